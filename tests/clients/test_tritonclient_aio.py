"""Triton's asyncio clients, over HTTP and gRPC, against a running service."""

import asyncio

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

from tests.clients.service import pixels


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_asyncio_client(service, image_file, protocol):
    if protocol == "http":
        module, address, messages = http_aio, service.url.removeprefix("http://"), http_client
    else:
        module, address, messages = grpc_aio, service.grpc_address, grpc_client

    def tensor(name, array, datatype):
        made = messages.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array)
        return made

    async def use() -> None:
        async with module.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("colours")
            batches = [[(n + row) % 3 for row in range(n % 4 + 1)] for n in range(20)]
            calls = (client.infer("colours", [tensor("images", pixels(*batch), "UINT8")]) for batch in batches)
            for batch, result in zip(batches, await asyncio.gather(*calls), strict=True):
                assert result.as_numpy("class_id").tolist() == batch
            files = np.array([image_file.read_bytes()], np.object_)
            result = await client.infer("colours", [tensor("image_bytes", files, "BYTES")])
            assert result.as_numpy("label").tolist() == [b"blue"]
            with pytest.raises(InferenceServerException, match='no model "unknown"'):
                await client.infer("unknown", [tensor("images", pixels(0), "UINT8")])

    asyncio.run(use())
