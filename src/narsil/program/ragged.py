"""Reads the operations over ids and their bags, and the lookups.

Where an id stands is not followed by rules but by example: an operation that moves ids is run again on their positions.
At a lookup every bag of every feature must then hold exactly the ids of one bag of the request, in their order, in both
recordings. That is proof only as long as nothing on the way looks at what it moves: lengths and offsets may therefore
pass through operations that are known not to (``Structure``), and what is done to an id's value is kept as an
expression.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.errors import first_line
from narsil.program.reader import Reader, fixed_array, reads
from narsil.program.recording import Constant, Op, Ref, Varying
from narsil.program.steps import ID_FUNCTIONS, Elementwise, IdArray, IdExpression, Lookup, Pooling, Table, of_feature
from narsil.program.values import Chosen, Column, Counted, Fixed, Known, Opaque, PerId, Structure, Unread, Vectors

__all__ = [
    "IDS",
    "WEIGHTS",
    "chosen",
    "converted",
    "functions_of",
    "looked_up_in",
    "matched",
    "moved",
    "per_id",
    "rearranged",
    "vectors_of_ids",
]

IDS, WEIGHTS = IdExpression("ids"), IdExpression("weights")
_POOLING: dict[int, Pooling] = {0: "sum", 1: "mean"}
_KINDS = {
    torch.int32: "to_int32", torch.int64: "", torch.float32: "to_float32", torch.float64: "to_float64",
    torch.float16: "to_float16", torch.bfloat16: "to_bfloat16", torch.bool: "to_bool",
}  # fmt: skip
# Of truth values, and else of whole numbers.
_OF_BITS = {"and": "bit_and", "or": "bit_or", "not": "bit_not"}
_BITWISE = ("aten.bitwise_and", "aten.bitwise_or", "aten.bitwise_not")
_WRAPS = ("add", "sub", "mul", "neg", "abs", "pow", "shift_left")
_DIVIDES = ("fmod", "floor_divide", "truncated_divide", "remainder")
_UNSET = IdExpression("unset")
_NOTHING = IdExpression("mul", (IDS, 0))
_ONE = IdExpression("add", (_NOTHING, 1))
_WENT = 4  # what bucketize gives where it is asked for where ids went
_OWN_PLACES = (9, 12)  # arguments of bucketize: where each device's ids begin, and how many there are
_EVERYTHING = 2**62  # an end at least so far away is none


def per_id(reader: Reader, op: Op, function: str, known: list[Any], numbers: tuple[Any, ...]) -> PerId:
    """A function of what belongs to each id: the same ids, and numbers."""
    sources = [item for item in known if isinstance(item, PerId)]
    for source in sources:
        if source.group != sources[0].group or not all(map(torch.equal, source.positions, sources[0].positions)):
            return _of_several(reader, op, sources)
    arguments: list[Any] = []
    for item in known:
        if isinstance(item, PerId):
            arguments.append(item.expression)
        elif isinstance(item, Fixed) and item.tensor.numel() == 1:
            arguments.append(item.tensor.item())
        elif isinstance(item, int | float):
            arguments.append(item)
        else:
            raise Unread("it takes ids together with something else")
    kind = reader.recording.tensors[op.outputs[0] or 0].dtype
    whole = not kind.is_floating_point
    if op.name in _BITWISE and kind != torch.bool:
        function = _OF_BITS[function]
    _check_function(function, arguments, kind)
    _check_numbers(reader, op, function, (*arguments, *numbers))
    made = PerId(sources[0].group, IdExpression(function, (*arguments, *numbers)), sources[0].positions)
    stays = whole and (kind == torch.bool or function not in _WRAPS)
    return made if stays else converted(made, torch.int64, kind)


def _of_several(reader: Reader, op: Op, sources: list[PerId]) -> PerId:
    """What is computed with the ids of several bags, as a hash that crosses two features: any number."""
    number = op.outputs[0] or 0
    kind, first = reader.recording.tensors[number].dtype, sources[0]
    if any(source.group != first.group for source in sources) or kind.is_floating_point:
        raise Unread("it takes the ids of different groups, or makes no whole numbers of them")
    made = [
        positions.expand(tensor.shape)
        for positions, tensor in zip(first.positions, reader.pair(Ref(number)), strict=True)
    ]
    several = IdExpression("several", (number, *(source.expression for source in sources)))
    return converted(PerId(first.group, several, (made[0], made[1])), torch.int64, kind)


def _check_function(function: str, arguments: list[Any], kind: torch.dtype) -> None:
    """Raises Unread where a function of ids is not followed."""
    if function not in ID_FUNCTIONS:
        raise Unread("no step for it over ids")
    if kind.is_floating_point and (function in _DIVIDES or function.startswith(("bit_", "shift_"))):
        raise Unread("it divides what are no whole numbers")
    if function in _DIVIDES and not (isinstance(arguments[1], int) and 0 < arguments[1] < 2**63):
        raise Unread("it divides by what is no positive whole number")
    bits = torch.iinfo(kind).bits if not kind.is_floating_point and kind != torch.bool else 64
    if function.startswith("shift_") and not (isinstance(arguments[1], int) and 0 <= arguments[1] < bits):
        raise Unread("it shifts by what is no number of bits")


def _check_numbers(reader: Reader, op: Op, function: str, numbers: tuple[Any, ...]) -> None:
    """Raises Unread where a number would be another one in the kind in which it meets the ids."""
    taken = [reader.recording.tensors[leaf.number].dtype for leaf in _tensors(op)]
    kinds = [kind for kind in taken if not kind.is_floating_point and kind != torch.bool]
    if not kinds:
        return
    limits = torch.iinfo(min(kinds, key=lambda kind: torch.iinfo(kind).bits))
    for number in numbers:
        if isinstance(number, int | float) and not limits.min <= number <= limits.max:
            raise Unread(f"it takes {number}, which ids of {limits.dtype} are not compared or computed with")


def looked_up_in(reader: Reader, op: Op, array: torch.Tensor, known: Known, function: str) -> Known:
    """Ids as places in an array of the model's own, or searched in one that rises."""
    kept = _id_array(array)
    if function != "take" and not kept.rises:
        raise Unread("it searches in numbers that do not rise")
    source = known.of if isinstance(known, Chosen) else known
    if not isinstance(source, PerId):
        raise Unread("it looks up what are no ids")
    made = PerId(source.group, IdExpression(function, (kept, source.expression)), source.positions)
    return Chosen(made, known.condition) if isinstance(known, Chosen) else made


