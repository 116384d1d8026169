"""In which columns a request may leave a number out, as NaN: those whose NaN reaches no output.

Followed through a program's steps, number by number. Of each number of a value it is known which columns' NaN may make
it NaN, which surely do, and of a truth value which columns hold numbers where it is true, and where it is false. What
``where`` gives on either side is looked at under its condition, so that ``where(isnan(x), 0, f(x))`` is found to take
NaN whatever ``f`` is. What is not known passes every NaN on: a column that is named here is proven, one that is not may
take NaN all the same. That the model makes no NaN of numbers is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.program.steps import (
    Arrange,
    Concat,
    Elementwise,
    Laid,
    LayerNorm,
    Linear,
    Lookup,
    Operand,
    Permute,
    Program,
    Reduce,
    Reshape,
    Softmax,
    Step,
    Take,
)

__all__ = ["caught_columns"]

Columns = NDArray[np.uint64]  # a set of up to 64 columns for each number, as bits

_BITS = 64
_NONE = np.uint64(0)

# NaN in, NaN out, in torch and in the engines.
_KEEPS = {
    *("relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "leaky_relu", "exp", "log", "log1p", "sqrt", "abs"),
    *("neg", "reciprocal", "floor", "clamp", "to_float16", "to_bfloat16"),
    *("add", "sub", "mul", "div", "maximum", "minimum"),
}
_COMPARED = ("gt", "ge", "lt", "le", "eq")  # false where a side is NaN
# Truth values, whatever goes in.
_TRUTHS = (*_COMPARED, "ne", "isnan", "to_bool", "and", "or", "not")


@dataclass(frozen=True)
class _Known:
    """What is known of each number of a value: arrays of its shape, without the rows."""

    may: Columns  # whose NaN may make it NaN
    surely: Columns  # whose NaN makes it NaN
    if_true: Columns  # that hold numbers where it is true
    if_false: Columns  # that hold numbers where it is false

    def moved(self, move: Callable[[Columns], Columns]) -> _Known:
        """The numbers in other places."""
        return _Known(*(move(part) for part in (self.may, self.surely, self.if_true, self.if_false)))


def caught_columns(program: Program, matrices: Sequence[str]) -> tuple[int, ...]:
    """The columns of all ``matrices`` beside each other whose NaN reaches no output."""
    widths = [program.shapes[program.dense[name]][0] for name in matrices]
    firsts = dict(zip(matrices, np.cumsum([0, *widths]).tolist(), strict=False))
    caught: list[int] = []
    for first in range(0, sum(widths), _BITS):
        passed = _passed_on(program, firsts, first)
        count = min(_BITS, sum(widths) - first)
        caught += [first + bit for bit in range(count) if not int(passed) >> bit & 1]
    return tuple(caught)


def _passed_on(program: Program, firsts: Mapping[str, int], first: int) -> np.uint64:
    """Of the columns from ``first`` on, those whose NaN may reach an output."""
    known: dict[int, _Known] = {}
    for name, number in program.dense.items():
        columns = _inputs(program.shapes[number], firsts[name] - first)
        known[number] = _passing(columns, columns)
    for step in program.steps:
        known[step.out] = _of(step, known, program.shapes[step.out])
    return _all(np.array([_all(known[number].may) for number in program.outputs.values()]))


def _inputs(shape: tuple[int, ...], place: int) -> Columns:
    """Each column's own bit, where it is one of the 64 from ``-place`` on."""
    bits = np.arange(place, place + shape[0])
    own = (bits >= 0) & (bits < _BITS)
    return np.where(own, np.left_shift(np.uint64(1), np.where(own, bits, 0).astype(np.uint64)), _NONE)


def _all(columns: Columns) -> np.uint64:
    return np.uint64(np.bitwise_or.reduce(columns, axis=None)) if columns.size else _NONE


def _passing(may: Columns, surely: Columns | None = None) -> _Known:
    """Of a number that is no truth value: as one it is false where it is zero, and NaN is true."""
    none = np.zeros_like(may)
    surely = none if surely is None else surely
    return _Known(may, surely, none, surely)


