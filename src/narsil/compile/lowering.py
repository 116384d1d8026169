"""Lowers a program to a plan: what the fused engine runs, step by step.

Receives a Program; produces a Lowered: the plan without its layers packed, the linear layers in FP32, the arrays and
the tables' bytes. Three things happen on the way:

    folding     a multiplication or an addition by constants behind a linear layer goes into its weights
    gathering   steps that only move numbers vanish: what computes next takes its numbers from where they were computed,
                directly where they lie in order, else through one move
    placing     values share the arena: a place is free again once the last step that reads it has run

Raises ArtifactError, naming the step, where the fused engine has none for it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.packed import rounded_up
from narsil.artifacts.plan import ALIGN, FUNCTIONS, PlanArray, PlanOperand, PlanStep, PlanTable, Stream
from narsil.errors import ArtifactError
from narsil.program.origins import Origins, Trace
from narsil.program.steps import (
    ByRow,
    Elementwise,
    IdArray,
    IdExpression,
    Laid,
    LayerNorm,
    Lengths,
    Linear,
    Lookup,
    MatMul,
    Program,
    Reduce,
    Softmax,
    Step,
    Table,
    of_feature,
)

__all__ = ["LinearLayer", "Lowered", "lowered"]

_NEVER_NEGATIVE = ("relu", "sigmoid", "exp", "abs", "to_bool")
_FEW = 8  # outputs of a layer that are computed one by one
_REDUCED = ("sum", "mean", "max", "min")
_ROOMY = 1 << 22  # floats of a row: a program whose values need more is none that rows are scored with


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer in FP32."""

    weight: NDArray[np.float32]  # (out, in)
    bias: NDArray[np.float32]  # (out,)
    signed: bool  # whether its input may be negative


@dataclass(frozen=True)
class Lowered:
    """A plan, its layers not packed yet."""

    steps: tuple[PlanStep, ...]
    arena: int
    transient: int
    outputs: tuple[tuple[int, int], ...]
    tables: tuple[PlanTable, ...]
    streams: tuple[Stream, ...]
    layers: tuple[LinearLayer, ...]
    arrays: tuple[PlanArray, ...]
    data: tuple[NDArray[Any], ...]  # of the arrays
    stored: tuple[NDArray[np.uint8], ...]  # what tables.bin holds, one after the other


@dataclass(frozen=True)
class _Value:
    """A value that lies in order, before it has a place."""

    number: int
    width: int
    stride: int


@dataclass(frozen=True)
class _Draft:
    """A step whose operands and runs are values still."""

    step: PlanStep
    made: _Value | None
    taken: tuple[_Value | NDArray[np.float32], ...] = ()
    runs: tuple[tuple[_Value, int, int, int], ...] = ()  # of a move: source, first column, first column made, length


def lowered(program: Program, tasks: Sequence[str], name: str) -> Lowered:
    """The plan of a program's tasks. Raises ArtifactError."""
    return _Lowering(_folded(program), name).run(tasks)


