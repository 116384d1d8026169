"""A program: what a model computes for each row, step by step, with a reference of every step in float64.

A value of a program is (B, *shape): for each of B rows an array of a fixed shape. Steps make values out of values and
of constants; none of them looks at another row, so that a row's result cannot depend on its company. What a request
brings is the inputs: dense columns, and groups of bags of ids.

The reference is plain numpy in float64. It is slow, and what faster engines and the gate are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ELEMENTWISE",
    "ID_FUNCTIONS",
    "Arrange",
    "Bags",
    "ByRow",
    "Concat",
    "Elementwise",
    "IdArray",
    "IdExpression",
    "Laid",
    "LayerNorm",
    "Lengths",
    "Linear",
    "Lookup",
    "MatMul",
    "Operand",
    "Permute",
    "Program",
    "Reduce",
    "Reshape",
    "Softmax",
    "Step",
    "Table",
    "Take",
    "evaluate_ids",
    "of_feature",
]

Values = NDArray[np.float64]  # (B, *shape); truth values are 0 and 1
Operand = int | NDArray[Any]  # the number of a value, or a constant that broadcasts against (B, *shape)
Pooling = Literal["sum", "mean"]


def _gelu(x: Values) -> Values:
    from math import erf

    result: Values = 0.5 * x * (1.0 + np.vectorize(erf, otypes=[np.float64])(x / np.sqrt(2.0)))
    return result


def _sigmoid(x: Values) -> Values:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _nan_to_num(x: Values, nan: Any = None, above: Any = None, below: Any = None) -> Values:
    most = float(np.finfo(np.float32).max)
    return np.nan_to_num(
        x, nan=nan or 0.0, posinf=most if above is None else above, neginf=-most if below is None else below
    )


def _clamp(x: Values, least: Any = None, most: Any = None) -> Values:
    return x if least is None and most is None else np.clip(x, least, most)


def _rounded_to_bfloat16(x: Values) -> Values:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


# name -> its reference: arguments are values or constants, and then numbers. NaN goes in and out as in torch.
ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    "relu": lambda x: np.where(x > 0, x, np.where(np.isnan(x), x, 0.0)),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
    "leaky_relu": lambda x, slope=0.01: np.where(x > 0, x, x * slope),
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "neg": np.negative,
    "reciprocal": lambda x: 1.0 / x,
    "sign": lambda x: np.where(np.isnan(x), 0.0, np.sign(x)),
    "floor": np.floor,
    "nan_to_num": _nan_to_num,
    "clamp": _clamp,
    "isnan": np.isnan,
    "to_bool": lambda x: x != 0,
    "to_integer": np.trunc,
    "to_float16": lambda x: x.astype(np.float16),
    "to_bfloat16": _rounded_to_bfloat16,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "remainder": np.mod,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": lambda x, y: (x != 0) & (y != 0),
    "or": lambda x, y: (x != 0) | (y != 0),
    "not": lambda x: x == 0,
    "where": lambda condition, x, y: np.where(condition != 0, x, y),
}


# What is done to ids, beside: whole numbers are computed in 64 bits and then brought to their own kind.
ID_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **ELEMENTWISE,
    "to_int32": lambda x: np.asarray(x).astype(np.int64).astype(np.int32).astype(np.int64),
    "to_float32": lambda x: np.asarray(x).astype(np.float32).astype(np.float64),
    "to_float64": lambda x: np.asarray(x).astype(np.float64),
    "to_integer": lambda x: np.trunc(x).astype(np.int64),
    "relu": lambda x: np.maximum(x, 0),  # floats would not hold all whole numbers
    "fmod": np.fmod,
    "floor_divide": np.floor_divide,
    "truncated_divide": lambda x, y: (x - np.fmod(x, y)) // y,
    "bit_and": np.bitwise_and,
    "bit_or": np.bitwise_or,
    "bit_xor": np.bitwise_xor,
    "bit_not": np.invert,
    "shift_left": np.left_shift,
    "shift_right": np.right_shift,
    # Ids that are let in stay inside of the array: see program/bounds.py.
    "take": lambda array, x: array.values[np.clip(x, 0, len(array.values) - 1)],
    "search": lambda array, x: np.searchsorted(array.values, x),
    "search_right": lambda array, x: np.searchsorted(array.values, x, side="right"),
}


@dataclass(frozen=True)
class Bags:
    """The ids of one group of a request's features, as a program's reference takes them."""

    lengths: NDArray[np.integer[Any]]  # (T, B)
    values: NDArray[np.integer[Any]]  # (N,) key-major
    weights: NDArray[np.floating[Any]] | None = None  # (N,)

    def of(self, feature: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """(lengths, ids, weights) of one feature's bags."""
        stops = np.cumsum(self.lengths.sum(axis=1))
        start, stop = int(stops[feature] - self.lengths[feature].sum()), int(stops[feature])
        weights = None if self.weights is None else self.weights[start:stop]
        return self.lengths[feature], self.values[start:stop], weights


