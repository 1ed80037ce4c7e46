"""Presets of the airbench network: its size and training settings. Imports no TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, in addition to a horizontal flip of each image in every other epoch.

    Attributes:
        max_shift: largest shift in each direction, in pixels.
        cutout: side of the square that is filled with the mean colour, in pixels; 0 disables it.
    """

    max_shift: int
    cutout: int = 0


class Block(NamedTuple):
    """One of the three blocks of an airbench network.

    Attributes:
        filters: output channels of every convolution.
        depth: number of convolutions.
        padding: of the first convolution, "SAME" or "VALID".
    """

    filters: int
    depth: int
    padding: str


@dataclass(frozen=True)
class Preset:
    """Size and training settings of an airbench network.

    Attributes:
        blocks: the three blocks, in order.
        epochs: default number of epochs by dtype policy.
        batch_size, learning_rate: defaults of `TrainingConfig`.
        augmentation: stronger for a network that could memorize its training images.
    """

    blocks: tuple[Block, Block, Block]
    epochs: dict[str, int]
    batch_size: int
    learning_rate: float
    augmentation: Augmentation


# Chosen on the validation images: quick at full size, best with half of its filters and a third of the images. The
# numbers of epochs fill the time of the article's ten epochs (quick) and one hour (best).
PRESETS = {
    "quick": Preset(
        # From 32x32 pixels the feature maps are 28, 14, 12, 6 and 3 wide. "SAME" padding in the first two blocks would
        # add a third to the work, part of it for rows that the last pooling drops.
        blocks=(Block(32, 1, "VALID"), Block(64, 2, "VALID"), Block(128, 3, "SAME")),
        epochs={"float32": 10, "mixed_bfloat16": 14},
        batch_size=500,
        learning_rate=0.12,
        augmentation=Augmentation(max_shift=2),
    ),
    "best": Preset(
        blocks=(Block(64, 2, "VALID"), Block(192, 2, "SAME"), Block(256, 2, "SAME")),
        epochs={"float32": 33, "mixed_bfloat16": 48},
        batch_size=500,
        learning_rate=0.12,
        augmentation=Augmentation(max_shift=4, cutout=8),
    ),
}
