"""Reads sequences: vectors that a lookup gives one by one, for each id, until they are laid out at a fixed length.

As with ids, where each vector stands is followed by example: an operation that moves vectors is run again on the
positions of their ids. Laid out, they must be the bags of one of the request's features, in both recordings.
"""

from __future__ import annotations

from typing import Any

import torch

from narsil.program.ragged import matched, moved
from narsil.program.reader import Reader, reads
from narsil.program.recording import Op, Ref
from narsil.program.steps import Laid, of_feature
from narsil.program.values import Counted, Known, Structure, Unread, Vectors

__all__ = ["move_vectors"]

_AXIS = {"aten.cat": 1, "aten.index_select": 1, "aten.slice": 1, "aten.split": 2, "aten.split_with_sizes": 2}


def move_vectors(reader: Reader, op: Op) -> Any:
    """What an operation makes that moves vectors, each as a whole."""
    place = _AXIS.get(op.name)
    if place is None:
        raise Unread("it takes a vector for each id")
    axis = op.kwargs.get("dim", op.args[place] if len(op.args) > place else 0)
    if axis != 0:
        raise Unread("it cuts the vectors of ids")
    if op.name == "aten.index_select":
        return _all_of(reader, op)
    items = op.args[0] if op.name == "aten.cat" else op.args[:1]
    sources = [_vectors(reader, item) for item in items]
    first, tables = sources[0], dict(sources[0].tables)
    for source in sources:
        if (source.group, source.ids) != (first.group, first.ids):
            raise Unread("it mixes vectors of different groups, or of ids to which different things were done")
        if any(tables.setdefault(feature, table) is not table for feature, table in source.tables.items()):
            raise Unread("it mixes vectors of one feature's ids from several tables")
    made = [moved(reader, op, which) for which in (0, 1)]
    found = [Vectors(first.group, tables, first.ids, (one, other)) for one, other in zip(*made, strict=True)]
    return tuple(found) if len(op.outputs) > 1 else found[0]


def _vectors(reader: Reader, argument: Any) -> Vectors:
    found = reader.of(argument)
    if not isinstance(found, Vectors):
        raise Unread("it puts other numbers beside the vectors of ids")
    return found


def _all_of(reader: Reader, op: Op) -> Known:
    """Vectors taken by 0, 1, 2, ..., as many as they are."""
    known, order = reader.of(op.args[0]), reader.of(op.args[2])
    if not isinstance(order, Counted) or [part.numel() for part in reader.pair(op.args[2])] != [
        part.shape[0] for part in reader.pair(op.args[0])
    ]:
        raise Unread("it takes the vectors of ids in an order that is not known")
    return known


@reads("fbgemm.jagged_to_padded_dense_forward", "fbgemm.jagged_to_padded_dense")
def read_padded(reader: Reader, op: Op) -> Known:
    """The vectors of a feature's bags, as many of each as fit, and a number where there are none."""
    known = reader.of(op.args[0])
    if not isinstance(known, Vectors):
        raise Unread("it lays out what are no vectors of ids")
    (offsets,), lengths = op.args[1], op.args[2]
    fill = op.kwargs.get("padding_value", op.args[3] if len(op.args) > 3 else 0.0)
    bags = reader.of(offsets)
    if not isinstance(bags, Structure) or bags.group != known.group:
        raise Unread("its offsets are not the request's")
    length = int(lengths[0])
    if len(lengths) != 1 or length < 1 or not isinstance(offsets, Ref):
        raise Unread(f"it lays bags out to {tuple(lengths)}")
    found = [
        matched(*recorded, 1)
        for recorded in zip(known.positions, reader.pair(offsets), reader.groups[known.group], reader.rows, strict=True)
    ]
    (feature,) = found[0]
    if found[0] != found[1] or feature not in known.tables:
        raise Unread("which feature's bags it lays out follows from the rows")
    number = op.outputs[0]
    if number is None or reader.recording.tensors[number].dtype != torch.float32:
        raise Unread("it lays out vectors that are not of float32")
    table = known.tables[feature]
    step = Laid(number, known.group, feature, table, of_feature(known.ids, feature), length, float(fill))
    return reader.add(op, step, (length, table.dim))