@dataclass(frozen=True, eq=False)
class IdArray:
    """Whole numbers of the model's own in which ids are looked up, or searched: not empty."""

    values: NDArray[np.int64]  # (N,)

    @cached_property
    def rises(self) -> bool:
        """Whether no number is less than the one before it."""
        return bool((self.values[1:] >= self.values[:-1]).all())

    def range(self, first: int, last: int) -> tuple[int, int]:
        """The least and the most of the numbers from one place to another, both included."""
        if (first, last) == (0, len(self.values) - 1):
            return self._range
        part = self.values[first : last + 1]
        return int(part.min()), int(part.max())

    @cached_property
    def _range(self) -> tuple[int, int]:
        return int(self.values.min()), int(self.values.max())


@dataclass(frozen=True)
class IdExpression:
    """A number for each id: the id itself, its weight, a constant, or what an ELEMENTWISE function makes of such.

    ``by_feature`` has one argument for each feature of the group: what is made of that feature's ids.
    """

    function: str  # "ids", "weights", "by_feature", or a name of ID_FUNCTIONS
    arguments: tuple[Any, ...] = ()  # IdExpression, IdArray or numbers

    @property
    def is_plain(self) -> bool:
        """Whether it is what the request says, unchanged."""
        return self.function in ("ids", "weights")


def of_feature(expression: Any, feature: int) -> Any:
    """What an expression is for the ids of one feature."""
    if not isinstance(expression, IdExpression) or not expression.arguments:
        return expression
    if expression.function == "by_feature":
        return of_feature(expression.arguments[feature], feature)
    arguments = tuple(of_feature(argument, feature) for argument in expression.arguments)
    same = all(one is other for one, other in zip(arguments, expression.arguments, strict=True))
    return expression if same else IdExpression(expression.function, arguments)


