"""The subprocess that parses large JSON documents gives the results and errors of parsing in this process."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.api import json_process
from serving.api.json_process import ARRAY_BYTES, LARGE_JSON_BYTES, JsonProcess
from serving.api.open_inference.messages import parse as parse_infer
from serving.api.tensorflow_serving.messages import parse_examples, parse_predict
from serving.errors import InvalidRequest, ModelFailed, Overloaded, ServingError, TooLarge, UnreadableImages
from serving.greenlets import SMALL_BYTES
from serving.inference.signatures import Signature, TensorSpec
from serving.memory import MemoryBudget, RequestMemory
from serving.open_inference.requests import InferRequest
from serving.request_context import RequestContext, current_request

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[3]
PADDING = b" " * (LARGE_JSON_BYTES + 1)
MAX_ROWS = 1_000_000
TIMEOUT_S = 30.0


def spec(name: str, dtype: str, shape: tuple[int | None, ...] | None) -> TensorSpec:
    return TensorSpec(name, dtype, shape, f"{name}:0")


def signature(name: str, **inputs: TensorSpec) -> Signature:
    return Signature(name, "predict", inputs, {"y": spec("y", "DT_FLOAT", (None,))})


SIGNATURES: Mapping[str, Signature] = {
    "serving_default": signature("serving_default", x=spec("x", "DT_FLOAT", (None, None))),
    "strings": signature("strings", s=spec("s", "DT_STRING", None)),
    "both": signature("both", n=spec("n", "DT_INT64", (None,)), s=spec("s", "DT_STRING", (None,))),
}


@pytest.fixture(scope="module")
def process() -> Iterator[JsonProcess]:
    process = JsonProcess()
    yield process
    process._end()


def pid_of(process: JsonProcess) -> int | None:
    return None if process._process is None else process._process.pid


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns or raises, in a form that can be compared."""
    try:
        result = function(*args)
    except ServingError as error:
        return type(error), str(error), error.status, error.code, error.body()
    if result is None or isinstance(result, str):
        return result
    inputs = {name: (array.dtype, array.shape, repr(array.ravel().tolist())) for name, array in result.inputs.items()}
    rest = (result.identifier, result.outputs) if isinstance(result, InferRequest) else (result.as_rows,)
    return result.signature, inputs, rest


def v1(document: Any, name: str = "") -> bytes:
    return json.dumps({**({"signature_name": name} if name else {}), **document}).encode()


def strings(*values: Any) -> bytes:
    return v1({"inputs": list(values)}, "strings")


V1_DOCUMENTS = {
    "numbers": v1({"instances": [[1, 2.5], [3, -4]]}),
    "NaN": b'{"instances":[[NaN,-Infinity]]}',
    "columns": v1({"inputs": {"n": [1, 2], "s": ["a", "b"]}}, "both"),
    "rows of two inputs": v1({"instances": [{"n": 1, "s": "a"}, {"n": 2, "s": ""}]}, "both"),
    "a string": v1({"inputs": "alone"}, "strings"),
    "strings": strings("", "a", "\N{GRINNING FACE}", "", "\u00e9" * 300),
    "empty strings": strings(*[""] * 1000),
    "nested strings": strings([["a", "bc"], ["", "def"]], [["g", ""], ["h", "i"]]),
    "no strings": v1({"inputs": []}, "strings"),
    "empty lists": v1({"inputs": [[], []]}, "strings"),
    "base64": strings({"b64": "AAEC/w=="}, {"b64": ""}),
    "string with a null byte": strings("a\0b"),
    "string that is not UTF-8": b'{"signature_name":"strings","inputs":["\xff\xfe","\xe9"]}',
    "repeated key": b'{"instances":[[1]],"instances":[[2]]}',
    "too deep": b'{"instances":' + b"[" * 400 + b"]" * 400 + b"}",
    "invalid JSON": b'{"instances":[[1,]]}',
    "trailing text": b'{"instances":[[1]]} x',
    "not an object": b"[1, 2]",
    "ragged": v1({"instances": [[1, 2], [3]]}),
    "wrong type": v1({"instances": [["one"]]}),
    "a lone surrogate": b'{"instances":["\\ud800"]}',
    "a large number": v1({"instances": [[10**400]]}),
    "unknown signature": v1({"instances": [[1]]}, "\u00fcnknown"),
    "neither instances nor inputs": b"{}",
    "too many rows": v1({"instances": [0] * (MAX_ROWS + 1)}),
}


