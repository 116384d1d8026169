"""A program for the inductor engine: what the model does between its lookups and its scores, as it was recorded.

Receives a model's Readings; produces a WholeModel: a module that does the recorded operations again, which torch.export
takes, and the lookups that give it its inputs. Every operation in it has been read or tried (program/replaying.py):
what it makes of a row is that row's own. Sizes that follow from the rows are multiples of their number.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from narsil.artifacts.compiled_info import SCALE_BIAS_BYTES
from narsil.artifacts.plan import Stream
from narsil.artifacts.whole import Call, Whole, WholeTable, row_bytes
from narsil.errors import ArtifactError
from narsil.program.reader import Readings
from narsil.program.recording import Constant, Op, Ref
from narsil.program.replaying import PerRow, plain_arguments
from narsil.program.steps import IdArray, IdExpression, Lookup, Table, of_feature
from narsil.program.values import Column, Fixed, Structure, Turned, Unread

__all__ = ["WholeModel", "whole_model"]

_ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class WholeModel:
    """What is compiled, and what is written beside it."""

    core: nn.Module
    whole: Whole
    stored: tuple[NDArray[np.uint8], ...]  # what tables.bin holds, one after the other


@dataclass(frozen=True)
class _Taken:
    """A tensor that an operation takes, by its number; or the module's constant of that name."""

    number: int = -1
    constant: str = ""


