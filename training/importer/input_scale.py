"""Decides which input scale a model takes: as given, as labelled images show, or as its own rescaling shows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.data import Split
from training.errors import ModelError
from training.importer.choice import Candidate, choose, evaluate_candidates, name_choice
from training.importer.classifier import Classifier
from training.importer.inspection import ImageInput
from training.importer.loading import Source
from training.importer.preprocessing import Preprocessing
from training.importer.rescaling import read_rescaling
from training.importer.scaling import plausible_scales

# Receives each inference: its subject and what was inferred.
Tell = Callable[[str, str], None]


def choose_preprocessing(
    classifier: Classifier,
    image_input: ImageInput,
    source: Source,
    *,
    images: Split | None,
    input_scale: str | None,
    color: str | None,
    tell: Tell,
) -> tuple[Preprocessing, list[Candidate]]:
    """Return the preprocessing, and the evaluated candidates if it was chosen with images.

    Args:
        classifier: the model.
        image_input: what it takes.
        source: for messages.
        images: labelled images of the model's size.
        input_scale: one of `SCALES`, if it was given.
        color: "rgb", "bgr" or "grey", if it was given.
        tell: receives what was inferred.

    Raises:
        ModelError: nothing shows the scale, or the images do not show it clearly.
    """
    scales = plausible_scales(channels=image_input.channels, is_float=image_input.is_float)
    colors = [color] if color else ["rgb", "bgr"] if image_input.channels == 3 else ["grey"]

    def make(scale: str, order: str) -> Preprocessing:
        return Preprocessing(scale, order, image_input.layout, image_input.dtype)

    if input_scale is not None:
        if input_scale not in scales:
            raise ModelError(
                f"{source.description} takes {image_input}, so --input-scale can be {', '.join(scales)}; got "
                f"{input_scale}"
            )
        if (input_scale, color) == ("imagenet-caffe", "bgr"):
            raise ModelError("--input-scale imagenet-caffe reverses RGB to BGR itself: leave out --color bgr")
        tell("input scale", f"{input_scale}, as given; colour {colors[0]}")
        return make(input_scale, colors[0]), []
    shown = read_rescaling(classifier.network, image_input)
    if images is not None:
        if color is None and np.array_equal(images.images[..., 0], images.images[..., 2]):
            colors = colors[:1]  # grey images do not show the order
        # The scale of Caffe's models reverses the colours itself.
        tried = [make(s, c) for s in scales for c in colors if (s, c) != ("imagenet-caffe", "bgr")]
        candidates = evaluate_candidates(tried, classifier.predict, images.images, images.labels)
        best = choose(candidates, images.labels) if len(candidates) > 1 else tried[0]
        differs = f"; its own rescaling shows {shown.scale}" if shown.scale not in (None, best.scale) else ""
        evaluated = f"the best of {len(candidates)} on {len(images.labels):,} images"
        unseen = ", which grey images do not show" if colors == ["rgb"] and color is None else ""
        tell("input scale", f"{best.scale}, colour {best.color}{unseen}: {evaluated} ({name_choice(best)}){differs}")
        return best, candidates
    if len(scales) == 1:
        tell("input scale", f"{scales[0]}: the model takes {image_input.dtype}; colour {colors[0]}")
        return make(scales[0], colors[0]), []
    if shown.scale is None:
        raise ModelError(
            f"{source.description} does not show which pixel values it was trained on: before its first weights it "
            "does not rescale them. Give the scale that was used in training, --input-scale "
            f"{', '.join(scales[:-1])} or {scales[-1]}; or labelled images that show it, --data FOLDER"
        )
    tell(
        "input scale",
        f"{shown.scale}: the model rescales it to {shown.black:.4g}..{shown.white:.4g} itself; colour {colors[0]}",
    )
    return make(shown.scale, colors[0]), []
