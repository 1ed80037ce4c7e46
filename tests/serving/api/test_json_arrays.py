"""Nested lists to elements and a shape, as both JSON protocols read them."""

from __future__ import annotations

from typing import Any

import pytest

from serving.api.json_arrays import flatten


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, ([1], (), {int})),
        ([], ([], (0,), set())),
        ([[], []], ([], (2, 0), set())),
        ([[1, 2.5], [3, 4]], ([1, 2.5, 3, 4], (2, 2), {int, float})),
        ([[["a"]]], (["a"], (1, 1, 1), {str})),
        ([1, [2]], ([1, [2]], (2,), {int, list})),
        ([[1, 2], [3]], None),
        ([[[1]], []], None),
    ],
)
def test_flatten(value: Any, expected: Any) -> None:
    assert flatten(value) == expected
