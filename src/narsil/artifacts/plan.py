"""A plan: a program as the fused engine runs it, in the manifest and in weights.bin.

Receives values from a manifest, which are hostile; produces a Plan whose steps stay inside its arena, its arrays and
its tables. compile/lowering.py makes plans, backends/programs.py runs them, csrc/forward/program.hpp says what each
step does. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.packed import LayerShape, rounded_up
from narsil.errors import ArtifactError

__all__ = ["ALIGN", "FUNCTIONS", "OPERATIONS", "Plan", "PlanArray", "PlanOperand", "PlanStep", "PlanTable", "Stream"]

# By program.hpp's numbers.
OPERATIONS = (
    *(
        "columns",
        "lookup",
        "linear",
        "dot",
        "move",
        "elementwise",
        "pairs",
        "matmul",
        "reduce",
        "softmax",
        "norm",
        "output",
        "sequence",
        "lengths",
    ),
)
# By elementwise.hpp's.
FUNCTIONS = (
    *("relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "leaky_relu", "exp", "log", "log1p", "sqrt", "abs"),
    *("neg", "reciprocal", "sign", "floor", "nan_to_num", "clamp", "isnan", "to_bool", "to_integer", "to_float16"),
    *("to_bfloat16", "add", "sub", "mul", "div", "pow", "maximum", "minimum", "remainder", "gt", "ge", "lt", "le"),
    *("eq", "ne", "and", "or", "not", "where"),
)
ALIGN = 32  # floats: rows of values begin at multiples of it
_KINDS = {"float32": np.float32, "int64": np.int64}
_MOST = 1 << 31
_AGAIN = "compile the model again"


@dataclass(frozen=True)
class PlanTable:
    """Where a table lies in tables.bin, and whose bags it pools."""

    start: int  # bytes
    rows: int
    row_bytes: int
    dim: int
    kind: int  # FBGEMM's SparseType
    scale_bytes: int
    mean: bool
    feature: int  # position in the request
    stream: int


@dataclass(frozen=True)
class Stream:
    """What is looked up: the ids of a request, and their weights, after what the model does to them. Expressions are
    nested lists of a function's name and its arguments, see program/steps.py; None: ids as they are, or no weights."""

    ids: Any = None
    weights: Any = None


@dataclass(frozen=True)
class PlanArray:
    """An array of weights.bin, behind the layers."""

    kind: str
    size: int  # numbers


@dataclass(frozen=True)
class PlanOperand:
    """A value, or an array where ``array`` is not negative."""

    at: int = 0
    stride: int = 0
    transient: bool = False  # whether all rows of a tile share one row of it
    array: int = -1