def _id_array(array: torch.Tensor) -> IdArray:
    if array.dim() != 1 or not array.numel() or array.is_floating_point() or array.is_complex():
        raise Unread("it looks ids up in what is no list of whole numbers")
    return IdArray(fixed_array(array).astype(np.int64, copy=False))


@reads("aten.searchsorted", "aten.bucketize")
def read_search(reader: Reader, op: Op) -> Known:
    """Where ids stand among numbers that rise."""
    numbers, ids = op.args[:2] if op.name == "aten.searchsorted" else (op.args[1], op.args[0])
    names = ("out_int32", "right", "side", "sorter")
    given = dict(zip(names, op.args[2:], strict=False)) | dict(op.kwargs)
    if given.get("sorter") is not None:
        raise Unread("it has an order of its own")
    right = bool(given.get("right")) or given.get("side") == "right"
    return looked_up_in(reader, op, reader.fixed(numbers), reader.of(ids), "search_right" if right else "search")


@reads("aten.empty_like", "aten.ones_like", "aten.full_like")
def read_like(reader: Reader, op: Op) -> Known:
    """A number for each id, or each of a value, the same for all, or not set yet."""
    known = reader.of(op.args[0])
    unset = op.name == "aten.empty_like"
    if isinstance(known, Structure) and not unset:
        return known  # held against the request's lengths where they are used
    if not isinstance(known, PerId) and (unset or not isinstance(known, Column)):
        raise Unread("it makes as many numbers as there are of something else")
    if unset and isinstance(known, PerId):
        return PerId(known.group, _UNSET, known.positions)
    number = 1 if op.name == "aten.ones_like" else op.args[1]
    return _like(reader, op, known, number)


