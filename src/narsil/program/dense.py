"""Reads the operations over columns: what each of them computes for one row.

Operations that would mix rows are not read: a reduction over the rows' axis, statistics of the batch, or shapes in
which the rows' axis is not the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from narsil.program.ragged import chosen, converted, looked_up_in, per_id, rearranged
from narsil.program.reader import Reader, fixed_array, has_varying, reads
from narsil.program.recording import Op, Ref, Varying
from narsil.program.sequences import move_vectors
from narsil.program.steps import (
    ELEMENTWISE,
    Concat,
    Elementwise,
    LayerNorm,
    Linear,
    MatMul,
    Operand,
    Permute,
    Reduce,
    Reshape,
    Softmax,
    Take,
)
from narsil.program.values import Column, Counted, Fixed, Known, PerId, Structure, Unread, Vectors

_UNARY = {
    "aten.relu": "relu", "aten.sigmoid": "sigmoid", "aten.tanh": "tanh", "aten.silu": "silu", "aten.exp": "exp",
    "aten.log": "log", "aten.log1p": "log1p", "aten.sqrt": "sqrt", "aten.abs": "abs", "aten.neg": "neg",
    "aten.reciprocal": "reciprocal", "aten.sign": "sign", "aten.floor": "floor", "aten.isnan": "isnan",
    "aten.logical_not": "not", "aten.bitwise_not": "not", "aten.relu_": "relu", "aten.sigmoid_": "sigmoid",
    "aten.tanh_": "tanh", "aten.silu_": "silu", "aten.exp_": "exp", "aten.log_": "log", "aten.log1p_": "log1p",
    "aten.sqrt_": "sqrt", "aten.abs_": "abs", "aten.neg_": "neg", "aten.reciprocal_": "reciprocal", "aten.sgn": "sign",
}  # fmt: skip
_BINARY = {
    "aten.add": "add", "aten.add_": "add", "aten.sub": "sub", "aten.sub_": "sub", "aten.mul": "mul", "aten.mul_": "mul",
    "aten.div": "div", "aten.div_": "div", "aten.maximum": "maximum", "aten.minimum": "minimum", "aten.pow": "pow",
    "aten.remainder": "remainder", "aten.gt": "gt", "aten.ge": "ge", "aten.lt": "lt", "aten.le": "le", "aten.eq": "eq",
    "aten.ne": "ne", "aten.logical_and": "and", "aten.logical_or": "or", "aten.bitwise_and": "and",
    "aten.bitwise_or": "or", "aten.fmod": "fmod", "aten.floor_divide": "floor_divide", "aten.bitwise_xor": "bit_xor",
    "aten.__lshift__": "shift_left", "aten.__rshift__": "shift_right", "aten.bitwise_left_shift": "shift_left",
    "aten.bitwise_right_shift": "shift_right",
}  # fmt: skip
_KINDS = {
    torch.float32: None, torch.float64: None, torch.float16: "to_float16", torch.bfloat16: "to_bfloat16",
    torch.bool: "to_bool", torch.int32: "to_integer", torch.int64: "to_integer",
}  # fmt: skip


def elementwise(reader: Reader, op: Op, function: str, operands: Sequence[Any], numbers: tuple[Any, ...] = ()) -> Known:
    """A function of values, constants and numbers, or of numbers for each id."""
    known = [reader.of(operand) if not _is_number(operand) else operand for operand in operands]
    if any(isinstance(item, PerId) for item in known):
        return per_id(reader, op, function, known, numbers)
    if any(isinstance(item, Structure) for item in known):
        raise Unread("it takes lengths of bags")
    if any(isinstance(item, Vectors | Counted) for item in known):
        raise Unread("it takes a vector, or a place, for each id")
    columns = [item for item in known if isinstance(item, Column)]
    if not columns:
        return Fixed(reader.recording.tensors[_only(op)])
    if function not in ELEMENTWISE:
        raise Unread("no step for it")
    _check_kind(reader.recording.tensors[_only(op)].dtype, function)
    folded = columns[0].folded
    rank = len(columns[0].shape)
    for column in columns:
        if column.folded != folded or len(column.shape) != rank or column.shape[:folded] != columns[0].shape[:folded]:
            raise Unread("the shapes of what it takes differ in their number of axes")
    kind = reader.recording.tensors[columns[0].number].dtype
    sources = tuple(_operand(item, rank, folded, kind) for item in known)
    shape = np.broadcast_shapes(
        *(column.shape for column in columns),
        *(np.shape(s)[-rank:] if rank else () for s in sources if not isinstance(s, int)),
    )
    return reader.add(op, Elementwise(_only(op), function, sources, numbers), shape, folded)


def _check_kind(kind: torch.dtype, function: str) -> None:
    """Raises Unread where whole numbers, or truth values, are not computed as numbers are."""
    if kind == torch.bool and function == "add":
        raise Unread("it adds truth values")
    if not kind.is_floating_point and kind != torch.bool:
        if function in ("and", "or", "not"):
            raise Unread("it computes with the bits of whole numbers")
        if function == "pow" or (function in ("add", "mul", "sub", "neg", "abs") and kind != torch.int64):
            raise Unread(f"it computes with {kind}, which wraps around")


def _operand(item: Any, rank: int, folded: int, kind: torch.dtype) -> Operand:
    """A constant must mean the same for every row."""
    if isinstance(item, Column):
        return item.number
    if not isinstance(item, Fixed):
        # torch computes in the tensor's kind, to which it rounds a number first.
        exact = kind == torch.float64 or not kind.is_floating_point
        return np.asarray(item, np.float64 if exact else np.float32).astype(np.float64)
    array = fixed_array(item.tensor).astype(np.float64)
    tail = rank - folded
    if array.ndim > tail:
        if array.ndim != tail + 1 or array.shape[0] != 1:
            raise Unread(f"a constant of shape {array.shape} belongs to certain rows")
        array = array[0]
    return array


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | bool) or value is None


def _only(op: Op) -> int:
    number = op.outputs[0]
    if number is None:
        raise Unread("it makes no tensor")
    return number


@reads(*_UNARY)
def read_unary(reader: Reader, op: Op) -> Known:
    """Functions of one operand."""
    return elementwise(reader, op, _UNARY[op.name], op.args[:1])


@reads(*_BINARY)
def read_binary(reader: Reader, op: Op) -> Known:
    """Functions of two operands, of which either may be a number."""
    left, right = op.args[:2]
    alpha = op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1)
    if (mode := op.kwargs.get("rounding_mode")) is not None:
        names = {"floor": "floor_divide", "trunc": "truncated_divide"}
        return elementwise(reader, op, names[mode], (left, right))
    if alpha != 1:
        if not _is_number(right):
            raise Unread(f"it has alpha = {alpha}")
        right = right * alpha
    return elementwise(reader, op, _BINARY[op.name], (left, right))


@reads("aten.rsub")
def read_rsub(reader: Reader, op: Op) -> Known:
    """other - x."""
    if op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1) != 1:
        raise Unread("it has an alpha")
    return elementwise(reader, op, "sub", (op.args[1], op.args[0]))


@reads("aten.where")
def read_where(reader: Reader, op: Op) -> Known:
    """Chosen number by number."""
    if len(op.args) != 3:
        raise Unread("it gives places, not numbers")
    return elementwise(reader, op, "where", op.args)


@reads(
    *("aten.clamp", "aten.clamp_", "aten.clamp_min", "aten.clamp_min_", "aten.clamp_max", "aten.clamp_max_"),
    "aten.hardtanh",
)
def read_clamp(reader: Reader, op: Op) -> Known:
    """Between two numbers, either of which may be missing."""
    names = ("min_val", "max_val") if op.name == "aten.hardtanh" else ("min", "max")
    limits = [op.args[n + 1] if len(op.args) > n + 1 else op.kwargs.get(name) for n, name in enumerate(names)]
    if op.name.startswith("aten.clamp_max"):
        limits = [None, op.args[1] if op.args[1:] else op.kwargs.get("max")]
    if op.name == "aten.hardtanh":
        limits = [standard if limit is None else limit for limit, standard in zip(limits, (-1.0, 1.0), strict=True)]
    tensors = [limit for limit in limits if not _is_number(limit)]
    if len(tensors) == 1 and None in limits:
        return elementwise(reader, op, "minimum" if limits[0] is None else "maximum", (op.args[0], *tensors))
    if tensors:
        raise Unread("its limits are no numbers")
    return elementwise(reader, op, "clamp", op.args[:1], tuple(limits))


@reads("aten.nan_to_num", "aten.nan_to_num_")
def read_nan_to_num(reader: Reader, op: Op) -> Known:
    """NaN and infinities replaced."""
    names = ("nan", "posinf", "neginf")
    given = [op.args[n + 1] if len(op.args) > n + 1 else op.kwargs.get(name) for n, name in enumerate(names)]
    kind = reader.recording.tensors[_only(op)].dtype
    if not kind.is_floating_point:
        raise Unread(f"it takes {kind}")
    most = torch.finfo(kind).max
    whole = (given[0] or 0.0, most if given[1] is None else given[1], -most if given[2] is None else given[2])
    return elementwise(reader, op, "nan_to_num", op.args[:1], whole)


@reads("aten.gelu", "aten.leaky_relu", "aten.leaky_relu_")
def read_with_option(reader: Reader, op: Op) -> Known:
    """Activations that have an option."""
    if op.name == "aten.gelu":
        form = op.kwargs.get("approximate", op.args[1] if len(op.args) > 1 else "none")
        return elementwise(reader, op, "gelu" if form == "none" else "gelu_tanh", op.args[:1])
    return elementwise(reader, op, "leaky_relu", op.args[:1], (op.args[1] if len(op.args) > 1 else 0.01,))


@reads("aten._to_copy", "aten.to", "aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh")
def read_copy(reader: Reader, op: Op) -> Known:
    """The same numbers, perhaps of another kind."""
    known = reader.of(op.args[0])
    kind = reader.recording.tensors[_only(op)].dtype
    if isinstance(known, Fixed):
        return Fixed(reader.recording.tensors[_only(op)])
    before = reader.recording.tensors[op.args[0].number].dtype
    if isinstance(known, Structure) and kind not in (torch.int32, torch.int64):
        raise Unread(f"it makes {kind} of lengths of bags")
    if isinstance(known, PerId) and kind != before:
        return converted(known, before, kind)
    if isinstance(known, Structure) or kind == before or (kind.is_floating_point and kind.itemsize >= 4):
        return known
    if kind not in _KINDS:
        raise Unread(f"it makes {kind}")
    function = _KINDS[kind]
    if function == "to_integer" and not before.is_floating_point:
        if before == torch.int64:
            raise Unread("it makes 32 bits of 64")
        return known
    if function is None:
        return known
    return elementwise(reader, op, function, op.args[:1])


@reads("aten.t", "aten.expand")
def read_of_weights(reader: Reader, op: Op) -> Known:
    """What is done to weights on the way."""
    known = reader.of(op.args[0])
    if isinstance(known, Fixed):
        if op.name == "aten.t":
            return Fixed(known.tensor.t())
        return Fixed(reader.recording.tensors[_only(op)])
    if op.name == "aten.t" and isinstance(known, PerId | Structure):
        return cast(Known, rearranged(reader, op))
    if op.name == "aten.expand" and isinstance(known, Column) and not known.folded:
        return _broadcast(reader, op, known)
    raise Unread("it transposes rows")


def _broadcast(reader: Reader, op: Op, column: Column) -> Known:
    per_row, tail = reader.tail(_only(op))
    if per_row != 1 or len(tail) != len(column.shape):
        raise Unread("it repeats rows")
    places = np.broadcast_to(np.arange(int(np.prod(column.shape))).reshape(column.shape), tail)
    return reader.add(op, Take(_only(op), column.number, places.copy()), tail)


@reads("aten.addmm", "aten.mm", "aten.linear", "mkldnn._linear_pointwise")
def read_linear(reader: Reader, op: Op) -> Known:
    """A weight over the last axis."""
    relu = False
    if op.name == "aten.addmm":
        if op.kwargs.get("alpha", 1) != 1 or op.kwargs.get("beta", 1) != 1:
            raise Unread("it has an alpha or a beta")
        bias, source, weight = reader.fixed(op.args[0]), op.args[1], reader.fixed(op.args[2]).t()
    elif op.name == "aten.mm":
        bias, source, weight = None, op.args[0], reader.fixed(op.args[1]).t()
    else:
        bias = None if len(op.args) < 3 or op.args[2] is None else reader.fixed(op.args[2])
        source, weight = op.args[0], reader.fixed(op.args[1])
        if op.name == "mkldnn._linear_pointwise":
            if op.args[3] not in ("relu", "none"):
                raise Unread(f"it applies {op.args[3]}")
            relu = op.args[3] == "relu"
    column = reader.of(source)
    if not isinstance(column, Column) or not column.shape:
        raise Unread("it takes no rows of numbers")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise Unread(f"its bias has the shape {tuple(bias.shape)}")
    step = Linear(_only(op), column.number, fixed_array(weight), None if bias is None else fixed_array(bias))
    made = reader.add(op, step, (*column.shape[:-1], weight.shape[0]), column.folded)
    if not relu:
        return made
    # The step before keeps a number of its own: no tensor of the recording has it.
    hidden = reader.hidden(made.shape)
    reader.steps[-1] = Linear(hidden, step.source, step.weight, step.bias)
    reader.steps.append(Elementwise(made.number, "relu", (hidden,)))
    return made


@reads("aten.bmm", "aten.matmul", "aten.baddbmm")
def read_bmm(reader: Reader, op: Op) -> Known:
    """Matrix products within each row."""
    if op.name == "aten.baddbmm":
        raise Unread("it adds to what it multiplies")
    left, right = reader.of(op.args[0]), reader.of(op.args[1])
    operands: list[Operand] = []
    shapes: list[tuple[int, ...]] = []
    columns = [known for known in (left, right) if isinstance(known, Column)]
    for known in (left, right):
        if isinstance(known, Column) and len(known.shape) >= 2 + known.folded:
            operands.append(known.number)
            shapes.append(known.shape)
        elif isinstance(known, Fixed) and (
            known.tensor.dim() == 2 or (known.tensor.dim() == 3 and known.tensor.shape[0] == 1)
        ):
            array = fixed_array(known.tensor)
            operands.append(array.reshape(array.shape[-2:]))
            shapes.append(array.shape[-2:])
        else:
            raise Unread("it multiplies across rows")
    if any((column.folded, column.shape[:-2]) != (columns[0].folded, columns[0].shape[:-2]) for column in columns):
        raise Unread("it multiplies what is laid out in several ways")
    shape = (*columns[0].shape[:-2], shapes[0][-2], shapes[1][-1])
    return reader.add(op, MatMul(_only(op), *operands), shape, columns[0].folded)


@reads(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten._reshape_alias",
)
def read_reshape(reader: Reader, op: Op) -> Known:
    """The same numbers in the same order, in another shape."""
    known = reader.of(op.args[0])
    if any(isinstance(argument, torch.dtype) for argument in (*op.args[1:], *op.kwargs.values())):
        raise Unread("it reads the bits of numbers as others")
    if isinstance(known, Fixed):
        return Fixed(reader.recording.tensors[_only(op)])
    if isinstance(known, PerId | Structure):
        return cast(Known, rearranged(reader, op))
    if not isinstance(known, Column):
        raise Unread("it takes no rows of numbers")
    per_row, tail = reader.tail(_only(op))
    if not _is_row_major(reader, op):
        raise Unread("it reinterprets memory that is not in order")
    total = int(np.prod(known.shape, dtype=np.int64))
    if per_row * int(np.prod(tail, dtype=np.int64)) != total:
        raise Unread("it lays rows out anew")
    folded = 0 if per_row == 1 else 1
    shape = tail if per_row == 1 else (per_row, *tail)
    return reader.add(op, Reshape(_only(op), known.number, shape), shape, folded)


def _is_row_major(reader: Reader, op: Op) -> bool:
    """A view means the logical order, whatever the strides: torch refuses the others itself."""
    return op.name != "aten._reshape_alias" or reader.recording.tensors[op.args[0].number].is_contiguous()


@reads("aten.transpose", "aten.permute", "aten.swapaxes")
def read_permute(reader: Reader, op: Op) -> Known:
    """The row's axes in another order."""
    known = reader.of(op.args[0])
    if isinstance(known, Fixed):
        return Fixed(reader.recording.tensors[_only(op)])
    if isinstance(known, PerId | Structure):
        return cast(Known, rearranged(reader, op))
    column = reader.column(op.args[0])
    rank = len(column.shape) + 1
    if op.name == "aten.permute":
        order = [axis % rank for axis in op.args[1]]
    else:
        order = list(range(rank))
        one, other = op.args[1] % rank, op.args[2] % rank
        order[one], order[other] = order[other], order[one]
    if order[0] != 0:
        raise Unread("it moves the rows' axis")
    axes = tuple(axis - 1 for axis in order[1:])
    return reader.add(op, Permute(_only(op), column.number, axes), tuple(column.shape[axis] for axis in axes))