@pytest.mark.parametrize("name", V1_DOCUMENTS)
def test_the_subprocess_parses_predict_requests_alike(process: JsonProcess, name: str) -> None:
    body = V1_DOCUMENTS[name] + PADDING
    expected = outcome(parse_predict, body, SIGNATURES, MAX_ROWS)
    assert outcome(process.parse, parse_predict, body, SIGNATURES, MAX_ROWS) == expected
    if name == "too many rows":
        assert expected[0] is TooLarge


def test_the_document_for_an_unknown_model_is_checked(process: JsonProcess) -> None:
    assert process.parse(parse_predict, b'{"instances":[]}' + PADDING, None, MAX_ROWS) is None
    with pytest.raises(InvalidRequest, match="JSON Parse error"):
        process.parse(parse_predict, b'{"instances":[}' + PADDING, None, MAX_ROWS)


@pytest.mark.parametrize("document", [b'{"examples":[{"x":1}],"signature_name":"s"}', b'{"examples":1}', b"{}"])
def test_the_subprocess_parses_classify_requests_alike(process: JsonProcess, document: bytes) -> None:
    assert outcome(process.parse, parse_examples, document + PADDING) == outcome(parse_examples, document + PADDING)


def v2_tensor(name: str, datatype: str, shape: list[int], **rest: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **rest}


def v2(tensors: list[Any], name: str = "serving_default", **rest: Any) -> bytes:
    return json.dumps({"inputs": tensors, "parameters": {"signature_name": name}, **rest}).encode()


V2_DOCUMENTS = {
    "numbers": v2([v2_tensor("x", "FP32", [2, 2], data=[1, 2, 3, 4.5])], id="7"),
    "strings": v2([v2_tensor("s", "BYTES", [2, 2], data=["", "a", "\N{GRINNING FACE}", "b"])], "strings"),
    "no strings": v2([v2_tensor("s", "BYTES", [0], data=[])], "strings"),
    "two inputs": v2([v2_tensor("n", "INT64", [1], data=[2**53]), v2_tensor("s", "BYTES", [1], data=["x"])], "both"),
    "outputs": v2([v2_tensor("x", "FP32", [1, 1], data=[1])], outputs=[{"name": "y", "parameters": {}}]),
    "wrong shape": v2([v2_tensor("x", "FP32", [3, 2], data=[1])]),
    "wrong datatype": v2([v2_tensor("x", "INT8", [1, 1], data=[1])]),
    "repeated input": v2([v2_tensor("x", "FP32", [1, 1], data=[1])] * 2),
    "unknown signature": v2([], "\u00fcnknown"),
    "invalid JSON": b'{"inputs": [',
    "not an object": b"[]",
    "not UTF-8": b'{"inputs": "\xff"}',
    "a lone surrogate": b'{"inputs": "\\ud800"}',
}


@pytest.mark.parametrize("name", V2_DOCUMENTS)
def test_the_subprocess_parses_inference_requests_alike(process: JsonProcess, name: str) -> None:
    body = V2_DOCUMENTS[name] + PADDING
    expected = outcome(parse_infer, body, len(body), "m", SIGNATURES)
    assert outcome(process.parse, parse_infer, body, len(body), "m", SIGNATURES) == expected


