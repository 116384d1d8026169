"""What callers hand over, as the wire's kinds of numbers: the same numbers, or an error that names the one that is not.

A cast that changes a number would score another row, silently: the id 7.9 would be 7, True would be 1, and a length of
2**32 + 1 would be 1. TypeError for a number of another kind, ValueError for one that the wire's type does not hold.
What does not fit the model, an id beyond its table or a NaN, is left to the server, which knows the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["floats", "names", "whole"]

_FLOAT32 = np.dtype("<f4")
_INT64 = np.iinfo(np.int64)


def whole(
    values: ArrayLike, what: str, columns: Sequence[str] = (), most: int = _INT64.max, least: int = _INT64.min
) -> NDArray[Any]:
    """Whole numbers of ``least`` to ``most`` as an array of a numpy integer type: int32 stays what it is.

    ``columns`` are the features that a matrix's columns are of, for error texts.
    """
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"{what} must be whole numbers, not {array.dtype}")
        array = array if array.dtype.kind in "iu" else array.astype(np.int64)
    else:
        array = _listed(values, what, columns)
    held = np.iinfo(array.dtype)
    if (held.max > most or held.min < least) and array.size and (array.max() > most or array.min() < least):
        index = np.argwhere((array > most) | (array < least))[0]
        raise ValueError(f"{what}{_place(index, columns)}: {array[tuple(index)]} is outside {least} to {most}")
    return array


def floats(values: ArrayLike, what: str) -> NDArray[np.float32]:
    """Numbers as a C-contiguous little-endian float32 array, rounded to it. NaN and infinity stay what they are."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{what}: its rows differ in length") from None
    if array.size and array.dtype.kind not in "fiub" and not np.can_cast(array.dtype, np.float32):
        raise TypeError(f"{what} must be numbers, not {array.dtype}")
    if array.dtype == _FLOAT32:
        return np.ascontiguousarray(array).reshape(array.shape)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=_FLOAT32).reshape(array.shape)
    if array.dtype.itemsize > 2:
        lost = np.isinf(cast) & (array != cast)
        if lost.any():
            index = np.argwhere(lost)[0]
            raise ValueError(f"{what}{_place(index)}: {array[tuple(index)]} is beyond what float32 holds")
    return cast


def names(values: Any, what: str) -> tuple[str, ...]:
    """Text, each. One text alone is refused: its letters would be taken for names."""
    if isinstance(values, str):
        raise TypeError(f"{what} must be a sequence of str, not the one str {values!r}")
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{what} must be str, not {value!r}")
    return tuple(values)


def _listed(values: Any, what: str, columns: Sequence[str]) -> NDArray[Any]:
    """Python's numbers, in any nesting, as int64. numpy alone would take True for 1 and turn all of a list to floats
    for one of them."""
    objects = np.array(values, dtype=object)
    flat = objects.ravel().tolist()
    if not {type(value) for value in flat} <= {int}:
        for index, value in enumerate(flat):
            if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
                place = _place(np.unravel_index(index, objects.shape), columns)
                kind = type(value).__name__
                raise TypeError(f"{what}{place}: {value!r} is of type {kind}; whole numbers are expected")
    try:
        return objects.astype(np.int64)
    except OverflowError:
        (index, value) = next((i, v) for i, v in enumerate(flat) if not _INT64.min <= v <= _INT64.max)
        place = _place(np.unravel_index(index, objects.shape), columns)
        raise ValueError(f"{what}{place}: {value} is beyond what int64 holds") from None


def _place(index: Any, columns: Sequence[str] = ()) -> str:
    """Where in an array, for an error text: a matrix's row and column or feature, the position in what is flat."""
    if len(index) == 2:
        row, column = index
        return f", row {row}, " + (f"feature {columns[column]}" if column < len(columns) else f"column {column}")
    return f", position {', '.join(map(str, index))}" if len(index) else ""