@dataclass(frozen=True)
class PlanStep:
    """One step; see program.hpp."""

    operation: str
    at: int = 0
    stride: int = 0
    transient: bool = False
    width: int = 0
    function: int = 0
    operands: tuple[PlanOperand, ...] = ()
    sizes: tuple[int, ...] = ()
    data: tuple[int, ...] = ()  # LINEAR: a layer; else arrays; negative: none
    numbers: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A program for the fused engine."""

    dense_columns: int
    features: int
    arena: int  # floats of a row, all values of a tile together
    transient: int  # floats of the values that have one row for all
    outputs: tuple[tuple[int, int], ...]  # (first column, width) of each task
    tables: tuple[PlanTable, ...]
    streams: tuple[Stream, ...]
    steps: tuple[PlanStep, ...]
    layers: tuple[LayerShape, ...]
    arrays: tuple[PlanArray, ...]

    @property
    def columns(self) -> int:
        """Of the result."""
        return sum(width for _, width in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is as usual is left out of a step."""
        usual = PlanStep("")
        steps = []
        for step in self.steps:
            names = [field.name for field in fields(step) if getattr(step, field.name) != getattr(usual, field.name)]
            steps.append({name: asdict(step)[name] for name in names})
        return {**asdict(self), "steps": steps}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of to_dict. Raises ArtifactError on values of wrong types; ``check`` looks at the numbers."""
        try:
            plan = cls(
                dense_columns=data["dense_columns"],
                features=data["features"],
                arena=data["arena"],
                transient=data["transient"],
                outputs=tuple((int(first), int(width)) for first, width in data["outputs"]),
                tables=tuple(PlanTable(**table) for table in data["tables"]),
                streams=tuple(Stream(**stream) for stream in data["streams"]),
                steps=tuple(_step(step) for step in data["steps"]),
                layers=tuple(LayerShape(**layer) for layer in data["layers"]),
                arrays=tuple(PlanArray(**array) for array in data["arrays"]),
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the manifest's plan is damaged ({error}); {_AGAIN}") from None
        return plan

    def check(self, features: int, dense_dim: int, widths: Sequence[int], tables_bytes: int) -> None:
        """Raises ArtifactError unless every step stays inside the arena, the arrays and the tables, and the plan
        belongs to a schema with so many features, columns and widths of tasks."""
        numbers = [self.dense_columns, self.features, self.arena, self.transient]
        if not all(type(number) is int and 0 <= number < _MOST for number in numbers):
            raise ArtifactError(f"the manifest's plan has impossible sizes; {_AGAIN}")
        if self.dense_columns != dense_dim or self.features != features:
            raise ArtifactError(f"the manifest's schema and plan differ; {_AGAIN}")
        columns = np.cumsum([0, *widths]).tolist()
        if [tuple(output) for output in self.outputs] != list(zip(columns[:-1], widths, strict=True)):
            raise ArtifactError(f"the manifest's tasks and plan differ; {_AGAIN}")
        for layer in self.layers:
            layer.check()
        for array in self.arrays:
            if (
                not isinstance(array.kind, str)
                or array.kind not in _KINDS
                or type(array.size) is not int
                or not 0 <= array.size < _MOST
            ):
                raise ArtifactError(f"the manifest's plan has impossible arrays; {_AGAIN}")
        for table in self.tables:
            self._check_table(table, tables_bytes)
        for step in self.steps:
            _StepCheck(self, step).check()

    def _check_table(self, table: PlanTable, tables_bytes: int) -> None:
        numbers = (table.start, table.rows, table.row_bytes, table.dim, table.kind, table.scale_bytes, table.feature)
        whole = all(type(number) is int and 0 <= number < 1 << 48 for number in (*numbers, table.stream))
        if (
            not whole
            or table.kind not in range(5)
            or table.scale_bytes not in (0, 4, 8)
            or type(table.mean) is not bool
        ):
            raise ArtifactError(f"the manifest's plan has impossible tables; {_AGAIN}")
        sizes = (4 * table.dim, 2 * table.dim, table.dim, -(-table.dim // 2), -(-table.dim // 4))
        needed = sizes[table.kind] + (table.scale_bytes if table.kind > 1 else 0)
        if (
            not (table.dim and table.rows)
            or needed > table.row_bytes
            or table.start + table.rows * table.row_bytes > tables_bytes
            or table.feature >= self.features
            or table.stream >= len(self.streams)
            or (table.kind > 1 and not table.scale_bytes)
        ):
            raise ArtifactError(f"a table of the manifest's plan would end beyond tables.bin; {_AGAIN}")

    def read_arrays(self, data: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
        """The arrays in the bytes behind the layers. Raises ArtifactError where they are more or fewer."""
        found, at = [], 0
        for array in self.arrays:
            size = array.size * np.dtype(_KINDS[array.kind]).itemsize
            if at + size > data.size:
                break
            found.append(data[at : at + size].view(_KINDS[array.kind]))
            at += rounded_up(size, 64)
        if len(found) != len(self.arrays) or at != data.size:
            raise ArtifactError(f"weights.bin has {data.size} bytes of arrays where the plan has {at}; {_AGAIN}")
        return tuple(found)


def _step(data: Mapping[str, Any]) -> PlanStep:
    lists = {name: tuple(data[name]) for name in ("sizes", "data", "numbers") if name in data}
    operands = tuple(PlanOperand(**operand) for operand in data.get("operands", ()))
    return PlanStep(**{**data, **lists, "operands": operands})


@dataclass(frozen=True)
class _StepCheck:
    """Whether one step reads and writes only what it may."""

    plan: Plan
    step: PlanStep

    def check(self) -> None:
        """Raises ArtifactError."""
        step = self.step
        numbers = (step.at, step.stride, step.width, step.function, *step.sizes, *step.data)
        places = [part for operand in step.operands for part in (operand.at, operand.stride, operand.array)]
        if not all(type(number) is int and abs(number) < _MOST for number in (*numbers, *places)):
            self._refuse()
        if any(type(number) not in (int, float) for number in step.numbers if number is not None):
            self._refuse()
        checks = {name: getattr(self, f"_{name}") for name in OPERATIONS}
        if not isinstance(step.operation, str) or step.operation not in checks:
            self._refuse()
        flags = [step.transient, *(operand.transient for operand in step.operands)]
        self._need(all(type(flag) is bool for flag in flags))
        if step.operation != "output":
            self._need(0 < step.width <= step.stride and self._inside(step.at, step.stride, step.transient))
        checks[step.operation]()

    def _refuse(self) -> None:
        raise ArtifactError(f"a step of the manifest's plan ({str(self.step.operation)[:32]}) is impossible; {_AGAIN}")

    def _need(self, true: bool) -> None:
        if not true:
            self._refuse()

    def _inside(self, at: int, stride: int, transient: bool) -> bool:
        room = self.plan.transient if transient else self.plan.arena
        return at >= 0 and stride > 0 and at + stride <= room and not at % ALIGN and not stride % ALIGN

    def _operand(self, position: int, width: int) -> None:
        """An operand with at least so many numbers."""
        self._need(position < len(self.step.operands))
        operand = self.step.operands[position]
        if operand.array >= 0:
            self._array(operand.array, "float32", width)
        else:
            self._need(self._inside(operand.at, operand.stride, operand.transient) and width <= operand.stride)

    def _array(self, number: int, kind: str, size: int) -> None:
        self._need(0 <= number < len(self.plan.arrays))
        self._need(self.plan.arrays[number].kind == kind and self.plan.arrays[number].size >= size)

    def _sizes(self, count: int) -> tuple[int, ...]:
        sizes = self.step.sizes
        self._need(len(sizes) == count and all(size >= 0 for size in sizes))
        return sizes

    def _columns(self) -> None:
        first = self.step.sizes[0] if self.step.sizes else 0
        self._need(len(self.step.sizes) <= 1 and 0 <= first <= self.plan.dense_columns - self.step.width)

    def _lookup(self) -> None:
        first, count = self._sizes(2)
        self._need(count > 0 and first + count <= len(self.plan.tables))
        self._need(sum(table.dim for table in self.plan.tables[first : first + count]) == self.step.width)

    def _sequence(self) -> None:
        number, length = self._sizes(2)
        self._need(number < len(self.plan.tables) and length > 0 and len(self.step.numbers) == 1)
        self._need(self.step.numbers[0] is not None and length * self.plan.tables[number].dim == self.step.width)

    def _lengths(self) -> None:
        (first,) = self._sizes(1)
        self._need(first + self.step.width <= self.plan.features)

    def _linear(self) -> None:
        sub_rows, stride_in, stride_out = self._sizes(3)
        self._need(len(self.step.data) == 1 and 0 <= self.step.data[0] < len(self.plan.layers))
        layer = self.plan.layers[self.step.data[0]]
        self._need(sub_rows > 0 and stride_in >= layer.inputs and stride_out >= layer.outputs)
        self._need(not stride_in % ALIGN and not stride_out % ALIGN and self.step.operands[:1] != ())
        operand = self.step.operands[0]
        self._need(operand.array < 0 and operand.stride == sub_rows * stride_in)
        self._need(not operand.transient and not self.step.transient)
        self._need(self._inside(operand.at, operand.stride, False) and self.step.stride == sub_rows * stride_out)

    def _dot(self) -> None:
        (inputs,) = self._sizes(1)
        self._need(inputs > 0 and len(self.step.data) == 2)
        wide = rounded_up(inputs, 16)
        self._operand(0, wide)
        self._array(self.step.data[0], "float32", self.step.width * wide)
        self._array(self.step.data[1], "float32", self.step.width)

    def _move(self) -> None:
        """The runs themselves are looked at when they are read: see backends/programs.py."""
        (runs,) = self._sizes(1)
        self._need(len(self.step.data) == 1)
        self._array(self.step.data[0], "int64", 5 * runs)

    def _elementwise(self) -> None:
        self._need(0 <= self.step.function < len(FUNCTIONS) and 1 <= len(self.step.operands) <= 3)
        for position in range(len(self.step.operands)):
            self._operand(position, self.step.width)

    def _pairs(self) -> None:
        vectors, dim = self._sizes(2)
        self._need(vectors > 0 and dim > 0 and vectors * (vectors - 1) // 2 == self.step.width)
        self._operand(0, vectors * dim)

    def _matmul(self) -> None:
        m, k, n, batch = self._sizes(4)
        self._need(m * n * batch == self.step.width and k > 0)
        self._operand(0, m * k * batch)
        self._operand(1, k * n * batch)

    def _reduce(self) -> None:
        outer, axis, inner = self._sizes(3)
        self._need(outer * inner == self.step.width and axis > 0 and 0 <= self.step.function < 4)
        self._operand(0, outer * axis * inner)

    def _softmax(self) -> None:
        outer, axis, inner = self._sizes(3)
        self._need(outer * axis * inner == self.step.width)
        self._operand(0, self.step.width)

    def _norm(self) -> None:
        outer, axis = self._sizes(2)
        self._need(outer * axis == self.step.width and len(self.step.data) == 2 and len(self.step.numbers) == 1)
        for number in self.step.data:
            if number >= 0:
                self._array(number, "float32", axis)
        self._operand(0, self.step.width)

    def _output(self) -> None:
        (first,) = self._sizes(1)
        self._need(self.step.width > 0 and first + self.step.width <= self.plan.columns)
        self._operand(0, self.step.width)
