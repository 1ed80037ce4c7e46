from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from serving.errors import ModelLoadError
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.warmup import MAX_RECORDS, WARMUP_FILE, read_warmup_records, replay_warmup_records
from tests.serving.saved_models import save_multiplier, write_warmup_records


@pytest.fixture
def version(tmp_path: Path, colours: Path) -> Path:
    return shutil.copytree(colours, tmp_path / "1")


class CountingPredictor(SavedModelPredictor):
    rows: list[int]

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        self.rows = [*getattr(self, "rows", []), len(inputs["images"])]
        return super().predict(signature, inputs, deadline_s=deadline_s)


def test_every_warm_up_record_is_replayed(version: Path) -> None:
    predictor = CountingPredictor(version)
    assert replay_warmup_records(version, predictor) == 2
    assert predictor.rows == [1, 3]


def test_warm_up_records_are_optional(version: Path) -> None:
    (version / WARMUP_FILE).unlink()
    assert replay_warmup_records(version, SavedModelPredictor(version)) == 0


def test_defaults_replace_omitted_inputs(tmp_path: Path) -> None:
    path = save_multiplier(tmp_path / "1")
    write_warmup_records(path, [np.ones(2, np.float32)], name="x")
    predictor = SavedModelPredictor(path)
    ((signature, inputs),) = read_warmup_records(path, predictor.signatures)
    assert (signature, inputs["x"].tolist(), inputs["k"].tolist()) == ("serving_default", [1, 1], 3)
    assert replay_warmup_records(path, predictor) == 1


def refusal(version: Path) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as refused:
        replay_warmup_records(version, SavedModelPredictor(version))
    return refused.value


def test_a_rejected_record_fails_the_load(version: Path) -> None:
    good, bad = np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 31, 32, 3), np.uint8)
    write_warmup_records(version, [good, bad])
    assert "warm-up record 1" in str(refusal(version))
    assert "got uint8 (1, 31, 32, 3)" in str(refusal(version))
    write_warmup_records(version, [good], signature="nope")
    assert '"nope" not found' in str(refusal(version))


def test_too_many_records_fail_the_load(version: Path) -> None:
    write_warmup_records(version, [np.zeros((1, 32, 32, 3), np.uint8)] * (MAX_RECORDS + 1))
    assert f"more than {MAX_RECORDS:,}".replace(",", "") in str(refusal(version)).replace(",", "")


def test_damaged_files_fail_the_load(version: Path) -> None:
    file = version / WARMUP_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert refusal(version).code == "DATA_LOSS"
    file.write_bytes(b"no records at all, but long enough for a header")
    assert refusal(version).code == "DATA_LOSS"
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(b"\xff\xff not a protocol buffer")
    assert refusal(version).code == "DATA_LOSS"
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(prediction_log_pb2.PredictionLog().SerializeToString())
    assert refusal(version).code == "UNIMPLEMENTED"