@reads("aten.cat", "aten.stack")
def read_cat(reader: Reader, op: Op) -> Known:
    """Values beside each other."""
    items = op.args[0]
    known = [reader.of(item) for item in items]
    if any(isinstance(item, Vectors) for item in known):
        return cast(Known, move_vectors(reader, op))
    if any(isinstance(item, PerId | Structure) for item in known):
        return cast(Known, rearranged(reader, op))
    if all(isinstance(item, Fixed) for item in known):
        return Fixed(reader.recording.tensors[_only(op)])
    columns = [reader.column(item) for item in items]
    axis = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else 0)
    rank = len(columns[0].shape) + 1 + (op.name == "aten.stack")
    axis = axis % rank - 1
    if axis < 0:
        raise Unread("it puts rows behind each other")
    sources, shapes = [column.number for column in columns], [column.shape for column in columns]
    if op.name == "aten.stack":
        for at, column in enumerate(columns):
            shapes[at] = (*column.shape[:axis], 1, *column.shape[axis:])
            sources[at] = reader.hidden(shapes[at])
            reader.steps.append(Reshape(sources[at], column.number, shapes[at]))
    shape = list(shapes[0])
    shape[axis] = sum(item[axis] for item in shapes)
    return reader.add(op, Concat(_only(op), tuple(sources), axis), shape)