def _like(reader: Reader, op: Op, known: PerId | Column, number: Any) -> Known:
    if isinstance(known, Column):
        made = op.outputs[0]
        if made is None or not isinstance(number, int | float):
            raise Unread("it makes no tensor, or of no number")
        # Whatever the value holds, NaN too.
        kind = reader.recording.tensors[made].dtype
        one = np.asarray(torch.full((), number, dtype=kind).item(), np.float64)
        step = Elementwise(made, "where", (known.number, one, one))
        return reader.add(op, step, known.shape, known.folded)
    if reader.recording.tensors[op.outputs[0] or 0].dtype.is_floating_point or not isinstance(number, int):
        raise Unread("it makes floats")
    return PerId(known.group, IdExpression("add", (_NOTHING, number)), known.positions)


def chosen(reader: Reader, op: Op, known: PerId, condition: Known) -> Chosen:
    """Those ids for which a truth value is true."""
    if not isinstance(condition, PerId) or reader.recording.tensors[op.args[1][0].number].dtype != torch.bool:
        raise Unread("it takes ids by ids")
    if known.group != condition.group or not all(map(torch.equal, known.positions, condition.positions)):
        raise Unread("it chooses by a condition on other ids")
    return Chosen(known, condition.expression)


@reads("aten.index_put_", "aten.index_put")
def read_index_put(reader: Reader, op: Op) -> Known:
    """Numbers of those ids for which a condition is true, replaced; or those of a value."""
    base = reader.of(op.args[0])
    if isinstance(base, Column):
        return _put_into_column(reader, op, base)
    if not isinstance(base, PerId) or len(op.args[1]) != 1 or (len(op.args) > 3 and op.args[3]) or op.kwargs:
        raise Unread("it puts numbers into what are none of ids, or adds them")
    condition = chosen(reader, op, base, reader.of(op.args[1][0])).condition
    value = reader.of(op.args[2])
    if isinstance(value, Fixed) and value.tensor.numel() == 1:
        put: Any = value.tensor.item()
    elif isinstance(value, Chosen) and value.condition == condition and value.of.group == base.group:
        if not all(map(torch.equal, value.of.positions, base.positions)):
            raise Unread("it puts numbers of other ids")
        put = value.of.expression
    else:
        raise Unread("it puts numbers of other ids")
    return PerId(base.group, _where(condition, put, base.expression), base.positions)


def _put_into_column(reader: Reader, op: Op, base: Column) -> Known:
    """One number where a mask over the value says so, as ``x[x.isnan()] = 0`` has it."""
    mask, value = reader.column(op.args[1][0]), reader.of(op.args[2])
    is_mask = reader.recording.tensors[op.args[1][0].number].dtype == torch.bool
    if len(op.args[1]) != 1 or (len(op.args) > 3 and op.args[3]) or op.kwargs or not is_mask:
        raise Unread("it puts numbers into places, or adds them")
    if mask.shape != base.shape or base.folded or not isinstance(value, Fixed) or value.tensor.numel() != 1:
        raise Unread("it puts several numbers into a value")
    number = op.outputs[0]
    if number is None:
        raise Unread("it makes no tensor")
    put = np.asarray(value.tensor.item(), np.float64)
    return reader.add(op, Elementwise(number, "where", (mask.number, put, base.number)), base.shape)


def _where(condition: IdExpression, yes: Any, no: Any) -> IdExpression:
    """A choice. What the other side of the same condition has put is kept alone: nothing is left of what was before."""
    before = no.arguments if isinstance(no, IdExpression) and no.function == "where" else (None,)
    if condition.function == "not" and before[0] == condition.arguments[0]:
        return IdExpression("where", (before[0], before[1], yes))
    return IdExpression("where", (condition, yes, no))


