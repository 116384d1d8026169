"""Reads a program from a merged recording: every operation between inputs and outputs becomes a step, or the reader
stops at the first one that it does not know.

What each operation means is in ``dense.py`` (columns) and ``ragged.py`` (ids, lengths, lookups), one function for each
kind, registered with ``reads``. An operation nobody knows gives an Opaque value, which is no fault as long as nothing
that matters comes of it: an output that does is refused with the operation's name, and so is a lookup whose ids do.

Sizes are never taken from one recording alone: a value's shape must have the rows of either where they belong and be
the same elsewhere.

What leaves the tensors for the model's own code, as a number or as a size that follows from data, cannot be followed:
no program is made of such a recording.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.program.recording import Constant, Op, Recording, Ref, Varying
from narsil.program.replaying import Replayed, Source, check_rows, plain_arguments, refuse_unseen
from narsil.program.steps import Arrange, Concat, Elementwise, Lookup, Program, Step, Table
from narsil.program.values import Column, Fixed, Known, Opaque, PerId, Structure, Turned, Unread, Vectors

__all__ = ["READERS", "ROWS_ANYWHERE", "Reader", "Readings", "TableOf", "fixed_array", "reads"]

ROUNDED = {torch.float16: "to_float16", torch.bfloat16: "to_bfloat16"}

# What moves ids or columns, whose places and sizes may follow from the rows: the outcome is held against them.
_MAY_VARY = frozenset(
    f"aten.{name}"
    for name in ("view", "reshape", "_unsafe_view", "_reshape_alias", "expand", "slice", "narrow", "split")
) | {"aten.split_with_sizes", "aten.select", "fbgemm.permute_2D_sparse_data", "fbgemm.permute_1D_sparse_data"}
# What sums numbers up or lays them out, and takes none of them for a place in a table.
_LOOKS_NOTHING_UP = frozenset(
    f"fbgemm.{name}"
    for name in ("jagged_to_padded_dense", "jagged_to_padded_dense_forward", "asynchronous_complete_cumsum")
)
# Ids that are let in are none that it would change.
_FEW_BYTES = 1 << 24  # of memory in which two tensors' places are compared one by one
_WRITES_NOTHING = frozenset({"fbgemm.bounds_check_indices"})

READERS: dict[str, Callable[[Reader, Op], Any]] = {}
# How operations are read that have no reader, or whose rows are not the first axis: program/turned.py's.
ROWS_ANYWHERE: dict[str, Callable[[Reader, Any], Any]] = {}

# (the lookup's weights, position of the feature) -> its table.
TableOf = Callable[[torch.Tensor, int], Table]


def reads(*names: str) -> Callable[[Callable[[Reader, Op], Any]], Callable[[Reader, Op], Any]]:
    """Registers what reads the operations of these names. It returns the outputs' Known, one or a tuple, or raises
    Unread."""

    def register(function: Callable[[Reader, Op], Any]) -> Callable[[Reader, Op], Any]:
        for name in names:
            if name in READERS:
                raise ValueError(f"two readers for {name}")
            READERS[name] = function
        return function

    return register


@dataclass(frozen=True)
class Readings:
    """What came of a recording."""

    program: Program | None  # None where an output is not known
    problem: str  # why, else empty
    lookups: tuple[Lookup, ...]  # all of them, those that no output needs included
    unknown_ids: str  # why the ids of some lookup are not known, else empty
    recording: Recording | None = None
    rows: tuple[int, int] = (0, 0)  # of the two recordings
    born: Mapping[int, Known] = field(default_factory=dict)  # what each tensor was when it was made


class Reader:
    """One reading. ``rows`` and ``groups`` say what the two recordings were given: B of each; group -> (T, B)
    lengths."""

    def __init__(
        self,
        recording: Recording,
        rows: tuple[int, int],
        groups: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]],
        table_of: TableOf,
    ) -> None:
        # Stand-ins are added behind the recorded tensors.
        self.recording = replace(recording, tensors=list(recording.tensors), second=list(recording.second))
        self.rows = rows
        self.groups = groups
        self.table_of = table_of
        self.steps: list[Step] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.known: dict[int, Known] = {}
        self.born: dict[int, Known] = {}
        self.lookups: list[Lookup] = []
        self.unknown_ids = ""
        self.left = ""  # what left the tensors
        self.checked: dict[int, list[int]] = {}  # number of some ids -> the tables' rows that they were held against
        self.made_by = {number: op.name for op in recording.ops for number in op.outputs if number is not None}
        self._written = self._written_to()

    def read(self, dense: Mapping[str, int], inputs: Mapping[int, Known]) -> Readings:
        """The program. ``dense``: input name -> number of the recording's tensor; ``inputs``: what the others are."""
        for number in dense.values():
            self.known[number] = Column(number, tuple(self.recording.tensors[number].shape[1:]))
            self.shapes[number] = tuple(self.recording.tensors[number].shape[1:])
        self.known.update(inputs)
        for number, item in inputs.items():
            if isinstance(item, Structure):
                self.known[number] = Structure(item.group, self._places(number, item.group))
        self.born.update(self.known)
        for op in self.recording.ops:
            self._read_op(op)
        outputs, problem = self._outputs()
        problem = problem or self.left
        program = None
        if not problem:
            groups = {name: len(lengths[0]) for name, lengths in self.groups.items()}
            program = Program(dense, groups, self._needed(outputs), outputs, self.shapes)
        lookups = tuple(self.lookups)
        return Readings(program, problem, lookups, self.unknown_ids, self.recording, self.rows, self.born)

    def _places(self, number: int, group: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where each number of an input stands in the group's lengths; None where it does not have all of them."""
        pair = self.recording.tensors[number], self.recording.second[number]
        for tensor, lengths in zip(pair, self.groups[group], strict=True):
            if tensor.shape != (lengths.size,) or not np.array_equal(tensor.numpy(), lengths.ravel()):
                return None
        return torch.arange(len(pair[0])), torch.arange(len(pair[1]))

    def of(self, argument: Any) -> Known:
        """What is known of an argument that is a tensor. Raises Unread where it is none, or opaque."""
        if isinstance(argument, Constant):
            found: Known = Fixed(argument.tensor)
        elif isinstance(argument, Ref):
            found = self.known.get(argument.number, Opaque("comes from nowhere"))
        else:
            raise Unread(f"an argument is {argument!r:.64}, not a tensor")
        if isinstance(found, Opaque):
            raise Unread(found.reason)
        if isinstance(found, Fixed) and _memory(found.tensor) in self._written:
            raise Unread("it takes a tensor of the model's own that an operation changes in place")
        return found

    def column(self, argument: Any) -> Column:
        """An argument that must be a value of the program, unfolded."""
        found = self.of(argument)
        if not isinstance(found, Column):
            raise Unread(f"it takes {_told(found)} where a value for each row is expected")
        if found.folded:
            raise Unread("it takes rows that are laid out as more than one")
        return found

    def fixed(self, argument: Any) -> torch.Tensor:
        """An argument that must be the model's own."""
        found = self.of(argument)
        if not isinstance(found, Fixed):
            raise Unread(f"it takes {_told(found)} where a weight is expected")
        return found.tensor

    def add(self, op: Op, step: Step, shape: Sequence[int], folded: int = 0, output: int = 0) -> Column:
        """The value that a step makes, once the recorded tensor has that shape in both recordings."""
        number = op.outputs[output]
        if number is None:
            raise Unread("it makes no tensor")
        shape = tuple(int(size) for size in shape)
        self.check_shape(number, shape, folded)
        self.shapes[number] = shape
        rounds = ROUNDED.get(self.recording.tensors[number].dtype)
        if (
            rounds is None
            or isinstance(step, Arrange | Concat)
            or (isinstance(step, Elementwise) and step.function == rounds)
        ):
            self.steps.append(step)
            return Column(number, shape, folded)
        # What is computed in 16 bits is rounded to them: the step's own result has a number that no tensor has.
        hidden = self.hidden(shape)
        self.steps += [replace(step, out=hidden), Elementwise(number, rounds, (hidden,))]
        return Column(number, shape, folded)

    def hidden(self, shape: tuple[int, ...]) -> int:
        """A number for a value between two steps that are one operation in the recording."""
        number = -1 - len(self.shapes)
        self.shapes[number] = shape
        return number

    def stand_in(self, first: torch.Tensor, second: torch.Tensor) -> int:
        """The number of a tensor that both recordings might have had."""
        tensors, others = self.recording.tensors, self.recording.second
        assert isinstance(tensors, list) and isinstance(others, list)  # noqa: PT018, S101 - made so
        tensors.append(first)
        others.append(second)
        return len(tensors) - 1

    def check_shape(self, number: int, shape: tuple[int, ...], folded: int = 0) -> None:
        """Raises Unread unless a tensor has the rows of either recording, and this shape for each of them."""
        per_row = int(np.prod(shape[:folded], dtype=np.int64))
        for tensor, rows in zip(
            (self.recording.tensors[number], self.recording.second[number]), self.rows, strict=True
        ):
            if tuple(tensor.shape) != (rows * per_row, *shape[folded:]):
                raise Unread(f"it makes {tuple(tensor.shape)} of {rows} rows, which are not laid out row by row")

    def pair(self, argument: Ref) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors of both recordings."""
        return self.recording.tensors[argument.number], self.recording.second[argument.number]

    def tail(self, number: int) -> tuple[int, tuple[int, ...]]:
        """(how many rows of the tensor belong to one row, the other axes) of a tensor. Raises Unread where its first
        axis does not go with the rows, or another one does."""
        first, second = self.recording.tensors[number].shape, self.recording.second[number].shape
        if not first or first[1:] != second[1:]:
            raise Unread(f"it makes {tuple(first)} of {self.rows[0]} rows, which are not laid out row by row")
        per_row = first[0] // self.rows[0]
        if (first[0], second[0]) != (per_row * self.rows[0], per_row * self.rows[1]) or not per_row:
            raise Unread(f"it makes {tuple(first)} of {self.rows[0]} rows, which are not laid out row by row")
        return per_row, tuple(first[1:])

    def _read_op(self, op: Op) -> None:
        made: Any
        try:
            made = self._meant(op)
            if isinstance(made, Fixed) and not self._is_fixed(op):
                raise Unread("it makes a constant for each row")
        except Unread as problem:
            made = self._otherwise(op, problem)
        results = made if isinstance(made, tuple) else (made,) * len(op.outputs)
        for number, result in zip(op.outputs, results, strict=True):
            if number is not None and result is not None:
                self.known[number] = self.born[number] = self._settled(op, number, result)
        if op.name not in _WRITES_NOTHING and (written := op.writes()):
            self._forget_aliases(op, written)

    def _meant(self, op: Op) -> Any:
        """What the operation's reader makes of it. Raises Unread where it has none."""
        taken = [leaf.number for leaf in _flat((*op.args, *op.kwargs.values())) if isinstance(leaf, Ref)]
        made = [number for number in op.outputs if number is not None]
        if any(self.recording.tensors[number].is_complex() for number in (*taken, *made)):
            raise Unread("no step for complex numbers")
        if any(isinstance(self.known.get(number), Turned) for number in taken):
            return ROWS_ANYWHERE["computed"](self, op)
        if op.name not in READERS:
            raise Unread("no step for it")
        if has_varying(op) and op.name not in _MAY_VARY:
            raise Unread("a number that it takes follows from how many rows there are")
        return READERS[op.name](self, op)

    def _otherwise(self, op: Op, problem: Unread) -> Any:
        """What no reader knows: by example where it moves numbers alone, else as it was recorded."""
        before = len(self.steps), dict(self.shapes)
        taken = [leaf.number for leaf in _flat((*op.args, *op.kwargs.values())) if isinstance(leaf, Ref)]
        lengths = {n: item for n in taken if isinstance(item := self.known.get(n), Structure) and item.places}
        if lengths:
            return self._of_lengths(op, lengths, problem)
        try:
            return ROWS_ANYWHERE["by_example"](self, op)
        except Unread:
            del self.steps[before[0] :]
            self.shapes = before[1]
            return self._replayed(op, problem)

    def _of_lengths(self, op: Op, lengths: Mapping[int, Structure], problem: Unread) -> Any:
        """What is computed with lengths of bags, as numbers that each row has."""
        try:
            for number in lengths:
                self.known[number] = ROWS_ANYWHERE["lengths"](self, number)
            try:
                return self._meant(op)
            except Unread as why:
                return self._otherwise(op, why)
        except Unread:
            return self._replayed(op, problem)
        finally:
            self.known.update(lengths)

    def _is_fixed(self, op: Op) -> bool:
        """Whether what it makes has the same shape for other rows."""
        made = [number for number in op.outputs if number is not None]
        return all(self.recording.tensors[n].shape == self.recording.second[n].shape for n in made)

    def _replayed(self, op: Op, problem: Unread) -> Any:
        """What no reader knows: as it was recorded where that treats each row by itself, else nothing."""
        reason = self._inherited(op)
        if not reason:
            before = len(self.steps), dict(self.shapes)
            try:
                return self._as_recorded(op)
            except Unread as why:
                del self.steps[before[0] :]
                self.shapes = before[1]
                reason = f"{op.name}: {problem if op.name in READERS else why}"
        self._note_unread(op, reason)
        return Opaque(reason)

    def _as_recorded(self, op: Op) -> Any:
        refuse_unseen(op)
        folds: list[tuple[int, ...]] = []

        def source(argument: Any) -> Source | torch.Tensor:
            known = self.of(argument)
            if isinstance(known, Fixed):
                return known.tensor
            if not isinstance(known, Column):
                raise Unread("no step for it")
            folds.append(known.shape[: known.folded])
            kind = self.recording.tensors[argument.number].dtype
            return Source(known.number, known.shape, known.folded, kind)

        args, kwargs = plain_arguments(op, source, self.rows)
        numbers = [number for number in op.outputs if number is not None]
        if not numbers or (op.writes() and not isinstance(args[0], Source)):
            raise Unread("no step for it")
        if not folds:
            return self._made_once(op)
        if any(fold != folds[0] for fold in folds):
            raise Unread("no step for it, and it takes rows that are laid out in several ways")
        per_row = int(np.prod(folds[0], dtype=np.int64))
        leaves = [leaf for leaf in _flat((*args, *kwargs.values())) if isinstance(leaf, Source)]
        recorded = {leaf.number: self._tensor_of(op, leaf) for leaf in leaves}
        check_rows(op, args, kwargs, recorded, self.rows[0], per_row)
        made: list[Known | None] = []
        for output, number in enumerate(op.outputs):
            if number is None:
                made.append(None)
                continue
            own, tail = self.tail(number)
            if own != per_row:
                raise Unread("no step for it, and it lays rows out anew")
            shape = (*folds[0], *tail)
            step = Replayed(number, op.name, op.call, args, kwargs, output, shape)
            made.append(self.add(op, step, shape, len(folds[0]), output))
        return tuple(made)

    def _tensor_of(self, op: Op, source: Source) -> torch.Tensor:
        """The recorded tensor of a value among an operation's arguments."""
        for leaf in _flat((*op.args, *op.kwargs.values())):
            known = self.known.get(leaf.number) if isinstance(leaf, Ref) else None
            if isinstance(known, Column) and known.number == source.number:
                return self.recording.tensors[leaf.number]
        raise Unread("no step for it")

    def _made_once(self, op: Op) -> Any:
        """What an operation makes of constants alone."""
        for number in op.outputs:
            if number is None or not _alike(self.recording.tensors[number], self.recording.second[number]):
                raise Unread("no step for it")
        return tuple(Fixed(self.recording.tensors[number or 0]) for number in op.outputs)

    def _note_unread(self, op: Op, reason: str) -> None:
        """What an operation that is not read may do beside making an unknown tensor."""
        taken = [leaf for leaf in _flat((*op.args, *op.kwargs.values())) if isinstance(leaf, Ref)]
        known = [self.known.get(leaf.number, Opaque("")) for leaf in taken]
        rows = any(not isinstance(item, Fixed) for item in known)
        # The bookkeeping of bags takes numbers out of lengths; what is done with them shows in what is looked up.
        ends = all(
            self.made_by.get(leaf.number) == "aten.aminmax" for leaf in taken
        )  # held against a number of classes
        if (
            not ends
            and op.tells(torch.Tag.data_dependent_output)
            and any(not isinstance(item, Fixed | Structure) for item in known)
        ):
            self.left = self.left or f"{op.name}: a number of what a request brings leaves the tensors ({reason})"
        if op.tells(torch.Tag.dynamic_output_shape) and rows:
            self.left = self.left or f"{op.name}: a size follows from what a request brings ({reason})"
        # torch's own operations hold what they look up against the size of what they look up in.
        unsafe = not op.name.startswith(("aten.", "prims.")) and op.name not in _LOOKS_NOTHING_UP
        looked_up = any(lookup.out in op.outputs for lookup in self.lookups)  # whose ids are known
        if unsafe and not looked_up and any(map(self._may_be_ids, taken, known)):
            self.unknown_ids = self.unknown_ids or reason

    def _may_be_ids(self, argument: Ref, known: Known) -> bool:
        kind = self.recording.tensors[argument.number].dtype
        return isinstance(known, PerId | Opaque) and not kind.is_floating_point and kind != torch.bool

    def _settled(self, op: Op, number: int, result: Known) -> Known:
        """A constant must have one shape, whatever the rows."""
        shapes = self.recording.tensors[number].shape, self.recording.second[number].shape
        if isinstance(result, Fixed) and shapes[0] != shapes[1]:
            return Opaque(f"{op.name}: it makes a constant for each row")
        return result

    def _inherited(self, op: Op) -> str:
        """Why an argument is opaque already: the first unknown operation is the one to name."""
        for argument in _flat((*op.args, *op.kwargs.values())):
            if isinstance(argument, Ref) and isinstance(found := self.known.get(argument.number), Opaque):
                return found.reason
        return ""

    def _forget_aliases(self, op: Op, written: Sequence[Any]) -> None:
        """What shares memory with a tensor that an operation changed in place is no longer what it was."""
        changed = [tensor for tensor in self._tensors_in(written) if _memory(tensor)]
        for number, tensor in enumerate(self.recording.tensors):
            if number in self.known and number not in op.outputs and any(_overlap(tensor, part) for part in changed):
                self.known[number] = Opaque(f"{op.name}: it changes a tensor in place")

    def _written_to(self) -> frozenset[int]:
        """The memory that operations change in place. A constant there is not the same throughout."""
        written = [op.writes() for op in self.recording.ops if op.name not in _WRITES_NOTHING]
        return frozenset(_memory(tensor) for tensor in self._tensors_in(written)) - {0}

    def _tensors_in(self, value: Any) -> list[torch.Tensor]:
        found = []
        for leaf in _flat(tuple(value)):
            if isinstance(leaf, Ref):
                found.append(self.recording.tensors[leaf.number])
            elif isinstance(leaf, Constant):
                found.append(leaf.tensor)
        return found

    def _outputs(self) -> tuple[dict[str, int], str]:
        outputs = {}
        for task, argument in self.recording.outputs.items():
            try:
                column = self.of(argument)
                if not isinstance(column, Column) or column.folded:
                    raise Unread(f"it is {_told(column)} and not one for each row")
            except Unread as problem:
                return {}, f"output {task}: {problem}"
            outputs[task] = column.number
        return outputs, ""

    def _needed(self, outputs: Mapping[str, int]) -> tuple[Step, ...]:
        """The steps that an output comes of, in order."""
        wanted, kept = set(outputs.values()), []
        for step in reversed(self.steps):
            if step.out in wanted:
                wanted.update(step.reads())
                kept.append(step)
        return tuple(reversed(kept))


def fixed_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A weight as numpy has it, 16-bit floats as float32. Raises Unread on kinds that numpy has not."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise Unread("a weight is quantized or sparse")
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have a number in memory in common."""
    if _memory(one) != _memory(other):
        return False
    size = max(part.untyped_storage().nbytes() for part in (one, other))
    if one.element_size() != other.element_size() or not 0 < size <= _FEW_BYTES:
        return True
    met = torch.zeros(size // one.element_size(), dtype=torch.bool)
    met.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(met.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _told(known: Known) -> str:
    return {
        Column: "rows laid out as more than one",
        Turned: "rows that are not the first axis",
        Fixed: "a constant of the model",
        PerId: "a number for each id",
        Vectors: "a vector for each id",
        Structure: "lengths of bags",
    }.get(type(known), "an unknown tensor")


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def has_varying(op: Op) -> bool:
    """Whether a number among the arguments follows from the rows."""
    return any(isinstance(leaf, Varying) for leaf in _flat((*op.args, *op.kwargs.values())))
