"""Reads operations that are several steps: each is put together of steps that the engines have.

The order of what is computed is torch's where it decides anything; intermediate values have numbers of their own, which
no tensor of the recording has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from narsil.program.ragged import per_id
from narsil.program.reader import Reader, fixed_array, reads
from narsil.program.recording import Op
from narsil.program.steps import Elementwise, Operand, Reduce, Step, Take
from narsil.program.values import Column, Fixed, Known, Opaque, PerId, Unread


class _Making:
    """The steps of one operation over a value whose rows are of one shape."""

    def __init__(self, reader: Reader, op: Op) -> None:
        self.reader = reader
        self.op = op
        self.source = reader.column(op.args[0])
        self.kind = reader.recording.tensors[self.source.number].dtype
        if not self.kind.is_floating_point or self.kind.itemsize < 4:
            raise Unread(f"it takes {self.kind}")
        self.out = self._out()

    def _out(self) -> int:
        number = self.op.outputs[0]
        if number is None:
            raise Unread("it makes no tensor")
        return number

    def argument(self, place: int, name: str, usual: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.op.args[place] if len(self.op.args) > place else self.op.kwargs.get(name, usual)

    def hidden(self, function: str, *operands: Any, numbers: tuple[float | None, ...] = ()) -> int:
        """A value between two steps, of the source's shape or of what its operands broadcast to."""
        taken = tuple(self._operand(operand) for operand in operands)
        number = self.reader.hidden(self._shape(taken))
        self.reader.steps.append(Elementwise(number, function, taken, numbers))
        return number

    def made(self, function: str, *operands: Any, numbers: tuple[float | None, ...] = ()) -> Column:
        """The value that the operation makes."""
        taken = tuple(self._operand(operand) for operand in operands)
        return self.reader.add(self.op, Elementwise(self.out, function, taken, numbers), self._shape(taken))

    def reduced(self, function: str, source: int, axes: Sequence[int], keep: bool) -> Step:
        """A reduction, for ``made_of`` or ``between``."""
        return Reduce(self.out, source, function, tuple(axes), keep)

    def between(self, function: str, source: int, axes: Sequence[int]) -> int:
        """A reduced value between two steps, whose axes stay as ones."""
        shape = self.reader.shapes[source]
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        number = self.reader.hidden(kept)
        self.reader.steps.append(Reduce(number, source, function, tuple(axes), True))
        return number

    def without(self, source: int, axes: Sequence[int], keep: bool, function: str) -> Column:
        """What is made: a reduced value."""
        shape = self.reader.shapes[source]
        left = [1 if axis in axes else size for axis, size in enumerate(shape) if keep or axis not in axes]
        return self.reader.add(self.op, self.reduced(function, source, axes, keep), left)

    def own(self, axes: Any) -> tuple[int, ...]:
        """Axes as torch counts them, without the rows'."""
        rank = len(self.source.shape) + 1
        axes = () if axes is None else axes if isinstance(axes, tuple | list) else (axes,)
        own = tuple(sorted(axis % rank - 1 for axis in axes))
        if not own or own[0] < 0:
            raise Unread("it goes over the rows")
        return own

    def _operand(self, operand: Any) -> Operand:
        if isinstance(operand, Column):
            return operand.number
        if isinstance(operand, float):
            return np.asarray(operand, np.float64 if self.kind == torch.float64 else np.float32).astype(np.float64)
        if isinstance(operand, np.ndarray | int):
            return operand
        raise Unread("it takes what is no value of a row")

    def _shape(self, operands: Sequence[Operand]) -> tuple[int, ...]:
        shapes = [self.reader.shapes[item] if isinstance(item, int) else np.shape(item) for item in operands]
        if len({len(shape) for item, shape in zip(operands, shapes, strict=True) if isinstance(item, int)}) != 1:
            raise Unread("the shapes of what it takes differ in their number of axes")
        return np.broadcast_shapes(*shapes)

    def other(self, argument: Any) -> Column | np.ndarray[Any, Any] | float:
        """A further operand: a value, a constant that is the same for every row, or a number."""
        if isinstance(argument, int | float):
            return float(argument)
        known = self.reader.of(argument)
        if isinstance(known, Fixed):
            array = fixed_array(known.tensor).astype(np.float64)
            if array.ndim > len(self.source.shape):
                if array.ndim != len(self.source.shape) + 1 or array.shape[0] != 1:
                    raise Unread(f"a constant of shape {array.shape} belongs to certain rows")
                array = array[0]
            return array
        return self.reader.column(argument)


def _softplus(making: _Making, beta: float, threshold: float) -> tuple[int, int]:
    """(where x counts as it is, what it is elsewhere)."""
    scaled = making.hidden("mul", making.source, beta)
    far = making.hidden("gt", scaled, threshold)
    curved = making.hidden("log1p", making.hidden("exp", scaled))
    return far, making.hidden("div", curved, beta)


