"""Parses large JSON documents in a subprocess, because parsing holds the GIL.

In this process, 26 MB would block all other requests for 1.5 s. The subprocess starts with the first large document,
parses one document at a time, and exits when its standard input closes, even if the service is killed.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from serving.api.json_cost import json_cost
from serving.errors import Overloaded, ServingError
from serving.greenlets import SMALL_BYTES, offload, run_blocking
from serving.memory import Pool
from serving.process_memory import return_freed_memory
from serving.request_context import RequestContext, current_request

R = TypeVar("R")

logger = logging.getLogger(__name__)

ARRAY_BYTES = 4  # of the parsed arrays, per byte of the document

LARGE_JSON_BYTES = 1024 * 1024  # parsed within 60 ms; larger documents go to the subprocess

PARSE_TIMEOUT_S = 30.0  # for requests without a deadline

_POLL_S = 0.25  # interval of the checks for the deadline and for a client disconnect
_NICENESS = 10  # small requests have priority


class JsonProcess:
    """Owns the subprocess and the queue of the requests that wait for it."""

    def __init__(self) -> None:
        self._queue = Pool("JSON parser for large documents", 1, shed_reason="json_parser")
        self._process: subprocess.Popen[bytes] | None = None

    def parse(self, function: Callable[..., R], body: bytes, *args: Any, json_bytes: int | None = None) -> R:
        """Return `function(body, *args)`, called where it does not block other requests.

        A small document is parsed on this thread, a medium one in a worker thread, a large one in the subprocess.
        Memory for the parsed objects is reserved first. A ServingError of the function is raised here too.

        Args:
            function: a module-level function.
            body: the document.
            args: more arguments. They and the result must be picklable.
            json_bytes: the length of the JSON at the beginning of the body; None if all of it is JSON.

        Raises:
            TooLarge: the document needs more memory than the whole budget.
            Overloaded: no memory, or no parser, was free before the deadline; or the parser ran out of memory.
            ModelFailed: the client disconnected, or the deadline passed.
        """
        if len(body) <= SMALL_BYTES:
            return function(body, *args)  # on the event loop's thread, so only one at a time takes memory
        context = current_request.get()
        if context.deadline_s is None:
            context = replace(context, deadline_s=time.monotonic() + PARSE_TIMEOUT_S)
        with context.reserved(offload(json_cost, memoryview(body)[:json_bytes])):
            if len(body) <= LARGE_JSON_BYTES:
                result = offload(function, body, *args)
            else:
                with self._queue.reserve(1, deadline_s=context.deadline_s):
                    context.check()
                    result = run_blocking(self._call, context, function, body, args)
        context.reserve(ARRAY_BYTES * len(body))
        return result

    def _call(self, context: RequestContext, function: Callable[..., R], body: bytes, args: tuple[Any, ...]) -> R:
        """Parse in the subprocess; kill it if the client disconnects or the deadline passes."""
        process = self._ensure_running()
        try:
            _write(_Pipe(process.stdin, context), [pickle.dumps((function, args)), body])
            pickled, *buffers = _read(_Pipe(process.stdout, context))
            outcome: R | ServingError = pickle.loads(pickled, buffers=buffers)
        except (OSError, EOFError) as error:
            self._end()
            logger.error("the subprocess that parses large JSON documents exited unexpectedly")
            message = "the document could not be parsed: the parser ran out of memory; send smaller requests"
            raise Overloaded(message, shed_reason="memory") from error
        except BaseException:
            self._end()
            raise
        if isinstance(outcome, ServingError):
            raise outcome
        return outcome

    def _ensure_running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C goes to the service only, which then closes stdin
            )
        return self._process

    def _end(self) -> None:
        if self._process:
            with self._process:  # closes the pipes, and waits for the exit
                self._process.kill()  # SIGKILL also ends a stopped process
            self._process = None


class _Pipe:
    """A pipe to or from the subprocess; waits until the request's deadline or a client disconnect."""

    def __init__(self, stream: Any, context: RequestContext) -> None:
        os.set_blocking(stream.fileno(), False)
        self._stream = stream
        self._context = context

    def write(self, data: memoryview) -> int:
        """Write some of the data; returns the number of bytes written."""
        return self._wait_for(select.POLLOUT, lambda: self._stream.write(data))

    def readinto(self, view: memoryview) -> int:
        """Read into some of the view; returns the number of bytes read, 0 at the end of the stream."""
        return self._wait_for(select.POLLIN, lambda: self._stream.readinto(view))

    def _wait_for(self, event: int, transfer: Callable[[], int | None]) -> int:
        poll = select.poll()  # `select.select` fails for file descriptors above 1,023
        poll.register(self._stream, event)
        while True:
            self._context.check()
            if poll.poll(_POLL_S * 1000) and (count := transfer()) is not None:
                return count


def serve(requests: io.FileIO, responses: io.FileIO) -> None:
    """Parse documents until `requests` ends; the main loop of the subprocess."""
    os.nice(_NICENESS)
    while True:
        try:
            call, body = _read(requests)
        except EOFError:
            return
        function, args = pickle.loads(call)
        buffers: list[pickle.PickleBuffer] = []
        try:
            outcome = function(bytes(body), *args)
        except Exception as error:
            why = f"the document could not be parsed ({type(error).__name__})"
            outcome = error if isinstance(error, ServingError) else ServingError(why)
        del body
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(outcome)
        pickled = stream.getvalue()
        del outcome
        _write(responses, [pickled, *(buffer.raw() for buffer in buffers)])
        buffers.clear()
        return_freed_memory()


class _Pickler(pickle.Pickler):
    """Joins the strings of an array: unpickling millions of them one by one would hold the GIL like parsing."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, np.ndarray) or obj.dtype != np.object_:
            return NotImplemented
        elements = obj.ravel().tolist()
        lengths = np.fromiter(map(len, elements), np.int64, len(elements))
        return _unpack_strings, (np.cumsum(lengths), b"".join(elements), obj.shape)


def _unpack_strings(ends: np.ndarray, joined: bytes, shape: tuple[int, ...]) -> np.ndarray:
    strings = [joined[start:end] for start, end in pairwise([0, *ends.tolist()])]
    return np.array(strings, object).reshape(shape)


def _write(stream: io.FileIO | _Pipe, parts: list[Any]) -> None:
    """Write the number of parts, their lengths, and the parts."""
    for data in (struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts)), *parts):
        view = memoryview(data)
        while view:
            view = view[stream.write(view) :]


def _read(stream: io.FileIO | _Pipe) -> list[bytearray]:
    (count,) = struct.unpack("<Q", _read_exactly(stream, 8))
    return [_read_exactly(stream, size) for size in struct.unpack(f"<{count}Q", _read_exactly(stream, 8 * count))]


def _read_exactly(stream: io.FileIO | _Pipe, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


if __name__ == "__main__":
    # Imported under its own name, so that both processes pickle the same classes.
    from serving.api import json_process

    json_process.serve(io.FileIO(0, "rb"), io.FileIO(1, "wb"))
