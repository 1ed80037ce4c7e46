from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2

from serving.errors import InvalidRequest, ModelLoadError
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.signatures import TensorSpec
from tests.serving.conftest import picture


@pytest.fixture(scope="module")
def classifier(colours: Path) -> SavedModelPredictor:
    return SavedModelPredictor(colours)


@pytest.fixture(scope="module")
def adding(adder: Path) -> SavedModelPredictor:
    return SavedModelPredictor(adder)


def test_signatures_are_read_from_the_saved_model(classifier: SavedModelPredictor) -> None:
    signature = classifier.signatures["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert signature.inputs == {
        "images": TensorSpec("images", "DT_UINT8", (None, 32, 32, 3), "serving_default_images:0")
    }
    assert {name: (spec.dtype, spec.shape) for name, spec in signature.outputs.items()} == {
        "probabilities": ("DT_FLOAT", (None, 3)),
        "class_id": ("DT_INT64", (None,)),
        "label": ("DT_STRING", (None,)),
    }
    assert classifier.signatures["image_bytes"].inputs["image_bytes"].dtype == "DT_STRING"


def test_every_output_is_an_array_of_its_dtype(classifier: SavedModelPredictor) -> None:
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[0, ..., 1] = 200
    images[1, ..., 2] = 200
    outputs = classifier.predict("serving_default", {"images": images})
    assert outputs["probabilities"].dtype == np.float32
    assert outputs["probabilities"].sum(axis=1) == pytest.approx([1, 1])
    assert outputs["class_id"].tolist() == [1, 2]
    assert outputs["label"].tolist() == [b"green", b"blue"]


def test_strings_are_passed_as_bytes(classifier: SavedModelPredictor, adding: SavedModelPredictor) -> None:
    files = np.array([picture("red"), picture("blue", (50, 20), "JPEG")], dtype=object)
    assert classifier.predict("image_bytes", {"image_bytes": files})["class_id"].tolist() == [0, 2]
    shouted = adding.predict("shout", {"text": np.array(b"a\0b", dtype=object)})["shouted"]
    assert shouted.shape == ()
    assert shouted.item() == b"A\0B"


def images(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("signature", "inputs", "message"),
    [
        ("nope", {}, 'Serving signature name: "nope" not found in signature def'),
        ("__saved_model_init_op", {}, "not found in signature def"),
        ("serving_default", {}, "needs the input images"),
        (
            "serving_default",
            {"images": images(1, 32, 32, 3), "x": images(1)},
            "has no input x; it takes images: uint8 (n, 32, 32, 3)",
        ),
        (
            "serving_default",
            {"images": images(1, 31, 32, 3)},
            "input images: expected uint8 (n, 32, 32, 3), got uint8 (1, 31, 32, 3)",
        ),
        ("serving_default", {"images": images(32, 32, 3)}, "got uint8 (32, 32, 3)"),
        ("serving_default", {"images": images(1, 1, 32, 32, 3)}, "got uint8 (1, 1, 32, 32, 3)"),
        ("serving_default", {"images": images(3)}, "got uint8 (3,)"),
        ("serving_default", {"images": images()}, "got uint8 ()"),
        ("serving_default", {"images": images(1, 32, 32, 4)}, "got uint8 (1, 32, 32, 4)"),
        ("serving_default", {"images": images(1, 32, 32, 3, dtype=np.float32)}, "got float32"),
        ("serving_default", {"images": images(0, 32, 32, 3)}, "input images has no rows"),
        ("image_bytes", {"image_bytes": images(2)}, "expected string (n,), got uint8 (2,)"),
        ("image_bytes", {"image_bytes": np.array([3, None], dtype=object)}, "Unsupported object type"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    classifier: SavedModelPredictor, signature: str, inputs: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        classifier.predict(signature, inputs)
    assert message in str(refused.value)


def test_inputs_of_different_lengths_are_refused(adding: SavedModelPredictor) -> None:
    with pytest.raises(InvalidRequest, match="a has 1, b has 2"):
        adding.predict("serving_default", {"a": images(1, 2, dtype=np.float32), "b": images(2, 2, dtype=np.float32)})


def test_an_error_inside_the_graph_is_reported_in_one_line(
    classifier: SavedModelPredictor, adding: SavedModelPredictor
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        classifier.predict("image_bytes", {"image_bytes": np.array([b"no picture"], dtype=object)})
    assert str(refused.value).startswith("Unknown image file format")
    with pytest.raises(InvalidRequest, match="nothing to shout"):
        adding.predict("shout", {"text": np.array(b"", dtype=object)})


def test_a_wrong_rank_never_reaches_a_convolution(tmp_path: Path) -> None:
    # The model does not check its input: a convolution of an input of rank 2 would abort the process.
    model = tf.Module()
    model.kernel = tf.Variable(tf.ones((3, 3, 3, 1)))

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.float32, "x")])
    def convolve(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.nn.conv2d(x, model.kernel, 1, "SAME")}

    tf.saved_model.save(model, str(tmp_path / "1"), signatures={"serving_default": convolve})
    predictor = SavedModelPredictor(tmp_path / "1")
    for shape in [(), (3,), (2, 3), (4, 4, 3), (1, 1, 4, 4, 3), (1, 4, 4, 4), (0, 4, 4, 3)]:
        with pytest.raises(InvalidRequest):
            predictor.predict("serving_default", {"x": images(*shape, dtype=np.float32)})
    outputs = predictor.predict("serving_default", {"x": images(2, 1, 7, 3, dtype=np.float32)})
    assert outputs["y"].shape == (2, 1, 7, 1)


def test_concurrent_calls_get_their_own_outputs(classifier: SavedModelPredictor) -> None:
    def predict(seed: int) -> bool:
        channels = np.random.default_rng(seed).integers(0, 3, size=1 + seed % 5)
        batch = np.zeros((len(channels), 32, 32, 3), np.uint8)
        batch[np.arange(len(channels)), ..., channels] = 255
        class_ids = classifier.predict("serving_default", {"images": batch})["class_id"]
        return bool(np.array_equal(class_ids, channels))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(predict, range(200)))


