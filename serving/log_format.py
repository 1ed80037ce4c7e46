"""The formats of log lines. Control characters are escaped: no request can begin a line or write to a terminal."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Any

import orjson
from typing_extensions import override

from serving.quoting import printable
from serving.request_context import current_request
from serving.request_log import RequestLine

LOG_FORMATS = ("text", "json")

# Of Unicode, what ends a line or controls a terminal.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class TextFormatter(logging.Formatter):
    """One line a record, and the indented lines of its exception; `worker` is the number of a worker process."""

    def __init__(self, worker: int | None = None) -> None:
        process = "" if worker is None else f" [worker {worker}]"
        super().__init__(f"%(asctime)s %(levelname)s{process} %(name)s: %(message)s")

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if not isinstance(record.msg, RequestLine) and (request_id := current_request.get().request_id):
            line += f" (request {request_id})"
        return _escape(printable(line))

    @override
    def formatException(self, ei: logging._SysExcInfoType) -> str:
        return _indent(super().formatException(ei))

    @override
    def formatStack(self, stack_info: str) -> str:
        return _indent(stack_info)


class JsonFormatter(logging.Formatter):
    """One JSON object a record: `time` (UTC), `level`, `logger`, `message`, and the fields of a request.

    A worker process adds its number as `worker`.
    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._process: dict[str, Any] = {} if worker is None else {"worker": worker}

    @override
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        document = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._process,
        }
        if isinstance(record.msg, RequestLine):
            document |= {"message": "request", **record.msg.fields()}
        else:
            document["message"] = printable(record.getMessage())
            if request_id := current_request.get().request_id:
                document["request_id"] = request_id
            if record.exc_info:
                document["exception"] = printable(self.formatException(record.exc_info))
        try:
            line = orjson.dumps(document).decode()
        except TypeError:  # a name that is not valid Unicode
            line = orjson.dumps({key: printable(f"{value}") for key, value in document.items()}).decode()
        return line if line.isascii() and "\x7f" not in line else _CONTROL.sub(lambda c: f"\\u{ord(c[0]):04x}", line)


def make_formatter(log_format: str, *, worker: int | None = None) -> logging.Formatter:
    """Return the formatter of one of LOG_FORMATS, for a worker process with this number."""
    return JsonFormatter(worker) if log_format == "json" else TextFormatter(worker)


def _escape(text: str) -> str:
    return _CONTROL.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def _indent(text: str) -> str:
    return "\n".join(f"    {_escape(printable(line))}" for line in text.split("\n"))