@reads("fbgemm.zero_collision_hash")
def read_zero_collision_hash(reader: Reader, op: Op) -> Any:
    """A place in the list of known ids, or one that an unknown id shares."""
    schema = getattr(op.call, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    given = dict(zip(names, op.args, strict=False)) | dict(op.kwargs)
    known, identities = reader.of(given["input"]), reader.fixed(given["identities"])
    if not isinstance(known, PerId) or not given.get("readonly") or given.get("disable_fallback"):
        raise Unread("it learns ids while it serves, or drops those that it does not know")
    if given.get("opt_in_prob", -1) != -1:
        raise Unread("it draws lots")
    parts = [reader.of(part) for name in ("local_sizes", "offsets") if (part := given.get(name)) is not None]
    places = _parts_of_a_table(known, parts, identities.shape[0])
    made = IdExpression("zero_collision_hash", (known.expression, *places))
    return PerId(known.group, made, known.positions), Opaque("fbgemm.zero_collision_hash: what it drops")


def _parts_of_a_table(ids: PerId, parts: list[Known], rows: int) -> tuple[Any, ...]:
    """What says which part of a table an id falls into, and the first and the last place of all parts. Raises Unread
    where one would lie outside of the table."""
    if not parts:
        return 0, rows - 1
    taken = []
    for part in parts:
        if not isinstance(part, PerId) or not all(map(torch.equal, part.positions, ids.positions)):
            raise Unread("it has parts for other ids")
        if part.expression.function != "take":
            raise Unread("it makes its parts of something else than a list")
        taken.append(part.expression)
    if len(taken) != 2 or taken[0].arguments[1] != taken[1].arguments[1]:
        raise Unread("the sizes and the places of its parts do not belong together")
    sizes, starts = (part.arguments[0].values for part in taken)
    if len(sizes) != len(starts) or sizes.min() < 1 or starts.min() < 0 or (sizes > rows - starts).any():
        raise Unread(f"one of its parts lies outside of its {rows} ids")
    return taken[0], int(starts.min()), int((starts + sizes).max()) - 1


def converted(known: PerId, before: torch.dtype, kind: torch.dtype) -> PerId:
    """Numbers for each id as another kind has them."""
    if kind not in _KINDS:
        raise Unread(f"it makes {kind} of ids")
    expression = known.expression
    if before.is_floating_point and not kind.is_floating_point and kind != torch.bool:
        expression = IdExpression("to_integer", (expression,))
    keeps = kind in (torch.int64, before) or (before, kind) == (torch.float32, torch.float64)
    if not keeps and before != torch.bool:
        expression = IdExpression(_KINDS[kind], (expression,))
    return PerId(known.group, expression, known.positions)


def rearranged(reader: Reader, op: Op) -> Any:
    """What an operation makes that moves ids, or lengths, and looks at neither."""
    sources = [known for leaf in _tensors(op) if isinstance(known := reader.of(leaf), PerId)]
    if op.name in ("aten.slice", "aten.split", "aten.unsafe_split"):
        _check_reached(reader, op)
    if not sources:
        return _structure(reader, op)
    _check_taken(reader, op)
    expression = _shared(reader, sources)
    made = [moved(reader, op, which) for which in (0, 1)]
    results = [PerId(sources[0].group, expression, (first, second)) for first, second in zip(*made, strict=True)]
    return tuple(results) if len(op.outputs) > 1 else results[0]


def _shared(reader: Reader, sources: list[PerId]) -> IdExpression:
    """What was done to the ids of all sources: by feature, where it is not the same. Raises Unread where it is not even
    the same for all ids of a feature."""
    first = sources[0]
    if any(source.group != first.group for source in sources):
        raise Unread("it mixes ids of different groups")
    if all(source.expression == first.expression for source in sources):
        return first.expression
    lengths = reader.groups[first.group]
    done: dict[int, Any] = {}
    for source in sources:
        for positions, each in zip(source.positions, lengths, strict=True):
            for feature in _features_among(positions, each):
                own = of_feature(source.expression, feature)
                if done.setdefault(feature, own) != own:
                    raise Unread("it mixes ids of one feature to which different things were done")
    return IdExpression("by_feature", tuple(done.get(feature, _UNSET) for feature in range(len(lengths[0]))))


def _check_taken(reader: Reader, op: Op) -> None:
    """Raises Unread where positions alone would not show what an operation does: other numbers among the ids, ids as
    places of ids, or an end that the recorded ids do not reach."""
    moves = op.args[0] if isinstance(op.args[0], tuple) else op.args[:1]
    if not all(isinstance(reader.of(item), PerId) for item in moves):
        raise Unread("it puts other numbers beside ids")
    if any(isinstance(leaf, Ref) and isinstance(reader.of(leaf), PerId) for leaf in op.args[1:]):
        raise Unread("it takes ids by ids")


def _check_reached(reader: Reader, op: Op) -> None:
    """Raises Unread where a fixed end of a stretch lies beyond what was recorded: more ids would be cut there."""
    first, second = (tensor.shape for tensor in reader.pair(op.args[0]))
    axis = op.args[1] if op.name == "aten.slice" and len(op.args) > 1 else op.args[2] if len(op.args) > 2 else 0
    size = min(first[axis], second[axis])
    ends = op.args[2:4] if op.name == "aten.slice" else op.args[1:2]
    for end in ends:
        if isinstance(end, int) and size < abs(end) < _EVERYTHING:
            raise Unread(f"it cuts at {end}, which no row that was recorded has")


def _structure(reader: Reader, op: Op) -> Any:
    taken = [reader.of(leaf) for leaf in _tensors(op)]
    groups = {known.group for known in taken if isinstance(known, Structure)}
    if len(groups) != 1:
        raise Unread("it mixes the lengths of different groups")
    (group,) = groups
    if all(isinstance(known, Fixed) or (isinstance(known, Structure) and known.places) for known in taken):
        made = [
            Structure(group, pair)
            for pair in zip(*(moved(reader, op, which, lengths=True) for which in (0, 1)), strict=True)
        ]
    else:
        made = [Structure(group)] * len(op.outputs)
    return tuple(made) if len(op.outputs) > 1 else made[0]


def moved(reader: Reader, op: Op, which: int, *, lengths: bool = False) -> tuple[torch.Tensor, ...]:
    """The operation's results, run over the positions of the ids in one of the recordings, or over those of lengths."""

    def given(value: Any) -> Any:
        if isinstance(value, tuple):
            return [given(item) for item in value]
        if isinstance(value, Constant):
            return value.tensor
        if isinstance(value, Varying):
            return (value.first, value.second)[which]
        if not isinstance(value, Ref):
            return value
        known = reader.known.get(value.number)
        if lengths and isinstance(known, Structure) and known.places:
            return known.places[which].contiguous()
        return known.positions[which].contiguous() if isinstance(known, PerId | Vectors) else reader.pair(value)[which]

    kwargs = {key: given(value) for key, value in op.kwargs.items() if key != "dtype"}
    try:
        made = op.call(*map(given, op.args), **kwargs)
    except Exception as error:  # an operation that moves other numbers than places
        raise Unread(f"it cannot be followed: {first_line(error)}") from None
    return tuple(made) if isinstance(made, tuple | list) else (made,)


def _tensors(op: Op) -> list[Any]:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, tuple):
            return [leaf for item in value for leaf in leaves(item)]
        return [value] if isinstance(value, Ref) else []

    return leaves((*op.args, *op.kwargs.values()))


