"""`Client` and `GrpcClient`: any number of pictures in any form, sent in batches, answered in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from PIL import Image

from client.errors import ImageRejected
from client.images import ImageSource, Picture, read_picture
from client.pipeline import map_in_order
from client.predictions import Failure, Prediction, ServiceStatus
from client.rest import DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, RestTransport

DEFAULT_BATCH_SIZE = 64  # as many as the service puts into one call of its model
REQUESTS_IN_FLIGHT = 4  # the service has work while the next batches are read

# A batch ends early rather than hold more than this; a larger picture is a batch of its own.
MAX_BATCH_BYTES = 16 * 1024 * 1024


class Transport(Protocol):
    """A way to the service. It knows the wire and the retries; it knows nothing of files and batching."""

    def predict_batch(self, pictures: Sequence[Picture]) -> list[Prediction | Failure]:
        """Classify pictures, in their order. One that cannot be read costs only itself: a Failure.

        Raises:
            ClientError: the service gives no answer.
        """

    def status(self) -> ServiceStatus:
        """Ask whether the service is ready and what it serves.

        Raises:
            ClientError: the service gives no answer.
        """

    def close(self) -> None:
        """Close the connections."""


class PictureClient:
    """What every client does, whatever its way to the service. Its connections are closed by `close()` or `with`.

    Args:
        transport: the way.
        batch_size: pictures in one request.

    Raises:
        ValueError: `batch_size` is out of its range.
    """

    def __init__(self, transport: Transport, *, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._batch_size = batch_size
        self._transport = transport

    def predict(self, images: ImageSource | Iterable[ImageSource]) -> list[Prediction]:
        """Classify one picture or several; return a prediction for each, in their order.

        Args:
            images: a path, the bytes of an encoded picture, uint8 RGB pixels (height, width, 3), a Pillow
                image, or an iterable of these; an array (n, height, width, 3) is n pictures.

        Raises:
            ImageRejected: a picture cannot be read, the first of them; the rest is not sent any more.
                `predict_iter` gives the others' predictions.
            ClientError: the service gives no answer.
            TypeError: something given is not a picture in any of these forms.
        """
        predictions = []
        for outcome in self.predict_iter(images):
            if isinstance(outcome, Failure):
                raise ImageRejected(outcome.index, outcome.file, outcome.reason)
            predictions.append(outcome)
        return predictions

    def predict_iter(self, images: ImageSource | Iterable[ImageSource]) -> Iterator[Prediction | Failure]:
        """Classify pictures as they come; yield a prediction or failure for each, in their order.

        While the service answers a batch, the next three are read and sent, and no more: few pictures are held in
        memory, however many there are. Give it a generator, such as `find_pictures(folder)`. Nothing is read or sent
        before the first result is asked for.

        Args:
            images: as for `predict`.

        Raises:
            ClientError: the service gives no answer.
            TypeError: something given is not a picture in any of the forms taken.
        """
        return map_in_order(self._predict_batch, self._gather(images), in_flight=REQUESTS_IN_FLIGHT)

    def _gather(self, images: ImageSource | Iterable[ImageSource]) -> Iterator[list[Picture | Failure]]:
        batch: list[Picture | Failure] = []
        batch_bytes = 0
        for index, source in enumerate(_each(images)):
            item = _read(source, index=index)
            item_bytes = item.size_bytes if isinstance(item, Picture) else 0
            if len(batch) == self._batch_size or batch_bytes + item_bytes > MAX_BATCH_BYTES:
                yield batch
                batch, batch_bytes = [], 0
            batch.append(item)
            batch_bytes += item_bytes
        if batch:
            yield batch

    def _predict_batch(self, batch: list[Picture | Failure]) -> list[Prediction | Failure]:
        pictures = [item for item in batch if isinstance(item, Picture)]
        answers = iter(self._transport.predict_batch(pictures) if pictures else ())
        return [item if isinstance(item, Failure) else next(answers) for item in batch]

    def status(self) -> ServiceStatus:
        """Ask once whether the service is ready to predict, and what it serves.

        Raises:
            ClientError: the service gives no answer.
        """
        return self._transport.status()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client(PictureClient):
    """A client of the classification service at `url`, such as http://127.0.0.1:8501.

    Connections are kept and reused, and closed by `close()` or at the end of a `with` block. It may be
    used by several threads.

    Args:
        url: the service's address, http or https. The environment's proxies are used, except for this machine.
        model: which model to ask; needed where several are served.
        version: which version of it; by default the newest.
        timeout_s: seconds for the answer to one batch, all attempts and waits included. Of these, making
            a connection may take 5.
        retries: how many times a batch is tried again when the connection fails or the service answers
            503. The waits between grow from 0.25 s and follow the service's Retry-After, up to 10 s.
        batch_size: pictures in one request.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        version: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        transport = RestTransport(url, model=model, version=version, timeout_s=timeout_s, retries=retries)
        super().__init__(transport, batch_size=batch_size)


class GrpcClient(PictureClient):
    """A client of the service's gRPC port, or of any TensorFlow Serving with an exported model: 127.0.0.1:8500.

    It gives what `Client` gives. The connection is kept; it may be used by several threads.

    Args:
        address: host:port of the gRPC API.
        model: which model to ask; over gRPC no server tells what it has.
        version: which version of it; by default the newest.
        timeout_s: seconds for the answer to one batch, all attempts and waits included; the server is told.
        retries: how many times a batch is tried again when the server cannot be reached or is not ready.
            The waits between grow from 0.25 s up to 10 s.
        batch_size: pictures in one request.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str,
        version: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        from client.grpc import GrpcTransport  # who asks over HTTP need not wait for gRPC's import

        transport = GrpcTransport(address, model=model, version=version, timeout_s=timeout_s, retries=retries)
        super().__init__(transport, batch_size=batch_size)


def _each(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    if isinstance(images, np.ndarray):
        return images if images.ndim == 4 else (images,)
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
        return (images,)
    if hasattr(images, "read") or not isinstance(images, Iterable):
        # An open file would be taken for an iterable of pictures, one in each line.
        raise TypeError(
            "expected a path, the bytes of an encoded picture, a uint8 array (height, width, 3), a Pillow image, "
            f"or an iterable of these; got {type(images).__name__}"
        )
    return images


def _read(source: ImageSource, *, index: int) -> Picture | Failure:
    try:
        return read_picture(source, index=index)
    except ImageRejected as error:
        return Failure(error.index, error.file, error.reason)