def test_binary_tensors_after_a_large_document_are_returned_intact(process: JsonProcess) -> None:
    pixels = np.arange(600_000, dtype=np.float32)
    text = v2([v2_tensor("x", "FP32", [2, 300_000], parameters={"binary_data_size": pixels.nbytes})]) + PADDING
    body = text + pixels.tobytes()
    read = process.parse(parse_infer, body, len(text), "m", SIGNATURES)
    assert read.inputs["x"].shape == (2, 300_000)
    assert (read.inputs["x"].ravel() == pixels).all()
    short = outcome(parse_infer, body[:-4], len(text), "m", SIGNATURES)
    assert outcome(process.parse, parse_infer, body[:-4], len(text), "m", SIGNATURES) == short
    assert short[0] is InvalidRequest


def test_large_arrays_are_returned_intact(process: JsonProcess) -> None:
    numbers = process.parse(parse_predict, v1({"instances": [list(range(400_000))] * 2}), SIGNATURES, MAX_ROWS)
    assert numbers
    assert (numbers.inputs["x"] == np.arange(400_000, dtype=np.float32)).all()
    values = [str(number % 1_000) * (number % 3) for number in range(400_000)]
    read = process.parse(parse_predict, strings(*values), SIGNATURES, MAX_ROWS)
    assert read
    assert read.inputs["s"].tolist() == [value.encode() for value in values]


def test_small_documents_start_no_subprocess() -> None:
    process = JsonProcess()
    assert process.parse(parse_predict, V1_DOCUMENTS["numbers"], SIGNATURES, MAX_ROWS) is not None
    assert process.parse(parse_predict, V1_DOCUMENTS["numbers"] + b" " * 500_000, SIGNATURES, MAX_ROWS) is not None
    assert pid_of(process) is None


# Stand-ins for parsers, called in the subprocess


