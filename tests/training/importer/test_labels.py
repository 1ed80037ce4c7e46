"""Accepted forms of `--labels`, and rejected ones."""

import json

import pytest

from training.errors import ModelError
from training.importer.labels import read_labels

LABELS = ("cat", "dog", "größe")


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\ngröße\n",
        "\ufeffcat\r\ndog\r\ngröße",
        json.dumps(LABELS),
        json.dumps({"dog": 1, "cat": 0, "größe": 2}),
        json.dumps({"1": "dog", "0": "cat", "2": "größe"}, indent=2),
    ],
    ids=["lines", "of Windows", "JSON list", "class_indices", "by class id"],
)
def test_a_file(tmp_path, text):
    path = tmp_path / "labels.txt"
    path.write_bytes(text.encode())
    assert read_labels(path) == read_labels(str(path)) == LABELS


def test_text_and_sequences():
    assert read_labels("cat, dog,größe") == LABELS
    assert read_labels('["cat", "dog", "größe"]') == LABELS
    assert read_labels(["cat", "dog", "größe"]) == LABELS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cat", r"the labels 'cat' are neither a file nor a list. Give a file with one label a line"),
        ("cat,,dog", "label 2 of 3 in cat,,dog is empty"),
        ("cat,dog,cat", "the labels have 'cat' 2 times: each class needs its own label"),
        ("[3, 4]", r"not valid JSON: expected a list of labels, or an object that gives each label its class id"),
        ('{"cat": 1, "dog": 2}', "expected a list of labels"),
        ('["cat"', "the labels in .* are not valid JSON"),
        (["cat"], "found 1 label in .*, and a classifier needs at least two"),
    ],
)
def test_rejected_labels(given, message):
    with pytest.raises(ModelError, match=message):
        read_labels(given)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "labels.png").write_bytes(b"\x89PNG\r\n\xff")
    with pytest.raises(ModelError, match="the labels cannot be read from "):
        read_labels(tmp_path / "labels.png")
