"""The client of the image classification service: pictures in, labels and probabilities out.

    from client import Client

    with Client("http://127.0.0.1:8501") as client:
        for prediction in client.predict(["cat.png", "dog.jpg"]):
            print(prediction.file, prediction.label, f"{prediction.confidence:.1%}")

`GrpcClient("127.0.0.1:8500", model="cifar10")` is the same over gRPC, for this service and for TensorFlow Serving.
Neither needs TensorFlow. `python -m client --help` is the same as a command.
"""

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
    UnexpectedReply,
)
from client.images import ImageSource, find_pictures
from client.predictions import Failure, ModelStatus, Prediction, ServiceStatus

__all__ = [
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
    "UnexpectedReply",
    "find_pictures",
]
