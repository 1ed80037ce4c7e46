"""Classification: the largest numbers of an output, as strings."""

from __future__ import annotations

import numpy as np
import pytest

from serving.inference.signatures import TensorSpec
from serving.open_inference.results import classify

NAMES = ("cat", "a:b", "Ä")


def strings(array: np.ndarray, count: int, *, shape: tuple[int | None, ...], names: tuple[str, ...] = NAMES) -> object:
    classes = classify(array, TensorSpec("y", "DT_FLOAT", shape, "y:0"), count, names)
    return np.vectorize(bytes.decode, otypes=[object])(classes).tolist() if classes.size else classes.shape


def test_each_row_has_its_largest_numbers_with_labels() -> None:
    array = np.array([[0.25, 0.5, 0.25], [1e-9, 0, 1]], np.float32)
    expected = [["0.500000:1:a:b", "0.250000:0:cat"], ["1.000000:2:Ä", "0.000000:0:cat"]]
    assert strings(array, 2, shape=(None, 3)) == expected


def test_there_are_no_more_than_classes_and_none_without_any() -> None:
    assert strings(np.zeros((1, 3), np.float32), 2**62, shape=(None, 3)) == [
        ["0.000000:0:cat", "0.000000:1:a:b", "0.000000:2:Ä"]
    ]
    assert strings(np.zeros((2, 0), np.float32), 5, shape=(None, None)) == (2, 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_whole_numbers_have_no_decimals_and_extremes_are_ordered(dtype: type) -> None:
    limits = np.iinfo(dtype)
    array: np.ndarray = np.array([[limits.min, limits.max]], dtype)
    assert strings(array, 2, shape=(None, 2)) == [[f"{limits.max}:1", f"{limits.min}:0"]]


def test_further_axes_are_one_row_and_without_a_batch_axis_there_is_one() -> None:
    array = np.arange(4, dtype=np.float16).reshape(1, 2, 2)
    assert strings(array, 1, shape=(None, 2, 2)) == [["3.000000:3"]]
    assert strings(array[0], 1, shape=(2, 2)) == ["3.000000:3"]
    assert strings(np.array(7, np.float32), 1, shape=()) == ["7.000000:0"]