@reads("fbgemm.asynchronous_complete_cumsum", "aten.cumsum")
def read_offsets(reader: Reader, op: Op) -> Known:
    """Lengths become offsets; a one for each id makes a bag of each."""
    known = reader.of(op.args[0])
    if isinstance(known, PerId) and known.expression == _ONE:
        return Structure(known.group)
    if not isinstance(known, Structure):
        raise Unread("it sums up what are no lengths")
    return Structure(known.group)


@reads("aten.new_zeros", "aten.zeros_like")
def read_zeros(reader: Reader, op: Op) -> Known:
    """Zeros beside lengths are the first offset."""
    if isinstance(known := reader.of(op.args[0]), Structure):
        return Structure(known.group)
    if op.name == "aten.zeros_like" and isinstance(known, PerId | Column):
        return _like(reader, op, known, 0)
    raise Unread("its size follows from how many rows there are")


@reads("fbgemm.permute_2D_sparse_data", "fbgemm.permute_1D_sparse_data")
def read_permute(reader: Reader, op: Op) -> Any:
    """Features in another order: lengths, ids and weights."""
    reader.fixed(op.args[0])
    lengths, ids = reader.of(op.args[1]), reader.of(op.args[2])
    if not isinstance(lengths, Structure) or not isinstance(ids, PerId):
        raise Unread("it does not move ids by their lengths")
    # Positions take the ids' place alone: weights have to be floats.
    alone = replace(op, args=(*op.args[:3], None, *op.args[4:]))
    made = [moved(reader, alone, which) for which in (0, 1)]
    permuted = PerId(ids.group, ids.expression, (made[0][1], made[1][1]))
    weights: Known | None = None
    if op.args[3] is not None:
        try:
            weights = PerId(ids.group, _weights_of(reader, ids, op.args[3]), permuted.positions)
        except Unread as problem:
            weights = Opaque(f"{op.name}: {problem}")
    return _permuted(reader, op, lengths), permuted, weights