def evaluate_ids(expression: Any, ids: NDArray[Any], weights: NDArray[Any] | None) -> Any:
    """The numbers of an expression: whole ones as torch computes them, wrap-around included."""
    if not isinstance(expression, IdExpression):
        return expression
    if expression.function == "ids":
        return np.asarray(ids).astype(np.int64)
    if expression.function == "weights":
        return np.ones(len(ids)) if weights is None else weights
    arguments = [evaluate_ids(argument, ids, weights) for argument in expression.arguments]
    return ID_FUNCTIONS[expression.function](*arguments)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of vectors, as FBGEMM lays them out: an integer row begins with its FP16 or FP32 scale and bias."""

    name: str
    data: NDArray[np.uint8]  # (bytes,) that hold this table and perhaps others
    start: int  # bytes
    rows: int
    dim: int
    kind: int  # FBGEMM's SparseType: 0 FP32, 1 FP16, 2 INT8, 3 INT4, 4 INT2
    row_bytes: int
    scale_bytes: int = 4  # scale and bias together

    def vectors(self, ids: NDArray[np.int64]) -> Values:
        """(N, dim) of the rows of these ids, as the lookup adds them up."""
        if len(ids) and (ids.min() < 0 or ids.max() >= self.rows):
            raise IndexError(f"an id lies outside of the table {self.name} of {self.rows} rows")
        all_rows = self.data[self.start : self.start + self.rows * self.row_bytes].reshape(self.rows, self.row_bytes)
        stored = np.ascontiguousarray(all_rows[ids])
        if self.kind in (0, 1):
            size = self.dim * (4 if self.kind == 0 else 2)
            return stored[:, :size].view(np.float32 if self.kind == 0 else np.float16).astype(np.float64)
        half = self.scale_bytes // 2
        pair = stored[:, : self.scale_bytes].view(np.float16 if half == 2 else np.float32).astype(np.float64)
        codes = _unpacked(stored[:, self.scale_bytes :], {2: 8, 3: 4, 4: 2}[self.kind])[:, : self.dim]
        return codes * pair[:, :1] + pair[:, 1:2]


def _unpacked(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(N, bytes) to (N, bytes * 8 / bits): the lowest bits come first."""
    if bits == 8:
        return stored
    parts = [(stored >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=2).reshape(len(stored), stored.shape[1] * len(parts))


@dataclass(frozen=True, eq=False)
class Step:
    """One step: makes the value ``out``."""

    out: int

    def reads(self) -> tuple[int, ...]:
        """The numbers of the values that it takes."""
        return ()

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """Its result in float64."""
        raise NotImplementedError


def _read(operand: Operand, values: Mapping[int, Values]) -> Any:
    return values[operand] if isinstance(operand, int) else np.asarray(operand, np.float64)


@dataclass(frozen=True, eq=False)
class Lookup(Step):
    """The pooled vectors of some features beside each other: (B, sum of dims)."""

    group: str
    features: tuple[int, ...]  # positions in the group, one for each table
    tables: tuple[Table, ...]
    pooling: Pooling
    ids: IdExpression
    weights: IdExpression | None = None

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        return np.concatenate(
            [self._pooled(groups[self.group], *pair) for pair in zip(self.features, self.tables, strict=True)], axis=1
        )

    def _pooled(self, bags: Bags, feature: int, table: Table) -> Values:
        lengths, ids, weights = bags.of(feature)
        own = of_feature(self.ids, feature)
        rows = table.vectors(np.asarray(evaluate_ids(own, ids, weights)).astype(np.int64))
        if self.weights is not None:
            weighing = evaluate_ids(of_feature(self.weights, feature), ids, weights)
            rows = rows * np.asarray(weighing, np.float64)[:, None]
        sums = np.zeros((len(lengths), table.dim))
        np.add.at(sums, np.repeat(np.arange(len(lengths)), lengths), rows)
        return sums / np.maximum(lengths, 1)[:, None] if self.pooling == "mean" else sums


@dataclass(frozen=True, eq=False)
class Lengths(Step):
    """How many ids each bag of a group's features holds: (B, T)."""

    group: str

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        return groups[self.group].lengths.T.astype(np.float64)


@dataclass(frozen=True, eq=False)
class Laid(Step):
    """The vectors of a feature's first ``length`` ids, (B, length, dim), and ``fill`` where a bag has fewer."""

    group: str
    feature: int
    table: Table
    ids: IdExpression
    length: int
    fill: float

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        lengths, ids, weights = groups[self.group].of(self.feature)
        vectors = self.table.vectors(np.asarray(evaluate_ids(self.ids, ids, weights)).astype(np.int64))
        result = np.full((len(lengths), self.length, self.table.dim), self.fill)
        starts = np.cumsum(lengths) - lengths
        for row, (start, length) in enumerate(zip(starts, np.minimum(lengths, self.length), strict=True)):
            result[row, :length] = vectors[start : start + length]
        return result


@dataclass(frozen=True, eq=False)
class ByRow(Step):
    """The same numbers for every row."""

    array: NDArray[np.float64]

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        counts = [len(value) for value in values.values()] + [bags.lengths.shape[1] for bags in groups.values()]
        return np.broadcast_to(self.array, (counts[0], *self.array.shape))


@dataclass(frozen=True, eq=False)
class Linear(Step):
    """Over the last axis: x . weight^T + bias."""

    source: int
    weight: NDArray[np.float32]  # (out, in)
    bias: NDArray[np.float32] | None  # (out,)

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return (self.source,)

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        product = values[self.source] @ self.weight.astype(np.float64).T
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True, eq=False)
class Elementwise(Step):
    """A function of ELEMENTWISE, with numpy's broadcasting between its operands."""

    function: str
    operands: tuple[Operand, ...]
    numbers: tuple[float | None, ...] = ()

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return tuple(operand for operand in self.operands if isinstance(operand, int))

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        result = ELEMENTWISE[self.function](*(_read(operand, values) for operand in self.operands), *self.numbers)
        return np.asarray(result, np.float64)


