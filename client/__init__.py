"""The client of the image classification service: pictures in, labels and probabilities out.

    from client import Client

    with Client("http://127.0.0.1:8501") as client:
        for prediction in client.predict(["cat.png", "dog.jpg"]):
            print(prediction.file, prediction.label, f"{prediction.confidence:.1%}")

It needs no TensorFlow. `python -m client --help` is the same as a command.
"""

from client.client import Client
from client.errors import (
    ClientError,
    ConnectionFailed,
    ImageRejected,
    ModelNotFound,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedReply,
)
from client.images import ImageSource, find_pictures
from client.predictions import Failure, ModelStatus, Prediction, ServiceStatus

__all__ = [
    "Client",
    "ClientError",
    "ConnectionFailed",
    "Failure",
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
    "UnexpectedReply",
    "find_pictures",
]