def _permuted(reader: Reader, op: Op, lengths: Structure) -> Structure:
    """The lengths of features in another order."""
    order = fixed_array(reader.fixed(op.args[0]))
    made = []
    for which, rows in enumerate(reader.rows):
        taken = None if lengths.places is None else lengths.places[which]
        if (
            taken is None
            or "2D" not in op.name
            or taken.numel() % rows
            or order.max(initial=0) >= taken.numel() // rows
        ):
            return Structure(lengths.group)
        moved_lengths = taken.reshape(-1, rows).numpy()[order]
        result = reader.pair(Ref(op.outputs[0] or 0))[which]
        made.append(torch.from_numpy(moved_lengths).reshape(result.shape))
    return Structure(lengths.group, (made[0], made[1]))


@reads("fbgemm.block_bucketize_sparse_features_inference", "fbgemm.block_bucketize_sparse_features")
def read_bucketize(reader: Reader, op: Op) -> Any:
    """Ids divided among devices: of one device, nothing changes."""
    if op.args[5] != 1 or op.args[2]:
        raise Unread("it divides ids among several devices; package the model for one")
    given = dict(enumerate(op.args))
    if any(given.get(place) is not None for place in _OWN_PLACES) or op.kwargs:
        raise Unread("it divides ids by places of its own")
    lengths, ids = reader.of(op.args[0]), reader.of(op.args[1])
    if not isinstance(lengths, Structure) or not isinstance(ids, PerId):
        raise Unread("it does not divide ids by their lengths")
    if not all(
        torch.equal(a, b) for a, b in zip(reader.pair(op.args[1]), reader.pair(Ref(op.outputs[1] or 0)), strict=True)
    ):
        raise Unread("it changes ids")
    places: list[Known | None] = [None] * len(op.outputs)
    places[0], places[1] = lengths, ids
    for output, number in enumerate(op.outputs[2:], 2):
        if number is not None:
            counts = all(torch.equal(part, torch.arange(len(part))) for part in reader.pair(Ref(number)))
            # Where each id went: of one device, to where it was.
            stays = counts and output == _WENT and op.args[3]
            places[output] = Counted() if stays else Opaque(f"{op.name}: places of ids")
    return tuple(places)


@reads("fbgemm.bounds_check_indices")
def read_bounds_check(reader: Reader, op: Op) -> Any:
    """Ids inside their tables stay what they are; others are never let in. The lookup's tables must be those."""
    if isinstance(op.args[1], Ref):
        reader.checked[op.args[1].number] = fixed_array(reader.fixed(op.args[0])).tolist()
    return (None,) * len(op.outputs)


@reads("fbgemm.int_nbit_split_embedding_codegen_lookup_function")
def read_lookup(reader: Reader, op: Op) -> Known:
    """FBGEMM's lookup over quantized tables."""
    weights, uvm = (reader.fixed(argument) for argument in op.args[:2])
    dims = np.diff(fixed_array(reader.fixed(op.args[5]))).tolist()
    pooling, given_weights = op.args[14], op.args[15]
    data = weights if weights.numel() else uvm
    tables = tuple(reader.table_of(data, position) for position in range(len(dims)))
    if [table.dim for table in tables] != dims:
        raise Unread("its tables have other dims than it says")
    if (rows := reader.checked.get(getattr(op.args[12], "number", -1))) and rows != [table.rows for table in tables]:
        raise Unread("ids were held against other numbers of rows")
    told = [fixed_array(reader.fixed(argument)).tolist() for argument in op.args[3:5]]
    if told != [[table.start for table in tables], [table.kind for table in tables]]:
        raise Unread("its tables lie in other places than the module says")
    return _lookup(reader, op, op.args[12], op.args[13], given_weights, tables, pooling)


