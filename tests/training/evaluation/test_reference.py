"""The summary of the predictions on the validation images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from serving.inference.model_info import read_model_info
from training.evaluation.reference import summarize_predictions


def test_shares_and_means(tmp_path: Path) -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]], np.float32)
    reference = summarize_predictions(probabilities, np.array([0.1, 0.2, 0.3, 0.8], np.float32))
    assert (reference.images, reference.class_shares) == (4, (0.75, 0.25, 0.0))
    assert reference.mean_confidence == pytest.approx(0.65)
    assert reference.mean_typicality == pytest.approx(0.35)
    (tmp_path / "assets.extra").mkdir()
    (tmp_path / "assets.extra" / "model.json").write_text(json.dumps({"reference": reference.to_json()}))
    info, problem = read_model_info(tmp_path)
    assert problem == ""
    assert info.reference is not None
    assert info.reference.class_shares == reference.class_shares
    assert info.reference.mean_confidence == reference.mean_confidence
