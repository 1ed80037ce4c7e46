"""Imports a Keras classifier: reads it, infers how it takes images, checks, evaluates and publishes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from training.errors import ModelError
from training.evaluation.typicality import evaluate_guard, fit_guard, measure_reference
from training.exporter.publish import publish_model
from training.exporter.verify import ExpectedLogits
from training.importer.checks import check_frozen, check_outputs, sample_images
from training.importer.classifier import Classifier
from training.importer.evaluation import (
    LabelledImages,
    calibrate_and_evaluate,
    describe_evaluation,
    load_images,
    write_import_report,
)
from training.importer.input_scale import Tell, choose_preprocessing
from training.importer.inspection import ImageInput, describe_shape, read_input
from training.importer.labels import read_labels
from training.importer.loading import Source, load_source
from training.importer.network import Network
from training.importer.outputs import Outputs, read_outputs
from training.importer.preprocessing import Preprocessing
from training.importer.scaling import RANGES
from training.importer.tracing import has_mixed_precision, trace
from training.models.guard import Guard
from training.models.inference_graph import InferenceGraph
from training.preflight import check_model_name, check_models_folder


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A model that is ready to be published; see `publish_model`."""

    name: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    graph: InferenceGraph
    expected: ExpectedLogits
    metadata: dict[str, Any]
    guard: Guard | None


def import_model(
    given: Any,
    *,
    models_dir: Path,
    tell: Tell,
    name: str | None = None,
    default_outputs: str = "all",
    explain: bool = False,
    **options: Any,
) -> Path:
    """Publish a Keras classifier as the next version of `models_dir/name`.

    Args:
        given: a `.keras` or `.h5` file, a SavedModel's folder, a Keras model, or a function of a batch of images.
        models_dir: the folder of all models.
        tell: receives what was inferred.
        name: of the model; by default that of the file or model.
        default_outputs: "all" or "probabilities"; see `publish_model`.
        explain: add the signature `explain`.
        options: of `read_model`.

    Returns:
        The folder of the new version.

    Raises:
        ModelError: the model cannot be served, or what cannot be inferred was not given.
        DatasetError: the data is missing or damaged.
        ExportError: the name is invalid, or the exported model's outputs differ from the model's.
    """
    if name is not None:
        check_model_name(name)
        check_models_folder(models_dir, name)
    model = read_model(given, name=name, tell=tell, **options)
    check_models_folder(models_dir, model.name)
    return publish_model(
        model.graph,
        model.expected,
        models_dir=models_dir,
        name=model.name,
        class_names=model.class_names,
        input_shape=model.input_shape,
        metadata=model.metadata,
        default_outputs=default_outputs,
        explain=explain,
        guard=model.guard,
    )