def _taken(reader: Reader, op: Op, column: Column, pick: Any, output: int = 0) -> Column:
    """The entries of the row that numpy's indexing picks."""
    size = int(np.prod(column.shape, dtype=np.int64))
    try:
        # As an array, that of a lone number too, which has no axes.
        places = np.array(np.arange(size).reshape(1, *column.shape)[(slice(None), *pick)][0])
    except IndexError as error:
        raise Unread(str(error)) from None
    number = op.outputs[output]
    if number is None:
        raise Unread("it makes no tensor")
    return reader.add(op, Take(number, column.number, places.copy()), places.shape, output=output)


@reads("aten.slice", "aten.narrow", "aten.select")
def read_slice(reader: Reader, op: Op) -> Known:
    """A stretch, or one, of an axis."""
    known = reader.of(op.args[0])
    if isinstance(known, Vectors):
        return cast(Known, move_vectors(reader, op))
    if isinstance(known, PerId | Structure):
        return cast(Known, rearranged(reader, op))
    if isinstance(known, Fixed):
        if has_varying(op):
            raise Unread("it takes a part of a constant that follows from how many rows there are")
        return Fixed(reader.recording.tensors[_only(op)])
    column = reader.column(op.args[0])
    axis = (op.args[1] if len(op.args) > 1 else 0) % (len(column.shape) + 1) - 1
    if op.name == "aten.select":
        pick: Any = op.args[2]
    elif op.name == "aten.narrow":
        if has_varying(op):
            raise Unread("what it takes follows from how many rows there are")
        pick = slice(op.args[2], op.args[2] + op.args[3])
    else:
        start, stop, step = (*op.args[2:], None, None, None)[:3]
        pick = slice(start, stop, step)
    if axis < 0:
        if op.name == "aten.slice" and _takes_all(pick, reader):
            return column
        raise Unread("it takes some rows")
    if has_varying(op):
        raise Unread("what it takes follows from how many rows there are")
    return _taken(reader, op, column, (*(slice(None),) * axis, pick))


