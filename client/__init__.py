"""The client of the image classification service: images in, labels and probabilities out.

    >>> from client import Client
    >>> with Client("http://127.0.0.1:8501") as client:
    ...     for prediction in client.predict(["red.png", "green.png"]):
    ...         print(prediction.file, prediction.label, f"{prediction.confidence:.0%}")
    red.png red 99%
    green.png green 99%

`AsyncClient` does the same for asyncio, and `GrpcClient("127.0.0.1:8500", model="cifar10")` over gRPC, for this service
and for TensorFlow Serving. None of them needs TensorFlow. `python -m client --help` describes the command line.
"""

from client.async_client import AsyncClient
from client.client import Client, GrpcClient
from client.errors import (
    ClientError,
    ConnectionFailed,
    ImageRejected,
    ModelNotFound,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedResponse,
)
from client.images import ImageSource, find_images
from client.predictions import Failure, ModelStatus, Prediction, ServiceStatus
from image_formats import __version__

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "Failure",
    "GrpcClient",
    "ImageRejected",
    "ImageSource",
    "ModelNotFound",
    "ModelStatus",
    "Prediction",
    "RequestRejected",
    "RequestTimedOut",
    "ServerBusy",
    "ServerFailed",
    "ServiceStatus",
    "UnexpectedResponse",
    "__version__",
    "find_images",
]