def sleep(_: bytes, seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def fail(_: bytes) -> str:
    raise RuntimeError("secret")


def exhaust_memory(_: bytes) -> str:
    raise MemoryError


def die(_: bytes) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def return_pid(_: bytes) -> str:
    return str(os.getpid())


@pytest.fixture
def context() -> Iterator[Callable[..., None]]:
    """Sets the current request's context for the test."""
    tokens = []

    def set_context(**fields: Any) -> None:
        tokens.append(current_request.set(RequestContext(**fields)))

    yield set_context
    for token in reversed(tokens):
        current_request.reset(token)


def assert_works(process: JsonProcess) -> None:
    read = process.parse(parse_predict, V1_DOCUMENTS["numbers"] + PADDING, SIGNATURES, MAX_ROWS)
    assert read
    assert read.inputs["x"].tolist() == [[1, 2.5], [3, -4]]


def test_the_subprocess_is_reused(process: JsonProcess) -> None:
    assert process.parse(return_pid, PADDING) == process.parse(return_pid, PADDING) == str(pid_of(process))


@pytest.mark.parametrize("parser", [fail, exhaust_memory])
def test_an_unexpected_error_hides_its_details_and_keeps_the_subprocess(
    process: JsonProcess, parser: Callable[[bytes], str]
) -> None:
    before = process.parse(return_pid, PADDING)
    with pytest.raises(ServingError, match="could not be parsed") as error:
        process.parse(parser, PADDING)
    assert error.value.status == 500
    assert "secret" not in str(error.value)
    assert process.parse(return_pid, PADDING) == before


def test_a_subprocess_killed_while_parsing_causes_one_503(process: JsonProcess) -> None:
    with pytest.raises(Overloaded, match="could not be parsed") as error:
        process.parse(die, PADDING)
    assert (error.value.status, error.value.retry_after_s) == (503, 1)
    assert_works(process)


def test_a_subprocess_killed_while_idle_is_restarted(process: JsonProcess) -> None:
    pid = int(process.parse(return_pid, PADDING))
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until all its threads have exited
    assert_works(process)
    assert pid_of(process) != pid


def test_the_deadline_stops_parsing(process: JsonProcess, context: Callable[..., None]) -> None:
    pid = int(process.parse(return_pid, PADDING))
    started_s = time.monotonic()
    context(deadline_s=started_s + 0.5)
    with pytest.raises(ModelFailed, match="deadline") as error:
        process.parse(sleep, PADDING, 60.0)
    assert error.value.status == 504
    assert time.monotonic() - started_s < 10
    wait_until(lambda: not is_running(pid))
    context()
    assert_works(process)


def test_a_client_disconnect_stops_parsing(process: JsonProcess, context: Callable[..., None]) -> None:
    pid = int(process.parse(return_pid, PADDING))
    disconnects_s = time.monotonic() + 0.3
    context(client_disconnected=lambda: time.monotonic() > disconnects_s)
    with pytest.raises(ModelFailed, match="disconnected"):
        process.parse(sleep, PADDING, 60.0)
    wait_until(lambda: not is_running(pid))
    context()
    assert_works(process)


def freeze(_: bytes) -> str:
    os.kill(os.getpid(), signal.SIGSTOP)
    return "never"


def freeze_while_responding(_: bytes) -> str:
    os.write(1, struct.pack("<QQ", 1, 1_000) + b"part")
    os.kill(os.getpid(), signal.SIGSTOP)
    return "never"


def return_long_result(_: bytes) -> bytes:
    return bytes(10_000_000)


@pytest.mark.parametrize("parser", [freeze, freeze_while_responding])
def test_a_frozen_subprocess_is_restarted_at_the_deadline(
    process: JsonProcess, context: Callable[..., None], parser: Callable[[bytes], str]
) -> None:
    pid = int(process.parse(return_pid, PADDING))
    context(deadline_s=time.monotonic() + 0.5)
    with pytest.raises(ModelFailed, match="deadline") as error:
        process.parse(parser, PADDING)
    assert error.value.status == 504
    wait_until(lambda: not is_running(pid))
    assert process._queue.used == 0
    context()
    assert_works(process)


@pytest.mark.parametrize("has_deadline", [True, False])
def test_a_subprocess_that_does_not_read_is_restarted_at_the_deadline(
    process: JsonProcess, monkeypatch: pytest.MonkeyPatch, has_deadline: bool
) -> None:
    pid = int(process.parse(return_pid, PADDING))
    monkeypatch.setattr(json_process, "PARSE_TIMEOUT_S", 0.5)
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        deadline = {"deadline_s": time.monotonic() + 0.5} if has_deadline else {}
        frozen = threads.submit(parse_in, process, 0.0, **deadline)
        wait_until(lambda: process._queue.used == 1)
        patient = threads.submit(parse_in, process, 0.0, deadline_s=time.monotonic() + TIMEOUT_S)
        with pytest.raises(ModelFailed, match="deadline"):
            frozen.result()
        assert patient.result() == "slept"
    assert not is_running(pid)


def test_a_client_disconnect_releases_a_frozen_subprocess(process: JsonProcess, context: Callable[..., None]) -> None:
    os.kill(int(process.parse(return_pid, PADDING)), signal.SIGSTOP)
    disconnects_s = time.monotonic() + 0.3
    context(client_disconnected=lambda: time.monotonic() > disconnects_s)
    with pytest.raises(ModelFailed, match="disconnected"):
        process.parse(return_pid, PADDING)
    context()
    assert_works(process)


def test_pipes_with_file_descriptors_above_1023_work() -> None:
    process = JsonProcess()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 1_200:
        pytest.skip("the hard limit on open files is below 1,200")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 1_200), limits[1]))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1_030)]
    try:
        assert_works(process)
    finally:
        process._end()
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_long_result_is_returned_intact(process: JsonProcess) -> None:
    assert process.parse(return_long_result, PADDING) == bytes(10_000_000)


