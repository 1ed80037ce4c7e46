"""`Client` and `GrpcClient`: send any number of images in batches, and return the predictions in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import httpx

from client.batches import map_in_order, read_batches, require_success, validate_batch_size
from client.http import Auth, Headers, HttpTransport, Verify, make_httpx_client
from client.images import ImageSource
from client.options import DEFAULT_BATCH_SIZE, DEFAULT_RETRIES, DEFAULT_TIMEOUT_S
from client.predictions import Failure, Prediction, ServiceStatus
from client.rest import RestApi

if TYPE_CHECKING:
    import grpc

    from client.grpc import GrpcTransport

REQUESTS_IN_FLIGHT = 4  # so that the service has work while the next batches are read


class BatchingClient:
    """Base class of the clients: reads images, groups them into batches, and sends those with a transport."""

    def __init__(self, transport: HttpTransport | GrpcTransport, *, batch_size: int) -> None:
        self._batch_size = validate_batch_size(batch_size)
        self._transport = transport

    def predict(self, images: ImageSource | Iterable[ImageSource]) -> list[Prediction]:
        """Classify one or more images; return a prediction for each, in their order.

        Args:
            images: a path, the bytes of an encoded image, uint8 RGB pixels (height, width, 3), a Pillow image, or an
                iterable of these. An array (n, height, width, 3) is n images.

        Raises:
            ImageRejected: an image cannot be read; the first one is reported, and no more are sent. `predict_iter`
                returns the predictions of the others.
            ClientError: the service did not return predictions.
            TypeError: something given is not an image in any of these forms.

        Example:
            >>> from client import Client
            >>> with Client("http://127.0.0.1:8501") as client:
            ...     [prediction.label for prediction in client.predict(["red.png", "green.png"])]
            ['red', 'green']
        """
        return [require_success(outcome) for outcome in self.predict_iter(images)]

    def predict_iter(self, images: ImageSource | Iterable[ImageSource]) -> Iterator[Prediction | Failure]:
        """Classify images one batch after the other; yield a prediction or failure for each, in their order.

        While the service processes a batch, the next three are read and sent, so memory does not grow with the number
        of images. `images` can be a generator, such as `find_images(folder)`. Nothing is read or sent before the first
        result is requested.

        Args:
            images: see `predict`.

        Raises:
            ClientError: the service did not return predictions.
            TypeError: something given is not an image in any of the accepted forms.

        Example:
            >>> from client import Client, Failure
            >>> with Client("http://127.0.0.1:8501") as client:
            ...     for outcome in client.predict_iter(["red.png", "missing.png", "green.png"]):
            ...         print(outcome.reason if isinstance(outcome, Failure) else outcome.label)
            red
            file not found
            green
        """
        batches = read_batches(images, self._batch_size)
        return map_in_order(self._transport.predict_batch, batches, in_flight=REQUESTS_IN_FLIGHT)

    def status(self) -> ServiceStatus:
        """Return whether the service is ready, and its models. There are no retries.

        Raises:
            ClientError: the service did not return its status.

        Example:
            >>> from client import Client
            >>> with Client("http://127.0.0.1:8501") as client:
            ...     client.status().ready
            True
        """
        return self._transport.status()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client(BatchingClient):
    """A client of the service's HTTP API. It is thread-safe.

    Connections are reused; `close()` or the end of a `with` block closes them.

    Args:
        url: the address of the service, http or https. Proxies set in the environment are used, except for this
            machine.
        model: the model's name; required if the service has several.
        version: the model's version; the newest by default.
        headers: sent with every request, as in httpx.
        auth: user name and password, or another kind of authentication, as in httpx.
        verify: an `ssl.SSLContext` for https, or False to accept any certificate, as in httpx.
        transport: an `httpx.BaseTransport` that sends the requests. As in httpx, `close()` closes it, and proxies set
            in the environment are not used.
        timeout_s: seconds for one batch, including retries. A connection attempt may take 5 of them.
        retries: the maximum number of retries of one batch when the connection fails or the service responds with 503
            or 429. The waits between grow from 0.25 s and respect `Retry-After`, up to 10 s.
        batch_size: images per request.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from client import Client
        >>> with Client("http://127.0.0.1:8501", headers={"Authorization": "Bearer secret"}) as client:
        ...     for prediction in client.predict(["red.png", "green.png"]):
        ...         print(prediction.file, prediction.label, f"{prediction.confidence:.0%}")
        red.png red 99%
        green.png green 99%
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        version: int | None = None,
        headers: Headers | None = None,
        auth: Auth | None = None,
        verify: Verify = True,
        transport: httpx.BaseTransport | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        api = RestApi(url, model=model, version=version, timeout_s=timeout_s, retries=retries)
        http = make_httpx_client(httpx.Client, api, headers=headers, auth=auth, verify=verify, transport=transport)
        super().__init__(HttpTransport(api, http), batch_size=batch_size)


class GrpcClient(BatchingClient):
    """A client of the service's gRPC API, or of any TensorFlow Serving with an exported model. It is thread-safe.

    It returns the same as `Client`. The connection is reused; `close()` or the end of a `with` block closes it.

    Args:
        target: the address of the gRPC API, such as 127.0.0.1:8500. With a channel it is only used in error messages.
        model: the model's name; required, as the gRPC API cannot list the models.
        version: the model's version; the newest by default.
        metadata: sent with every call, such as `[("authorization", "Bearer secret")]`.
        credentials: for TLS, `grpc.ssl_channel_credentials(...)`; without them the connection is not encrypted.
        channel: a `grpc.Channel` to use. `close()` does not close it, and `credentials` are not used.
        timeout_s: seconds for one batch, including retries; the server receives it as the deadline.
        retries: the maximum number of retries of one batch when the server cannot be reached or is not ready. The waits
            between grow from 0.25 s to 10 s.
        batch_size: images per request.

    Raises:
        ValueError: an argument is out of range, or there is neither a target nor a channel.

    Example:
        >>> from client import GrpcClient
        >>> with GrpcClient("127.0.0.1:8500", model="colours") as client:
        ...     [prediction.label for prediction in client.predict(["red.png", "green.png"])]
        ['red', 'green']
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        model: str,
        version: int | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        credentials: grpc.ChannelCredentials | None = None,
        channel: grpc.Channel | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        from client.grpc import GrpcTransport  # not at the top: importing gRPC is slow, and HTTP does not need it

        transport = GrpcTransport(
            target,
            model=model,
            version=version,
            metadata=metadata,
            credentials=credentials,
            channel=channel,
            timeout_s=timeout_s,
            retries=retries,
        )
        super().__init__(transport, batch_size=batch_size)
