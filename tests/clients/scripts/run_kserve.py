"""KServe's own clients, for REST with the protocols v1 and v2 and for gRPC: run_kserve.py URL GRPC_ADDRESS IMAGE."""

import asyncio
import base64
import sys
from pathlib import Path

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

PIXELS = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0))])


def pixel_request(*, binary: bool) -> InferRequest:
    tensor = InferInput("images", list(PIXELS.shape), "UINT8")
    tensor.set_data_from_numpy(PIXELS, binary_data=binary)
    return InferRequest("colours", [tensor], request_id="r1")


def image_request(image: bytes) -> InferRequest:
    tensor = InferInput("image_bytes", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([image], np.object_), binary_data=True)
    return InferRequest("colours", [tensor], request_outputs=[RequestedOutput("label"), RequestedOutput("class_id")])


def outputs_of(response) -> dict:
    assert response.model_name == "colours"
    assert response.model_version in ("7", None)  # the REST client does not read it
    return {output.name: output.as_numpy() for output in response.outputs}


def texts(labels) -> list:
    return [label.decode() if isinstance(label, bytes) else label for label in labels.reshape(-1).tolist()]


async def test_rest_v1(url: str, image: bytes) -> None:
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        instances = [{"b64": base64.b64encode(image).decode()}]
        body = {"instances": instances, "signature_name": "image_bytes"}
        response = await client.infer(url, body, model_name="colours")
        assert response["predictions"][0]["label"] == "blue", response
        response = await client.infer(url, {"instances": PIXELS.tolist()}, model_name="colours")
        assert [row["label"] for row in response["predictions"]] == ["red", "green"], response
        try:
            await client.infer(url, body, model_name="unknown")
        except httpx.HTTPStatusError as error:
            assert error.response.status_code == 404
        else:
            raise AssertionError("an unknown model is an error")


async def test_rest_v2(url: str, image: bytes) -> None:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(url) is True
        assert await client.is_server_ready(url) is True
        assert await client.is_model_ready(url, "colours")
        assert not await client.is_model_ready(url, "unknown")
        for binary in (True, False):
            response = await client.infer(url, pixel_request(binary=binary), model_name="colours")
            assert response.id == "r1"
            outputs = outputs_of(response)
            assert outputs["class_id"].tolist() == [0, 1]
            np.testing.assert_allclose(outputs["probabilities"].sum(axis=1), 1, rtol=1e-6)
            assert texts(outputs["label"]) == ["red", "green"]
        outputs = outputs_of(await client.infer(url, image_request(image), model_name="colours"))
        assert (texts(outputs["label"]), outputs["class_id"].tolist()) == (["blue"], [2])
        assert outputs.keys() == {"label", "class_id"}
        try:
            await client.infer(url, pixel_request(binary=True), model_name="unknown")
        except httpx.HTTPStatusError as error:
            assert "no model" in str(error)
        else:
            raise AssertionError("an unknown model is an error")


async def test_grpc(address: str, image: bytes) -> None:
    async with InferenceGRPCClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("colours")
        for binary in (True, False):  # raw and typed contents
            response = await client.infer(pixel_request(binary=binary))
            outputs = outputs_of(response)
            assert outputs["class_id"].tolist() == [0, 1]
            np.testing.assert_allclose(outputs["probabilities"].sum(axis=1), 1, rtol=1e-6)
            assert texts(outputs["label"]) == ["red", "green"]
        outputs = outputs_of(await client.infer(image_request(image)))
        assert texts(outputs["label"]) == ["blue"]
        request = InferRequest("unknown", [InferInput("x", [1], "FP32", [1.0])])
        try:
            await client.infer(request)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
        else:
            raise AssertionError("an unknown model is an error")


async def main(url: str, grpc_address: str, image: bytes) -> None:
    await test_rest_v1(url, image)
    await test_rest_v2(url, image)
    await test_grpc(grpc_address, image)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes()))
