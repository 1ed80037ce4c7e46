import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.config import TrainingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "cifar100"),
        ("variant", "resnet"),
        ("loop", "keras"),
        ("conv_activation", "gelu"),
        ("epochs", 0),
        ("batch_size", 0),
        ("plateau_patience", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("plateau_factor", 1.0),
        ("image_size", (0, 32)),
        ("seed", -1),
        ("seed", 2**31),
        ("preset", "quick"),
        ("backbone", "MobileNetV3Small"),
        ("weights", Path("small.h5")),
        ("weights_sha256", "ab"),
    ],
)
def test_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


def test_json_round_trip():
    config = TrainingConfig(data=Path("some/where"), image_size=(48, 64), epochs=3, deterministic=True)
    assert TrainingConfig.from_json(config.to_json()) == config
    assert TrainingConfig.from_json(TrainingConfig().to_json()) == TrainingConfig()
    transfer = TrainingConfig.fill_in(variant="transfer", weights=Path("some/where.h5"), weights_sha256="ab")
    assert transfer.backbone == "MobileNetV3Small"
    assert TrainingConfig.from_json(transfer.to_json()) == transfer


def test_a_resumed_run_may_find_the_same_files_in_other_places():
    config = TrainingConfig.fill_in(variant="transfer", weights=Path("a.h5"), weights_sha256="ab", data=Path("a"))
    earlier = json.loads(config.to_json())
    moved = dataclasses.replace(config, weights=Path("b.h5"), data=Path("b"))
    assert moved.changes_from(earlier) == {}
    assert dataclasses.replace(moved, weights_sha256="cd").changes_from(earlier) == {"weights_sha256": ("cd", "ab")}


def test_unknown_backbone_is_rejected_with_the_choices():
    with pytest.raises(ValueError, match=r"backbone must be one of MobileNetV3Small, .* got 'VGG16'"):
        TrainingConfig.fill_in(variant="transfer", backbone="VGG16")


@pytest.mark.parametrize("text", ["[]", "{", '{"epochs": 3, "optimiser": "adam"}', '{"epochs": 0}'])
def test_invalid_json_is_rejected(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the four have different messages
        TrainingConfig.from_json(text)


def test_command_line_does_not_import_tensorflow():
    program = "import sys, training.__main__; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
