"""The client generated from the protocol's description: run_open_inference_openapi.py URL GRPC_ADDRESS IMAGE."""

import asyncio
import base64
import sys
from pathlib import Path

from open_inference.openapi.client import AsyncOpenInferenceClient, OpenInferenceClient
from open_inference.openapi.core.api_error import ApiError
from open_inference.openapi.types import InferenceRequest, RequestInput, RequestOutput

RED = InferenceRequest(
    id="r1", inputs=[RequestInput(name="images", shape=[1, 32, 32, 3], datatype="UINT8", data=[255, 0, 0] * 1024)]
)


def check(response, label: str) -> None:
    assert (response.model_name, response.model_version) == ("colours", "7")
    outputs = {output.name: output.data for output in response.outputs}
    assert outputs["label"].__root__ == [label], outputs


def test_sync(url: str, image: bytes) -> None:
    client = OpenInferenceClient(base_url=url)
    client.check_server_liveness()
    client.check_server_readiness()
    client.check_model_readiness("colours")
    client.check_model_version_readiness("colours", "7")
    assert client.read_server_metadata().name
    for metadata in (client.read_model_metadata("colours"), client.read_model_version_metadata("colours", "7")):
        assert (metadata.name, metadata.versions) == ("colours", ["7"])
        assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in metadata.inputs] == [
            ("images", "UINT8", [-1, 32, 32, 3])
        ]
        assert {tensor.name for tensor in metadata.outputs} == {"probabilities", "class_id", "label"}
    response = client.model_infer("colours", request=RED)
    assert response.id == "r1"
    check(response, "red")
    encoded = RequestInput(
        name="image_bytes",
        shape=[1, 1],
        datatype="BYTES",
        parameters={"content_type": "base64"},
        data=[base64.b64encode(image).decode()],
    )
    request = InferenceRequest(inputs=[encoded], outputs=[RequestOutput(name="label")])
    check(client.model_version_infer("colours", "7", request=request), "blue")
    for call in (client.check_model_readiness, client.read_model_metadata):
        try:
            call("unknown")
        except ApiError as error:
            assert error.status_code == 404, error
        else:
            raise AssertionError("an unknown model is an error")


async def test_async(url: str) -> None:
    client = AsyncOpenInferenceClient(base_url=url)
    await client.check_server_readiness()
    for response in await asyncio.gather(*(client.model_infer("colours", request=RED) for _ in range(5))):
        check(response, "red")


if __name__ == "__main__":
    test_sync(sys.argv[1], Path(sys.argv[3]).read_bytes())
    asyncio.run(test_async(sys.argv[1]))
