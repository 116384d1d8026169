"""Holds a model's weights against the one thing that every forward needs of them: that they are finite numbers.

Receives arrays as they lie in memory or in a mapped file; raises ArtifactError naming the table and the row. One NaN
or infinity in a table makes a NaN of every score that looks it up, and nothing later can tell where it came from.
Imports no torch.

An INT8 row begins with its scale and its bias in FP16, whose largest number is 65504: weights beyond it become infinite
there, however finite they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.errors import ArtifactError

__all__ = ["FP16_MOST", "bad_weights", "check_quantized_tables", "first_bad_row", "first_bad_scale"]

FP16_MOST = 65504.0  # the largest FP16 number

_CHUNK_BYTES = 16 << 20  # looked at together: what a check needs beside the weights


def check_quantized_tables(
    data: NDArray[np.uint8],
    starts: Sequence[int],
    rows: Sequence[int],
    row_bytes: int,
    tables: Iterable[str],
    name: str,
) -> None:
    """Raises ArtifactError where an INT8 row's FP16 scale or bias is NaN or infinite.

    ``data`` is (bytes,), such as a mapped tables.bin; table t has ``rows[t]`` rows of ``row_bytes`` bytes from byte
    ``starts[t]`` on, all inside ``data``. ``tables`` are their names and ``name`` the file's, for the message.
    """
    for table, start, count in zip(tables, starts, rows, strict=True):
        bad = first_bad_scale(data[start : start + count * row_bytes].reshape(count, row_bytes))
        if bad is not None:
            raise ArtifactError(bad_weights(name, f"row {bad} of table {table}"))


def bad_weights(file: str, what: str) -> str:
    """The sentence about weights, of a row or a tensor, that are no finite numbers."""
    return (
        f"{file}: {what} is NaN or infinite, and so would be every score that meets it; mend it, or train the model "
        "again, and package it again"
    )


def first_bad_scale(rows: NDArray[np.uint8], scale_bias: Any = np.float16) -> int | None:
    """The first of (rows, bytes) quantized rows, each of which begins with a scale and a bias of the given type, that
    has one that is NaN or infinite; None where all are finite."""
    kind = np.dtype(scale_bias).newbyteorder("<")
    step = max(1, _CHUNK_BYTES // (2 * kind.itemsize))
    for start in range(0, len(rows), step):
        pairs = np.ascontiguousarray(rows[start : start + step, : 2 * kind.itemsize]).view(kind)
        bad = first_bad_row(pairs)
        if bad is not None:
            return start + bad
    return None


def first_bad_row(values: NDArray[Any]) -> int | None:
    """The first index along the first axis of a float array at which there is NaN or infinity; None without one."""
    flat = values.reshape(len(values), prod(values.shape[1:])) if values.ndim else values.reshape(1, 1)
    step = max(1, _CHUNK_BYTES // max(1, flat.shape[1] * flat.itemsize))
    for start in range(0, len(flat), step):
        finite = np.isfinite(flat[start : start + step])
        if not finite.all():
            return start + int(np.argmin(finite.all(axis=1)))
    return None
