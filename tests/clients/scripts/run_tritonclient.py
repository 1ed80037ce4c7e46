"""Triton's clients with the dependencies that they ask for: run_tritonclient.py URL GRPC_ADDRESS IMAGE."""

import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http

PIXELS = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0))])


def test(module, address: str, image: bytes) -> None:
    with module.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("colours", "7")
        pixels = module.InferInput("images", list(PIXELS.shape), "UINT8")
        pixels.set_data_from_numpy(PIXELS)
        result = client.infer(
            "colours", [pixels], outputs=[module.InferRequestedOutput("probabilities", class_count=1)]
        )
        ranked = [text.decode().split(":")[1:] for text in result.as_numpy("probabilities").reshape(-1)]
        assert ranked == [["0", "red"], ["1", "green"]], ranked
        files = module.InferInput("image_bytes", [1], "BYTES")
        files.set_data_from_numpy(np.array([image], np.object_))
        assert client.infer("colours", [files]).as_numpy("label").tolist() == [b"blue"]


if __name__ == "__main__":
    test(tritonclient.http, sys.argv[1].removeprefix("http://"), Path(sys.argv[3]).read_bytes())
    test(tritonclient.grpc, sys.argv[2], Path(sys.argv[3]).read_bytes())