def test_errors_keep_their_attributes(process: JsonProcess) -> None:
    before = process.parse(return_pid, PADDING)
    with pytest.raises(UnreadableImages) as unreadable:
        process.parse(refuse_images, PADDING)
    assert unreadable.value.body() == refusal_of_images().body()
    with pytest.raises(ModelFailed) as failed:
        process.parse(refuse_model, PADDING)
    assert (failed.value.status, failed.value.code, failed.value.retry_after_s) == (503, "UNAVAILABLE", 1)
    assert process.parse(return_pid, PADDING) == before


def refusal_of_images() -> UnreadableImages:
    return UnreadableImages([{"index": 0, "file": None, "error": "empty"}], image_count=1)


def refuse_images(_: bytes) -> str:
    raise refusal_of_images()


def refuse_model(_: bytes) -> str:
    raise ModelFailed("gone", code="UNAVAILABLE")


def parse_in(process: JsonProcess, seconds: float, **fields: Any) -> str:
    current_request.set(RequestContext(**fields))
    return process.parse(sleep, PADDING, seconds)


def test_documents_are_queued_until_their_deadline(process: JsonProcess) -> None:
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(parse_in, process, 1.0)
        wait_until(lambda: process._queue.used == 1)
        late = threads.submit(parse_in, process, 0.0, deadline_s=time.monotonic() + 0.1)
        patient = threads.submit(parse_in, process, 0.0, deadline_s=time.monotonic() + TIMEOUT_S)
        with pytest.raises(Overloaded, match="JSON parser for large documents"):
            late.result()
        assert not first.done()
        assert first.result() == patient.result() == "slept"
    assert process._queue.used == 0


def test_a_client_disconnect_while_queued_skips_the_document(process: JsonProcess) -> None:
    before = process.parse(return_pid, PADDING)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(parse_in, process, 0.5)
        wait_until(lambda: process._queue.used == 1)
        gone = threads.submit(parse_in, process, 60.0, client_disconnected=lambda: True)
        with pytest.raises(ModelFailed, match="disconnected"):
            gone.result()
        assert first.result() == "slept"
    assert process.parse(return_pid, PADDING) == before


@pytest.mark.parametrize("size", [1_000, 300_000, LARGE_JSON_BYTES + 1])
def test_memory_is_reserved_before_parsing(process: JsonProcess, context: Callable[..., None], size: int) -> None:
    budget = MemoryBudget(1_000_000_000)
    memory = RequestMemory(budget)
    context(memory=memory)
    body = b'{"instances":[[1]]}'.ljust(size)
    process.parse(parse_predict, body, SIGNATURES, MAX_ROWS)
    # For a large document, the memory of its arrays stays reserved.
    held = ARRAY_BYTES * len(body) if size > SMALL_BYTES else 0
    assert budget.used_bytes == memory.held_bytes == held
    memory.release()


def test_a_document_larger_than_the_memory_budget_is_refused_before_parsing(
    process: JsonProcess, context: Callable[..., None]
) -> None:
    context(memory=RequestMemory(MemoryBudget(100_000_000)))
    with pytest.raises(TooLarge):
        process.parse(die, b"[]," * 500_000)
    context()
    assert_works(process)


START = """
import time
from serving.api.json_process import JsonProcess
from tests.serving.api.test_json_process import PADDING, sleep, return_pid
process = JsonProcess()
print(process.parse(return_pid, PADDING), flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["time.sleep(60)", "process.parse(sleep, PADDING, 1.0)"], ids=["idle", "parsing"])
def test_the_subprocess_exits_when_the_service_is_killed(then: str) -> None:
    service = subprocess.Popen([sys.executable, "-c", START.format(then=then)], cwd=PROJECT, stdout=subprocess.PIPE)
    assert service.stdout
    pid = int(service.stdout.readline())
    time.sleep(0.2)
    assert is_running(pid)
    service.kill()
    service.wait()
    wait_until(lambda: not is_running(pid))