def _takes_all(pick: slice, reader: Reader) -> bool:
    if pick.start not in (0, None) or pick.step not in (1, None):
        return False
    if isinstance(pick.stop, Varying):
        return (pick.stop.first, pick.stop.second) == reader.rows
    return pick.stop is None or pick.stop >= 2**31


@reads("aten.index")
def read_index(reader: Reader, op: Op) -> Known:
    """Entries of the row by places that the model knows."""
    known = reader.of(op.args[0])
    indices = op.args[1]
    if isinstance(known, Fixed):
        if all(index is None or isinstance(reader.of(index), Fixed) for index in indices):
            return Fixed(reader.recording.tensors[_only(op)])
        if len(indices) == 1 and reader.recording.tensors[indices[0].number].dtype != torch.bool:
            return looked_up_in(reader, op, known.tensor, reader.of(indices[0]), "take")
        raise Unread("it looks something up in a constant")
    if isinstance(known, PerId) and len(indices) == 1:
        return chosen(reader, op, known, reader.of(indices[0]))
    column = reader.column(op.args[0])
    if not indices or indices[0] is not None:
        raise Unread("it takes rows by their number")
    pick = [slice(None) if index is None else fixed_array(reader.fixed(index)) for index in indices[1:]]
    return _taken(reader, op, column, pick)


