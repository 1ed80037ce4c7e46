"""A small HTTP server with the service's routes, which a test can script to misbehave."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image
from werkzeug.exceptions import ClientDisconnected
from werkzeug.formparser import parse_form_data

COLOURS = ("red", "green", "blue")
MAX_IMAGES = 256
MAX_PIXELS = 1_000_000


@dataclass(frozen=True)
class Received:
    """A request; `connection` is the client's address, the same for all requests of a connection."""

    path: str
    query: dict[str, list[str]]
    headers: Message
    files: list[tuple[str, bytes]]
    connection: tuple[str, int]


@dataclass
class Service:
    """Classifies images by their dominant colour.

    `script` has functions that handle the next requests instead; `received` has all requests.
    """

    port: int = 0
    script: deque[Callable[[Handler], None]] = field(default_factory=deque)
    received: list[Received] | deque[Received] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    release: threading.Event = field(default_factory=threading.Event)
    max_images: int = MAX_IMAGES

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def batches(self) -> list[list[str]]:
        """The names of the files in each request."""
        return [[name for name, _ in request.files] for request in self.received]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    service: Service

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not report clients that disconnect."""
        if not isinstance(sys.exception(), (ConnectionError, ClientDisconnected)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        _, _, files = parse_form_data(
            {
                "wsgi.input": io.BytesIO(body),
                "CONTENT_LENGTH": str(length),
                "CONTENT_TYPE": self.headers["Content-Type"],
                "REQUEST_METHOD": "POST",
            }
        )
        images = [(file.filename or "", file.read()) for file in files.getlist("image")]
        if self._record(images):
            self.predict(images)

    def do_GET(self) -> None:
        if self._record([]):
            models = [{"name": "colours", "version": 7, "state": "AVAILABLE", "warmup_records": 0, "error": None}]
            self.respond(200, {"ready": True, "reason": None, "models": models})

    def _record(self, images: list[tuple[str, bytes]]) -> bool:
        """Record the request; return whether it is to be handled as usual."""
        service = self.server.service
        parts = urlsplit(self.path)
        self.received = Received(parts.path, parse_qs(parts.query), self.headers, images, self.client_address)
        service.received.append(self.received)
        service.arrived.release()
        if not service.script:
            return True
        service.script.popleft()(self)
        return False

    def predict(self, images: list[tuple[str, bytes]]) -> None:
        query = self.received.query
        model = query.get("model", ["colours"])[0]
        if model != "colours":
            return self.respond(404, {"error": f"no model {model}; served: colours"})
        if len(images) > self.server.service.max_images:
            return self.respond(413, {"error": "too many images in one request"})
        predictions, errors = [], []
        for index, (file, data) in enumerate(images):
            try:
                image = Image.open(io.BytesIO(data))
                if image.width * image.height > MAX_PIXELS:
                    return self.respond(413, {"error": f"{file}: the image has too many pixels"})
                predictions.append({"file": file, **classify(image)})
            except OSError:
                errors.append({"index": index, "file": file, "error": "not an image"})
        if errors:
            return self.respond(400, {"error": f"{len(errors)} images could not be read", "errors": errors})
        version = int(query.get("version", ["7"])[0])
        return self.respond(
            200,
            {
                "model": {"name": model, "version": version},
                "predictions": predictions,
                "timing_ms": {"decode": 0.1, "predict": 0.1},
            },
        )

    def respond(self, status: int, body: Any, *, content_type: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def classify(image: Image.Image) -> dict[str, Any]:
    means = np.asarray(image.convert("RGB"), float).mean(axis=(0, 1)) + 1
    probabilities = means / means.sum()
    class_id = int(probabilities.argmax())
    return {
        "label": COLOURS[class_id],
        "class_id": class_id,
        "confidence": probabilities[class_id],
        "probabilities": dict(zip(COLOURS, probabilities.tolist(), strict=True)),
    }


def busy(retry_after: str | None = None) -> Callable[[Handler], None]:
    headers = {"Retry_After": retry_after} if retry_after is not None else {}
    return lambda handler: handler.respond(503, {"error": "colours is being loaded"}, **headers)


def hang_up(handler: Handler) -> None:
    """Close the connection without a response."""
    handler.close_connection = True


def hang_up_midway(handler: Handler) -> None:
    """Close the connection after a part of the response."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"model": ')
    handler.close_connection = True


def stall(handler: Handler) -> None:
    """Do not respond before the test ends."""
    handler.server.service.release.wait(60)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """Send the response byte by byte, without an end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.close_connection = True
    try:
        while not handler.server.service.release.wait(0.02):
            handler.wfile.write(b" ")
    except OSError:
        pass


def respond(
    status: int, body: Any, content_type: str = "application/json", **headers: str
) -> Callable[[Handler], None]:
    return lambda handler: handler.respond(status, body, content_type=content_type, **headers)
