"""Runs a loaded model on a few rows, to see what it takes, gives and does.

Receives a ScriptModule, what its graph says of its inputs, and its tables; produces a Probed: the width of its columns
of numbers, the kind of its ids, and a reading of its operations (program/reader.py). All ids of the probes are 0, and
every lookup's are held against its tables before it runs: nothing is read out of bounds however the model is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.artifacts.torchscript import LENGTHS, VALUES, WEIGHTS, in_order
from narsil.errors import ArtifactError, last_line
from narsil.program.ragged import IDS
from narsil.program.ragged import WEIGHTS as WEIGHTS_OF_IDS
from narsil.program.reading import Readings, merged, read, record
from narsil.program.recording import Recording, Ref
from narsil.program.steps import Bags, Table
from narsil.program.values import Known, PerId, Structure

__all__ = ["ROWS", "Probed", "Rows", "Takes", "lone_columns", "outputs_of", "probe"]

log = logging.getLogger(__name__)

ROWS = (5, 7)  # of the two recordings
MOST_COLUMNS = 4096  # of the widths that are tried
_LOOKUP = "fbgemm.int_nbit_split_embedding_codegen_lookup_function"
_HASH = "fbgemm.zero_collision_hash"

TableOf = Callable[[torch.Tensor, int], Table]


@dataclass(frozen=True)
class Probed:
    """What a model does."""

    dense_dim: int  # 0 where it takes no columns of numbers
    wide_ids: bool  # whether ids and lengths have to be int64
    readings: Readings
    outputs: Mapping[str, int]  # task -> numbers that it gives for each row
    recording: Recording


@dataclass(frozen=True)
class Rows:
    """Rows for one forward."""

    inputs: dict[str, torch.Tensor]
    lengths: Mapping[str, NDArray[np.int64]]  # group -> (T, B)

    def bags(self) -> dict[str, Bags]:
        """The groups, as a program's reference takes them."""
        return {
            group: Bags(lengths, self.inputs[group + VALUES].numpy(), _array(self.inputs.get(group + WEIGHTS)))
            for group, lengths in self.lengths.items()
        }


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.numpy()


@dataclass(frozen=True)
class Takes:
    """A model's inputs: the name of its columns, and group -> its number of features and whether its ids have
    weights. ``known``: the widths of other matrices of numbers."""

    columns: str | None
    groups: Mapping[str, tuple[int, bool]]
    device: str = "cpu"
    known: Mapping[str, int] = field(default_factory=dict)
    joined: bool = False  # whether forward joins groups: a reading has one of all of them then
    one_each: bool = False  # whether every bag has to hold one id

    @property
    def matrices(self) -> tuple[str, ...]:
        """The inputs of numbers, in the order of the request's columns."""
        return in_order((*self.known, *(() if self.columns is None else (self.columns,))))

    def rows(self, count: int, dense_dim: int, wide_ids: bool, ids: Callable[[str, NDArray[np.int64]], Any]) -> Rows:
        """Random columns and bags of 0 to 3, or of 1; every feature has one that is not empty. ``ids`` gives a group's
        ids for its (T, B) lengths."""
        random = np.random.default_rng(count)
        kind = torch.int64 if wide_ids else torch.int32
        inputs: dict[str, torch.Tensor] = {}
        for key in self.matrices:
            width = dense_dim if key == self.columns else self.known[key]
            inputs[key] = torch.from_numpy(random.standard_normal((count, width)).astype(np.float32))
        every = {}
        for group, (features, weighted) in self.groups.items():
            lengths = random.integers(0, 4, (features, count))
            lengths[np.arange(features), random.integers(0, count, features)] += 1
            if self.one_each:
                lengths[:] = 1
            total = int(lengths.sum())
            inputs[group + LENGTHS] = torch.from_numpy(lengths.ravel()).to(kind)
            inputs[group + VALUES] = torch.as_tensor(ids(group, lengths)).to(kind)
            if weighted:
                inputs[group + WEIGHTS] = torch.from_numpy(random.random(total, np.float32))
            every[group] = lengths
        return Rows({key: tensor.to(self.device) for key, tensor in inputs.items()}, every)


