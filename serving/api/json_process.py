"""Large JSON documents are parsed in a process of their own.

Parsing holds the interpreter's lock: 26 MB would stop every other request for 1.5 s. The process is started when the
first large document comes, parses one at a time, and ends when its standard input does, even if the service is killed.
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
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import numpy as np

from serving.api.json_cost import json_cost
from serving.errors import Overloaded, ServingError
from serving.greenlets import SMALL_BYTES, offload, run_blocking
from serving.memory import Pool
from serving.process_memory import return_freed_memory
from serving.request_context import RequestContext, current_request

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

ARRAY_BYTES = 4  # of the arrays that a document becomes, for each of its own

LARGE_JSON_BYTES = 1024 * 1024  # parsed within 60 ms; more is left to the process

PARSE_TIMEOUT_S = 30.0  # for a request without a deadline of its own

_LENGTH = struct.Struct("<Q")
_POLL_S = 0.25  # how often a deadline that has passed, and a client that has disconnected, is noticed
_NICENESS = 10  # whoever sends little comes first


class JsonProcess:
    """The process, and the order in which requests have it."""

    def __init__(self) -> None:
        self._turns = Pool("JSON parser for large documents", 1)
        self._process: subprocess.Popen[bytes] | None = None

    def parse(self, function: Callable[..., R], body: bytes, *args: Any, json_bytes: int | None = None) -> R:
        """Call a parser on a document: here if it is small, else where it keeps nobody waiting.

        Memory for the document's objects is reserved first.

        Args:
            function: a function of a module; called with `body` and `args`. What it raises comes back if it is a
                ServingError.
            body: the document.
            args: its other arguments, and like its result something that can be pickled.
            json_bytes: how much of the body, from its beginning, is JSON; None: all.

        Raises:
            TooLarge: there could never be enough memory for it.
            Overloaded: there was no memory or no turn for it before the deadline.
            ModelFailed: the client disconnected, or the deadline passed.
        """
        if len(body) <= SMALL_BYTES:
            return function(body, *args)  # one at a time, so its objects take little memory
        context = current_request.get()
        if context.deadline_s is None:
            context = replace(context, deadline_s=time.monotonic() + PARSE_TIMEOUT_S)
        with context.reserved(offload(json_cost, memoryview(body)[:json_bytes])):
            if len(body) <= LARGE_JSON_BYTES:
                result = offload(function, body, *args)
            else:
                with self._turns.reserve(1, deadline_s=context.deadline_s):
                    context.check()
                    kind, value = run_blocking(self._call, context, function, body, args)
                if kind == "error":
                    raise value
                result = value
        context.reserve(ARRAY_BYTES * len(body))
        return result

    def _call(
        self, context: RequestContext, function: Callable[..., object], body: bytes, args: tuple[Any, ...]
    ) -> tuple[str, Any]:
        """Have the process parse; kills it if the client disconnects or the deadline passes, whatever it does then."""
        process = self._running()
        assert process.stdin
        assert process.stdout
        writable, readable = _Pipe(process.stdin, context), _Pipe(process.stdout, context)
        try:
            _write(writable, [pickle.dumps((function, args)), body])
            answer, *buffers = _read(readable)
            reply: tuple[str, Any] = pickle.loads(answer, buffers=buffers)
        except (OSError, EOFError) as error:
            self._end()
            logger.error("the process that parses large JSON documents has ended")
            raise Overloaded("the document could not be parsed, as the parser ran out of memory; send less") from error
        except BaseException:
            self._end()
            raise
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            package = Path(__file__).parents[2]
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])},
                start_new_session=True,  # Ctrl-C is for the service, which ends it
            )
            for stream in (self._process.stdin, self._process.stdout):
                assert stream
                os.set_blocking(stream.fileno(), False)
        return self._process

    def _end(self) -> None:
        if self._process:
            self._process.kill()  # a stopped one too
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream:
                    stream.close()
            self._process = None


class _Pipe:
    """One end of a pipe to the process: reads and writes what it can, and waits while the request may."""

    def __init__(self, stream: Any, context: RequestContext) -> None:
        self._stream = stream  # not blocking
        self._context = context

    def write(self, data: bytes | memoryview) -> int:
        """Write some of it; returns how much."""
        return self._wait_for(select.POLLOUT, lambda: self._stream.write(data))

    def readinto(self, view: memoryview) -> int:
        """Fill some of it; returns how much, 0 at the end of the stream."""
        return self._wait_for(select.POLLIN, lambda: self._stream.readinto(view))

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def _wait_for(self, event: int, move: Callable[[], int | None]) -> int:
        """Wait until data can be moved, and return the number of bytes moved."""
        poll = select.poll()  # `select.select` knows no descriptors beyond 1,023
        poll.register(self._stream, event)
        while True:
            self._context.check()
            if poll.poll(_POLL_S * 1000) and (count := move()) is not None:
                return count


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Parse what comes until the end of the input."""
    os.nice(_NICENESS)
    while True:
        try:
            call, body = _read(requests)
        except EOFError:
            return
        function, args = pickle.loads(call)
        buffers: list[pickle.PickleBuffer] = []
        try:
            reply: tuple[str, Any] = ("result", function(bytes(body), *args))
        except ServingError as error:
            reply = ("error", error)
        except Exception as error:
            reply = ("error", ServingError(f"the document could not be parsed ({type(error).__name__})"))
        del body
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(reply)
        answer = stream.getvalue()
        del reply
        _write(replies, [answer, *(buffer.raw() for buffer in buffers)])
        buffers.clear()
        return_freed_memory()


class _Pickler(pickle.Pickler):
    """Packs strings together: to unpickle millions of them would hold the service's lock as parsing does."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, np.ndarray) or obj.dtype != np.object_:
            return NotImplemented
        elements = obj.ravel().tolist()
        lengths = np.fromiter(map(len, elements), np.int64, len(elements))
        return _unpack_strings, (np.cumsum(lengths), b"".join(elements), obj.shape)


def _unpack_strings(ends: np.ndarray, joined: bytes, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(ends), object)
    start = 0
    for index, end in enumerate(ends):
        array[index] = joined[start:end]
        start = end
    return array.reshape(shape)


def _write(stream: IO[bytes] | _Pipe, parts: list[Any]) -> None:
    _write_all(stream, _LENGTH.pack(len(parts)))
    for part in parts:
        _write_all(stream, _LENGTH.pack(len(part)))
        _write_all(stream, part)
    stream.flush()


def _write_all(stream: IO[bytes] | _Pipe, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _read(stream: IO[bytes] | _Pipe) -> list[bytearray]:
    (count,) = _LENGTH.unpack(_read_exactly(stream, _LENGTH.size))
    return [_read_exactly(stream, _LENGTH.unpack(_read_exactly(stream, _LENGTH.size))[0]) for _ in range(count)]


def _read_exactly(stream: IO[bytes] | _Pipe, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.readinto(view)  # type: ignore[union-attr]
        if not count:
            raise EOFError
        view = view[count:]
    return data


if __name__ == "__main__":
    # The module under its own name, so that what is pickled here and there is of the same classes.
    from serving.api import json_process

    json_process.serve(sys.stdin.buffer, sys.stdout.buffer)
