"""A small memory budget and the limits beside it: what never fits is refused, what fits later waits."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks import payloads
from benchmarks.hostile import GrpcCall, HttpCall, Outcome, Server, send, send_at_once
from benchmarks.service import Service
from serving.grpc.protos import open_inference_pb2

BUDGET_BYTES = 140_000_000
# What the process may take beyond the budget: caches of the allocator, threads, the model's own arrays.
OVERHEAD_MB = 150
AT_ONCE_S = 1.0
MEDIUM_PNG = payloads.make_png(3_500, 3_000)  # 32 MB as RGB, and more while it is resized
JSON = {"Content-Type": "application/json"}
PNG = {"Content-Type": "image/png"}

PREDICT = "/v1/models/colours:predict"
INFER = "/v2/models/colours/infer"
UPLOAD = "/predict?model=colours"
LIMITS = ("--max-rows", "100", "--max-image-side", "20000")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(colours, folder / "colours" / "7")
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("budget") / "log"
    with Service(models, log, "--memory-budget", str(BUDGET_BYTES), "--max-request-bytes", "400000000") as service:
        yield service


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Service]:
    with Service(models, tmp_path_factory.mktemp("limits") / "log", *LIMITS) as service:
        yield service


def server_of(service: Service) -> Server:
    return Server(service.url, service.grpc_address, "colours")


def ask(service: Service, call: HttpCall | GrpcCall) -> Outcome:
    return send(server_of(service), call)


def upload(image: bytes) -> HttpCall:
    return HttpCall(UPLOAD, image, PNG)


def infer(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> GrpcCall:
    request = open_inference_pb2.ModelInferRequest(model_name="colours", raw_input_contents=[raw])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    return GrpcCall(request.SerializeToString(), method="/inference.GRPCInferenceService/ModelInfer")


def every_way(images: Sequence[bytes]) -> dict[str, HttpCall | GrpcCall]:
    headers, form = payloads.make_form(images)
    return {
        "form": HttpCall(UPLOAD, form, headers),
        "base64": HttpCall(PREDICT, payloads.make_b64_json(images), JSON),
        "gRPC": GrpcCall(payloads.make_files_message("colours", images)),
        "v2 gRPC": infer(
            "image_bytes", "BYTES", [len(images)], b"".join(struct.pack("<I", len(image)) + image for image in images)
        ),
    }


@pytest.mark.parametrize("way", ["form", "base64", "gRPC", "v2 gRPC"])
def test_an_image_that_never_fits_is_refused_at_once(service: Service, way: str) -> None:
    # 50 megapixels: 150 MB as RGB, and within --max-image-pixels.
    outcome = ask(service, every_way([payloads.make_giant_png()])[way])
    assert outcome.status in ("413", "RESOURCE_EXHAUSTED"), outcome
    assert outcome.seconds < AT_ONCE_S, outcome


def test_a_body_that_never_fits_is_refused_before_it_is_sent(service: Service) -> None:
    address = server_of(service).http_address
    with socket.create_connection(address, timeout=10) as connection:
        head = f"POST {UPLOAD} HTTP/1.1\r\nHost: service\r\nContent-Type: image/png\r\n"
        head += "Content-Length: 390000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_a_json_document_that_never_fits_is_refused_at_once(service: Service) -> None:
    # 60 MB of empty lists are 20 million objects of 56 bytes and more.
    body = payloads.compress(payloads.make_v1_json(payloads.repeat_element(b"[],", 60_000_000)))
    outcome = ask(service, HttpCall(PREDICT, body, {**JSON, "Content-Encoding": "gzip"}))
    assert outcome.status == "413", outcome
    assert outcome.seconds < AT_ONCE_S, outcome


def test_images_that_fit_one_after_another_are_all_served_in_bounded_memory(service: Service) -> None:
    calls = [upload(MEDIUM_PNG)] * 16
    before_mb = service.resident_mb()
    service.reset_peak()
    outcomes = send_at_once(server_of(service), calls)
    assert [outcome.status for outcome in outcomes] == ["200"] * 16, outcomes
    peak_mb = service.peak_mb()
    assert peak_mb - before_mb < BUDGET_BYTES / 2**20 + OVERHEAD_MB, f"{before_mb:.0f} MB before, {peak_mb:.0f} at most"


def hold_the_budget(service: Service, stack: ExitStack) -> None:
    """Begin an upload of 80 MB, and leave the last byte unsent."""
    connection = stack.enter_context(socket.create_connection(server_of(service).http_address, timeout=10))
    connection.sendall(
        b"POST /predict HTTP/1.1\r\nHost: service\r\nContent-Type: image/png\r\nContent-Length: 80000000\r\n\r\n"
    )
    connection.sendall(bytes(79_999_999))
    time.sleep(0.2)  # until the last bytes on the way are read


def test_waiting_for_the_budget_ends_at_the_deadline_with_503_and_small_requests_are_served(service: Service) -> None:
    with ExitStack() as stack:
        hold_the_budget(service, stack)
        headers = {**PNG, "X-Request-Timeout-S": "0.5"}
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(httpx.post, service.url + UPLOAD, content=MEDIUM_PNG, headers=headers, timeout=30)
            started_s = time.monotonic()
            small = ask(service, upload(payloads.make_small_image()))
            assert small.status == "200", small
            assert small.seconds < 0.4, f"waited with the large one: {small}"
            late = waiting.result()
        waited_s = time.monotonic() - started_s
        assert late.status_code == 503, late.text
        assert int(late.headers["Retry-After"]) >= 0
        assert waited_s < 2, f"the deadline was 0.5 s, the response came after {waited_s:.1f} s"
    # The uploads have ended, and with them their share.
    again = ask(service, upload(MEDIUM_PNG))
    assert again.status == "200", again


def test_over_grpc_waiting_for_the_budget_ends_at_the_deadline(service: Service) -> None:
    grpc = pytest.importorskip("grpc")
    message = payloads.make_files_message("colours", [payloads.make_png(2_000, 2_000)])
    with ExitStack() as stack:
        hold_the_budget(service, stack)
        channel = stack.enter_context(grpc.insecure_channel(service.grpc_address))
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        started_s = time.monotonic()
        with pytest.raises(grpc.RpcError) as error:
            call(message, timeout=1)
        assert error.value.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        assert time.monotonic() - started_s < 2


def test_binary_tensors_and_files_of_megabytes_are_served(limited: Service) -> None:
    rows = 100
    tensor = {"name": "images", "datatype": "UINT8", "shape": [rows, 32, 32, 3]}
    pixels = np.random.default_rng(0).integers(0, 256, rows * 32 * 32 * 3, np.uint8).tobytes()
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(pixels)}}]}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    # The JSON in front of the tensors is small; what follows it is none.
    assert ask(limited, HttpCall(INFER, head + pixels, headers)).status == "200"
    form_headers, form = payloads.make_form([payloads.make_photo(2_000, 1_500)] * 4, kind="image/jpeg")
    assert len(form) > 1_000_000
    assert ask(limited, HttpCall(UPLOAD, form, form_headers)).status == "200"


@pytest.mark.parametrize("way", ["v1", "v1 base64", "v2", "gRPC", "gRPC files", "v2 gRPC"])
def test_rows_beyond_their_limit_are_refused(limited: Service, way: str) -> None:
    files = [payloads.make_small_image()] * 101
    strings = b"[" + b",".join([b'""'] * 101) + b"]"
    v1 = payloads.make_v1_json(strings, signature="image_bytes")
    v2 = payloads.make_v2_json(b"[" + b",".join([b"0"] * (101 * 32 * 32 * 3)) + b"]", (101, 32, 32, 3))
    calls: dict[str, HttpCall | GrpcCall] = {
        "v1": HttpCall(PREDICT, v1, JSON),
        "v1 base64": HttpCall(PREDICT, payloads.make_b64_json(files), JSON),
        "v2": HttpCall(INFER, v2, JSON),
        "gRPC": GrpcCall(payloads.make_pixel_message("colours", 101)),
        "gRPC files": GrpcCall(payloads.make_files_message("colours", files)),
        "v2 gRPC": infer("images", "UINT8", [101, 32, 32, 3], bytes(101 * 32 * 32 * 3)),
    }
    outcome = ask(limited, calls[way])
    assert outcome.status in ("400", "413", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), outcome
    assert "rows" in outcome.text, outcome
    assert "100" in outcome.text, outcome


def test_as_many_rows_as_the_limit_are_served(limited: Service) -> None:
    assert ask(limited, GrpcCall(payloads.make_pixel_message("colours", 100))).status == "OK"


@pytest.mark.parametrize("way", ["form", "base64", "gRPC"])
@pytest.mark.parametrize("size", [(20_001, 1), (1, 20_001)])
def test_an_image_with_too_long_a_side_is_refused(limited: Service, way: str, size: tuple[int, int]) -> None:
    outcome = ask(limited, every_way([payloads.make_png(*size)])[way])
    assert outcome.status in ("413", "400", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"), outcome
    assert "20,000" in outcome.text or "20000" in outcome.text, outcome


@pytest.mark.parametrize("way", ["form", "base64", "gRPC"])
def test_an_image_with_the_longest_side_is_served(limited: Service, way: str) -> None:
    assert ask(limited, every_way([payloads.make_png(20_000, 1)])[way]).status in ("200", "OK")


@pytest.mark.parametrize("way", ["form", "base64", "gRPC", "v2 gRPC"])
def test_a_jpeg_with_hundreds_of_scans_is_refused_before_it_is_decoded(limited: Service, way: str) -> None:
    outcome = ask(limited, every_way([payloads.make_scan_bomb()])[way])
    assert outcome.status in ("400", "413", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), outcome
    assert "scan" in outcome.text, outcome
    assert outcome.seconds < AT_ONCE_S, outcome


@pytest.mark.parametrize("way", ["form", "base64", "gRPC"])
def test_an_ordinary_progressive_jpeg_is_served(limited: Service, way: str) -> None:
    image = payloads.make_scan_bomb(200, 0)
    assert ask(limited, every_way([image])[way]).status in ("200", "OK")


@pytest.mark.parametrize("option", ["--memory-budget", "--max-image-side", "--max-rows"])
def test_a_limit_of_nothing_is_refused(models: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(RuntimeError) as error, Service(models, tmp_path / "log", option, "0"):
        pass
    assert option in str(error.value).partition("did not get ready:")[2]
    assert "No such option" not in str(error.value)


def test_the_budget_can_be_set_in_the_environment(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVING_MEMORY_BUDGET", "100000000")
    with Service(models, tmp_path / "log") as service:
        outcome = ask(service, upload(payloads.make_png(7_000, 7_100)))
    assert outcome.status == "413", outcome