def _of(step: Step, known: Mapping[int, _Known], shape: tuple[int, ...]) -> _Known:
    if isinstance(step, Lookup | Laid):
        return _passing(np.zeros(shape, np.uint64))
    if isinstance(step, Elementwise):
        return _elementwise(step, known, shape)
    if isinstance(step, Arrange):
        return known[step.source].moved(_moving(step))
    if isinstance(step, Concat):
        parts = [known[source] for source in step.sources]
        every = ([getattr(part, name) for part in parts] for name in ("may", "surely", "if_true", "if_false"))
        return _Known(*(np.concatenate(columns, axis=step.axis) for columns in every))
    if isinstance(step, Linear | Reduce | Softmax | LayerNorm):
        source, over = known[step.source], _axes(step, len(known[step.source].may.shape))
        may, surely = (
            np.bitwise_or.reduce(columns, axis=over, keepdims=True) for columns in (source.may, source.surely)
        )
        if isinstance(step, Reduce) and not step.keep:
            may, surely = (columns.reshape(shape) for columns in (may, surely))
        return _passing(*(np.broadcast_to(columns, shape) for columns in (may, surely)))
    # What is done is not known, or not followed: anything may come of anything.
    return _passing(np.full(shape, _all(np.array([_NONE, *(_all(known[number].may) for number in step.reads())]))))


def _axes(step: Linear | Reduce | Softmax | LayerNorm, rank: int) -> tuple[int, ...]:
    """Along which numbers meet."""
    if isinstance(step, Linear):
        return (rank - 1,)
    if isinstance(step, Reduce):
        return step.axes
    return (step.axis,) if isinstance(step, Softmax) else tuple(range(rank - step.axes, rank))


def _moving(step: Arrange) -> Callable[[Columns], Columns]:
    if isinstance(step, Take):
        return lambda columns: columns.ravel()[step.places]
    if isinstance(step, Reshape):
        return lambda columns: columns.reshape(step.shape)
    assert isinstance(step, Permute)  # noqa: S101 - there is no other
    return lambda columns: np.transpose(columns, step.axes)


def _elementwise(step: Elementwise, known: Mapping[int, _Known], shape: tuple[int, ...]) -> _Known:
    operands = [_operand(operand, known, shape) for operand in step.operands]
    if step.function == "where":
        condition, yes, no = operands
        may = (yes.may & ~condition.if_true) | (no.may & ~condition.if_false)
        return _passing(may, yes.surely & no.surely)
    may, surely = (
        np.bitwise_or.reduce([getattr(operand, name) for operand in operands], axis=0) for name in ("may", "surely")
    )
    if step.function in _TRUTHS:
        return replace(_truth(step, operands, surely), may=np.zeros_like(may), surely=np.zeros_like(may))
    if step.function == "nan_to_num" and not _is_nan(step.numbers[:1]):
        return _passing(np.zeros_like(may))
    return _passing(may, surely if step.function in _KEEPS else None)


def _truth(step: Elementwise, operands: Sequence[_Known], surely: Columns) -> _Known:
    """Of a truth value: which columns hold numbers where it is true, and where it is false."""
    none, function = np.zeros_like(surely), step.function
    if function == "not":
        return _Known(none, none, operands[0].if_false, operands[0].if_true)
    if function in ("and", "or"):
        one, other = operands
        both = (one.if_true | other.if_true, one.if_false & other.if_false)
        either = (one.if_true & other.if_true, one.if_false | other.if_false)
        return _Known(none, none, *(both if function == "and" else either))
    if function == "to_bool":
        return operands[0]
    if function == "isnan":
        return _Known(none, none, none, surely)
    return _Known(none, none, surely, none) if function in _COMPARED else _Known(none, none, none, surely)


def _operand(operand: Operand, known: Mapping[int, _Known], shape: tuple[int, ...]) -> _Known:
    found = known[operand] if isinstance(operand, int) else _passing(np.zeros(np.shape(operand), np.uint64))
    return found.moved(lambda columns: np.broadcast_to(columns, shape))


def _is_nan(numbers: Sequence[Any]) -> bool:
    return any(number is not None and np.isnan(number) for number in numbers)
