"""Drift metrics: predictions in service against those on the validation images."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving import drift
from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.drift import Window, stability_index
from serving.inference.model_info import Reference
from serving.metrics.snapshot import Snapshot
from serving.settings import Settings
from tests.serving.conftest import picture

SHARES = (0.5, 0.3, 0.2)
REFERENCE = Reference(images=1_000, class_shares=SHARES, mean_confidence=0.9, mean_typicality=0.5)


def write_info(version: Path, reference: Any) -> None:
    info = {"class_names": ["red", "green", "blue"], "reference": reference}
    (version / "assets.extra" / "model.json").write_text(json.dumps(info))


def make_outputs(class_ids: np.ndarray, *, confidence: float = 0.8) -> dict[str, np.ndarray]:
    probabilities = np.full((len(class_ids), 3), (1 - confidence) / 2, np.float32)
    probabilities[np.arange(len(class_ids)), class_ids] = confidence
    return {"probabilities": probabilities, "typicality": np.full(len(class_ids), 0.25, np.float32)}


def feed(window: Window, shares: tuple[float, ...], *, rows: int = 2_000, seed: int = 0) -> None:
    class_ids = np.random.default_rng(seed).choice(3, rows, p=shares)
    for class_id in class_ids[:200]:
        window.record(make_outputs(np.array([class_id])))
    window.record(make_outputs(class_ids[200:]))


def read_metrics(app: ServingApp) -> dict[tuple[str, str], float]:
    """Return the values of the drift metrics, by name and label."""
    families = text_string_to_metric_families(app.metrics.render().decode())
    samples = [sample for family in families for sample in family.samples if sample.labels.get("version") == "7"]
    return {(sample.name, sample.labels.get("label", "")): sample.value for sample in samples}


@pytest.fixture
def app(tmp_path: Path, colours: Path) -> ServingApp:
    version = tmp_path / "colours" / "7"
    shutil.copytree(colours, version)
    shares = {"images": 1_000, "class_shares": SHARES, "mean_confidence": 0.9, "mean_typicality": 0.5}
    write_info(version, shares)
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    return app


def test_the_index_of_a_stable_stream_is_low_and_of_a_shifted_one_high() -> None:
    stable, shifted = Window(REFERENCE), Window(REFERENCE)
    feed(stable, SHARES)
    feed(shifted, (0.1, 0.2, 0.7))
    assert stability_index(stable.total().classes, REFERENCE) < 0.02
    assert stability_index(shifted.total().classes, REFERENCE) > 0.25


def test_the_index_of_known_shares() -> None:
    reference = Reference(images=10**9, class_shares=(0.5, 0.5), mean_confidence=1, mean_typicality=1)
    expected = (0.8 - 0.5) * np.log(0.8 / 0.5) + (0.2 - 0.5) * np.log(0.2 / 0.5)
    assert stability_index(np.array([8 * 10**8, 2 * 10**8]), reference) == pytest.approx(expected)
    assert np.isfinite(stability_index(np.array([10**6, 0]), reference))


def test_means_and_shares_are_those_of_all_results_large_and_small() -> None:
    window = Window(REFERENCE)
    window.record(make_outputs(np.array([0, 0, 2]), confidence=0.6))
    window.record(make_outputs(np.zeros(100, int), confidence=0.9))
    window.record({"label": np.array([b"red"], object)})  # another signature
    window.record({"probabilities": np.ones((1, 7), np.float32)})  # of other classes
    total = window.total()
    assert total.classes.tolist() == [102, 0, 1]
    assert (total.rows, total.typical_rows) == (103, 103)
    assert total.confidence == pytest.approx(3 * 0.6 + 100 * 0.9)
    assert total.typicality == pytest.approx(103 * 0.25)


def test_the_window_slides() -> None:
    now_s = 0.0
    window = Window(REFERENCE, clock=lambda: now_s)
    for hour, class_id in enumerate((0, 1, 2)):
        now_s = hour * drift.WINDOW_S * 0.6
        window.record(make_outputs(np.array([class_id])))
        assert window.total().rows == min(hour + 1, 2)
    assert window.total().classes.tolist() == [0, 1, 1]
    for _ in range(10 * drift.SLICES):
        now_s += drift.WINDOW_S / drift.SLICES
        window.record(make_outputs(np.array([0])))
        window.total()
    assert len(window.slices) <= drift.SLICES + 1


def test_a_small_queue_holds_the_results_of_few_requests() -> None:
    window = Window(REFERENCE)
    for _ in range(5 * drift.QUEUED_RESULTS):
        window.record(make_outputs(np.array([0])))
        assert len(window.queue) < drift.QUEUED_RESULTS
    window.record(make_outputs(np.zeros(drift.QUEUED_ROWS + 1, int)))
    assert not window.queue


def test_the_metrics_of_served_predictions(app: ServingApp) -> None:
    client = app.test_client()
    for _ in range(drift.MIN_ROWS // 5):
        form = {f"image{index}": (io.BytesIO(picture("blue")), f"{index}.png") for index in range(5)}
        assert client.post("/predict", data=form).status_code == 200
    metrics = read_metrics(app)
    assert metrics["serving_drift_rows", ""] == drift.MIN_ROWS
    assert metrics["serving_class_share", "blue"] == 1
    assert metrics["serving_class_share", "red"] == 0
    assert metrics["serving_validation_class_share", "green"] == 0.3
    assert metrics["serving_validation_mean_typicality", ""] == 0.5
    assert 0.9 < metrics["serving_mean_confidence", ""] <= 1
    assert metrics["serving_drift_psi", ""] > 0.25


def test_few_predictions_have_no_index(app: ServingApp) -> None:
    assert ("serving_class_share", "red") not in read_metrics(app)
    app.test_client().post("/predict", data=picture("red"), content_type="image/png")
    metrics = read_metrics(app)
    assert metrics["serving_class_share", "red"] == 1
    assert ("serving_drift_psi", "") not in metrics


def test_an_export_without_a_reference_has_no_drift_metrics(tmp_path: Path, colours: Path) -> None:
    shutil.copytree(colours, tmp_path / "colours" / "7")
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    assert app.test_client().post("/predict", data=picture("red"), content_type="image/png").status_code == 200
    assert not [name for name, _ in read_metrics(app) if "drift" in name or "validation" in name or "mean" in name]


def test_predictions_of_other_processes_count(app: ServingApp) -> None:
    """With several workers, each renders the drift of all of them."""
    image = picture("red")
    for _ in range(3):
        assert app.test_client().post("/predict", data=image, content_type="image/png").status_code == 200
    window = Window(REFERENCE)
    window.record(make_outputs(np.array([2, 2, 2, 2, 2, 2, 2, 2, 2])))
    app.metrics.read_others = lambda: [Snapshot(drift={("colours", 7): window.total()})]
    metrics = read_metrics(app)
    assert metrics["serving_drift_rows", ""] == 12
    shares = {label: metrics["serving_class_share", label] for label in ("red", "green", "blue")}
    assert shares == {"red": 0.25, "green": 0.0, "blue": 0.75}
    app.metrics.read_others = tuple
    assert read_metrics(app)["serving_drift_rows", ""] == 3
