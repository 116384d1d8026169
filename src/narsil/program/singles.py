"""Reads lookups of single ids: of features whose bags hold one id each, laid out as the rows are.

As with bags, where an id stands is followed by example: its place must be the one of its row's only id, in both
recordings.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.program.ragged import functions_of, vectors_of_ids
from narsil.program.reader import Reader, reads
from narsil.program.recording import Op
from narsil.program.steps import ID_FUNCTIONS, Lookup, Reshape, Table
from narsil.program.values import Known, Opaque, PerId, Unread

__all__ = ["read_embedding"]

_KINDS = {torch.float32: 0, torch.float16: 1}  # FBGEMM's SparseType of a table
_FOLLOWED = frozenset({"ids", "by_feature", *ID_FUNCTIONS})


@reads("aten.embedding")
def read_embedding(reader: Reader, op: Op) -> Known:
    """torch's lookup of each id: (B,) or (B, T) ids become (B, dim) or (B, T, dim)."""
    weight, known = reader.fixed(op.args[0]), reader.of(op.args[1])
    if not isinstance(known, PerId) or weight.dtype not in _KINDS:
        raise Unread("it looks up what are no ids, or in a table of other numbers than floats")
    try:
        found = [
            _features(places, lengths, rows)
            for places, lengths, rows in zip(known.positions, reader.groups[known.group], reader.rows, strict=True)
        ]
    except Unread:
        return vectors_of_ids(reader, op, known, weight)  # of bags
    if found[0] != found[1]:
        raise Unread("which feature is looked up where follows from the rows")
    features, number = found[0], op.outputs[0]
    if number is None:
        raise Unread("it makes no tensor")
    table = _table(weight)
    step = Lookup(number, known.group, features, (table,) * len(features), "sum", known.expression)
    reader.lookups.append(step)
    if unknown := next((each for each in functions_of(known.expression) if each not in _FOLLOWED), ""):
        return Opaque(f"{op.name}: no step for {unknown} of its ids")
    if known.positions[0].dim() == 1:
        return reader.add(op, step, (table.dim,))
    hidden = reader.hidden((len(features) * table.dim,))
    reader.steps.append(replace(step, out=hidden))
    shape = (*known.positions[0].shape[1:], table.dim)
    return reader.add(op, Reshape(number, hidden, shape), shape)


def _table(weight: torch.Tensor) -> Table:
    data = np.ascontiguousarray(weight.detach().cpu().numpy())
    row_bytes = data.shape[1] * data.itemsize
    return Table(
        "embedding", data.view(np.uint8).reshape(-1), 0, len(data), data.shape[1], _KINDS[weight.dtype], row_bytes, 0
    )


def _features(places: torch.Tensor, lengths: NDArray[np.int64], rows: int) -> tuple[int, ...]:
    """The feature of each column of places, (B, ..), in one recording. Raises Unread where one is none."""
    if places.dim() < 1 or places.shape[0] != rows:
        raise Unread("its ids are not laid out as the rows are")
    starts = np.cumsum(lengths.sum(axis=1)) - lengths.sum(axis=1)
    found = []
    for column in places.reshape(rows, -1).numpy().T:
        feature = int(np.searchsorted(starts, column[0], side="right") - 1)
        if not (lengths[feature] == 1).all() or not np.array_equal(column, starts[feature] + np.arange(rows)):
            raise Unread("it looks ids up one by one that are not the only ones of their bags")
        found.append(feature)
    return tuple(found)