@reads("aten.softplus", "aten.mish", "aten.log_sigmoid_forward")
def read_softplus(reader: Reader, op: Op) -> Any:
    """log(1 + e^x), and what is made of it."""
    making = _Making(reader, op)
    x = making.source
    if op.name == "aten.log_sigmoid_forward":
        # min(x, 0) - log(1 + e^-|x|): nothing overflows.
        small = making.hidden("exp", making.hidden("neg", making.hidden("abs", x)))
        return making.made("sub", making.hidden("minimum", x, 0.0), making.hidden("log1p", small)), None
    if op.name == "aten.softplus":
        far, near = _softplus(making, float(making.argument(1, "beta", 1)), float(making.argument(2, "threshold", 20)))
        return making.made("where", far, x, near)
    far, near = _softplus(making, 1.0, 20.0)
    return making.made("mul", x, making.hidden("tanh", making.hidden("where", far, x, near)))


@reads("aten.hardswish", "aten.hardswish_", "aten.hardsigmoid", "aten.hardsigmoid_")
def read_hard(reader: Reader, op: Op) -> Known:
    """Sigmoid and swish of straight lines."""
    making = _Making(reader, op)
    line = making.hidden("clamp", making.hidden("add", making.source, 3.0), numbers=(0.0, 6.0))
    if op.name.startswith("aten.hardsigmoid"):
        return making.made("div", line, 6.0)
    return making.made("div", making.hidden("mul", making.source, line), 6.0)


@reads("aten.elu", "aten.elu_", "aten.celu", "aten.celu_")
def read_elu(reader: Reader, op: Op) -> Known:
    """x above 0, and below it an exponential that ends in -alpha."""
    making = _Making(reader, op)
    alpha = float(making.argument(1, "alpha", 1.0))
    scale, inner = float(making.argument(2, "scale", 1.0)), float(making.argument(3, "input_scale", 1.0))
    if op.name.startswith("aten.celu"):
        scale, inner = 1.0, 1.0 / alpha
    x = making.source
    below = making.hidden("exp", making.hidden("mul", making.hidden("minimum", x, 0.0), inner))
    below = making.hidden("mul", making.hidden("sub", below, 1.0), alpha * scale)
    above = making.hidden("mul", x, scale)
    return making.made("where", making.hidden("gt", x, 0.0), above, below)


@reads("aten._prelu_kernel", "aten.prelu")
def read_prelu(reader: Reader, op: Op) -> Known:
    """A slope below 0 that was learned."""
    making = _Making(reader, op)
    slope = making.other(op.args[1])
    if op.name == "aten.prelu" and not (isinstance(slope, np.ndarray) and slope.size == 1):
        raise Unread("it has a slope for each channel")
    if isinstance(slope, np.ndarray) and slope.size == 1:
        slope = slope.reshape(())
    x = making.source
    return making.made("where", making.hidden("gt", x, 0.0), x, making.hidden("mul", x, slope))


@reads("aten.rsqrt", "aten.logit", "aten.square")
def read_root(reader: Reader, op: Op) -> Known:
    """1 / sqrt(x), log(x / (1 - x)), x^2."""
    making = _Making(reader, op)
    x: Any = making.source
    if op.name == "aten.rsqrt":
        return making.made("reciprocal", making.hidden("sqrt", x))
    if op.name == "aten.square":
        return making.made("mul", x, x)
    epsilon = making.argument(1, "eps")
    if epsilon is not None:
        x = making.hidden("clamp", x, numbers=(float(epsilon), 1.0 - float(epsilon)))
    return making.made("log", making.hidden("div", x, making.hidden("sub", 1.0, x)))


@reads("aten.addcmul", "aten.addcdiv", "aten.lerp")
def read_three(reader: Reader, op: Op) -> Known:
    """x + v y z, x + v y / z, x + w (y - x)."""
    making = _Making(reader, op)
    x, one, two = making.source, making.other(op.args[1]), making.other(op.args[2])
    if op.name == "aten.lerp":
        return making.made("add", x, making.hidden("mul", making.hidden("sub", one, x), two))
    if not any(isinstance(part, Column) for part in (one, two)):
        raise Unread("it adds a constant that is made of two")
    part = making.hidden("mul" if op.name == "aten.addcmul" else "div", one, two)
    return making.made("add", x, making.hidden("mul", part, float(op.kwargs.get("value", 1))))


@reads("aten.masked_fill", "aten.masked_fill_")
def read_masked_fill(reader: Reader, op: Op) -> Known:
    """A number where a mask says so."""
    if isinstance(reader.of(op.args[0]), PerId):
        known = [item if isinstance(item, int | float) else reader.of(item) for item in op.args[:3]]
        return per_id(reader, op, "where", [known[1], known[2], known[0]], ())
    making = _Making(reader, op)
    mask, value = making.other(op.args[1]), making.other(op.args[2])
    if isinstance(value, Column) or np.size(value) != 1:
        raise Unread("it fills in what is no number")
    return making.made("where", mask, np.asarray(value, np.float64).reshape(()), making.source)