@reads("aten._embedding_bag", "aten._embedding_bag_forward_only")
def read_embedding_bag(reader: Reader, op: Op) -> Any:
    """torch's own lookup over a table of floats."""
    weight = reader.fixed(op.args[0])
    if weight.dtype == torch.float64:
        raise Unread("its table is of 64-bit floats")
    arguments = dict(zip(("scale", "mode", "sparse", "weights", "last", "padding"), op.args[3:], strict=False))
    if arguments.get("scale") or arguments.get("padding", -1) not in (-1, None):
        raise Unread("it scales gradients, or has a padding row")
    found = _table_of(weight)
    mode, last = arguments.get("mode", 0), bool(arguments.get("last", False))
    made = _lookup(reader, op, op.args[1], op.args[2], arguments.get("weights"), (found,), mode, last=last)
    return made, None, None, None


def vectors_of_ids(reader: Reader, op: Op, known: PerId, weight: torch.Tensor) -> Known:
    """A vector for each id out of a table of floats, as an EmbeddingCollection that is not quantized looks them up."""
    features = [_features_among(*each) for each in zip(known.positions, reader.groups[known.group], strict=True)]
    if features[0] != features[1]:
        raise Unread("which feature is looked up where follows from the rows")
    found, expression = _table_of(weight), _as_it_came(known.expression)
    tables = (found,) * len(features[0])
    step = Lookup(op.outputs[0] or 0, known.group, features[0], tables, "sum", expression)
    reader.lookups.append(step)
    if unknown := _without_step(op, expression):
        return Opaque(unknown)
    if known.positions[0].dim() != 1:
        raise Unread("its ids are laid out as more than a list")
    return _vectors(op, step, known)


def _table_of(weight: torch.Tensor) -> Table:
    array = fixed_array(weight)
    rows, dim = array.shape
    return Table("embedding", array.view(np.uint8).reshape(-1), 0, rows, dim, 0, dim * 4, 0)


def _as_it_came(expression: IdExpression) -> IdExpression:
    """What is done to ids, without a conversion that changes none: those below a table's rows stay what they are."""
    plain = expression.function == "to_int32" and expression.arguments[0].is_plain
    return expression.arguments[0] if plain else expression


def _without_step(op: Op, *parts: IdExpression | None) -> str:
    """Why what is done to ids cannot be in a program; empty where it can."""
    unknown = next((each for part in parts for each in functions_of(part) if each not in _STEPS), "")
    if unknown == "several":
        return f"{op.name}: its ids are computed of several features' ids"
    return (
        ""
        if not unknown
        else f"{op.name}: an id may be unset"
        if unknown == "unset"
        else f"fbgemm.{unknown}: no step for it"
    )


def _features_among(positions: torch.Tensor, lengths: NDArray[np.int64]) -> tuple[int, ...]:
    """The features that ids belong to. ``lengths``: (T, B)."""
    ends = np.cumsum(lengths.sum(axis=1))
    return tuple(np.unique(np.searchsorted(ends, positions.ravel().numpy(), side="right")).tolist())


def _lookup(
    reader: Reader,
    op: Op,
    ids: Any,
    offsets: Any,
    weights: Any,
    tables: tuple[Table, ...],
    pooling: Any,
    *,
    last: bool = True,
) -> Known:
    """``last``: whether the offsets end with the number of ids."""
    try:
        known = reader.of(ids)
        if not isinstance(known, PerId):
            raise Unread("its ids are not the request's")
    except Unread as problem:
        reader.unknown_ids = reader.unknown_ids or f"{op.name}: {problem}"
        raise
    try:
        bags = reader.of(offsets)
        if not isinstance(bags, Structure) or bags.group != known.group:
            raise Unread("its offsets are not the request's")
        features = _features(reader, known, offsets, len(tables), last=last)
    except Unread as problem:
        if not isinstance(reader.known.get(getattr(offsets, "number", -1)), Structure):
            reader.unknown_ids = reader.unknown_ids or f"{op.name}: {problem}"
        _bound(reader, op, known, tables)
        raise
    number = op.outputs[0]
    if number is None:
        raise Unread("it makes no tensor")
    expression = _as_it_came(known.expression)
    step = Lookup(number, known.group, features, tables, _POOLING.get(pooling, "sum"), expression)
    reader.lookups.append(step)
    # Weights lead to no row of a table: where they are not known, the ids are bounded all the same.
    if weights is not None:
        step = replace(step, weights=_weights_of(reader, known, weights))
    if unknown := _without_step(op, expression, step.weights):
        return Opaque(unknown)
    if pooling not in _POOLING:
        if op.name.startswith("aten."):
            return Opaque(f"{op.name}: pooling by the largest is not read")
        return _vectors(op, step, known)
    return reader.add(op, step, (sum(table.dim for table in tables),))


