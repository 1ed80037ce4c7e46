"""Batch prediction with real SavedModels: results, errors, interruption and continuation."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from image_formats.decoding import read_rgb
from tests.serving.saved_models import COLOURS, save_adder, save_colour_classifier
from tests.training.batch_prediction.pictures import encode, write_pictures
from tests.training.test_commands import call
from training.batch_prediction import prediction
from training.batch_prediction.classifier import Classifier
from training.batch_prediction.parts import Parts
from training.batch_prediction.prediction import predict_source
from training.batch_prediction.predictor import Predictor
from training.batch_prediction.rows import Row
from training.errors import ExportError, PredictionError
from training.exporter.checksums import write_checksums
from training.image_progress import ImageProgress

pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra [batch]")
from pyarrow import parquet

PROJECT = Path(__file__).parents[3]
COUNT = 300
DAMAGED = len(range(16, COUNT, 17))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colour_classifier(tmp_path_factory.mktemp("models") / "colours" / "3", guarded=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "pictures"
    write_pictures(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "predictions.parquet"
    predict_source(model, str(pictures), out, batch_size=8)
    return out


def read(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(out).to_pylist()
    return rows


def test_each_image_has_the_outputs_of_the_signature_or_an_error(model: Path, undisturbed: Path) -> None:
    table = parquet.read_table(undisturbed)
    columns = ["source", "index", "label", "class_id", "confidence", "probabilities"]
    assert table.column_names == [*columns, "typicality", "is_typical", "label_set", "error"]
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata == {"model": "colours", "version": "3", "class_names": json.dumps(COLOURS)}
    loaded = tf.saved_model.load(str(model))
    result = table.to_pylist()
    assert [row["index"] for row in result] == list(range(COUNT))
    assert [Path(row["source"]).stem for row in result] == [
        f"{n:04}" for n in (*range(0, COUNT, 2), *range(1, COUNT, 2))
    ]
    failed = 0
    for row in result:
        if row["error"] is not None:
            failed += 1
            assert int(Path(row["source"]).stem) % 17 == 16
            assert re.match("the image is damaged or cut off|the image is cut off", row["error"])
            assert {name for name, value in row.items() if value is not None} == {"source", "index", "error"}
            continue
        image = read_rgb(Path(row["source"]).read_bytes()).resize((32, 32), 2)
        outputs = loaded.signatures["guarded"](images=tf.constant(np.asarray(image)[None]))
        expected = {name: tensor.numpy()[0] for name, tensor in outputs.items()}
        np.testing.assert_allclose(row["probabilities"], expected["probabilities"], atol=1e-6)
        assert row["confidence"] == max(row["probabilities"])
        assert (row["class_id"], row["label"]) == (expected["class_id"], expected["label"].decode())
        assert row["typicality"] == pytest.approx(expected["typicality"], abs=1e-6)
        assert row["is_typical"] == expected["is_typical"]
        assert row["label_set"] == [COLOURS[class_id] for class_id in np.flatnonzero(expected["label_set"])]
    assert failed == DAMAGED


def test_the_result_depends_neither_on_threads_nor_on_parts_nor_on_the_decoder(
    model: Path, pictures: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def classify_files(self: Classifier, files: list[bytes]) -> Any:
        calls.append(len(files))
        return original(self, files)

    original = Classifier.classify_files
    monkeypatch.setattr(Classifier, "classify_files", classify_files)
    monkeypatch.setattr(prediction, "PART_S", 0)
    small = tmp_path / "small"  # all of the model's size, one damaged in a way that only decoding shows
    small.mkdir()
    for index in range(20):
        data = encode(seed=index)
        place = data.index(b"IDAT") + 40
        (small / f"{index}.png").write_bytes(data[:place] + b"\0\0\0\0" + data[place + 4 :] if index == 13 else data)
    outs = []
    for jobs in (1, 3):
        for source, name in ((pictures, "pictures"), (small, "small")):
            out = tmp_path / f"{name}-{jobs}.parquet"
            predict_source(model, str(source), out, batch_size=8, jobs=jobs)
            outs.append(out.read_bytes())
    assert calls.count(8) >= 4  # the model has decoded them
    monkeypatch.setattr(Predictor, "_predict_files", lambda *_: None)
    predict_source(model, str(small), tmp_path / "pillow.parquet", batch_size=8)
    assert outs[0] == outs[2] == undisturbed.read_bytes()
    assert outs[1] == outs[3] == (tmp_path / "pillow.parquet").read_bytes()
    (failed,) = [row for row in read(tmp_path / "pillow.parquet") if row["error"]]
    assert failed["source"].endswith("13.png")


# Run in a child process that has imported TensorFlow and not started it: imports take longer than the predictions.
_KILLED_RUNS = """
import os, signal, sys
from pathlib import Path
import tensorflow
from training.batch_prediction import prediction
model, source, *runs = sys.argv[1:]
prediction.PART_S = 0  # a part for each batch
for run in runs:
    point, out = run.split(":", 1)
    if not (child := os.fork()):
        calls = 0
        def count(original):
            def counted(*arguments, **options):
                global calls
                calls += 1
                if calls == int(point):
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)
            return counted
        # All writes of the finished parts and of the result are synced, then renamed.
        os.fsync, Path.replace = count(os.fsync), count(Path.replace)
        prediction.predict_source(Path(model), source, Path(out), batch_size=8)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    parts = len(list(Path(out + ".parts").glob("part-*.parquet")))
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "done", parts, Path(out).exists(), flush=True)
"""


def test_a_prediction_that_is_killed_continues_to_the_same_file(model: Path, pictures: Path, tmp_path: Path) -> None:
    """Killed before a part is renamed, before the result is renamed, and before the parts are removed."""
    out = tmp_path / "predictions.parquet"
    manifest, part, result = 1 + 3, 3, 3  # syncs and renames of each; before the manifest, of the new folder
    finished, count = 4, -(-COUNT // 8)
    points = [manifest + finished * part + 2, (count - finished) * part + 2, result, 9999]
    # By the same command too: other threads of TensorFlow may round the last bit of a sum differently.
    undisturbed = tmp_path / "undisturbed.parquet"
    runs = [f"{point}:{out}" for point in points] + [f"9999:{undisturbed}"]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_RUNS, str(model), str(pictures), *runs],
        cwd=PROJECT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    kill = str(signal.SIGKILL.value)
    assert lines == [
        [kill, str(finished), "False"],
        [kill, str(count), "False"],
        [kill, str(count), "True"],
        ["done", "0", "True"],
        ["done", "0", "True"],
    ]
    assert out.read_bytes() == undisturbed.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, undisturbed.name]


@pytest.fixture
def interrupted(
    model: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> Path:
    """The result of a command that Ctrl-C interrupts after the fifth part."""

    def write(self: Parts, batches: Any) -> None:
        original(self, batches)
        if self.done == 40:
            signal.raise_signal(signal.SIGINT)

    original = Parts.write
    out = tmp_path / "new folder" / "predictions.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "PART_S", 0)
        patch.setattr(Parts, "write", write)
        assert call("predict", model, pictures, "--out", out, "--batch-size", 8) == 130
    stdout, stderr = capfd.readouterr()
    assert (stdout, stderr) == ("", "\ninterrupted\n")
    assert caplog.messages[-1:] == [f"40 of {COUNT} images are done and kept; the same command continues with the next"]
    assert not out.exists()
    return out


def test_ctrl_c_keeps_the_finished_parts_and_the_command_continues(
    interrupted: Path, model: Path, pictures: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("predict", model.parent, pictures, "--out", interrupted, "--batch-size", 8) == 5
    stdout, stderr = capfd.readouterr()
    assert re.match(rf"predicted      {COUNT - 40} images in 0:0\d, .* images/s, and 40 in an earlier run\n", stdout)
    assert stdout.endswith(f"wrote          {interrupted}\n")
    assert stderr.startswith(
        f"error: {DAMAGED} of {COUNT} images could not be read: the column error has the reasons. The first is "
        f"{pictures}/0016.png: the image is damaged or cut off"
    )
    assert interrupted.read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in interrupted.parent.iterdir()] == [interrupted.name]


def test_parts_of_another_prediction_are_refused_and_kept_until_they_are_discarded(
    interrupted: Path, model: Path, pictures: Path, undisturbed: Path, tmp_path: Path
) -> None:
    parts = interrupted.with_name("predictions.parquet.parts")
    kept = sorted(path.name for path in parts.glob("part-*"))
    other = shutil.copytree(pictures, tmp_path / "other")
    newer = shutil.copytree(model, tmp_path / "colours" / "4")
    cases: list[tuple[Path, Path, int, str]] = [
        (model, other, 8, "source: was {'files': 300"),
        (newer, pictures, 8, r"model: was colours version 3 \(\w{16}\), is colours version 4"),
        (model, pictures, 9, "batch size: was 8, is 9"),
    ]
    for version, source, batch_size, difference in cases:
        with pytest.raises(PredictionError, match=difference) as error:
            predict_source(version, str(source), interrupted, batch_size=batch_size)
        assert "Add --restart to discard them, or choose another --out" in str(error.value)
        assert sorted(path.name for path in parts.glob("part-*")) == kept
    summary = predict_source(model, str(pictures), interrupted, batch_size=8, restart=True)
    assert summary.predicted == COUNT
    assert interrupted.read_bytes() == undisturbed.read_bytes()


def test_a_damaged_part_is_predicted_again(interrupted: Path, model: Path, pictures: Path, undisturbed: Path) -> None:
    part = interrupted.with_name("predictions.parquet.parts") / f"part-{16:012}.parquet"
    part.write_bytes(part.read_bytes()[:-50])
    assert predict_source(model, str(pictures), interrupted, batch_size=8).predicted == COUNT - 16
    assert interrupted.read_bytes() == undisturbed.read_bytes()


def test_one_process_writes_a_result(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    with Parts(out), pytest.raises(PredictionError, match=f"another process is writing {out}: wait for it"):
        predict_source(model, str(pictures), out)


@pytest.mark.parametrize("call_number", [1, 9, -2])
def test_a_full_disk_keeps_the_finished_parts(
    call_number: int,
    model: Path,
    pictures: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At the manifest, at a part, at the result: the last but one, before its folder is synced."""
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == (call_number if call_number > 0 else most + call_number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    original, most = os.fsync, 9999
    out = tmp_path / "predictions.parquet"
    monkeypatch.setattr(prediction, "PART_S", 0)
    monkeypatch.setattr(os, "fsync", fsync)
    if call_number < 0:
        predict_source(model, str(pictures), tmp_path / "counted.parquet", batch_size=8)
        (tmp_path / "counted.parquet").unlink()
        most, calls = calls + 1, 0
    assert call("predict", model, pictures, "--out", out, "--batch-size", 8) == 4
    assert (
        f"error: disk full: cannot write {out}. The finished parts are kept: free some space" in capfd.readouterr().err
    )
    assert not out.exists()
    calls = 10_000
    predict_source(model, str(pictures), out, batch_size=8)
    assert out.read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_prevents_a_prediction_is_explained_and_leaves_nothing(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.parquet").mkdir()
    altered = shutil.copytree(model, tmp_path / "altered" / "1")
    write_checksums(altered)
    with (altered / "saved_model.pb").open("ab") as file:
        file.write(b"\0")
    damaged = shutil.copytree(model, tmp_path / "damaged" / "1")
    (damaged / "saved_model.pb").write_bytes(b"damaged")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out.parquet"
    adder = save_adder(tmp_path / "adder" / "1")
    cases: list[tuple[Path, Path, Path, type[Exception], str]] = [
        (model, pictures, tmp_path / "out.csv", PredictionError, "choose a name that ends in .parquet"),
        (model, pictures, tmp_path / "folder.parquet", PredictionError, "is a folder: choose the name of a file"),
        (model, pictures, tmp_path / "file" / "out.parquet", PredictionError, "cannot write .*out.parquet: "),
        (model, tmp_path / "missing", out, PredictionError, "missing does not exist; expected a folder"),
        (tmp_path / "no model", pictures, out, ExportError, "no model is not an exported model: it does not exist"),
        (altered, pictures, out, PredictionError, "1 differs from its export: saved_model.pb. Copy or export"),
        (damaged, pictures, out, PredictionError, "1 cannot be loaded: "),
        (adder, pictures, out, PredictionError, "1 is not an image classifier: expected a signature serving_default"),
    ]
    for version, source, path, kind, message in cases:
        with pytest.raises(kind, match=message):
            predict_source(version, str(source), path)
    shutil.rmtree(adder.parent)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PredictionError, match=r"not installed: pyarrow. .* -m pip install '.\[batch\]'"):
        predict_source(model, str(pictures), out)


def test_a_source_without_a_readable_image_gives_rows_and_an_exit_code(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("missing.png\nalso-missing.png\n")
    assert call("predict", model, tmp_path / "list.txt", "--out", tmp_path / "out.parquet") == 5
    error = capfd.readouterr().err
    assert error.startswith("error: none of 2 images could be read: the column error has the reasons. The first is ")
    assert error.endswith("missing.png: file not found\n")
    assert [row["error"] for row in read(tmp_path / "out.parquet")] == ["file not found"] * 2


def test_images_above_the_limit_are_not_decoded(model: Path) -> None:
    data = bytearray(encode())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    (row,) = Predictor(model).predict([Row("large.png", bytes(data), len(data))], 0).to_pylist()
    assert row["error"] == "the image has 20000 x 20000 pixels; the maximum is 50,000,000"


def test_the_batches_in_flight_are_bounded(model: Path) -> None:
    """Whatever the source has: it is read only as fast as it is predicted."""

    class Endless:
        given = 0

        def read(self, start: int) -> Iterator[Row]:
            assert start == 5
            while True:
                self.given += 1
                yield Row("x.png", data, len(data))

    data, source, yielded = encode(), Endless(), 0
    batches = prediction._map_batches(Predictor(model), source, 5, batch_size=4, jobs=2)  # type: ignore[arg-type]
    for batch in batches:
        assert batch.column("index").to_pylist() == list(range(5 + yielded, 9 + yielded))
        yielded += len(batch)
        assert source.given - yielded <= 4 * prediction._BATCHES_PER_JOB * 2
        if yielded == 80:
            break
    batches.close()  # type: ignore[attr-defined]


def test_a_model_of_probabilities_only_gives_classes_by_its_model_info(tmp_path: Path, pictures: Path) -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.uint8, "images")])
    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": tf.nn.softmax(tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2)) / 20)}

    version = tmp_path / "plain" / "1"
    tf.saved_model.save(tf.Module(), str(version), signatures={"serving_default": classify})
    predict_source(version.parent, str(pictures / "0000.png"), tmp_path / "numbers.parquet")
    (version / "assets.extra").mkdir()
    (version / "assets.extra" / "model.json").write_text(json.dumps({"class_names": COLOURS}))
    predict_source(version.parent, str(pictures / "0000.png"), tmp_path / "names.parquet")
    (numbered,), (named,) = read(tmp_path / "numbers.parquet"), read(tmp_path / "names.parquet")
    assert list(numbered) == ["source", "index", "label", "class_id", "confidence", "probabilities", "error"]
    assert numbered["class_id"] == named["class_id"] == np.argmax(numbered["probabilities"])
    assert (numbered["label"], named["label"]) == (str(named["class_id"]), COLOURS[named["class_id"]])


