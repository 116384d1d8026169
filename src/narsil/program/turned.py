"""Reads what is done while the rows are not a tensor's first axis, as ``einsum`` and attention over (L, B, E) have it.

Two things happen to such tensors. Operations that only move numbers are read by example: they run over numbers that
say where each came from, for several numbers of rows, and what they make must be the same for every row. Operations
that compute are given the same numbers with the rows first, and read as any other.

By example, too, constants are found that forward makes for every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.program.reader import READERS, ROWS_ANYWHERE, Reader, fixed_array
from narsil.program.recording import Constant, Op, Ref
from narsil.program.replaying import PerRow, plain_arguments
from narsil.program.steps import ByRow, Concat, Lengths, Linear, MatMul, Reshape, Step, Take
from narsil.program.values import Column, Fixed, Known, Structure, Turned, Unread

__all__ = ["by_example", "computed", "lengths"]

_COUNTS = (5, 7, 12)  # of rows
_MOST = 2048  # rows that are tried
_FAR = 2**31  # an end at least so far away is none
# What moves numbers: their arguments that are moved; others are taken as they are.
_FIRST, _LIST, _NONE = "first", "list", "none"
_MOVES = {
    **dict.fromkeys(
        (
            *(
                "transpose",
                "permute",
                "t",
                "view",
                "reshape",
                "_unsafe_view",
                "unsqueeze",
                "squeeze",
                "expand",
                "repeat",
            ),
            *(
                "slice",
                "select",
                "narrow",
                "split",
                "unsafe_split",
                "split_with_sizes",
                "chunk",
                "unbind",
                "index",
                "index_select",
            ),
            *("flip", "roll", "diagonal", "repeat_interleave", "unfold", "constant_pad_nd", "tril", "triu"),
            *("diag_embed", "clone", "detach", "alias", "movedim", "flatten", "lift_fresh", "contiguous"),
        ),
        _FIRST,
    ),
    **dict.fromkeys(("cat", "stack"), _LIST),
    **dict.fromkeys(
        (
            *("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"),
            "scalar_tensor",
        ),
        _NONE,
    ),
}
# What computes number by number, or over axes: where their axes are given, and under which name.
_POINTWISE = ("aten.addcmul", "aten.addcdiv", "aten.lerp", "aten._to_copy", "aten.masked_fill", "aten.native_dropout")
_OVER_AXES = {
    **dict.fromkeys(("aten._softmax", "aten._log_softmax"), (1, "dim")),
    **dict.fromkeys(("aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.linalg_vector_norm"), (1, "dim")),
}
_LINEAR = {"aten.addmm": 1, "aten.mm": 0, "aten.linear": 0, "mkldnn._linear_pointwise": 0}


@dataclass(frozen=True)
class _Lay:
    """How a tensor of any number of rows holds a value: its axis ``at`` has pre * rows * post numbers."""

    number: int
    lead: tuple[int, ...]
    pre: int
    post: int
    trail: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return (*self.lead, self.pre, self.post, *self.trail)

    def tensor(self, rows: int) -> tuple[int, ...]:
        """The tensor's shape."""
        return (*self.lead, self.pre * rows * self.post, *self.trail)

    def rows_last(self, tensor: torch.Tensor, rows: int) -> torch.Tensor:
        """(*lead, pre, post, *trail, rows) of a tensor that is laid out so."""
        apart = tensor.reshape(*self.lead, self.pre, rows, self.post, *self.trail)
        return apart.movedim(len(self.lead) + 1, -1)


def _lay(known: Column | Turned) -> _Lay:
    if isinstance(known, Turned):
        at = known.at
        return _Lay(known.number, known.shape[:at], known.shape[at], known.shape[at + 1], known.shape[at + 2 :])
    post = int(np.prod(known.shape[: known.folded], dtype=np.int64))
    return _Lay(known.number, (), 1, post, known.shape[known.folded :])