@reads("aten.index_select")
def read_index_select(reader: Reader, op: Op) -> Known:
    """Entries along one axis."""
    known = reader.of(op.args[0])
    if isinstance(known, Vectors):
        return cast(Known, move_vectors(reader, op))
    if isinstance(known, PerId | Structure):
        return cast(Known, rearranged(reader, op))
    if isinstance(known, Fixed):
        return looked_up_in(reader, op, known.tensor, reader.of(op.args[2]), "take")
    column = reader.column(op.args[0])
    axis = op.args[1] % (len(column.shape) + 1) - 1
    if axis < 0:
        raise Unread("it takes rows by their number")
    return _taken(reader, op, column, (*(slice(None),) * axis, fixed_array(reader.fixed(op.args[2]))))


@reads("aten.split", "aten.unsafe_split", "aten.split_with_sizes", "aten.chunk", "aten.unbind")
def read_split(reader: Reader, op: Op) -> Any:
    """An axis in pieces."""
    known = reader.of(op.args[0])
    if isinstance(known, Vectors):
        return move_vectors(reader, op)
    if isinstance(known, PerId | Structure):
        return cast(Known, rearranged(reader, op))
    column = reader.column(op.args[0])
    rank = len(column.shape) + 1
    place = 1 if op.name == "aten.unbind" else 2
    axis = op.kwargs.get("dim", op.args[place] if len(op.args) > place else 0) % rank - 1
    if axis < 0:
        raise Unread("it splits the rows")
    made, at = [], 0
    for output, number in enumerate(op.outputs):
        if op.name == "aten.unbind":
            pick: Any = output
        else:
            width = reader.recording.tensors[number or 0].shape[axis + 1]
            pick, at = slice(at, at + width), at + width
        made.append(_taken(reader, op, column, (*(slice(None),) * axis, pick), output))
    return tuple(made)