@dataclass(frozen=True, eq=False)
class Arrange(Step):
    """Steps that move numbers and compute none."""

    source: int

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Take(Arrange):
    """Some entries of the row, by their place in the flattened row, in a new shape."""

    places: NDArray[np.int64]  # of the new shape

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        source = values[self.source]
        return source.reshape(len(source), -1)[:, self.places]


@dataclass(frozen=True, eq=False)
class Reshape(Arrange):
    """The same numbers in the same order, of another shape."""

    shape: tuple[int, ...]

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        source = values[self.source]
        return source.reshape(len(source), *self.shape)


@dataclass(frozen=True, eq=False)
class Permute(Arrange):
    """The row's axes in another order."""

    axes: tuple[int, ...]  # from 0, without the rows'

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        return np.transpose(values[self.source], (0, *(axis + 1 for axis in self.axes)))


@dataclass(frozen=True, eq=False)
class Concat(Step):
    """Values beside each other along an axis of the row."""

    sources: tuple[int, ...]
    axis: int

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return self.sources

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        return np.concatenate([values[source] for source in self.sources], axis=self.axis + 1)


@dataclass(frozen=True, eq=False)
class MatMul(Step):
    """Matrix products of the last two axes, row by row; axes before those broadcast as numpy's do."""

    left: Operand
    right: Operand

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return tuple(operand for operand in (self.left, self.right) if isinstance(operand, int))

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        result: Values = _read(self.left, values) @ _read(self.right, values)
        return result


_REDUCED: Mapping[str, Callable[..., Any]] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


@dataclass(frozen=True, eq=False)
class Reduce(Step):
    """Sum, mean, max or min over axes of the row."""

    source: int
    function: str
    axes: tuple[int, ...]
    keep: bool

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return (self.source,)

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        axes = tuple(axis + 1 for axis in self.axes)
        return np.asarray(_REDUCED[self.function](values[self.source], axis=axes, keepdims=self.keep))


@dataclass(frozen=True, eq=False)
class Softmax(Step):
    """Over one axis of the row."""

    source: int
    axis: int

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return (self.source,)

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        source = values[self.source]
        powers = np.exp(source - source.max(axis=self.axis + 1, keepdims=True))
        result: Values = powers / powers.sum(axis=self.axis + 1, keepdims=True)
        return result


@dataclass(frozen=True, eq=False)
class LayerNorm(Step):
    """Over the last ``axes`` axes: mean 0 and variance 1, then scaled and moved."""

    source: int
    axes: int
    weight: NDArray[np.float32] | None
    bias: NDArray[np.float32] | None
    epsilon: float

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return (self.source,)

    def reference(self, values: Mapping[int, Values], groups: Mapping[str, Bags]) -> Values:
        """See Step.reference."""
        source = values[self.source]
        over = tuple(range(source.ndim - self.axes, source.ndim))
        centred = source - source.mean(axis=over, keepdims=True)
        scaled = centred / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + self.epsilon)
        scaled = scaled if self.weight is None else scaled * self.weight
        result: Values = scaled if self.bias is None else scaled + self.bias
        return result


@dataclass(frozen=True)
class Program:
    """Steps in an order in which they can run, from the inputs to the outputs."""

    dense: Mapping[str, int]  # input of columns -> number of its value
    groups: Mapping[str, int]  # input of bags -> its number of features
    steps: tuple[Step, ...]
    outputs: Mapping[str, int]  # task -> number of its value
    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # of every value, without the rows

    def reference(self, dense: Mapping[str, NDArray[Any]], groups: Mapping[str, Bags]) -> dict[str, Values]:
        """Task -> (B, *shape) in float64."""
        values: dict[int, Values] = {number: np.asarray(dense[name], np.float64) for name, number in self.dense.items()}
        with np.errstate(all="ignore"):
            for step in self.steps:
                values[step.out] = step.reference(values, groups)
        return {task: values[number] for task, number in self.outputs.items()}

    def consumers(self) -> dict[int, list[Step]]:
        """Number of a value -> the steps that take it."""
        found: dict[int, list[Step]] = {}
        for step in self.steps:
            for number in step.reads():
                found.setdefault(number, []).append(step)
        return found


def operands_of(items: Sequence[Operand]) -> tuple[int, ...]:
    """Those of the operands that are values."""
    return tuple(item for item in items if isinstance(item, int))