class _Core(nn.Module):
    """The recorded operations between inputs and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Op, Any, Any]] = []
        self.inputs = 0
        self.counts = 0  # the input of lengths
        # number -> (input, first, behind) of its columns, kind, shape of a row
        self.parts: dict[int, tuple[list[tuple[int, int, int]], torch.dtype, tuple[int, ...]]] = {}
        self.lengths: dict[int, tuple[int, int, torch.dtype]] = {}  # number -> first feature, features, kind
        self.scores: list[_Taken] = []

    def constant(self, tensor: Tensor) -> _Taken:
        """A tensor of the model's own."""
        name = f"constant_{len(self._buffers)}"
        self.register_buffer(name, tensor.detach().clone())
        return _Taken(constant=name)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs, each (B, its width) float32 -> (B, all scores) float32."""
        rows = inputs[0].shape[0]
        made: dict[int, Tensor] = {}
        for number, (parts, kind, shape) in self.parts.items():
            given = [inputs[place][:, first:behind] for place, first, behind in parts]
            joined = (given[0] if len(given) == 1 else torch.cat(given, dim=1)).to(kind)
            made[number] = joined if len(shape) == 1 else joined.reshape(rows, *shape)

        for number, (first, count, kind) in self.lengths.items():
            made[number] = inputs[self.counts][:, first : first + count].t().reshape(-1).to(kind)

        def filled(value: Any) -> Any:
            if isinstance(value, tuple):
                return [filled(item) for item in value]
            if isinstance(value, _Taken):
                return getattr(self, value.constant) if value.constant else made[value.number]
            return value.times * rows if isinstance(value, PerRow) else value

        for op, args, kwargs in self.calls:
            taken = [filled(value) for value in args]
            if op.writes():  # its result is what counts; what it would write to may be an input
                taken[0] = taken[0].clone()
            result = op.call(*taken, **{key: filled(value) for key, value in kwargs.items()})
            results = result if isinstance(result, tuple | list) else (result,)
            made.update({n: part for n, part in zip(op.outputs, results, strict=False) if n is not None})
        return torch.cat([filled(score).reshape(rows, -1).to(torch.float32) for score in self.scores], dim=1)


def whole_model(readings: Readings, tasks: Sequence[str], name: str) -> WholeModel:
    """The model. Raises ArtifactError, naming the operation that keeps it on torch."""
    return _Making(readings, name).run(tasks)


class _Making:
    def __init__(self, readings: Readings, name: str) -> None:
        if readings.recording is None or readings.program is None:
            raise ArtifactError(f"{name} cannot be compiled: its operations are not recorded")
        self.readings, self.recording, self.name = readings, readings.recording, name
        self.program = readings.program
        self.lookups = {lookup.out: lookup for lookup in readings.lookups}
        self.made_by = {number: op for op in self.recording.ops for number in op.outputs if number is not None}
        self.core = _Core()
        self.places: dict[
            int, list[tuple[int, int, int]]
        ] = {}  # lookup's number -> (call, first, behind) of each table
        self.needed: dict[int, None] = {}
        self.constants: dict[int, _Taken] = {}

    def run(self, tasks: Sequence[str]) -> WholeModel:
        """See whole_model."""
        self._follow([self.recording.outputs[task] for task in tasks])
        calls, streams, stored = self._calls()
        columns = self._columns()
        dense, self.core.counts = columns > 0, columns
        columns += self._lengths()
        for number, places in self.places.items():
            parts = [(columns + call, first, behind) for call, first, behind in places]
            tensor = self.recording.tensors[number]
            self.core.parts[number] = _joined(parts), tensor.dtype, tuple(tensor.shape[1:])
        self.core.inputs = columns + len(calls)
        for op in self.recording.ops:
            wanted = any(number in self.needed for number in op.outputs if number is not None)
            if wanted and op.outputs[0] not in self.lookups:
                self.core.calls.append((op, *self._arguments(op)))
        self.core.scores = [self._taken(self.recording.outputs[task]) for task in tasks]
        if not self.core.inputs:
            raise ArtifactError(f"{self.name}: its scores follow from nothing that a request brings")
        return WholeModel(self.core.eval(), Whole(dense, calls, streams, bool(self.core.lengths)), stored)

    def _columns(self) -> int:
        """How many inputs the dense columns are: one, of all matrices beside each other, where any is needed."""
        first = 0
        for number in self.program.dense.values():
            tensor = self.recording.tensors[number]
            if number in self.needed:
                self.core.parts[number] = [(0, first, first + tensor.shape[1])], tensor.dtype, (tensor.shape[1],)
            first += tensor.shape[1]
        return int(any(number in self.needed for number in self.program.dense.values()))

    def _lengths(self) -> int:
        """How many inputs lengths are: one, of all bags, where any are needed."""
        firsts = dict(zip(self.program.groups, np.cumsum([0, *self.program.groups.values()]).tolist(), strict=False))
        for number in self.needed:
            known = self.readings.born.get(number)
            if isinstance(known, Structure) and number not in self.made_by:
                kind = self.recording.tensors[number].dtype
                self.core.lengths[number] = firsts[known.group], self.program.groups[known.group], kind
        return int(bool(self.core.lengths))

    def _follow(self, outputs: Sequence[Any]) -> None:
        """Finds all tensors that the outputs come of, back to the inputs and the lookups."""
        waiting = [leaf for leaf in _leaves(tuple(outputs)) if isinstance(leaf, Ref)]
        while waiting:
            number = waiting.pop().number
            known = self.readings.born.get(number)
            if number in self.needed or isinstance(known, Fixed):
                continue
            op = self.made_by.get(number)
            counted = isinstance(known, Structure) and known.places is not None
            counted = counted and (op is None or op.name.startswith("aten."))
            if not isinstance(known, Column | Turned) and not counted:
                told = "what a request brings" if op is None else op.name
                raise ArtifactError(
                    f"{self.name}: the inductor engine runs numbers of rows alone, and {told} makes others; serve it "
                    "with the torch backend"
                )
            self.needed[number] = None
            if op is not None and number not in self.lookups:
                waiting += [leaf for leaf in _leaves((*op.args, *op.kwargs.values())) if isinstance(leaf, Ref)]

    def _arguments(self, op: Op) -> Any:
        try:
            args, kwargs = plain_arguments(op, self._taken, self.readings.rows)
        except Unread as problem:
            raise ArtifactError(
                f"{self.name}: the inductor engine cannot do {op.name} again ({problem}); serve it with the torch "
                "backend"
            ) from None
        return args, kwargs

    def _taken(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            known = self.readings.born.get(argument.number)
            if not isinstance(known, Fixed):
                return _Taken(argument.number)
            tensor = known.tensor
        elif isinstance(argument, Constant):
            tensor = argument.tensor
        else:
            raise Unread("it takes another tensor for other rows")
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = self.core.constant(tensor)
        return self.constants[id(tensor)]

    def _calls(self) -> tuple[tuple[Call, ...], tuple[Stream, ...], tuple[NDArray[np.uint8], ...]]:
        """Lookups that are done alike share a call; tables that are shared lie once."""
        streams: list[Stream] = []
        calls: dict[tuple[bool, int, int], Call] = {}
        stored: list[NDArray[np.uint8]] = []
        starts: dict[tuple[int, int], int] = {}
        bases = dict(zip(self.program.groups, np.cumsum([0, *self.program.groups.values()]).tolist(), strict=False))
        for number in sorted(self.needed.keys() & self.lookups.keys()):
            lookup, alignment = self.lookups[number], self._alignment(self.lookups[number])
            self.places[number] = []
            for feature, table in zip(lookup.features, lookup.tables, strict=True):
                stream = self._stream(lookup, feature)
                if stream not in streams:
                    streams.append(stream)
                key = (lookup.pooling == "mean", streams.index(stream), alignment)
                call = calls.setdefault(key, Call(*key, ()))
                self.places[number].append((list(calls).index(key), call.width, call.width + table.dim))
                place = (table.data.ctypes.data, table.start)
                if place not in starts:
                    starts[place] = sum(part.size for part in stored)
                    stored.append(table.data[table.start : table.start + table.rows * table.row_bytes])
                made = WholeTable(starts[place], table.rows, table.dim, table.kind, bases[lookup.group] + feature)
                calls[key] = replace(call, tables=(*call.tables, made))
        return tuple(calls.values()), tuple(streams), tuple(stored)

    def _stream(self, lookup: Lookup, feature: int) -> Stream:
        ids, weights = (None if part is None else of_feature(part, feature) for part in (lookup.ids, lookup.weights))
        plain = None if getattr(ids, "function", "") == "ids" else self._plain(ids)
        return Stream(plain, None if weights is None else self._plain(weights))

    def _plain(self, expression: Any) -> Any:
        """An expression as nested lists, for a manifest."""
        if isinstance(expression, IdArray):
            raise ArtifactError(
                f"{self.name}: the inductor engine takes no ids out of arrays; serve it with the torch backend"
            )
        if not isinstance(expression, IdExpression):
            return expression
        if not expression.arguments:
            return expression.function
        return [expression.function, *map(self._plain, expression.arguments)]

    def _alignment(self, lookup: Lookup) -> int:
        """One by which the rows of all its tables come to as many bytes as they have."""

        def fits(table: Table, alignment: int) -> bool:
            plain = table.kind < 2 or table.scale_bytes == SCALE_BIAS_BYTES
            return plain and row_bytes(table.dim, table.kind, alignment) == table.row_bytes

        for alignment in (*_ALIGNMENTS, lookup.tables[0].row_bytes):
            if all(fits(table, alignment) for table in lookup.tables):
                return alignment
        raise ArtifactError(
            f"{self.name}: the inductor engine does not know how the rows of {lookup.tables[0].name} lie; serve it "
            "with the torch backend"
        )


def _joined(parts: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same columns, those that lie beside each other as one."""
    found: list[tuple[int, int, int]] = []
    for place, first, behind in parts:
        if found and found[-1][0] == place and found[-1][2] == first:
            found[-1] = (place, found[-1][1], behind)
        else:
            found.append((place, first, behind))
    return found


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
