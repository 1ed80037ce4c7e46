"""What a model takes: one batch of images, and their layout, size, channels and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from training.errors import ModelError
from training.importer.loading import InputTensor, Source
from training.importer.scaling import COLORS

_CHANNELS = (1, 3)
_WRAP = "Wrap it: build a Keras model with a single image input that calls this one"


@dataclass(frozen=True)
class ImageInput:
    """A model's input.

    Attributes:
        layout: "nhwc", "nchw", or "nhw" for images without an axis for the channel.
        height, width: in pixels.
        channels: 3, or 1 for grey.
        dtype: such as "float32".
    """

    layout: str
    height: int
    width: int
    channels: int
    dtype: str

    @property
    def spec(self) -> tf.TensorSpec:
        """The model's input tensor, with a batch of any size."""
        shape = {
            "nhwc": (self.height, self.width, self.channels),
            "nchw": (self.channels, self.height, self.width),
            "nhw": (self.height, self.width),
        }[self.layout]
        return tf.TensorSpec((None, *shape), self.dtype, "images")

    @property
    def is_float(self) -> bool:
        """Whether the dtype is a floating-point type."""
        return bool(tf.as_dtype(self.dtype).is_floating)

    def __str__(self) -> str:
        color = "grey" if self.channels == 1 else "colour"
        return f"{self.height}x{self.width} {color}, {self.dtype} {describe_shape(tuple(self.spec.shape))}"


def describe_shape(shape: tuple[int | None, ...]) -> str:
    """Return a shape for people, such as `(n, 32, 32, 3)`."""
    first, *rest = shape or (None,)
    return f"({', '.join(['n' if first is None else str(first), *('any' if s is None else str(s) for s in rest)])})"


def read_input(source: Source, *, image_size: tuple[int, int] | None, color: str | None) -> ImageInput:
    """Return what a model takes.

    Args:
        source: the model.
        image_size: (height, width) where the model leaves them open.
        color: "rgb", "bgr" or "grey" where the model leaves the number of channels open.

    Raises:
        ModelError: it has several inputs or takes no images, or a size or colour is missing, invalid or contradicts
            the model.
    """
    if color not in (None, *COLORS):
        raise ModelError(f"the colours can be {', '.join(COLORS)}; got {color!r}")
    if source.inputs is None:
        declared = InputTensor("images", (None, None, None, None), "float32")
    elif len(source.inputs) == 1:
        (declared,) = source.inputs
    else:
        listed = ", ".join(f"{each.name} {describe_shape(each.shape)}" for each in source.inputs)
        raise ModelError(
            f"{source.description} has {len(source.inputs)} inputs, {listed}; one batch of images is served. {_WRAP}"
        )
    found = f"{source.description} takes {declared.dtype} {describe_shape(declared.shape)}"
    if declared.dtype in ("string", "bool") or len(declared.shape) not in (3, 4):
        raise ModelError(
            f"{found}; expected images, (n, height, width, 1 or 3), (n, 1 or 3, height, width) or (n, height, width). "
            f"{_WRAP}: its first layers reshape or flatten the images"
        )
    if declared.shape[0] is not None:
        raise ModelError(
            f"{found}: its batch size is fixed. Build or export it again with a batch axis of any size, None instead "
            f"of {declared.shape[0]}"
        )
    layout, sides, channels = _read_layout(declared.shape, found)
    channels = _choose_channels(channels, color, found)
    return ImageInput(layout, *_choose_size(sides, image_size, found), channels, declared.dtype)


def _read_layout(shape: tuple[int | None, ...], found: str) -> tuple[str, tuple[int | None, int | None], int | None]:
    _, *axes = shape
    if len(axes) == 2:
        return "nhw", (axes[0], axes[1]), 1
    if axes[2] in _CHANNELS or (axes[2] is None and axes[0] not in _CHANNELS):
        return "nhwc", (axes[0], axes[1]), axes[2]
    if axes[0] in _CHANNELS:
        return "nchw", (axes[1], axes[2]), axes[0]
    raise ModelError(
        f"{found}: {axes[2]} channels. Images have 3, or 1 in grey. {_WRAP}: its first layers make the other channels"
    )


def _choose_channels(channels: int | None, color: str | None, found: str) -> int:
    given = None if color is None else 1 if color == "grey" else 3
    if channels is None:
        if given is None:
            raise ModelError(f"{found}: the number of channels is open. Give --color rgb, bgr or grey")
        return given
    if given is not None and given != channels:
        fitting = "--color grey, or leave it out" if channels == 1 else "--color rgb or bgr, or leave it out"
        raise ModelError(f"{found}: {channels} channel{'s' * (channels > 1)}, and --color is {color}. Give {fitting}")
    return channels


def _choose_size(
    sides: tuple[int | None, int | None], image_size: tuple[int, int] | None, found: str
) -> tuple[int, int]:
    if image_size is None:
        height, width = sides
        if height is None or width is None:
            raise ModelError(
                f"{found}: the image size is open. Give the size that it was trained with: --image-size HEIGHTxWIDTH"
            )
        return height, width
    if any(side not in (None, given) for side, given in zip(sides, image_size, strict=True)):
        raise ModelError(
            f"{found}, and --image-size is {image_size[0]}x{image_size[1]}. Leave out --image-size: every image is "
            "resized to the size that the model takes"
        )
    return image_size