def _bound(reader: Reader, op: Op, ids: PerId, tables: tuple[Table, ...]) -> None:
    """Bounds ids whose bags are laid out anew, so that any of them may come to any of the tables. No program has such a
    lookup."""
    for feature in range(len(reader.groups[ids.group][0])):
        expression = _as_it_came(of_feature(ids.expression, feature))
        if expression != _UNSET:
            features = (feature,) * len(tables)
            reader.lookups.append(Lookup(op.outputs[0] or 0, ids.group, features, tables, "sum", expression))


def _vectors(op: Op, step: Lookup, ids: PerId) -> Known:
    if step.weights is not None or len(set(step.features)) < len(step.features):
        raise Unread("it looks a feature's ids up twice, or weighs what it does not pool")
    tables = dict(zip(step.features, step.tables, strict=True))
    return Vectors(step.group, tables, step.ids, ids.positions)


def _weights_of(reader: Reader, ids: PerId, weights: Any) -> IdExpression:
    given = reader.of(weights)
    if not isinstance(given, PerId) or not all(map(torch.equal, given.positions, ids.positions)):
        raise Unread("its weights are not the ids' own")
    return given.expression


_STEPS = frozenset({"ids", "weights", "by_feature", *ID_FUNCTIONS})


def functions_of(expression: Any) -> list[str]:
    """The names of all functions in an expression."""
    if not isinstance(expression, IdExpression):
        return []
    return [expression.function, *(name for part in expression.arguments for name in functions_of(part))]


def _features(reader: Reader, ids: PerId, offsets: Ref, count: int, *, last: bool) -> tuple[int, ...]:
    """The request's feature whose bags each of a lookup's features has. Raises Unread where one has no such."""
    bounds = reader.pair(offsets)
    if not last:
        ends = [each.new_tensor([len(places)]) for each, places in zip(bounds, ids.positions, strict=True)]
        bounds = torch.cat([bounds[0], ends[0]]), torch.cat([bounds[1], ends[1]])
    found = [
        matched(*recorded, count)
        for recorded in zip(ids.positions, bounds, reader.groups[ids.group], reader.rows, strict=True)
    ]
    if found[0] != found[1]:
        raise Unread("which feature is looked up where follows from the rows")
    return found[0]


def matched(
    positions: torch.Tensor, offsets: torch.Tensor, lengths: NDArray[np.int64], rows: int, count: int
) -> tuple[int, ...]:
    """The request's feature whose bags each of ``count`` features has, in one recording. Raises Unread where one has no
    such."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places, bounds = positions.numpy(), offsets.numpy()
    if len(bounds) != count * rows + 1:
        raise Unread(f"it has {len(bounds)} offsets for {count} features of {rows} rows")
    features = []
    for number in range(count):
        bags = [places[bounds[number * rows + row] : bounds[number * rows + row + 1]] for row in range(rows)]
        feature = next(
            (int(np.searchsorted(starts, bag[0], side="right") - 1) // rows for bag in bags if len(bag)), None
        )
        if feature is None:
            raise Unread("it looks up bags that hold nothing")
        for row, bag in enumerate(bags):
            own = feature * rows + row
            if not np.array_equal(bag, np.arange(starts[own], starts[own + 1])):
                raise Unread("its bags are not the request's bags")
        features.append(feature)
    return tuple(features)
