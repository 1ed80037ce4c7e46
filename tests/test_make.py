"""What `make` hands on to the programs, whatever is in a path."""

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PYTHON = """#!/usr/bin/env python3
import json, sys
print(json.dumps(sys.argv[1:]))
"""
AWKWARD = "my 'cat' & \"dog\" pictures $HOME (2)"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile, and a Python that only prints its arguments."""
    shutil.copy(PROJECT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def make(project: Path, *arguments: str) -> list[str]:
    # The tests may run below make, which would hand its flags on, and have its children print their folder.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", *arguments], cwd=project, env=env, capture_output=True, text=True, check=True)
    given: list[str] = json.loads(done.stdout.splitlines()[-1])
    return given


def options(given: list[str]) -> dict[str, str]:
    return {name: value for name, value in itertools.pairwise(given) if name.startswith("--")}


def test_sizes_and_the_name_are_handed_on(project: Path) -> None:
    given = options(make(project, "train", "IMAGE_SIZE=64x48", "BATCH_SIZE=16", "NAME=pets"))
    assert (given["--image-size"], given["--batch-size"], given["--name"]) == ("64x48", "16", "pets")
    assert not {"--image-size", "--batch-size", "--data", "--name"} & set(make(project, "train"))


def test_backbone_and_weights_are_handed_on(project: Path) -> None:
    given = options(make(project, "train", "VARIANT=transfer", "BACKBONE=EfficientNetV2B0", f"WEIGHTS={AWKWARD}"))
    assert (given["--backbone"], given["--weights"]) == ("EfficientNetV2B0", AWKWARD)
    assert not {"--backbone", "--weights"} & set(make(project, "train"))
    assert options(make(project, "train", "RESUME=run", "WEIGHTS=small.h5"))["--weights"] == "small.h5"


def test_streaming_and_shards_are_handed_on(project: Path) -> None:
    assert "--stream" in make(project, "train", "DATASET=folder", "DATA=shards", "STREAM=1")
    assert "--stream" in make(project, "train", "RESUME=run", "STREAM=1")
    assert "--stream" not in make(project, "train")
    given = make(project, "shard", f"DATA={AWKWARD}", f"OUTPUT=shards {AWKWARD}", "IMAGE_SIZE=64x48", "SEED=3")
    assert (options(given)["--out"], given[-1]) == (f"shards {AWKWARD}", AWKWARD)
    assert (options(given)["--image-size"], options(given)["--seed"]) == ("64x48", "3")
    done = subprocess.run(["make", "shard", "DATA=photos"], cwd=project, capture_output=True, text=True, check=False)
    assert "name two folders: make shard DATA=photos OUTPUT=shards" in done.stderr


def test_paths_may_hold_any_characters(project: Path) -> None:
    given = options(make(project, "train", "DATASET=folder", f"DATA={AWKWARD}", f"MODELS=models {AWKWARD}"))
    assert (given["--data"], given["--models-dir"]) == (AWKWARD, f"models {AWKWARD}")
    assert options(make(project, "train", f"RESUME={AWKWARD}"))["--resume"] == AWKWARD
    assert options(make(project, "serve", f"MODELS={AWKWARD}"))["--models-dir"] == AWKWARD
    assert make(project, "predict", f"IMAGE={AWKWARD}")[-1] == AWKWARD


def test_the_model_to_convert_is_handed_on(project: Path) -> None:
    given = make(project, "convert", f"MODEL=models/{AWKWARD}", "TO=onnx", f"OUTPUT={AWKWARD}")
    assert (options(given)["--to"], options(given)["--output"], given[-1]) == ("onnx", AWKWARD, f"models/{AWKWARD}")
    assert "--output" not in make(project, "convert", "MODEL=models/pets", "TO=litert")
    done = subprocess.run(["make", "convert", "TO=onnx"], cwd=project, capture_output=True, text=True, check=False)
    assert "name a model and a format: make convert MODEL=models/pets TO=onnx" in done.stderr


def test_the_model_to_query_is_handed_on(project: Path) -> None:
    assert options(make(project, "predict", "IMAGE=cat.png", "MODEL=pets"))["--model"] == "pets"
    assert "--model" not in make(project, "predict", "IMAGE=cat.png")


def test_a_model_to_import_is_handed_on(project: Path) -> None:
    given = make(project, "import", f"MODEL={AWKWARD}", f"LABELS={AWKWARD}", "INPUT_SCALE=-1..1", "NAME=pets")
    assert given[-2:] == ["--", AWKWARD]
    named = options(given)
    assert (named["--labels"], named["--input-scale"], named["--name"]) == (AWKWARD, "-1..1", "pets")
    assert not {"--labels", "--input-scale", "--data", "--image-size"} & set(make(project, "import", "MODEL=a.keras"))


def test_the_container_is_given_an_absolute_path(project: Path) -> None:
    script = project / "deploy" / "tfserving.sh"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nprintf %s "[\\"$MODELS\\"]"\n')
    script.chmod(0o755)
    assert make(project, "tfserving", "MODELS=my models (2)") == [f"{project}/my models (2)"]
    assert make(project, "tfserving", "MODELS=/my models") == ["/my models"]
