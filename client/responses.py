"""Reads the service's responses. If another server or a proxy has sent them, `UnexpectedResponse` is raised."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from client.errors import ClientError, ModelNotFound, RequestRejected, ServerBusy, ServerFailed, UnexpectedResponse
from client.images import LoadedImage
from client.predictions import Failure, ModelStatus, Prediction, ServiceStatus


@dataclass(frozen=True)
class Response:
    """A complete HTTP response of the service at `url`; `retry_after` is that header, None if it is missing."""

    url: str
    status: int
    reason_phrase: str
    content_type: str
    retry_after: str | None
    body: bytes

    @cached_property
    def json(self) -> Any:
        """The parsed body; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def error(self) -> str | None:
        """The text of the service's `{"error": text}`; None if the body is something else."""
        match self.json:
            case {"error": str(error)}:
                return error
        return None

    @property
    def summary(self) -> str:
        """The status, the content type and the start of the body, for error messages."""
        status = f"{self.status} {self.reason_phrase}".rstrip()
        start = self.body[:80].decode("utf-8", errors="replace")
        return f"{status}, {self.content_type or 'no content type'}, {start!r}"

    def unexpected(self, expected: str) -> UnexpectedResponse:
        """Return the error for a response that is not what was expected."""
        return UnexpectedResponse(
            f"expected {expected} from {self.url}, got {self.summary}; "
            "check that this is the address of the service, and that no proxy is in between"
        )


def read_predictions(response: Response, images: Sequence[LoadedImage]) -> Iterator[tuple[int, Prediction]]:
    """Yield the index and the prediction of each image that was sent, from the response of `POST /predict`."""
    match response.json:
        case {"model": {"name": str(model), "version": int(version)}, "predictions": list(rows)}:
            pass
        case _:
            raise response.unexpected("predictions as JSON")
    if len(rows) != len(images):
        raise UnexpectedResponse(f"expected {len(images)} predictions from {response.url}, got {len(rows)}")
    for image, row in zip(images, rows, strict=True):
        match row:
            case {
                "label": str(label),
                "class_id": int(class_id),
                "confidence": float() | int() as confidence,
                "probabilities": dict(probabilities),
            } if all(isinstance(probability, (float, int)) for probability in probabilities.values()):
                prediction = Prediction(image.file, label, class_id, confidence, probabilities, model, version)
                yield image.index, _add_limits(prediction, row)
            case _:
                raise UnexpectedResponse(
                    f"expected label, class_id, confidence and probabilities from {response.url}, got {str(row)[:200]}"
                )


def _add_limits(prediction: Prediction, row: dict[str, Any]) -> Prediction:
    """Add the fields that only models with out-of-distribution detection return."""
    match row:
        case {"typicality": float() | int() as typicality, "is_typical": bool(is_typical), "label_set": list(labels)}:
            return dataclasses.replace(
                prediction, typicality=typicality, is_typical=is_typical, label_set=tuple(map(str, labels))
            )
    return prediction


def read_rejections(response: Response, images: Sequence[LoadedImage]) -> list[Failure]:
    """Return a failure for each image that a 400 response rejects; empty if it rejects the request as a whole."""
    match response.status, response.json:
        case 400, {"errors": list(problems)}:
            pass
        case _:
            return []
    failures = {}
    for problem in problems:
        match problem:
            case {"index": int(position), "error": str(reason)} if 0 <= position < len(images):
                image = images[position]
                failures[position] = Failure(image.index, image.file, reason)
            case _:
                raise UnexpectedResponse(
                    f"expected the index, below {len(images)}, and the error of each unreadable image "
                    f"from {response.url}, got {str(problem)[:200]}"
                )
    return list(failures.values())


def read_status(response: Response) -> ServiceStatus:
    """Return the status in a response to `GET /readyz`."""
    match response.json:
        case {"ready": bool(ready), "models": list(rows)}:
            reason = response.json.get("reason")
        case {"ready": bool(ready)}:  # the service requires tokens
            rows, reason = [], None if ready else "it gives the reason to callers with a token (--token)"
        case _:
            raise response.unexpected("the service's readiness as JSON")
    models = []
    for row in rows:
        match row:
            case {"name": str(name), "version": int(version), "state": str(state)}:
                models.append(ModelStatus(name, version, state, error=row.get("error")))
            case _:
                raise response.unexpected("the name, version and state of each model")
    return ServiceStatus(ready, reason, tuple(models))


def make_error(response: Response) -> ClientError:
    """Return the error for a response without predictions or status."""
    url = response.url
    if response.status == 503:
        return ServerBusy(
            f"the service at {url} is not ready: {response.error or response.summary}; "
            f"check with `{_status_command(url)}`"
        )
    if response.status == 429:
        return ServerBusy(f"the service at {url} limits requests: {response.error or response.summary}")
    if response.status in (401, 403):
        return RequestRejected(
            f"the service at {url} denied access ({response.error or response.summary}); "
            "pass valid credentials with auth or headers (--token)"
        )
    if response.error is None:
        return response.unexpected("predictions or an error as JSON")
    if response.status == 404:
        return ModelNotFound(f"{response.error} ({url}); `{_status_command(url)}` lists the models")
    if response.status >= 500:
        return ServerFailed(f"the service at {url} failed ({response.status}): {response.error}")
    match response.status, response.json:
        case 400, {"models": list(models)}:
            names = ", ".join(map(str, models))
            return RequestRejected(f"the service at {url} has several models; choose one with model (--model): {names}")
    return RequestRejected(f"the service at {url} rejected the request ({response.status}): {response.error}")


def _status_command(url: str) -> str:
    """Return the command line of `status`, with the Python that runs this process: PATH may not have one."""
    python = Path(sys.executable or "python")
    with contextlib.suppress(ValueError, OSError):  # OSError: the working directory does not exist any more
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "client", "status", "--url", url])