def zeros(group: str, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The id 0 for every place in a group's bags."""
    return np.zeros(int(lengths.sum()), np.int64)


def probe(
    forward: Any, takes: Takes, dense_dim: int | None, table_of: TableOf, name: str, *, wide_ids: bool = False
) -> Probed:
    """What a model does. ``dense_dim``: the width of its columns, where it is known; ``wide_ids``: whether it is given
    int64 even if it takes int32. Raises ArtifactError where it runs on no rows, or on several widths."""
    guard = _guard(table_of)
    if not wide_ids or dense_dim is None:
        wide_ids, dense_dim = _form(forward, takes, dense_dim, guard, name)
    rows = [takes.rows(count, dense_dim, wide_ids, zeros) for count in ROWS]
    try:
        recorded = [record(forward, each.inputs, guard) for each in rows]
    except ArtifactError:
        raise
    except Exception as error:  # whatever a model raises
        raise ArtifactError(f"{name}: forward does not run on bags of 0 to 3 ids: {last_line(error)}") from None
    recording = merged(*recorded)
    readings = read(recording, ROWS, _both(takes, rows), table_of, takes.matrices, _known(recording, takes, rows))
    return Probed(dense_dim, wide_ids, readings, outputs_of(recording, name), recording)


def lone_columns(forward: Any, takes: Takes, keys: Sequence[str], table_of: TableOf) -> dict[str, int] | None:
    """The widths of several matrices of which none is known: one column each, as TorchEasyRec's features have. None
    where the model does not run on that, or where one of them could have another number of columns. ``takes`` has no
    others that are not known."""
    guard, ones = _guard(table_of), dict.fromkeys(keys, 1)

    def runs(widths: Mapping[str, int], wide: bool) -> bool:
        return _runs(forward, replace(takes, known={**takes.known, **widths}), 0, wide, guard) is None

    wide = next((wide for wide in (False, True) if runs(ones, wide)), None)
    if wide is None:
        return None
    # One column is broadcast to as many as a constant has.
    sizes = {size for weight in forward.parameters() if weight.dim() == 1 for size in weight.shape}
    others = sorted({2, 3} | {size for size in sizes if 1 < size <= MOST_COLUMNS})
    if any(runs({**ones, key: other}, wide) for key in keys for other in others):
        return None
    return ones


_ALL = "all"  # groups that are joined, one behind the other


def _both(takes: Takes, rows: Sequence[Rows]) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    if takes.joined:
        first, second = (np.concatenate(list(each.lengths.values())) for each in rows)
        return {_ALL: (first, second)}
    return {group: (rows[0].lengths[group], rows[1].lengths[group]) for group in rows[0].lengths}


def _known(recording: Recording, takes: Takes, rows: Sequence[Rows]) -> dict[int, Known]:
    """What the inputs of bags are, by number of the tensor."""
    known: dict[int, Known] = {}
    begins = [0, 0]
    for key in takes.groups:
        group = _ALL if takes.joined else key
        counts = [each.inputs[key + VALUES].numel() for each in rows]
        places = tuple(torch.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True))
        known[recording.inputs[key + LENGTHS]] = Structure(group)
        known[recording.inputs[key + VALUES]] = PerId(group, IDS, (places[0], places[1]))
        if key + WEIGHTS in recording.inputs:
            known[recording.inputs[key + WEIGHTS]] = PerId(group, WEIGHTS_OF_IDS, (places[0], places[1]))
        if takes.joined:
            begins = [begin + count for begin, count in zip(begins, counts, strict=True)]
    return known


def outputs_of(recording: Recording, name: str) -> dict[str, int]:
    """Task -> numbers for each row. Raises ArtifactError where an output is not laid out by rows."""
    widths = {}
    for task, made in recording.outputs.items():
        tensors = (
            [every[made.number] for every in (recording.tensors, recording.second)] if isinstance(made, Ref) else []
        )
        shapes = [tuple(tensor.shape) for tensor in tensors] or [tuple(made.tensor.shape)] * 2
        if any(not shape or shape[0] != count for shape, count in zip(shapes, ROWS, strict=True)):
            raise ArtifactError(
                f"{name}: the output {task} has the shape {shapes[0]} for {ROWS[0]} rows; it must have one entry for "
                f"each row"
            )
        if shapes[0][1:] != shapes[1][1:]:
            raise ArtifactError(
                f"{name}: how many numbers the output {task} has for a row follows from how many rows there are"
            )
        widths[task] = int(np.prod(shapes[0][1:], dtype=np.int64))
    return widths


