"""Ask a running image classification service about pictures. Needs no TensorFlow.

from client import Client

with Client("http://127.0.0.1:8501") as client:
for prediction in client.predict(["cat.png", "dog.jpg"]):
print(prediction.label, prediction.confidence)
"""

from __future__ import annotations

from client.errors import (
    ClientError,
    ConnectionFailed,
    ImageRejected,
    ModelNotFound,
    RequestRefused,
    RequestTimedOut,
    ServiceNotReady,
    UnexpectedReply,
)
from client.predictions import Prediction
from client.rest import Client

__all__ = [
    "Client",
    "ClientError",
    "ConnectionFailed",
    "ImageRejected",
    "ModelNotFound",
    "Prediction",
    "RequestRefused",
    "RequestTimedOut",
    "ServiceNotReady",
    "UnexpectedReply",
]