@reads("aten.sum", "aten.mean", "aten.amax", "aten.amin")
def read_reduce(reader: Reader, op: Op) -> Known:
    """Over axes of the row."""
    known = reader.of(op.args[0])
    if isinstance(known, Structure) and op.name == "aten.sum" and _over_rows(reader, op):
        return Structure(known.group)
    column = reader.column(op.args[0])
    axes = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    keep = bool(op.args[2] if len(op.args) > 2 else op.kwargs.get("keepdim", False))
    rank = len(column.shape) + 1
    axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    own = tuple(sorted(axis % rank - 1 for axis in axes))
    if not own or own[0] < 0:
        raise Unread("it goes over the rows")
    function = {"aten.amax": "max", "aten.amin": "min"}.get(op.name, op.name[5:])
    shape = [1 if axis in own else size for axis, size in enumerate(column.shape) if keep or axis not in own]
    return reader.add(op, Reduce(_only(op), column.number, function, own, keep), shape)


def _over_rows(reader: Reader, op: Op) -> bool:
    """Whether lengths are added up over all rows, as the bookkeeping of bags does for each feature."""
    axes = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
    first, second = (tensor.shape for tensor in reader.pair(op.args[0]))
    return all(first[axis] != second[axis] for axis in axes)


@reads("aten._softmax")
def read_softmax(reader: Reader, op: Op) -> Known:
    """Over one axis of the row."""
    column = reader.of(op.args[0])
    if not isinstance(column, Column):
        raise Unread("it takes no rows of numbers")
    axis = op.args[1] % (len(column.shape) + 1 - column.folded)
    if axis == 0:
        raise Unread("it goes over the rows")
    step = Softmax(_only(op), column.number, axis - 1 + column.folded)
    return reader.add(op, step, column.shape, column.folded)