def _form(forward: Any, takes: Takes, dense_dim: int | None, guard: Any, name: str) -> tuple[bool, int]:
    """(whether ids are int64, width of the columns): the form of rows that a forward takes."""
    # Columns meet a weight that has as many, or more: it is looked for there first. One more tells a width that any do.
    most = 1 + max((size for weight in forward.parameters() for size in weight.shape), default=0)
    most = min(most, MOST_COLUMNS)
    if takes.columns is None or dense_dim is not None:
        given = dense_dim or 0
        for wide in (False, True):
            if _runs(forward, takes, given, wide, guard) is None:
                return wide, given
        problem = _runs(forward, takes, given, False, guard)
        raise ArtifactError(f"{name}: forward does not run on rows of {given} columns: {problem}")
    for wide in (False, True):
        for widths in (range(most + 1), range(most + 1, MOST_COLUMNS + 1)):
            found = [width for width in widths if _runs(forward, takes, width, wide, guard) is None]
            # Nothing is wrong with no numbers at all, and one column is broadcast to as many as a constant has.
            if len(found) > 1 and found[0] == 0:
                found = found[1:]
            if len(found) == 2 and found[0] == 1:
                found = found[1:]
            if len(found) == 1:
                return wide, found[0]
            if found and found[0] > 1:
                # It takes columns by their places: a request of more columns is refused, so that none is scored wrong.
                log.warning(
                    "%s runs with %d, %d and other numbers of columns in %s; it is taken to have %d: --dense-dim gives "
                    "another number",
                    *(name, found[0], found[1], takes.columns, found[0]),
                )
                return wide, found[0]
            if found:
                raise ArtifactError(
                    f"{name}: forward runs with {found[0]}, {found[1]} and other numbers of columns in "
                    f"{takes.columns}, so that theirs is unknown; give it with --dense-dim"
                )
    raise ArtifactError(
        f"{name}: forward runs with no number of dense columns up to {MOST_COLUMNS}: "
        f"{_runs(forward, takes, 1, False, guard)}"
    )


def _runs(forward: Any, takes: Takes, width: int, wide: bool, guard: Any) -> str | None:
    """None where a forward of these rows ends well, else why not."""
    rows = takes.rows(2, width, wide, zeros)
    try:
        record(forward, rows.inputs, guard)
    except ArtifactError:
        raise
    except Exception as error:  # whatever a model raises
        return last_line(error)
    return None


def _check_hash(arguments: Sequence[Any]) -> None:
    """Raises ArtifactError before zero collision hashing would read beyond its list of ids."""
    rows, (sizes, starts) = len(arguments[1]), (*arguments[6:8], None, None)[:2]
    if sizes is None or starts is None or not sizes.numel():
        return
    if int(sizes.min()) < 1 or int(starts.min()) < 0 or int((sizes + starts).max()) > rows:
        raise ArtifactError(f"{_HASH} would read beyond its {rows} ids; package the model again")


def _guard(table_of: TableOf) -> Callable[[str, Sequence[Any]], None]:
    """Raises ArtifactError before a lookup would read outside of its tables."""

    def check(operation: str, arguments: Sequence[Any]) -> None:
        if operation == _HASH:
            _check_hash(arguments)
        if operation != _LOOKUP:
            return
        weights = arguments[0] if arguments[0].numel() else arguments[1]
        ids, offsets, features = arguments[12], arguments[13].tolist(), arguments[5].numel() - 1
        per_feature = (len(offsets) - 1) // features
        for feature in range(features):
            found = ids[offsets[feature * per_feature] : offsets[(feature + 1) * per_feature]]
            table = table_of(weights, feature)
            if found.numel() and (int(found.min()) < 0 or int(found.max()) >= table.rows):
                raise ArtifactError(
                    f"the id 0 becomes {int(found.min())} to {int(found.max())} on its way to the table {table.name} "
                    f"of "
                    f"{table.rows} rows: the model would read out of bounds; mend what it does to its ids"
                )

    return check