def test_a_model_whose_rows_influence_each_other_is_called_one_by_one(tmp_path: Path, pictures: Path) -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.uint8, "images")])
    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        colours = tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2))
        return {"probabilities": tf.nn.softmax(colours / tf.reduce_mean(colours))}

    version = tmp_path / "1"
    tf.saved_model.save(tf.Module(), str(version), signatures={"serving_default": classify})
    with pytest.raises(PredictionError, match=r"depend on the other images of a batch.*with --batch-size 1"):
        predict_source(version, str(pictures), tmp_path / "out.parquet")
    assert predict_source(version, str(pictures), tmp_path / "out.parquet", batch_size=1).images == COUNT


def test_progress_has_the_speed_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("training.image_progress.time.perf_counter", lambda: now)
    with ImageProgress(total=100_000, done=20_000) as progress:
        for now in (130.0, 161.0, 162.0):  # noqa: B007
            progress.update(10_000)
    assert capfd.readouterr().err == "40,000 of 100,000 images  328 images/s  3:03 left\n"


def test_a_folder_is_replaced_only_by_a_complete_result(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    out.write_bytes(b"an earlier result")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PredictionError):
        predict_source(model, str(tmp_path / "empty"), out)
    assert out.read_bytes() == b"an earlier result"
    predict_source(model, str(pictures), out)
    assert len(read(out)) == COUNT