@reads("aten.native_layer_norm")
def read_layer_norm(reader: Reader, op: Op) -> Any:
    """Over the last axes."""
    column = reader.of(op.args[0])
    if not isinstance(column, Column) or len(op.args[1]) > len(column.shape) - column.folded:
        raise Unread("it goes over the rows")
    weight, bias = (None if item is None else fixed_array(reader.fixed(item)) for item in op.args[2:4])
    step = LayerNorm(_only(op), column.number, len(op.args[1]), weight, bias, float(op.args[4]))
    return reader.add(op, step, column.shape, column.folded), None, None


@reads("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training")
def read_batch_norm(reader: Reader, op: Op) -> Any:
    """With the statistics of training: a multiplication and an addition for each column."""
    trains = op.name == "aten.native_batch_norm" and op.args[5]
    if trains or op.args[3] is None or op.args[4] is None:
        raise Unread("it takes the statistics of the rows at hand: put the model into eval mode before it is packaged")
    column = reader.column(op.args[0])
    weight, bias, mean, variance = (
        None if item is None else fixed_array(reader.fixed(item)).astype(np.float64) for item in op.args[1:5]
    )
    scale = (1.0 if weight is None else weight) / np.sqrt(np.asarray(variance) + float(op.args[-1]))
    shift = (0.0 if bias is None else bias) - np.asarray(mean) * scale
    across = (-1, *(1,) * (len(column.shape) - 1))
    scaled = reader.hidden(column.shape)
    reader.steps.append(Elementwise(scaled, "mul", (column.number, scale.reshape(across))))
    made = reader.add(op, Elementwise(_only(op), "add", (scaled, np.asarray(shift).reshape(across))), column.shape)
    return made, None, None


@reads(
    "aten.arange",
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.scalar_tensor",
    "aten.triu_indices",
    "aten.tril_indices",
)
def read_made(reader: Reader, op: Op) -> Known:
    """A constant that forward makes each time."""
    return Fixed(reader.recording.tensors[_only(op)])


@reads("aten.empty")
def read_empty(reader: Reader, op: Op) -> Known:
    """Memory that TorchScript fills without an operation, as it does with a list of numbers."""
    first, second = reader.pair(Ref(_only(op)))
    if first.shape != second.shape or not torch.equal(first, second):
        raise Unread("what is in it follows from the rows")
    return Fixed(first)