def read_model(
    given: Any,
    *,
    tell: Tell,
    name: str | None = None,
    labels: str | Path | Sequence[str] | None = None,
    data: Path | None = None,
    input_scale: str | None = None,
    image_size: tuple[int, int] | None = None,
    color: str | None = None,
    output: str | None = None,
    custom: Path | None = None,
) -> ImportedModel:
    """Read a Keras classifier, infer how it takes images, check it, and evaluate it if there is data.

    Args:
        given: see `import_model`.
        tell: receives what was inferred.
        name: of the model; by default that of the file or model.
        labels: in the order of the outputs; see `read_labels`. By default the class names of `data`.
        data: a folder of labelled images, to choose the input scale, calibrate and evaluate.
        input_scale: one of `SCALES`; by default the one that the model's own rescaling or `data` shows.
        image_size: (height, width), if the model leaves them open.
        color: "rgb", "bgr" or "grey".
        output: name of the output with a value for each class, if there are several.
        custom: a Python file with the model's own classes and functions; it is executed.

    Raises:
        ModelError: the model cannot be served, or what cannot be inferred was not given.
        DatasetError: the data is missing or damaged.
    """
    label_names = None if labels is None else read_labels(labels)
    source = load_source(given, custom=custom)
    name = name or source.name
    check_model_name(name)
    image_input = read_input(source, image_size=image_size, color=color)
    network = trace(source, image_input, output=output)
    tell("model", f"{source.description}, {network.weights:,} weights")
    tell("input", f"{image_input}{', computed in float32' if has_mixed_precision(source) else ''}")
    _freeze(network, source, image_input)
    outputs = read_outputs(network, _compute_samples(network, image_input), source=source)
    tell("outputs", outputs.description + (f", of the output {network.output_name!r}" if network.output_name else ""))
    images = None
    if data is not None:
        size = (image_input.height, image_input.width)
        images = load_images(data, image_size=size, labels=label_names, classes=outputs.classes)
    label_names = _check_labels(label_names, images, outputs, source)
    tell("labels", f"{_shorten(label_names)}{'' if labels is not None else ', the folders of the images, sorted'}")
    classifier = Classifier(network, outputs, layout=image_input.layout)
    preprocessing, candidates = choose_preprocessing(
        classifier,
        image_input,
        source,
        images=None if images is None else images.choice_part(),
        input_scale=input_scale,
        color=color,
        tell=tell,
    )
    inputs = preprocessing.apply_numpy(sample_images((image_input.height, image_input.width, 3)))
    check_outputs(network, inputs, source=source)
    own = outputs.to_probabilities(network.original(inputs))
    check_frozen(network, tf.nn.softmax(classifier.logits(tf.constant(inputs))).numpy(), own, source=source)
    cut = classifier.feature_map
    none = "none before the logits: no heat maps"
    tell("features", none if cut is None else f"{describe_shape(tuple(cut.shape))}, {_name_operation(cut)}")
    metadata: dict[str, Any] = {
        "imported": {
            "source": source.description,
            "input": str(image_input),
            "input_scale": preprocessing.scale,
            "color": preprocessing.color,
            "outputs": outputs.description,
        },
        "parameters": network.weights,
        "temperature": 1.0,
        "libraries": {library: library_version(library) for library in ("tensorflow", "keras", "numpy")},
    }
    guard = None
    if images is None:
        tell("calibration", "none: the confidences are the model's own; --data calibrates and evaluates them")
    else:
        test = calibrate_and_evaluate(images, lambda pixels: classifier.predict(preprocessing, pixels))
        calibrated = classifier.build_graph(preprocessing, test.temperature)
        guard = fit_guard(calibrated, images.calibration)
        limits = evaluate_guard(calibrated, guard, images.dataset.test, dataset_name=name)
        metadata |= describe_evaluation(images, test) | limits.to_json()
        metadata["reference"] = measure_reference(calibrated, guard, images.calibration).to_json()
        tell("calibration", f"temperature {test.temperature:.3f}, fitted on {len(images.calibration.labels):,} images")
        accuracy, count, loss = test.evaluation.accuracy, test.evaluation.count, test.evaluation.loss
        tell("test accuracy", f"{accuracy:.2%} of {count:,} other images, loss {loss:.4f}")
        tell(
            "label sets",
            f"{limits.sets.coverage:.1%} have the true label, {limits.sets.mean_size:.2f} labels on average",
        )
        settings = {key.replace("_", " "): value for key, value in metadata["imported"].items()}
        report = write_import_report(images, test, name=name, settings=settings, candidates=candidates, limits=limits)
        tell("report", str(report))
    temperature = metadata["temperature"]
    return ImportedModel(
        name=name,
        class_names=label_names,
        input_shape=(image_input.height, image_input.width, 3),
        graph=classifier.build_graph(preprocessing, temperature),
        expected=lambda pixels: classifier.logits_numpy(preprocessing, pixels) / temperature,
        metadata=metadata,
        guard=guard,
    )


def _name_operation(tensor: tf.Tensor) -> str:
    """Return the layer and the operation that compute a tensor."""
    return "/".join(tensor.op.name.split("/")[-2:])


def _freeze(network: Network, source: Source, image_input: ImageInput) -> None:
    try:
        assert network.frozen is not None
    except ModelError:
        # Random numbers are such state too, and the checks say so.
        check_outputs(network, next(_sample_inputs(image_input)), source=source)
        raise


def _sample_inputs(image_input: ImageInput) -> Iterator[np.ndarray]:
    """Yield sample images in every plausible scale, as the model takes them."""
    images = sample_images((image_input.height, image_input.width, 3))
    color = "grey" if image_input.channels == 1 else "rgb"
    for scale in RANGES if image_input.is_float else ("0..255",):
        yield Preprocessing(scale, color, image_input.layout, image_input.dtype).apply_numpy(images)


def _compute_samples(network: Network, image_input: ImageInput) -> np.ndarray:
    return np.concatenate([network.original(inputs) for inputs in _sample_inputs(image_input)])


def _check_labels(
    labels: tuple[str, ...] | None, images: LabelledImages | None, outputs: Outputs, source: Source
) -> tuple[str, ...]:
    if labels is None:
        if images is None:
            raise ModelError(
                f"{source.description} has {outputs.classes} classes, and a model has no names for them. Give them in "
                "the order of the outputs: --labels cat,dog or --labels FILE; or give labelled images: --data FOLDER"
            )
        return images.dataset.class_names
    if len(labels) != outputs.classes:
        raise ModelError(
            f"{source.description} has {outputs.classes} classes ({outputs.description}), and --labels has "
            f"{len(labels)}: {_shorten(labels)}. Give one label for each class, in the order of the outputs"
        )
    return labels


def _shorten(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
