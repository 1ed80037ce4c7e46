"""MLServer's codecs, over HTTP and gRPC: run_mlserver.py URL GRPC_ADDRESS IMAGE."""

import sys
import urllib.request
from pathlib import Path

import grpc
import numpy as np
from mlserver.codecs import Base64Codec, NumpyCodec, NumpyRequestCodec, StringCodec
from mlserver.grpc import converters
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
from mlserver.types import InferenceRequest, InferenceResponse, RequestOutput

PIXELS = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0))])


def check(response: InferenceResponse, labels: list) -> None:
    assert (response.model_name, response.model_version) == ("colours", "7")
    outputs = {output.name: output for output in response.outputs}
    assert StringCodec.decode_output(outputs["label"]) == labels
    if "probabilities" in outputs:
        probabilities = NumpyCodec.decode_output(outputs["probabilities"])
        assert probabilities.shape == (len(labels), 3)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


def make_requests(image: bytes, *, use_bytes: bool) -> list:
    """Return requests, each with the labels of its response."""
    pixels = InferenceRequest(inputs=[NumpyCodec.encode_input("images", PIXELS)])
    one = NumpyRequestCodec.encode_request(PIXELS[1:])  # names its input itself
    one.inputs[0].name = "images"
    encoded = InferenceRequest(
        inputs=[Base64Codec.encode_input("image_bytes", [image], use_bytes=use_bytes)],
        outputs=[RequestOutput(name="label")],
    )
    assert (encoded.inputs[0].shape, encoded.inputs[0].parameters.content_type) == ([1, 1], "base64")
    return [(pixels, ["red", "green"]), (one, ["green"]), (encoded, ["blue"])]


def test_rest(url: str, image: bytes) -> None:
    for request, labels in make_requests(image, use_bytes=False):  # JSON has text
        body = request.model_dump_json(exclude_none=True)
        with urllib.request.urlopen(url + "/v2/models/colours/infer", body.encode(), timeout=60) as response:
            check(InferenceResponse.model_validate_json(response.read()), labels)


def test_grpc(address: str, image: bytes) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for raw in (False, True):
            for request, labels in make_requests(image, use_bytes=True):
                message = converters.ModelInferRequestConverter.from_types(request, "colours", use_raw=raw)
                response = stub.ModelInfer(message, timeout=60)
                check(converters.ModelInferResponseConverter.to_types(response), labels)


if __name__ == "__main__":
    test_rest(sys.argv[1], Path(sys.argv[3]).read_bytes())
    test_grpc(sys.argv[2], Path(sys.argv[3]).read_bytes())
