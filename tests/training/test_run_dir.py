"""Run directories: creation, and invalid or edited files in them."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from training.config import TrainingConfig
from training.errors import RunError
from training.run_dir import RunDir


def test_runs_started_in_the_same_second_have_different_folders(tmp_path):
    path = tmp_path / "runs" / "20260101-000000-shapes"
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda seed: RunDir.create_numbered(path, TrainingConfig(seed=seed)), range(8)))
    assert len({run.path for run in runs}) == 8
    assert path in [run.path for run in runs]
    assert [run.read_config().seed for run in runs] == list(range(8))


def test_named_folder_contains_one_run(tmp_path):
    RunDir.create(tmp_path / "run", TrainingConfig(seed=1))
    with pytest.raises(RunError, match="contains a run already"):
        RunDir.create(tmp_path / "run", TrainingConfig(seed=2))
    assert RunDir.open(tmp_path / "run").read_config().seed == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"epochs": "5"}, 'epochs must be a whole number; got "5"'),
        ({"epochs": 2.5}, "epochs must be a whole number; got 2.5"),
        ({"epochs": None}, "epochs must be a whole number; got null"),
        ({"deterministic": "no"}, 'deterministic must be true or false; got "no"'),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"seed": True}, "seed must be a whole number; got true"),
        ({"image_size": 32}, r"image_size must be \[height, width\]; got 32"),
        ({"image_size": [32, "x"]}, r"image_size must be \[height, width\]"),
        ({"data": 5}, "data must be a text"),
        ({"preset": ["quick"]}, "preset must be a text"),
    ],
)
def test_a_config_edited_to_a_wrong_type_is_rejected(tmp_path, edit, message):
    run = RunDir.create(tmp_path / "run", TrainingConfig())
    values = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**values, **edit}))
    with pytest.raises(RunError, match=rf"config\.json is invalid: {message}"):
        run.read_config()


def test_fixed_settings_that_changed_are_listed():
    then = json.loads(TrainingConfig().to_json())
    assert TrainingConfig(epochs=99, tensorboard=True).changes_from(then) == {}
    assert TrainingConfig(learning_rate=0.5, seed=3).changes_from(then) == {
        "learning_rate": (0.5, 0.001),
        "seed": (3, 0),
    }
    assert TrainingConfig(seed=3).changes_from({}) == {}  # checkpoints of earlier versions do not say


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"name": "pets"}', "\x00\x00"])
def test_invalid_dataset_json_is_named(tmp_path, content):
    run = RunDir.create(tmp_path / "run", TrainingConfig())
    (run.path / "dataset.json").write_text(content)
    with pytest.raises(RunError, match=r"dataset\.json"):
        run.read_dataset()


@pytest.mark.parametrize("content", ["epoch\nx\n", "epoch,loss\n1,2\n", "loss\n1\n"])
def test_invalid_history_csv_is_named(tmp_path, content):
    run = RunDir.create(tmp_path / "run", TrainingConfig())
    (run.path / "history.csv").write_text(content)
    with pytest.raises(RunError, match=r"history\.csv is invalid.*--resume"):
        run.read_history()
