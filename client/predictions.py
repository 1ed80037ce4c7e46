"""What the client returns: a prediction or a failure for each image, and the status of the service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """The classification of one image.

    Attributes:
        file: the path as it was given; None for an image that was given as bytes or pixels.
        label: the most probable class.
        class_id: its number.
        confidence: its probability, 0 to 1.
        probabilities: the probability of every label, in the order of the class numbers.
        model: the name of the model.
        model_version: its version.
        typicality: share of the validation images that are less typical of the training images than this one; None,
            as are the next two, if the model does not tell.
        is_typical: whether the image is like the training images; the prediction means little if not.
        label_set: labels that hold the right one for 90 % of images like the training images; it may be empty.

    Example:
        >>> from client import Client
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     (prediction,) = client.predict("red.png")
        >>> print(f"{prediction.label}, {prediction.confidence:.0%}, by {prediction.model} {prediction.model_version}")
        red, 99%, by colours 7
    """

    file: str | None
    label: str
    class_id: int
    confidence: float
    probabilities: dict[str, float]
    model: str
    model_version: int
    typicality: float | None = None
    is_typical: bool | None = None
    label_set: tuple[str, ...] | None = None

    def describe_limits(self) -> str:
        """Say what limits the prediction; empty if nothing does or the model does not tell.

        Example:
            >>> from client import Prediction
            >>> limits = {"typicality": 0.4, "is_typical": True, "label_set": ("cat", "dog")}
            >>> Prediction("cat.png", "cat", 0, 0.6, {"cat": 0.6, "dog": 0.4}, "pets", 1, **limits).describe_limits()
            'cat or dog'
        """
        limits = ["unlike the training images"] if self.is_typical is False else []
        if self.label_set is not None and len(self.label_set) > 1:
            *others, last = self.label_set
            limits.append(f"{', '.join(others)} or {last}")
        return "; ".join(limits)

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the `k` most probable labels with their probabilities, the most probable first.

        Example:
            >>> from client import Prediction
            >>> prediction = Prediction("cat.png", "cat", 0, 0.7, {"cat": 0.7, "cow": 0.1, "dog": 0.2}, "pets", 1)
            >>> prediction.top(2)
            [('cat', 0.7), ('dog', 0.2)]
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        return sorted(self.probabilities.items(), key=lambda item: item[1], reverse=True)[:k]


@dataclass(frozen=True)
class Failure:
    """An image without a prediction: `index` is its position among the given images, `file` its path or None.

    Example:
        >>> from client import Client
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     list(client.predict_iter(["missing.png"]))
        [Failure(index=0, file='missing.png', reason='file not found')]
    """

    index: int
    file: str | None
    reason: str


@dataclass(frozen=True)
class ModelStatus:
    """The status of one version of a model; `state` is one of TensorFlow Serving's, AVAILABLE once it is ready.

    Example:
        >>> from client import Client
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     client.status().models[0]
        ModelStatus(name='colours', version=7, state='AVAILABLE', error=None)
    """

    name: str
    version: int
    state: str
    error: str | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """Whether the service is ready, the reason if it is not, and its models.

    Example:
        >>> from client import Client
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     status = client.status()
        >>> status.ready, [model.name for model in status.models]
        (True, ['colours'])
    """

    ready: bool
    reason: str | None
    models: tuple[ModelStatus, ...]