def by_example(reader: Reader, op: Op) -> Any:
    """What an operation makes that moves numbers of rows and of constants, or makes constants. Raises Unread."""
    moved = _MOVES.get(op.name.removeprefix("aten.")) if op.name.startswith("aten.") else None
    if moved is None or op.writes():
        raise Unread("no step for it")
    example = _Example(reader, op, moved)
    made = [example.made(output) for output, number in enumerate(op.outputs) if number is not None]
    return tuple(made) if len(op.outputs) > 1 else made[0]


class _Example:
    """An operation, run over numbers that say where each came from."""

    def __init__(self, reader: Reader, op: Op, moved: str) -> None:
        self.reader, self.op, self.moved = reader, op, moved
        self.sources: list[_Lay | torch.Tensor] = []
        moving = {id(leaf) for leaf in _leaves(op.args[:1] if moved != _NONE else ())}
        args, kwargs = plain_arguments(op, lambda leaf: self._source(leaf, id(leaf) in moving), reader.rows)
        reach = max((abs(n) for n in _leaves((*args, *kwargs.values())) if type(n) is int and abs(n) < _FAR), default=0)
        if reach > _MOST:
            raise Unread(f"it takes the number {reach}, which no row that was recorded reaches")
        self.counts = (*_COUNTS, reach + 3)
        self.found = [self._run(args, kwargs, rows) for rows in self.counts]

    def _source(self, leaf: Any, moving: bool) -> Any:
        known = self.reader.of(leaf)
        if not isinstance(known, Column | Turned | Fixed):
            raise Unread("it moves what is no value of a row")
        if not moving:
            if isinstance(known, Fixed):
                return known.tensor
            if self.moved != _NONE:
                raise Unread("it takes places that follow from a request")
        self.sources.append(known.tensor if isinstance(known, Fixed) else _lay(known))
        return _Numbered(len(self.sources) - 1)

    def _run(self, args: Any, kwargs: Any, rows: int) -> list[torch.Tensor]:
        def filled(value: Any) -> Any:
            if isinstance(value, tuple):
                return [filled(item) for item in value]
            if isinstance(value, _Numbered):
                return self._codes(value.number, rows)
            return value.times * rows if isinstance(value, PerRow) else value

        given, named = [filled(value) for value in args], {key: filled(value) for key, value in kwargs.items()}
        fill = given[2] if len(given) > 2 else named.get("value", 0.0)
        if self.op.name == "aten.constant_pad_nd" and fill:
            raise Unread("it fills in another number than 0")
        try:
            made = self.op.call(*given, **named)
        except Exception:  # of whatever an operation says of sizes
            raise Unread(f"it does not run on {rows} rows") from None
        return list(made) if isinstance(made, tuple | list) else [made]

    def _codes(self, number: int, rows: int) -> torch.Tensor:
        """For each number of a source: which it is, (source, place, row + 1), as one; row 0 is that of constants. 0 is
        what operations fill in."""
        source = self.sources[number]
        if isinstance(source, torch.Tensor):
            if self.moved == _NONE:
                return torch.zeros(source.shape, dtype=source.dtype)
            size, places = source.numel(), torch.arange(source.numel()).reshape(source.shape)
            row = torch.zeros((), dtype=torch.int64)
        else:
            size = int(np.prod(source.shape, dtype=np.int64))
            places = torch.arange(size).reshape(*source.lead, source.pre, 1, source.post, *source.trail)
            row = 1 + torch.arange(rows).reshape(-1, 1, *(1,) * len(source.trail))
        if max(size, rows) >= 1 << 24:
            raise Unread("it moves too many numbers")
        codes = ((number + 1) << 48) + (places << 24) + row
        shape = source.shape if isinstance(source, torch.Tensor) else source.tensor(rows)
        return codes.long().broadcast_to(codes.shape).reshape(shape) if self.moved != _NONE else torch.zeros(shape)

    def made(self, output: int) -> Known:
        """What one of its results is."""
        number = self.op.outputs[output]
        assert number is not None  # noqa: S101 - by_example has looked
        results = [found[output] for found in self.found]
        lay = self._laid(number, results)
        tables = [lay.rows_last(result, rows) for result, rows in zip(results, self.counts, strict=True)]
        first = tables[0][..., 0]
        if self.moved == _NONE:
            if any(not torch.equal(table, first.unsqueeze(-1).expand_as(table)) for table in tables):
                raise Unread("it makes other numbers for other rows")
            return self._added(output, ByRow(number, fixed_array(first).astype(np.float64)), lay)
        rowless = first & ~((1 << 24) - 1)
        for table, rows in zip(tables, self.counts, strict=True):
            row = table & ((1 << 24) - 1)
            own = (row == 0) | (row == torch.arange(1, rows + 1))
            if not own.all() or not torch.equal(table - row, rowless.unsqueeze(-1).expand_as(table)):
                raise Unread("it moves numbers from row to row")
        return self._added(output, self._taking(number, rowless.numpy(), lay), lay)

    def _laid(self, number: int, results: Sequence[torch.Tensor]) -> _Lay:
        """How the rows lie in the results, the same for all numbers of rows."""
        shapes = [tuple(result.shape) for result in results]
        if len({len(shape) for shape in shapes}) != 1:
            raise Unread("it has other axes for other rows")
        axes = [axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
        if len(axes) != 1:
            raise Unread("it lays rows out along no axis, or several")
        (at,) = axes
        times = shapes[0][at] // self.counts[0]
        if not times or any(shape[at] != times * rows for shape, rows in zip(shapes, self.counts, strict=True)):
            raise Unread("it makes what is no multiple of the rows")
        lead, trail = shapes[0][:at], shapes[0][at + 1 :]
        for pre in range(1, times + 1):
            if times % pre:
                continue
            lay = _Lay(number, lead, pre, times // pre, trail)
            if self.moved == _NONE or all(map(self._goes_with, results, self.counts, [lay] * len(results))):
                return lay
        raise Unread("it moves numbers from row to row")

    def _goes_with(self, result: torch.Tensor, rows: int, lay: _Lay) -> bool:
        row = lay.rows_last(result, rows) & ((1 << 24) - 1)
        return bool(((row == 0) | (row == torch.arange(1, rows + 1))).all())

    def _taking(self, number: int, codes: NDArray[np.int64], lay: _Lay) -> Step:
        """The step that takes numbers by their codes."""
        sources, places = codes >> 48, (codes >> 24) & ((1 << 24) - 1)
        used = np.unique(sources).tolist()
        values = [self._value_of(source) for source in used]
        if len(values) == 1:
            size = int(np.prod(self.reader.shapes[values[0]], dtype=np.int64))
            if places.size == size and np.array_equal(places.ravel(), np.arange(size)):
                return Reshape(number, values[0], lay.shape)
            return Take(number, values[0], places)
        flat, sizes = [], []
        for value in values:
            sizes.append(int(np.prod(self.reader.shapes[value], dtype=np.int64)))
            flat.append(self.reader.hidden((sizes[-1],)))
            self.reader.steps.append(Reshape(flat[-1], value, (sizes[-1],)))
        together = self.reader.hidden((sum(sizes),))
        self.reader.steps.append(Concat(together, tuple(flat), 0))
        firsts = np.cumsum([0, *sizes])[:-1]
        return Take(number, together, places + firsts[np.searchsorted(used, sources)])

    def _value_of(self, source: int) -> int:
        """The number of a source's value; that of a constant is made."""
        held = torch.zeros(1) if source == 0 else self.sources[source - 1]
        if isinstance(held, _Lay):
            return held.number
        array = fixed_array(held).astype(np.float64).ravel()
        value = self.reader.hidden(array.shape)
        self.reader.steps.append(ByRow(value, array))
        return value

    def _added(self, output: int, step: Step, lay: _Lay) -> Known:
        if lay.lead or lay.pre > 1:
            self.reader.shapes[step.out] = lay.shape
            self.reader.steps.append(step)
            return Turned(step.out, lay.shape, len(lay.lead))
        folded = int(lay.post > 1)
        shape = (*([lay.post] if folded else []), *lay.trail)
        if isinstance(step, Reshape):
            step = replace(step, shape=shape)
        elif isinstance(step, Take):
            step = replace(step, places=step.places.reshape(shape))
        elif isinstance(step, ByRow):
            step = replace(step, array=step.array.reshape(shape))
        return self.reader.add(self.op, step, shape, folded, output)


def lengths(reader: Reader, number: int) -> Known:
    """A tensor of lengths as a value of the program. Raises Unread where it has not some features' of every row."""
    known = reader.known[number]
    if not isinstance(known, Structure) or known.places is None:
        raise Unread("it takes lengths of bags")
    shapes = [tuple(places.shape) for places in known.places]
    axes = [axis for axis in range(len(shapes[0])) if shapes[0][axis] != shapes[1][axis]]
    if len(shapes[0]) != len(shapes[1]) or len(axes) != 1 or shapes[0][axes[0]] % reader.rows[0]:
        raise Unread("it takes lengths of some bags")
    (at,) = axes
    times = shapes[0][at] // reader.rows[0]
    for pre in range(1, times + 1):
        lay = _Lay(number, shapes[0][:at], pre, max(times // pre, 1), shapes[0][at + 1 :])
        if any(lay.tensor(rows) != shape for rows, shape in zip(reader.rows, shapes, strict=True)):
            continue
        tables = [lay.rows_last(places, rows) for places, rows in zip(known.places, reader.rows, strict=True)]
        features = tables[0][..., 0] // reader.rows[0]
        if all(
            torch.equal(table, features.unsqueeze(-1) * rows + torch.arange(rows))
            for table, rows in zip(tables, reader.rows, strict=True)
        ):
            return _settled(reader, lay, Take(number, _all_lengths(reader, known.group), features.numpy()))
    raise Unread("it takes lengths of some bags")


def _all_lengths(reader: Reader, group: str) -> int:
    """The number of the value that has all lengths of a group."""
    for step in reader.steps:
        if isinstance(step, Lengths) and step.group == group:
            return step.out
    number = reader.hidden((len(reader.groups[group][0]),))
    reader.steps.append(Lengths(number, group))
    return number


def _settled(reader: Reader, lay: _Lay, step: Take) -> Known:
    turned = bool(lay.lead or lay.pre > 1)
    shape = lay.shape if turned else (*([lay.post] if lay.post > 1 else []), *lay.trail)
    reader.shapes[lay.number] = shape
    reader.steps.append(replace(step, places=step.places.reshape(shape)))
    return Turned(lay.number, shape, len(lay.lead)) if turned else Column(lay.number, shape, int(lay.post > 1))


@dataclass(frozen=True)
class _Numbered:
    """A source among the arguments."""

    number: int


def computed(reader: Reader, op: Op) -> Any:
    """What an operation makes that computes with numbers whose rows are not first. Raises Unread."""
    if op.name == "aten.bmm":
        return _Virtual(reader, op).multiplied()
    if op.name in _LINEAR:
        return _Virtual(reader, op).over_the_last()
    if op.name in _OVER_AXES:
        return _Virtual(reader, op).over_axes(*_OVER_AXES[op.name])
    if op.name == "aten.native_layer_norm":
        return _Virtual(reader, op).normalised()
    if op.tells(torch.Tag.pointwise) or op.name in _POINTWISE:
        return _Virtual(reader, op).pointwise()
    raise Unread("no step for it where the rows are not the first axis")


class _Virtual:
    """An operation given the same numbers with the rows first."""

    def __init__(self, reader: Reader, op: Op) -> None:
        self.reader, self.op = reader, op
        leaves = [leaf for leaf in _leaves((*op.args, *op.kwargs.values())) if isinstance(leaf, Ref | Constant)]
        self.known = {id(leaf): reader.of(leaf) for leaf in leaves}
        self.lays = {key: _lay(item) for key, item in self.known.items() if isinstance(item, Column | Turned)}
        if any(not isinstance(item, Column | Turned | Fixed) for item in self.known.values()):
            raise Unread("it takes what is no value of a row")
        one = next(iter(self.lays.values()))
        self.pre, self.post, self.behind = one.pre, one.post, len(one.trail)
        self.before = max(len(lay.lead) for lay in self.lays.values())

    def _alike(self) -> None:
        for lay in self.lays.values():
            if (lay.pre, lay.post, len(lay.trail)) != (self.pre, self.post, self.behind):
                raise Unread("it takes rows that are laid out in several ways")

    def pointwise(self) -> Any:
        """The same function of the same numbers."""
        self._alike()
        return self._read(self._filled(self.op), self.before)

    def over_axes(self, place: int, name: str) -> Any:
        """Along axes of which none is the rows'."""
        self._alike()
        rank = self.before + 1 + self.behind
        axes = self.op.args[place] if len(self.op.args) > place else self.op.kwargs.get(name)
        given = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
        own = [axis % rank for axis in given]
        if not own or self.before in own:
            raise Unread("it goes over the rows")
        turned = tuple(axis + 1 if axis < self.before else axis + 2 for axis in own)
        put = turned if isinstance(axes, tuple) else turned[0]
        op = self._filled(self.op)
        args = (*op.args[:place], put, *op.args[place + 1 :]) if len(op.args) > place else op.args
        kwargs = op.kwargs if len(op.args) > place else {**op.kwargs, name: put}
        softmax = "softmax" in op.name
        keep = softmax or bool(op.args[place + 1] if len(op.args) > place + 1 else op.kwargs.get("keepdim", False))
        lost = 0 if keep else sum(axis < self.before for axis in own)
        return self._read(replace(op, args=args, kwargs=kwargs), self.before - lost)

    def normalised(self) -> Any:
        """Over axes behind the rows."""
        self._alike()
        if len(self.op.args[1]) > self.behind:
            raise Unread("it goes over the rows")
        key = id(self.op.args[0])
        return self._read(replace(self.op, args=(self._first(key), *self.op.args[1:])), self.before)

    def over_the_last(self) -> Any:
        """A layer over the last axis."""
        place = _LINEAR[self.op.name]
        source = self.op.args[place]
        if len(self.lays) != 1 or id(source) not in self.lays or not self.behind:
            raise Unread("it multiplies across rows")
        args = list(self.op.args)
        args[place] = self._first(id(source))
        return self._read(replace(self.op, args=tuple(args)), self.before)

    def multiplied(self) -> Any:
        """(N, M, K) by (N, K, P), of which only one may have rows that are not the first axis."""
        left, right = (self.known[id(argument)] for argument in self.op.args[:2])
        if len(self.lays) == 2:
            if self.before:
                raise Unread("it multiplies across rows")
            return self.pointwise()
        number = self.op.outputs[0]
        if number is None:
            raise Unread("it makes no tensor")
        (lay,) = self.lays.values()
        if isinstance(right, Fixed) and len(lay.lead) == 1:
            array, made = fixed_array(right.tensor), replace(lay, trail=(right.tensor.shape[2],))
            if len(array) == 1:
                step: Step = Linear(self._out(made), lay.number, np.ascontiguousarray(array[0].T), None)
            else:
                step = MatMul(self._out(made), lay.number, array[:, None])
            return self._made(number, step, made)
        if isinstance(left, Fixed) and len(lay.lead) == 2:
            array = fixed_array(left.tensor)
            flat = self.reader.hidden((*lay.lead, lay.pre * lay.post))
            self.reader.steps.append(Reshape(flat, lay.number, self.reader.shapes[flat]))
            made = replace(lay, lead=(lay.lead[0], array.shape[1]))
            product = self.reader.hidden((*made.lead, lay.pre * lay.post))
            self.reader.steps.append(MatMul(product, array, flat))
            return self._made(number, Reshape(self._out(made), product, made.shape), made)
        raise Unread("it multiplies across rows")

    def _out(self, made: _Lay) -> int:
        return self.reader.hidden(made.shape)

    def _made(self, number: int, step: Step, made: _Lay) -> Known:
        for tensor, rows in zip(self.reader.pair(Ref(number)), self.reader.rows, strict=True):
            if tuple(tensor.shape) != made.tensor(rows):
                raise Unread("it lays rows out anew")
        self.reader.steps.append(step)
        return self._turned(Column(step.out, made.shape), len(made.lead))

    def _filled(self, op: Op) -> Op:
        """The operation over tensors whose rows are first."""

        def filled(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(filled(item) for item in value)
            return self._first(id(value)) if id(value) in self.known else value

        return replace(op, args=filled(op.args), kwargs={key: filled(value) for key, value in op.kwargs.items()})

    def _first(self, key: int) -> Any:
        """An argument with its rows first."""
        known = self.known[key]
        if isinstance(known, Fixed):
            return self._constant(known.tensor)
        lay = self.lays[key]
        lay = replace(lay, lead=(*(1,) * (self.before - len(lay.lead)), *lay.lead))
        leaf = next(leaf for leaf in _leaves((*self.op.args, *self.op.kwargs.values())) if id(leaf) == key)
        number = self.reader.stand_in(
            *(lay.rows_last(tensor, rows).movedim(-1, 0) for tensor, rows in self._pairs(leaf))
        )
        self.reader.shapes[number] = lay.shape
        self.reader.steps.append(Reshape(number, lay.number, lay.shape))
        self.reader.known[number] = Column(number, lay.shape)
        return Ref(number)

    def _pairs(self, leaf: Any) -> Any:
        return zip(self.reader.pair(leaf), self.reader.rows, strict=True)

    def _constant(self, tensor: torch.Tensor) -> Constant:
        rank = self.before + 1 + self.behind
        if tensor.dim() > rank:
            raise Unread("a constant has more axes than what it meets")
        shape = (*(1,) * (rank - tensor.dim()), *tensor.shape)
        if shape[self.before] != 1:
            raise Unread(f"a constant of shape {tuple(tensor.shape)} belongs to certain rows")
        return Constant(tensor.reshape(1, *shape[: self.before], 1, 1, *shape[self.before + 1 :]))

    def _read(self, op: Op, at: int) -> Any:
        """What the operation's own reader makes of it."""
        if op.name not in READERS:
            raise Unread("no step for it")
        outputs: list[int | None] = []
        for number in self.op.outputs:
            if number is None:
                outputs.append(None)
                continue
            parts: list[torch.Tensor] = []
            for tensor, rows in self._pairs(Ref(number)):
                shape = tuple(tensor.shape)
                if len(shape) <= at or shape[at] != self.pre * rows * self.post:
                    parts = []
                    break
                lay = _Lay(number, shape[:at], self.pre, self.post, shape[at + 1 :])
                parts.append(lay.rows_last(tensor, rows).movedim(-1, 0))
            outputs.append(self.reader.stand_in(*parts) if parts else None)
        made = READERS[op.name](self.reader, replace(op, outputs=tuple(outputs)))
        if isinstance(made, tuple):
            return tuple(self._turned(part, at) if isinstance(part, Column) else part for part in made)
        return self._turned(made, at)

    def _turned(self, made: Known, at: int) -> Known:
        if not isinstance(made, Column) or made.folded:
            raise Unread("it makes what is no value of a row")
        if at or self.pre > 1:
            return Turned(made.number, made.shape, at)
        shape = made.shape[1:] if self.post > 1 else made.shape[2:]
        number = self.reader.hidden(shape)
        self.reader.steps.append(Reshape(number, made.number, shape))
        return Column(number, shape, int(self.post > 1))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


ROWS_ANYWHERE.update(by_example=by_example, computed=computed, lengths=lengths)
