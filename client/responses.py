"""The service's replies, read and checked: nothing in them is believed to have its shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from client.errors import UnexpectedReply
from client.images import Picture
from client.predictions import Failure, ModelStatus, Prediction, ServiceStatus


@dataclass(frozen=True)
class Reply:
    """A reply as it came from `url`; `retry_after` is that header, None where there is none."""

    url: str
    status: int
    reason_phrase: str
    content_type: str
    retry_after: str | None
    body: bytes

    @cached_property
    def json(self) -> Any:
        """What the body says as JSON; None where it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def error(self) -> str | None:
        """The text of the service's `{"error": text}`; None where that is not what came."""
        match self.json:
            case {"error": str(error)}:
                return error
        return None

    @property
    def summary(self) -> str:
        """The status, the type and the start of the body, for a message."""
        status = f"{self.status} {self.reason_phrase}".rstrip()
        start = self.body[:80].decode("utf-8", errors="replace")
        return f"{status}, {self.content_type or 'no content type'}, {start!r}"

    def unexpected(self, expected: str) -> UnexpectedReply:
        """Return the error that says what was expected instead of this reply."""
        return UnexpectedReply(
            f"expected {expected} from {self.url}, got {self.summary}; "
            "is this the address of the service, and is no proxy in between?"
        )


def read_predictions(reply: Reply, pictures: Sequence[Picture]) -> Iterator[tuple[int, Prediction]]:
    """Yield the index and the prediction of each picture that was sent.

    Raises:
        UnexpectedReply: the reply is not what `POST /predict` answers, or not for as many pictures.
    """
    match reply.json:
        case {"model": {"name": str(model), "version": int(version)}, "predictions": list(rows)}:
            pass
        case _:
            raise reply.unexpected("predictions as JSON")
    if len(rows) != len(pictures):
        raise UnexpectedReply(f"expected {len(pictures)} predictions from {reply.url}, got {len(rows)}")
    for picture, row in zip(pictures, rows, strict=True):
        match row:
            case {
                "label": str(label),
                "class_id": int(class_id),
                "confidence": float() | int() as confidence,
                "probabilities": dict(probabilities),
            } if all(isinstance(probability, (float, int)) for probability in probabilities.values()):
                yield (
                    picture.index,
                    Prediction(
                        file=picture.file,
                        label=label,
                        class_id=class_id,
                        confidence=confidence,
                        probabilities=probabilities,
                        model=model,
                        model_version=version,
                    ),
                )
            case _:
                raise UnexpectedReply(
                    f"expected label, class_id, confidence and probabilities from {reply.url}, got {str(row)[:200]}"
                )


def read_rejections(reply: Reply, pictures: Sequence[Picture]) -> list[Failure]:
    """Return a failure for each picture that a refused request names; empty if it was refused for another reason."""
    match reply.status, reply.json:
        case 400, {"errors": list(problems)}:
            pass
        case _:
            return []
    failures = {}
    for problem in problems:
        match problem:
            case {"index": int(position), "error": str(reason)} if 0 <= position < len(pictures):
                picture = pictures[position]
                failures[position] = Failure(picture.index, picture.file, reason)
            case _:
                raise UnexpectedReply(
                    f"expected the index, below {len(pictures)}, and the error of each unreadable picture "
                    f"from {reply.url}, got {str(problem)[:200]}"
                )
    return list(failures.values())


def read_status(reply: Reply) -> ServiceStatus:
    """Return what `GET /readyz` says.

    Raises:
        UnexpectedReply: the reply is not what that route answers.
    """
    match reply.json:
        case {"ready": bool(ready), "models": list(rows)}:
            reason = reply.json.get("reason")
        case _:
            raise reply.unexpected("the service's readiness as JSON")
    models = []
    for row in rows:
        match row:
            case {"name": str(name), "version": int(version), "state": str(state)}:
                models.append(ModelStatus(name, version, state, error=row.get("error")))
            case _:
                raise reply.unexpected("the name, version and state of each model")
    return ServiceStatus(ready, reason, tuple(models))