@reads("aten.linalg_vector_norm", "aten.norm")
def read_norm(reader: Reader, op: Op) -> Known:
    """Lengths of vectors: the square root of a sum of squares, or a sum of what is without its sign."""
    making = _Making(reader, op)
    order = making.argument(1, "ord" if op.name == "aten.linalg_vector_norm" else "p", 2)
    axes, keep = making.own(making.argument(2, "dim")), bool(making.argument(3, "keepdim", False))
    if order == 1:
        return making.without(making.hidden("abs", making.source), axes, keep, "sum")
    if order not in (2, None):
        raise Unread(f"it is the norm of order {order}")
    squares = making.hidden("mul", making.source, making.source)
    left = [1 if a in axes else size for a, size in enumerate(making.source.shape) if keep or a not in axes]
    total = reader.hidden(tuple(left))
    reader.steps.append(Reduce(total, squares, "sum", axes, keep))
    return making.made("sqrt", total)


@reads("aten.max", "aten.min")
def read_most(reader: Reader, op: Op) -> Any:
    """The largest or the least along an axis; which one it was is not known. Or of two values."""
    making = _Making(reader, op)
    function = op.name[5:]
    if len(op.args) > 1 and not isinstance(op.args[1], int):
        return making.made({"max": "maximum", "min": "minimum"}[function], making.source, making.other(op.args[1]))
    axes = making.own(making.argument(1, "dim"))
    most = making.without(making.source.number, axes, bool(making.argument(2, "keepdim", False)), function)
    return most, Opaque(f"{op.name}: no step for which one it is")


@reads("aten._log_softmax")
def read_log_softmax(reader: Reader, op: Op) -> Known:
    """x - max - log(sum of e^(x - max))."""
    making = _Making(reader, op)
    axes = making.own(op.args[1])
    moved = making.hidden("sub", making.source, making.between("max", making.source.number, axes))
    return making.made("sub", moved, making.hidden("log", making.between("sum", making.hidden("exp", moved), axes)))


@reads("aten.var", "aten.std")
def read_variance(reader: Reader, op: Op) -> Known:
    """The mean square about the mean, or its root; torch divides by one less unless it is told otherwise."""
    making = _Making(reader, op)
    axes, keep = making.own(making.argument(1, "dim")), bool(making.argument(3, "keepdim", False))
    told = making.argument(2, "unbiased", op.kwargs.get("correction", 1))
    less = 1 if told is None else int(told)
    count = int(np.prod([making.source.shape[axis] for axis in axes]))
    if count <= less:
        raise Unread(f"it is the variance of {count} numbers")
    centred = making.hidden("sub", making.source, making.between("mean", making.source.number, axes))
    squares = making.hidden("mul", centred, centred)
    left = [1 if a in axes else size for a, size in enumerate(making.source.shape) if keep or a not in axes]
    total = reader.hidden(tuple(left))
    reader.steps.append(Reduce(total, squares, "sum", axes, keep))
    if op.name == "aten.var":
        return making.made("div", total, float(count - less))
    return making.made("sqrt", making.hidden("div", total, float(count - less)))


@reads("aten.flip", "aten.roll", "aten.repeat", "aten.diagonal")
def read_moved(reader: Reader, op: Op) -> Known:
    """Entries of the row at other places, or several times: what torch does to their numbers says where each goes."""
    column = reader.column(op.args[0])
    number = op.outputs[0]
    if number is None:
        raise Unread("it makes no tensor")
    size, rank = int(np.prod(column.shape, dtype=np.int64)), len(column.shape) + 1
    places = torch.arange(size).reshape(1, *column.shape)
    if op.name == "aten.repeat":
        if len(op.args[1]) != rank or op.args[1][0] != 1:
            raise Unread("it repeats rows")
        moved = places.repeat(*op.args[1])
    elif op.name == "aten.diagonal":
        names = ("offset", "dim1", "dim2")
        given = [op.args[n + 1] if len(op.args) > n + 1 else op.kwargs.get(name, n) for n, name in enumerate(names)]
        _check_axes(given[1:], rank)
        moved = torch.diagonal(places, *given)
    else:
        axes = op.args[-1] if op.name == "aten.flip" or len(op.args) > 2 else op.kwargs.get("dims")
        _check_axes(axes, rank)
        moved = torch.flip(places, axes) if op.name == "aten.flip" else torch.roll(places, op.args[1], axes)
    taken = moved[0].numpy()
    return reader.add(op, Take(number, column.number, taken.copy()), taken.shape)


def _check_axes(axes: Any, rank: int) -> None:
    """Raises Unread where the rows' axis is among them. None, and no axes, mean all."""
    if not axes or any(axis % rank == 0 for axis in axes):
        raise Unread("it moves rows")


@reads("aten.mv")
def read_mv(reader: Reader, op: Op) -> Known:
    """Each row by one vector."""
    making = _Making(reader, op)
    vector = making.other(op.args[1])
    return making.without(making.hidden("mul", making.source, vector), (0,), False, "sum")


@reads("aten.eye", "aten.block_diag")
def read_square(reader: Reader, op: Op) -> Known:
    """A constant matrix that forward makes each time."""
    parts: Sequence[Any] = op.args[0] if op.name == "aten.block_diag" else ()
    for part in parts:
        reader.fixed(part)
    number = op.outputs[0]
    if number is None:
        raise Unread("it makes no tensor")
    return Fixed(reader.recording.tensors[number])
