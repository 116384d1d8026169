"""Fuses the features of several requests into one Batch.

Receives validated Features in whatever layout they came, produces key-major tensors over all rows. Owns the
buffers it fills, which are used again by the next batch of the same lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Batch, Features, Floats, Ints, Jagged, OneHot, Payload
from narsil.extension import NativeFeatures, all_native


class Collator:
    """One lane's collation buffers. A Batch it returns is valid until its next ``collate``."""

    def __init__(self, schema: ModelSchema, bucket: Callable[[int], int] = lambda rows: rows) -> None:
        self._schema = schema
        self._bucket = bucket
        self._dense = np.empty(0, dtype=np.float32)
        self._values: Ints = np.empty(0, dtype=schema.id_dtype)
        self._ones = np.ones(0, dtype=np.int32)
        self._lengths = np.empty(0, dtype=np.int32)

    def collate(self, payloads: Sequence[Payload]) -> Batch:
        """Fuses payloads in the given order: row i of part p becomes row ``sum of rows before p`` + i. Padding
        follows."""
        rows = self._bucket(sum(part.rows for part in payloads))
        if all_native(payloads):
            return self._native_batch(payloads, rows)
        parts = [part.portable() for part in payloads]
        dense = self._fuse_dense(parts, rows)
        one_hot = [part.sparse for part in parts if isinstance(part.sparse, OneHot)]
        if len(one_hot) == len(parts):
            return self._one_hot_batch(one_hot, rows, dense)
        return self._jagged_batch([part.sparse.jagged() for part in parts], rows, dense)

    def _native_batch(self, parts: Sequence[NativeFeatures], rows: int) -> Batch:
        from narsil._native import collate

        calls = [part.call for part in parts]
        bags = self._schema.num_features * rows
        one_hot = all(call.one_hot for call in calls)
        count = bags if one_hot else sum(part.ids for part in parts)
        self._values = _grown(self._values, count)
        if one_hot:
            lengths = self._all_ones(bags)
        else:
            self._lengths = _grown(self._lengths, bags)
            lengths = self._lengths[:bags]
        dense = self._dense_of(rows)
        collate(calls, rows, dense, self._values, None if one_hot else lengths)
        return Batch(rows, dense, lengths, self._values[:count], one_hot)

    def _all_ones(self, count: int) -> Ints:
        if len(self._ones) < count:
            self._ones = np.ones(2 * count, dtype=np.int32)
        return self._ones[:count]

    def _dense_of(self, rows: int) -> Floats:
        """(rows, D) of the buffer."""
        width = self._schema.dense_dim
        self._dense = _grown(self._dense, rows * width)
        return self._dense[: rows * width].reshape(rows, width)

    def _fuse_dense(self, parts: Sequence[Features], rows: int) -> Floats:
        dense = self._dense_of(rows)
        start = 0
        for part in parts:
            dense[start : start + part.rows] = part.dense
            start += part.rows
        dense[start:] = 0
        return dense

    def _one_hot_batch(self, parts: Sequence[OneHot], rows: int, dense: Floats) -> Batch:
        count = self._schema.num_features * rows
        self._values = _grown(self._values, count)
        values = self._values[:count].reshape(-1, rows)
        start = 0
        for part in parts:
            stop = start + part.ids.shape[1]
            values[:, start:stop] = part.ids
            start = stop
        values[:, start:] = 0
        return Batch(rows, dense, self._all_ones(count), values.reshape(count), one_hot=True)

    def _jagged_batch(self, parts: Sequence[Jagged], rows: int, dense: Floats) -> Batch:
        padding = rows - sum(part.lengths.shape[1] for part in parts)
        if padding:
            nothing = np.zeros((self._schema.num_features, padding), dtype=np.int32)
            parts = [*parts, Jagged(np.empty(0, dtype=np.int32), nothing, nothing)]
        bases = np.cumsum([0, *(len(part.values) for part in parts[:-1])])
        # Over all rows, key-major: where each bag begins in the parts' values laid end to end, and how long it is.
        starts = np.concatenate([part.starts + base for part, base in zip(parts, bases, strict=True)], axis=1).ravel()
        lengths = np.concatenate([part.lengths for part in parts], axis=1, dtype=np.int32).ravel()
        ends = np.cumsum(lengths, dtype=np.int64)
        # Value i of the batch comes from position i + (its bag's start there - its bag's start here).
        source = np.repeat(starts - (ends - lengths), lengths)
        source += np.arange(len(source))
        # A lone part, or a slice of one, is gathered from where it lies: its values may be many more than its rows
        # need.
        pools = [part.values for part in parts if len(part.values)]
        pool = pools[0] if len(pools) == 1 else np.concatenate([part.values for part in parts])
        values = pool[source].astype(self._schema.id_dtype, copy=False)
        weights = None
        if any(part.weights is not None for part in parts):
            weights = np.concatenate([part.weights_or_ones() for part in parts])[source]
        return Batch(rows, dense, lengths, values, one_hot=False, weights=weights)


def _grown(buffer: NDArray[Any], size: int) -> NDArray[Any]:
    """The buffer if it holds ``size`` items, else a new one with room to spare."""
    return buffer if len(buffer) >= size else np.empty(2 * size, dtype=buffer.dtype)
