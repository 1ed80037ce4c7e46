"""Model signatures, their tensor specs, and `Predictor`, the interface of the backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np

from serving.errors import InvalidRequest, TooLarge

DEFAULT_SIGNATURE = "serving_default"
_NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128")
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "DT_HALF": np.dtype(np.float16),
    "DT_FLOAT": np.dtype(np.float32),
    "DT_DOUBLE": np.dtype(np.float64),
    **{f"DT_{name.upper()}": np.dtype(name) for name in _NUMBERS},
    "DT_STRING": np.dtype(np.object_),  # elements are bytes
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a signature, as described by its SignatureDef."""

    name: str
    dtype: str  # name in TensorFlow's types.proto: "DT_UINT8"
    shape: tuple[int | None, ...] | None  # None: any rank; an axis of None: any size
    tensor_name: str  # in the graph: "serving_default_images:0"

    @property
    def numpy_dtype(self) -> np.dtype[Any] | None:
        """The dtype of its arrays; None for a type without arrays (DT_RESOURCE)."""
        return NUMPY_DTYPES.get(self.dtype)

    @property
    def is_batched(self) -> bool:
        """True if the first axis is a batch axis: present, and of any size."""
        return bool(self.shape) and self.shape is not None and self.shape[0] is None

    def fits(self, array: np.ndarray) -> bool:
        """Return True if an array has this dtype and shape."""
        expected, shape = self.shape, array.shape
        if array.dtype != self.numpy_dtype or (expected is not None and len(shape) != len(expected)):
            return False
        for want, have in zip(expected or (), shape):  # noqa: B905, SIM110 - strict zip and `all` are slower
            if want is not None and want != have:
                return False
        return True

    def __str__(self) -> str:
        """Return dtype and shape: `uint8 (n, 32, 32, 3)`."""
        dtype = self.dtype.removeprefix("DT_").lower()
        return f"{dtype} of any shape" if self.shape is None else f"{dtype} {_shape_text(self.shape)}"


@dataclass(frozen=True)
class Signature:
    """One callable of a model: named tensors in, named tensors out."""

    name: str
    method_name: str  # "tensorflow/serving/predict"
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    defaults: Mapping[str, np.ndarray] = field(default_factory=dict)  # of inputs that a gRPC request may omit

    @property
    def is_batched(self) -> bool:
        """True if all inputs and outputs have a batch axis."""
        return bool(self.inputs) and all(spec.is_batched for spec in (*self.inputs.values(), *self.outputs.values()))


class Predictor(Protocol):
    """Runs the signatures of a model version, in this process or on a remote server. Thread-safe."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """All SignatureDefs of the model by name, including those that cannot be called."""

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """Run a signature.

        Args:
            signature: its name, for example "serving_default".
            inputs: one array per input of the signature, of exactly its dtype (`TensorSpec.numpy_dtype`;
                strings are object arrays of bytes), rows along axis 0.
            deadline_s: a `time.monotonic()` timestamp, or None.

        Returns:
            One array per output of the signature.

        Raises:
            InvalidRequest: the signature does not exist or the inputs do not fit it.
            ModelFailed: the model refused the inputs, or failed.
        """


def check_inputs(signature: Signature, inputs: Mapping[str, np.ndarray]) -> None:
    """Validate arrays against a signature before TensorFlow's kernels get them.

    TensorFlow does not validate them: a convolution with an input of the wrong rank aborts the process.

    Raises:
        InvalidRequest: an input is missing, unexpected, empty, of the wrong dtype or shape, or its number of rows
            differs from another input's.
    """
    expected = signature.inputs
    if inputs.keys() != expected.keys():
        _refuse_names(signature, inputs)
    rows: dict[str, int] = {}
    for name, spec in expected.items():
        array = inputs[name]
        if not spec.fits(array):
            raise InvalidRequest(f"input {name}: expected {spec}, got {_dtype_text(array)} {_shape_text(array.shape)}")
        if spec.is_batched:
            rows[name] = array.shape[0]
    for name, count in rows.items():
        if count == 0:
            raise InvalidRequest(f"input {name} has no rows: an empty batch cannot be predicted")
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise InvalidRequest(f"all inputs need the same number of rows, but {counts}")


def count_rows(signature: Signature, inputs: Mapping[str, np.ndarray]) -> int:
    """Return the size of the batch axis, or 1 without a batch axis."""
    return next((len(inputs[name]) for name, spec in signature.inputs.items() if spec.is_batched), 1)


def check_rows(rows: int, most: int) -> None:
    """Raise TooLarge if a request has more rows than allowed."""
    if rows > most:
        raise TooLarge(f"the request has {rows:,} rows; at most {most:,} are allowed, so split the request")


def _refuse_names(signature: Signature, inputs: Mapping[str, np.ndarray]) -> NoReturn:
    expected = signature.inputs
    if missing := sorted(expected.keys() - inputs.keys()):
        raise InvalidRequest(f'signature "{signature.name}" needs the input {", ".join(missing)}')
    raise InvalidRequest(
        f'signature "{signature.name}" has no input {", ".join(sorted(inputs.keys() - expected.keys()))}; '
        f"it takes {', '.join(f'{name}: {spec}' for name, spec in expected.items())}"
    )


def _shape_text(shape: tuple[int | None, ...]) -> str:
    sizes = ["n" if size is None and axis == 0 else "?" if size is None else str(size)
             for axis, size in enumerate(shape)]  # fmt: skip
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _dtype_text(array: np.ndarray) -> str:
    return "string" if array.dtype == np.object_ else array.dtype.name
