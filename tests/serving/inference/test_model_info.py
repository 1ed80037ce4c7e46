"""Reading of valid and invalid model.json files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pytest

from serving.inference.model_info import MAX_INFO_BYTES, ModelInfo, Reference, read_model_info


def read(version: Path, text: bytes | str) -> tuple[ModelInfo, str]:
    file = version / "assets.extra" / "model.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    info, problem = read_model_info(version)
    orjson.dumps(asdict(info))  # can be sent as JSON
    return info, problem


def test_the_known_fields_are_read(tmp_path: Path) -> None:
    whole = {"class_names": ["a", "b"], "dataset": {"name": "paint", "hash": 1}, "test": {"accuracy": 1}, "seed": [0]}
    assert read(tmp_path, json.dumps(whole)) == (ModelInfo(("a", "b"), "paint", 1.0), "")
    assert read(tmp_path, "{}") == (ModelInfo(), "")
    assert read(tmp_path, '{"class_names": null, "dataset": null, "test": {"accuracy": null}}') == (ModelInfo(), "")


def test_a_missing_file_is_not_an_error(tmp_path: Path) -> None:
    assert read_model_info(tmp_path) == (ModelInfo(), "")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"[1]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"class_names": ' + b"9" * 5_000 + b"}",
        b" " * (MAX_INFO_BYTES + 1),
        b"\0" * 100,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_an_invalid_file_is_reported(tmp_path: Path, text: bytes) -> None:
    info, problem = read(tmp_path, text)
    assert info == ModelInfo()
    assert str(tmp_path / "assets.extra" / "model.json") in problem


NO_OBJECTS: list[Any] = ["paint", 1, ["name"], True]
NO_STRINGS: list[Any] = [1, [], {}, True]
NO_TESTS: list[Any] = [0.5, [0.5], "high"]
NO_ACCURACIES: list[Any] = ["high", True, [], -0.1, 1.1, 10**400, float("nan"), float("inf")]


REFERENCE = {"images": 20, "class_shares": [0.25, 0.75], "mean_confidence": 0.9, "mean_typicality": 0.5}
NO_SHARES: list[Any] = [None, 0.5, [], ["a"], [0.5, 0.4], [1.5, -0.5], [float("nan"), 1]]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        *(
            ("class_names", value, "class_names must")
            for value in (
                3,
                "ab",
                {"0": "a"},
                [{"name": "a"}],
                [["a"], "b"],
                [None],
                [True],
                ["a", "a"],
                [1.5],
                [1, "1"],
            )
        ),
        *(("dataset", value, "dataset must be an object") for value in NO_OBJECTS),
        *(("dataset", {"name": value}, "dataset.name must") for value in NO_STRINGS),
        *(("test", value, "test must be an object") for value in NO_TESTS),
        *(("test", {"accuracy": value}, "test.accuracy must") for value in NO_ACCURACIES),
        *(("reference", value, "reference must be an object") for value in NO_OBJECTS),
        *(("reference", REFERENCE | {"images": value}, "reference.images must") for value in (None, 0, 1.5, True)),
        *(("reference", REFERENCE | {"class_shares": value}, "class_shares must") for value in NO_SHARES),
        *(("reference", REFERENCE | {"mean_typicality": value}, "mean_typicality must") for value in NO_ACCURACIES),
    ],
)
def test_an_invalid_field_is_reported_and_the_others_are_read(
    tmp_path: Path, field: str, value: Any, problem: str
) -> None:
    good = {"class_names": ["a"], "dataset": {"name": "paint"}, "test": {"accuracy": 0.5}, "reference": REFERENCE}
    info, found = read(tmp_path, json.dumps(good | {field: value}))
    reference = Reference(20, (0.25, 0.75), 0.9, 0.5)
    expected: dict[str, Any] = {
        "class_names": ("a",),
        "dataset": "paint",
        "test_accuracy": 0.5,
        "reference": reference,
    }
    del expected["test_accuracy" if field == "test" else field]
    assert info == ModelInfo(**expected)
    assert problem in found


def test_lone_surrogates_are_escaped(tmp_path: Path) -> None:
    info, _ = read(tmp_path, r'{"class_names": ["\ud800", "\udcff", "ok"], "dataset": {"name": "\udfff\ud800"}}')
    assert info == ModelInfo((r"\ud800", r"\xff", "ok"), r"\udfff\ud800")


@pytest.mark.timeout(60)
def test_a_pipe_is_reported_and_does_not_block(tmp_path: Path) -> None:
    file = tmp_path / "assets.extra" / "model.json"
    file.mkdir(parents=True)
    assert "is not a regular file" in read_model_info(tmp_path)[1]
    file.rmdir()
    os.mkfifo(file)
    assert "is not a regular file" in read_model_info(tmp_path)[1]
    file.unlink()
    file.symlink_to(file)
    assert "cannot read" in read_model_info(tmp_path)[1]
