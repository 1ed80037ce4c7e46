"""Nested JSON lists to flat elements and a shape, at the speed of C functions."""

from __future__ import annotations

from itertools import chain
from typing import Any


def flatten(value: Any) -> tuple[list[Any], tuple[int, ...], set[type]] | None:
    """Flatten nested lists level by level.

    Returns:
        The elements, their shape and their types; None if the lists of a level differ in length. Lists that are mixed
        with elements count as elements.

    Example:
        >>> flatten([[1, 2.5], [3, 4]])
        ([1, 2.5, 3, 4], (2, 2), {<class 'int'>, <class 'float'>})
    """
    shape: list[int] = []
    elements = [value]
    while (types := set(map(type, elements))) == {list}:
        lengths = set(map(len, elements))
        if len(lengths) > 1:
            return None
        shape.append(lengths.pop())
        elements = list(chain.from_iterable(elements))
    return elements, tuple(shape), types