class _Lowering:
    def __init__(self, program: Program, name: str) -> None:
        self.program = program
        self.name = name
        self.trace = Trace(program)
        self.uses = _uses(program)
        self.drafts: list[_Draft] = []
        self.values: dict[Any, _Value] = {}
        self.fresh = 0
        self.layers: list[LinearLayer] = []
        self.arrays: list[NDArray[Any]] = []
        self.tables: list[tuple[Table, PlanTable]] = []
        self.streams: list[Stream] = []
        self.fused: set[int] = set()  # activations that ran with their layer
        self.places: dict[int, _Places] = {}
        self.pairs: dict[int, dict[tuple[int, int], int]] = {}  # of a matmul that gives pairs: (i, j) -> its column

    def run(self, tasks: Sequence[str]) -> Lowered:
        """See lowered."""
        for step in self.program.steps:
            if step.out not in self.fused and _computes(step):
                self._lower(step)
        outputs, first = [], 0
        for task in tasks:
            value = self._operand(self.trace.of(self.program.outputs[task]))
            width = value.width
            self.drafts.append(_Draft(PlanStep("output", width=width, sizes=(first,)), None, (value,)))
            outputs.append((first, width))
            first += width
        return self._placed(tuple(outputs))

    def _lower(self, step: Step) -> None:
        kinds: dict[type[Step], Any] = {
            ByRow: self._by_row,
            Lookup: self._lookup,
            Laid: self._laid,
            Lengths: self._lengths,
            Linear: self._linear,
            Elementwise: self._elementwise,
            MatMul: self._matmul,
            Reduce: self._reduce,
            Softmax: self._softmax,
            LayerNorm: self._norm,
        }
        if type(step) not in kinds:
            raise self._unknown(getattr(step, "name", type(step).__name__))
        kinds[type(step)](step)

    def _unknown(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.name}: the fused engine has no step for {what}; serve it with the torch backend")

    def _value(self, key: Any, width: int, stride: int | None = None) -> _Value:
        self.fresh += 1
        self.values[key] = value = _Value(self.fresh, width, stride or rounded_up(width, ALIGN))
        return value

    def _shape(self, number: int) -> tuple[int, ...]:
        return self.program.shapes[number]

    def _made(self, number: int) -> _Value:
        """The place of what a step computes."""
        return self._value(number, _size(self._shape(number)))

    def _computed(self, number: int) -> _Value:
        """A value that a step before has made; dense columns are copied into the arena when they are first needed."""
        if number not in self.values:
            if number not in self.program.dense.values():
                raise self._unknown("a value that nothing makes")
            value = self._made(number)
            first = 0
            for other in self.program.dense.values():
                if other == number:
                    break
                first += _size(self._shape(other))
            self.drafts.append(_Draft(PlanStep("columns", width=value.width, sizes=(first,)), value))
        return self.values[number]

    def _operand(self, origins: Origins, layout: tuple[int, int] | None = None) -> _Value:
        """A value of these numbers, in order. ``layout``: (sub-rows, stride) of sub-rows that do not lie end to end."""
        lone = origins.lone()
        count = origins.values.size
        if lone is not None and layout is None and lone not in self.pairs and _size(self._shape(lone)) == count:
            return self._computed(lone)
        key = (origins.values.tobytes(), origins.places.tobytes(), layout)
        if key not in self.values:
            self._move(key, origins, layout)
        return self.values[key]

    def _move(self, key: Any, origins: Origins, layout: tuple[int, int] | None) -> None:
        runs: list[tuple[_Value, int, int, int]] = []
        inner = origins.values.size if layout is None else origins.values.size // layout[0]
        for at, (number, place) in enumerate(zip(origins.values.ravel(), origins.places.ravel(), strict=True)):
            source = self._computed(int(number))
            column = int(place)
            if int(number) in self.pairs:
                column = self._pair(int(number), column)
            to = at if layout is None else at // inner * layout[1] + at % inner
            if (
                runs
                and runs[-1][0] == source
                and (runs[-1][1] + runs[-1][3], runs[-1][2] + runs[-1][3]) == (column, to)
            ):
                runs[-1] = (*runs[-1][:3], runs[-1][3] + 1)
            else:
                runs.append((source, column, to, 1))
        if layout is None:
            value = self._value(key, origins.values.size)
        else:
            value = self._value(key, layout[0] * layout[1], layout[0] * layout[1])
        self.drafts.append(_Draft(PlanStep("move", width=value.width), value, (), tuple(runs)))

    def _array(self, array: NDArray[Any]) -> int:
        """The number of an array; equal ones are kept once."""
        for number, kept in enumerate(self.arrays):
            if kept.dtype == array.dtype and np.array_equal(kept, array):
                return number
        self.arrays.append(array)
        return len(self.arrays) - 1

    def _lookup(self, step: Lookup) -> None:
        first, base = len(self.tables), self._first_of(step.group)
        for feature, table in zip(step.features, step.tables, strict=True):
            ids = of_feature(step.ids, feature)
            stream = self._stream(ids, None if step.weights is None else of_feature(step.weights, feature))
            place = PlanTable(
                *(0, table.rows, table.row_bytes, table.dim, table.kind, table.scale_bytes if table.kind > 1 else 0),
                *(step.pooling == "mean", base + feature, stream),
            )
            self.tables.append((table, place))
        value = self._made(step.out)
        sizes = (first, len(step.tables))
        self.drafts.append(_Draft(PlanStep("lookup", width=value.width, sizes=sizes), value))

    def _first_of(self, group: str) -> int:
        """The request's feature that is a group's first."""
        before = itertools.takewhile(lambda name: name != group, self.program.groups)
        return sum(self.program.groups[name] for name in before)

    def _laid(self, step: Laid) -> None:
        table, stream = step.table, self._stream(step.ids, None)
        scale_bytes = table.scale_bytes if table.kind > 1 else 0
        feature = self._first_of(step.group) + step.feature
        place = PlanTable(*(0, table.rows, table.row_bytes, table.dim, table.kind, scale_bytes, False, feature, stream))
        self.tables.append((table, place))
        value = self._made(step.out)
        sizes = (len(self.tables) - 1, step.length)
        plan = PlanStep("sequence", width=value.width, sizes=sizes, numbers=(step.fill,))
        self.drafts.append(_Draft(plan, value))

    def _lengths(self, step: Lengths) -> None:
        value = self._made(step.out)
        self.drafts.append(_Draft(PlanStep("lengths", width=value.width, sizes=(self._first_of(step.group),)), value))

    def _stream(self, ids: IdExpression, weights: IdExpression | None) -> int:
        what, weighing = _plain(ids, self), None if weights is None else _plain(weights, self)
        stream = Stream(None if what == "ids" else what, weighing)
        if stream not in self.streams:
            self.streams.append(stream)
        return self.streams.index(stream)

    def _linear(self, step: Linear) -> None:
        origins = self.trace.of(step.source)
        inputs, outputs = step.weight.shape[1], step.weight.shape[0]
        rows = origins.values.size // inputs
        if rows == 1 and outputs <= _FEW:
            self._dot(step, origins)
            return
        signed = not all(self._never_negative(int(number)) for number in np.unique(origins.values))
        bias = np.zeros(outputs, np.float32) if step.bias is None else np.asarray(step.bias, np.float32)
        self.layers.append(LinearLayer(np.asarray(step.weight, np.float32), bias, signed))
        relu = self._relu_behind(step.out)
        out = step.out if relu is None else relu
        stride_in, stride_out = rounded_up(inputs, ALIGN), rounded_up(outputs, ALIGN)
        plan = PlanStep("linear", function=int(relu is not None), data=(len(self.layers) - 1,))
        if rows == 1:
            value = self._made(out)
            plan = replace(plan, width=outputs, sizes=(1, stride_in, stride_out))
            self.drafts.append(_Draft(plan, value, (self._operand(origins),)))
            return
        source = self._operand(origins, (rows, stride_in))
        wide = self._value(("sub-rows", out), rows * stride_out, rows * stride_out)
        plan = replace(plan, width=wide.width, sizes=(rows, stride_in, stride_out))
        self.drafts.append(_Draft(plan, wide, (source,)))
        runs = tuple((wide, row * stride_out, row * outputs, outputs) for row in range(rows))
        value = self._made(out)
        self.drafts.append(_Draft(PlanStep("move", width=value.width), value, (), runs))

    def _dot(self, step: Linear, origins: Origins) -> None:
        """A layer of few outputs, in FP32: a panel of outputs would be mostly zeros."""
        outputs, inputs = step.weight.shape
        weight = np.zeros((outputs, rounded_up(inputs, 16)), np.float32)
        weight[:, :inputs] = step.weight
        bias = np.zeros(outputs, np.float32) if step.bias is None else np.asarray(step.bias, np.float32)
        relu = self._relu_behind(step.out)
        source, value = self._operand(origins), self._made(step.out if relu is None else relu)
        data = (self._array(weight.ravel()), self._array(bias))
        plan = PlanStep("dot", width=outputs, function=int(relu is not None), sizes=(inputs,), data=data)
        self.drafts.append(_Draft(plan, value, (source,)))

    def _relu_behind(self, number: int) -> int | None:
        """The relu that alone takes a layer's result, as it is."""
        if self.uses[number] != 1:
            return None
        for step in self.program.steps:
            if isinstance(step, Elementwise) and step.function == "relu":
                (operand,) = step.operands
                if isinstance(operand, int) and self._shape(step.out) == self._shape(number) and operand == number:
                    self.fused.add(step.out)
                    return step.out
        return None

    def _never_negative(self, number: int) -> bool:
        step = self.trace.made_by.get(number)
        return isinstance(step, Softmax) or (isinstance(step, Elementwise) and step.function in _NEVER_NEGATIVE)

    def _elementwise(self, step: Elementwise) -> None:
        if step.function not in FUNCTIONS:
            raise self._unknown(f"an elementwise {step.function}")
        shape = self._shape(step.out)
        taken: list[_Value | NDArray[np.float32]] = []
        for operand in step.operands:
            if isinstance(operand, int):
                origins = self.trace.of(operand)
                taken.append(self._operand(origins if origins.values.shape == shape else origins.broadcast(shape)))
            else:
                taken.append(np.ascontiguousarray(np.broadcast_to(operand, shape), np.float32).ravel())
        value = self._made(step.out)
        plan = PlanStep(
            "elementwise", width=value.width, function=FUNCTIONS.index(step.function), numbers=_numbers(step)
        )
        self.drafts.append(_Draft(plan, value, tuple(taken)))

    def _by_row(self, step: ByRow) -> None:
        array = np.ascontiguousarray(step.array, np.float32).ravel()
        value = self._made(step.out)
        plan = PlanStep("elementwise", width=value.width, function=FUNCTIONS.index("clamp"), numbers=(None, None))
        self.drafts.append(_Draft(plan, value, (array,)))

    def _matmul(self, step: MatMul) -> None:
        shapes = [self._shape(part) if isinstance(part, int) else part.shape for part in (step.left, step.right)]
        (m, k), n = shapes[0][-2:], shapes[1][-1]
        if (
            len(shapes[0]) == len(shapes[1]) == 2
            and isinstance(step.left, int)
            and isinstance(step.right, int)
            and self._are_pairs(step, m)
        ):
            pairs = np.triu_indices(m, k=1)
            self.pairs[step.out] = {(int(i), int(j)): at for at, (i, j) in enumerate(zip(*pairs, strict=True))}
            value = self._value(step.out, len(pairs[0]))
            source = self._operand(self.trace.of(step.left))
            self.drafts.append(_Draft(PlanStep("pairs", width=value.width, sizes=(m, k)), value, (source,)))
            return
        batch = self._shape(step.out)[:-2]
        taken: list[_Value | NDArray[np.float32]] = []
        for part, shape in zip((step.left, step.right), shapes, strict=True):
            whole = (*batch, *shape[-2:])
            if isinstance(part, int):
                origins = self.trace.of(part)
                taken.append(self._operand(origins if shape == whole else origins.broadcast(whole)))
            else:
                taken.append(np.ascontiguousarray(np.broadcast_to(part, whole), np.float32).ravel())
        value = self._made(step.out)
        sizes = (m, k, n, _size(batch))
        self.drafts.append(_Draft(PlanStep("matmul", width=value.width, sizes=sizes), value, tuple(taken)))

    def _are_pairs(self, step: MatMul, vectors: int) -> bool:
        """Whether vectors are multiplied by themselves, and only products of two different ones are ever taken."""
        left, right = self.trace.of(int(step.left)), self.trace.of(int(step.right))
        if vectors < 2 or not (
            np.array_equal(left.values.T, right.values) and np.array_equal(left.places.T, right.places)
        ):
            return False
        for number in _read_by_computing(self.program):
            origins = self.trace.of(number)
            places = origins.places[origins.values == step.out]
            if (places // vectors == places % vectors).any():
                return False
        return True

    def _pair(self, number: int, place: int) -> int:
        vectors = self._shape(number)[0]
        one, other = sorted(divmod(place, vectors))
        return self.pairs[number][one, other]

    def _reduce(self, step: Reduce) -> None:
        origins = self.trace.of(step.source)
        kept = tuple(axis for axis in range(origins.values.ndim) if axis not in step.axes)
        if kept + step.axes != tuple(range(origins.values.ndim)):
            origins = origins.transposed(kept + step.axes)
        axis = _size([self._shape(step.source)[axis] for axis in step.axes])
        source = self._operand(origins)
        value = self._made(step.out)
        plan = PlanStep(
            "reduce", width=value.width, function=_REDUCED.index(step.function), sizes=(value.width, axis, 1)
        )
        self.drafts.append(_Draft(plan, value, (source,)))

    def _softmax(self, step: Softmax) -> None:
        shape = self._shape(step.source)
        sizes = (_size(shape[: step.axis]), shape[step.axis], _size(shape[step.axis + 1 :]))
        source, value = self._operand(self.trace.of(step.source)), self._made(step.out)
        self.drafts.append(_Draft(PlanStep("softmax", width=value.width, sizes=sizes), value, (source,)))

    def _norm(self, step: LayerNorm) -> None:
        shape = self._shape(step.source)
        axis = _size(shape[len(shape) - step.axes :])
        source, value = self._operand(self.trace.of(step.source)), self._made(step.out)
        data = tuple(
            -1 if part is None else self._array(np.asarray(part, np.float32).ravel())
            for part in (step.weight, step.bias)
        )
        plan = PlanStep(
            "norm", width=value.width, sizes=(value.width // axis, axis), data=data, numbers=(float(step.epsilon),)
        )
        self.drafts.append(_Draft(plan, value, (source,)))

    def _placed(self, outputs: tuple[tuple[int, int], ...]) -> Lowered:
        arena, transient = _Places(transient=False), _Places(transient=True)
        last = {value.number: at for at, draft in enumerate(self.drafts) for value in _values_of(draft)}
        passing = _passing(self.drafts)
        self.places = {number: (transient if number in passing else arena) for number in last}
        steps: list[PlanStep] = []
        waiting: list[_Value] = []
        for at, draft in enumerate(self.drafts):
            if draft.step.operation == "linear":
                # Up to here rows went one by one: another row's numbers were still to be read.
                for value in waiting:
                    arena.free(value)
                waiting = []
            if draft.made is not None:
                self.places[draft.made.number].take(draft.made)
            steps.append(self._settled(draft))
            for value in {value.number: value for value in _values_of(draft)}.values():
                if last[value.number] == at:
                    if value.number in passing:
                        transient.free(value)
                    else:
                        waiting.append(value)
        if max(arena.most, transient.most) > _ROOMY:
            raise self._unknown(f"rows that need {arena.most + transient.most} numbers at a time")
        stored, tables = self._stored()
        arrays = tuple(PlanArray(array.dtype.name, array.size) for array in self.arrays)
        return Lowered(
            *(tuple(steps), arena.most, transient.most, outputs, tables, tuple(self.streams), tuple(self.layers)),
            *(arrays, tuple(self.arrays), stored),
        )

    def _place(self, value: _Value) -> tuple[int, bool]:
        """(where a value lies, whether it has one row for all)."""
        places = self.places[value.number]
        return places.at[value.number], places.transient

    def _settled(self, draft: _Draft) -> PlanStep:
        step = draft.step
        operands = []
        for value in draft.taken:
            if isinstance(value, _Value):
                at, transient = self._place(value)
                operands.append(PlanOperand(at, value.stride, transient))
            else:
                operands.append(PlanOperand(array=self._array(value)))
        if draft.runs:
            runs = []
            for source, column, to, length in draft.runs:
                at, transient = self._place(source)
                runs.append((at, 0 if transient else source.stride, column, to, length))
            step = replace(step, sizes=(len(runs),), data=(self._array(np.array(runs, np.int64).ravel()),))
        if draft.made is None:
            return replace(step, operands=tuple(operands))
        at, transient = self._place(draft.made)
        return replace(step, at=at, stride=draft.made.stride, transient=transient, operands=tuple(operands))

    def _stored(self) -> tuple[tuple[NDArray[np.uint8], ...], tuple[PlanTable, ...]]:
        """(the bytes of all tables, each table's place in them): a table that several features share is kept once."""
        stored: list[NDArray[np.uint8]] = []
        starts: dict[tuple[int, int], int] = {}
        tables, end = [], 0
        for table, place in self.tables:
            key = (table.data.ctypes.data, table.start)
            if key not in starts:
                starts[key] = end
                stored.append(table.data[table.start : table.start + table.rows * table.row_bytes])
                end += stored[-1].size
            tables.append(replace(place, start=starts[key]))
        return tuple(stored), tuple(tables)


class _Places:
    """Places in the arena, first fit."""

    def __init__(self, *, transient: bool) -> None:
        self.transient = transient
        self.at: dict[int, int] = {}
        self.most = 0
        self._taken: list[tuple[int, int]] = []  # (first, behind the last), in order

    def take(self, value: _Value) -> None:
        """Gives a value a place."""
        at = 0
        for first, behind in self._taken:
            if first - at >= value.stride:
                break
            at = max(at, behind)
        self.at[value.number] = at
        self._taken = sorted([*self._taken, (at, at + value.stride)])
        self.most = max(self.most, at + value.stride)

    def free(self, value: _Value) -> None:
        """Takes it back."""
        at = self.at[value.number]
        self._taken.remove((at, at + value.stride))


def _passing(drafts: Sequence[_Draft]) -> set[int]:
    """The values that are made and taken between two layers alone: the steps there run row by row."""
    stretch, stretches = 0, []
    for draft in drafts:
        layer = draft.step.operation == "linear"
        stretch += layer
        stretches.append(-1 if layer else stretch)
        stretch += layer
    met: dict[int, set[int]] = {}
    for number, draft in zip(stretches, drafts, strict=True):
        for value in _values_of(draft):
            met.setdefault(value.number, set()).add(number)
    return {number for number, found in met.items() if len(found) == 1 and found != {-1}}


def _values_of(draft: _Draft) -> list[_Value]:
    values = [value for value in draft.taken if isinstance(value, _Value)]
    values += [source for source, *_ in draft.runs]
    return values if draft.made is None else [*values, draft.made]


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _numbers(step: Elementwise) -> tuple[float | None, ...]:
    """As the engine takes them: a side that a clamp has not is None."""
    numbers = tuple(None if number is None else float(number) for number in step.numbers)
    if step.function == "nan_to_num":
        most = float(np.finfo(np.float32).max)
        nan, above, below = (*numbers, None, None, None)[:3]
        return (nan or 0.0, most if above is None else above, -most if below is None else below)
    return numbers


def _plain(expression: Any, lowering: _Lowering) -> Any:
    """An expression as nested lists, for a manifest."""
    if isinstance(expression, IdArray):
        return ["array", lowering._array(expression.values)]
    if not isinstance(expression, IdExpression):
        return expression
    if not expression.arguments:
        return expression.function
    return [expression.function, *(_plain(argument, lowering) for argument in expression.arguments)]


def _computes(step: Step) -> bool:
    kinds = (ByRow, Lookup, Laid, Lengths, Linear, Elementwise, MatMul, Reduce, Softmax, LayerNorm)
    return type(step) in kinds or hasattr(step, "call")


def _read_by_computing(program: Program) -> list[int]:
    """The values that a step which computes takes, and the outputs."""
    read = [number for step in program.steps if _computes(step) for number in step.reads()]
    return [*read, *program.outputs.values()]


def _uses(program: Program) -> Counter[int]:
    """How many steps, and outputs, take each value."""
    return Counter([number for step in program.steps for number in step.reads()] + list(program.outputs.values()))


def _folded(program: Program) -> Program:
    """The program with constants behind its linear layers in their weights, as batch norms leave them."""
    steps: dict[int, Step] = {step.out: step for step in program.steps}
    uses = _uses(program)
    for step in program.steps:
        if not isinstance(step, Elementwise) or step.function not in ("mul", "add", "sub", "div"):
            continue
        operands = [operand for operand in step.operands if isinstance(operand, int)]
        if len(operands) != 1 or uses[operands[0]] != 1 or step.numbers:
            continue
        layer = steps.get(operands[0])
        if isinstance(layer, Linear) and program.shapes[step.out] == program.shapes[layer.out]:
            scale, shift = _affine(step, layer.weight.shape[0])
            if scale is None or shift is None:
                continue
            bias = np.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.astype(np.float64)
            weight = (layer.weight.astype(np.float64) * scale[:, None]).astype(np.float32)
            steps[step.out] = Linear(step.out, layer.source, weight, (bias * scale + shift).astype(np.float32))
            del steps[layer.out]
    order = [step.out for step in program.steps if step.out in steps]
    return replace(program, steps=tuple(steps[number] for number in order))


def _affine(step: Elementwise, width: int) -> tuple[Any, Any]:
    """(scale, shift) of what an elementwise step does to a layer's outputs; None where it is not the same for all rows
    of a layer that has several."""
    left, right = step.operands
    constant = np.asarray(right if isinstance(left, int) else left, np.float64)
    if constant.size not in (1, width) or constant.shape[:-1] not in ((), (1,) * (constant.ndim - 1)):
        return None, None
    numbers = np.broadcast_to(constant.reshape(-1), (width,))
    one, none = np.ones(width), np.zeros(width)
    if step.function == "mul":
        return numbers, none
    if step.function == "add":
        return one, numbers
    if step.function == "sub":
        return (one, -numbers) if isinstance(left, int) else (-one, numbers)
    return (1.0 / numbers, none) if isinstance(left, int) else (None, None)