def save_with_two_graphs(path: Path, tags: list[list[str]]) -> Path:
    """Write a SavedModel with one graph per tag set: the first multiplies by ten, the second adds ten."""
    v1 = tf.compat.v1
    info = v1.saved_model.build_tensor_info
    builder = v1.saved_model.builder.SavedModelBuilder(str(path))
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None])
        signatures = [
            {"serving_default": v1.saved_model.build_signature_def({"x": info(x)}, {"y": info(y)}, "predict")}
            for y in (x * 10.0, x + 10.0)
        ]
        builder.add_meta_graph_and_variables(session, tags[0], signatures[0])
        builder.add_meta_graph(tags[1], signatures[1])
        builder.save()
    return path


def test_the_graph_with_the_single_tag_serve_is_used(tmp_path: Path) -> None:
    predictor = SavedModelPredictor(save_with_two_graphs(tmp_path / "1", [["serve", "gpu"], ["serve"]]))
    x = np.array([1, 2], np.float32)
    assert predictor.predict("serving_default", {"x": x})["y"].tolist() == [11, 12]
    with pytest.raises(ModelLoadError, match=r'tagged "gpu" and "serve", "train"$') as refused:
        SavedModelPredictor(save_with_two_graphs(tmp_path / "2", [["serve", "gpu"], ["train"]]))
    assert refused.value.code == "NOT_FOUND"


def test_a_saved_model_in_text_format_is_read(tmp_path: Path, adder: Path) -> None:
    path = shutil.copytree(adder, tmp_path / "1")
    saved_model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    (path / "saved_model.pbtxt").write_text(text_format.MessageToString(saved_model))
    (path / "saved_model.pb").unlink()
    ones = np.ones((1, 2), np.float32)
    assert SavedModelPredictor(path).predict("serving_default", {"a": ones, "b": ones})["sum"].tolist() == [[2, 2]]
    for broken in (b"meta_graphs {", b"\xff"):
        (path / "saved_model.pbtxt").write_bytes(broken)
        with pytest.raises(ModelLoadError, match="as text proto") as refused:
            SavedModelPredictor(path)
        assert refused.value.code == "DATA_LOSS"


def test_an_error_that_quotes_invalid_utf8_keeps_its_message(tmp_path: Path) -> None:
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, "examples")])
    def parse(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"x": tf.io.parse_example(examples, {"x": tf.io.FixedLenFeature([2], tf.float32)})["x"]}

    tf.saved_model.save(tf.Module(), str(tmp_path / "1"), signatures=parse)
    with pytest.raises(InvalidRequest) as refused:
        SavedModelPredictor(tmp_path / "1").predict(
            "serving_default", {"examples": np.array([b"\xfb\xff"], dtype=object)}
        )
    assert str(refused.value) == r"Could not parse example input, value: '\xfb\xff'"


def test_folders_without_a_loadable_model_are_refused(tmp_path: Path, colours: Path) -> None:
    def code_of(path: Path) -> str:
        with pytest.raises(ModelLoadError) as refused:
            SavedModelPredictor(path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
        return refused.value.code

    assert code_of(tmp_path) == "NOT_FOUND"
    (tmp_path / "saved_model.pb").write_bytes(b"\xff not a protocol buffer")
    assert code_of(tmp_path) == "DATA_LOSS"
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert code_of(tmp_path) == "NOT_FOUND"
    # The graph without its variables: TensorFlow reports the error.
    (tmp_path / "saved_model.pb").write_bytes((colours / "saved_model.pb").read_bytes())
    assert code_of(tmp_path) in {"NOT_FOUND", "UNKNOWN"}
