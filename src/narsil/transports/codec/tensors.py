"""Named tensors as a model's features: what the Open Inference Protocol's requests hold, whatever carries them.

Ids come in one of four forms, of which a request uses one:

    ids                                      (B, T): one id for each feature
    ids.values, ids.lengths[, ids.weights]   (N,), (B, T): bags, all features of row 0 first
    NAME, or NAME.values with NAME.lengths   (B,), (B, 1) or (B, k); (N,) with (B,): a tensor, or two, for each feature
    id_list_features.values and .lengths     (N,), (T * B,): as TorchRec's modules take them, key-major
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Features, Floats, Ints, Jagged, OneHot, RequestLimits, Scores
from narsil.errors import InvalidRequest
from narsil.transports import validate

__all__ = ["DTYPES", "Tensor", "features_of", "inputs_of", "outputs_of", "picked", "tensor_of"]

# Datatype -> how its numbers lie in memory. BF16 has no dtype of numpy's: it is the upper half of an FP32.
DTYPES: dict[str, np.dtype[Any]] = {
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
}
_FLOATS, _INTEGERS = ("FP32", "FP16", "BF16", "FP64"), ("INT64", "INT32")

VALUES, LENGTHS, WEIGHTS = ".values", ".lengths", ".weights"
_DENSE = ("dense", "float_features")
_TORCHREC = ("id_list_features", "id_score_list_features")
_MOST_SHOWN = 80  # characters of a name that a client gave

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: as many numbers as its shape says, in row-major order."""

    name: str
    datatype: str
    shape: Sizes
    values: NDArray[Any]  # flat, of the datatype's dtype


def tensor_of(name: str, datatype: str, shape: Sizes, values: NDArray[Any]) -> Tensor:
    """A tensor, once its numbers are as many as its shape says. Raises InvalidRequest."""
    count = 1
    for size in shape:
        if size < 0:
            raise InvalidRequest(f"{_cut(name)}: its shape {list(shape)[:8]} has a negative size")
        count *= size
    if count != len(values):
        raise InvalidRequest(f"{_cut(name)}: {len(values)} {datatype} are given for the shape {list(shape)[:8]}")
    return Tensor(name, datatype, shape, values)


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """How an input's numbers lie in memory. Raises InvalidRequest for a datatype that no input has."""
    if datatype not in DTYPES:
        raise InvalidRequest(
            f"{_cut(name)} has the datatype {_cut(datatype)!r}; ids and lengths are {' or '.join(_INTEGERS)}, "
            f"and other inputs {', '.join(_FLOATS)}"
        )
    return DTYPES[datatype]


def inputs_of(schema: ModelSchema) -> list[tuple[str, str, Sizes]]:
    """(name, datatype, shape) of the tensors that a model takes; -1 in a shape is as many as there are rows, or ids.

    Of the forms of ids, the one that can hold every request.
    """
    dense: list[tuple[str, str, Sizes]] = [("dense", "FP32", (-1, schema.dense_dim))] if schema.dense_dim else []
    if not schema.num_features:
        return dense
    if not schema.weighted:
        return [*dense, ("ids", "INT64", (-1, schema.num_features))]
    bags: list[tuple[str, str, Sizes]] = [
        ("ids" + VALUES, "INT64", (-1,)),
        ("ids" + LENGTHS, "INT32", (-1, schema.num_features)),
    ]
    return [*dense, *bags, ("ids" + WEIGHTS, "FP32", (-1,))]


def outputs_of(schema: ModelSchema) -> list[tuple[str, str, Sizes]]:
    """(name, datatype, shape) of what it gives."""
    return [(task, "FP32", (-1,) if width == 1 else (-1, width)) for task, width in schema.outputs.items()]


def picked(scores: Scores, names: Sequence[str]) -> Scores:
    """The outputs that a request asks for, in its order; all where it names none."""
    return {name: scores[name] for name in names} if names else scores


def check_names(names: Sequence[str], schema: ModelSchema) -> None:
    """Raises InvalidRequest where an output is asked for that the model has not, or twice."""
    for name in names:
        if name not in schema.outputs:
            raise InvalidRequest(f"output {_cut(name)!r} is asked for; the model has {', '.join(schema.tasks)[:400]}")
    if len(set(names)) != len(names):
        raise InvalidRequest("an output is asked for twice; name each once, or none for all")


def features_of(tensors: Sequence[Tensor], schema: ModelSchema, limits: RequestLimits) -> Features:
    """The rows in a request's tensors, held against the schema. Raises InvalidRequest."""
    given = {tensor.name: tensor for tensor in tensors}
    if len(given) < len(tensors):
        raise InvalidRequest("two inputs have one name")
    dense = next((given.pop(name) for name in _DENSE if schema.dense_dim and name in given), None)
    if schema.dense_dim and dense is None:
        raise InvalidRequest(f"the input dense is missing; {_wanted(schema)}")
    read = _form(given, schema)
    rows = dense.shape[0] if dense is not None and dense.shape else _rows(given, schema)
    validate.batch_size(rows, limits, "the first dimension of the inputs")
    columns = _dense(dense, rows, schema)
    sparse = read(given, rows, schema, limits)
    if given:
        raise InvalidRequest(
            f"the model takes no input {_cut(next(iter(given)))!r} beside the others; {_wanted(schema)}"
        )
    return Features(rows, columns, sparse)


_Given = dict[str, Tensor]
_Read = Callable[[_Given, int, ModelSchema, RequestLimits], OneHot | Jagged]


def _form(given: _Given, schema: ModelSchema) -> _Read:
    """What reads the ids, by the names that are there."""
    if not schema.num_features:
        return _no_ids
    by_feature = schema.index.keys() <= {name.removesuffix(VALUES) for name in given}
    if by_feature:
        return _ids_of_features
    if "ids" in given:
        return _one_id_each
    if "ids" + VALUES in given or "ids" + LENGTHS in given:
        return _bags
    if any(group + VALUES in given for group in _TORCHREC):
        return _key_major_bags
    missing = next(f.name for f in schema.features if f.name not in given and f.name + VALUES not in given)
    if len(given) and any(name.partition(".")[0] in schema.index or name in schema.index for name in given):
        raise InvalidRequest(f"the input {missing} is missing: every feature needs a tensor; {_wanted(schema)}")
    raise InvalidRequest(f"the request holds no ids; {_wanted(schema)}")


def _rows(given: _Given, schema: ModelSchema) -> int:
    """B of a request without dense columns."""
    first = schema.features[0].name if schema.features else ""
    for name in ("ids", "ids" + LENGTHS, first + LENGTHS, first):
        if name in given and given[name].shape:
            return given[name].shape[0]
    for group in _TORCHREC:
        if group + LENGTHS in given:
            return len(given[group + LENGTHS].values) // max(1, schema.num_features)
    raise InvalidRequest(f"the request does not say how many rows it has; {_wanted(schema)}")


def _dense(tensor: Tensor | None, rows: int, schema: ModelSchema) -> Floats:
    if tensor is None:
        return np.empty((rows, 0), np.float32)
    if tensor.shape != (rows, schema.dense_dim):
        raise InvalidRequest(
            f"{tensor.name} is {list(tensor.shape)[:8]}; the model takes [B, {schema.dense_dim}]: B rows of "
            f"{schema.dense_dim} columns"
        )
    return validate.dense(_as_float32(tensor), rows, schema.takes_nan, tensor.name)


def _no_ids(given: _Given, rows: int, schema: ModelSchema, limits: RequestLimits) -> OneHot:
    return OneHot(np.empty((0, rows), np.int32))


def _one_id_each(given: _Given, rows: int, schema: ModelSchema, limits: RequestLimits) -> OneHot:
    tensor = given.pop("ids")
    ids = _integers(tensor)
    _expect_shape(tensor, (rows, schema.num_features), "[B, T]: an id for each of B rows and T features")
    validate.id_count(len(ids), limits)
    return validate.one_hot(ids.reshape(rows, schema.num_features).T, schema)


def _bags(given: _Given, rows: int, schema: ModelSchema, limits: RequestLimits) -> OneHot | Jagged:
    values, lengths, weights = _bag_tensors(given, "ids")
    _expect_shape(lengths, (rows, schema.num_features), "[B, T]: a length for each of B rows and T features")
    validate.id_count(len(values.values), limits)
    counts = _lengths(lengths, (rows, schema.num_features), schema, key_major=False)
    ids, weighs = _integers(values), None if weights is None else _as_float32(weights)
    return validate.jagged(ids, counts, schema, "ids", key_major=False, weights=weighs)


def _key_major_bags(given: _Given, rows: int, schema: ModelSchema, limits: RequestLimits) -> OneHot | Jagged:
    group = next(group for group in _TORCHREC if group + VALUES in given)
    values, lengths, weights = _bag_tensors(given, group)
    if lengths.shape not in ((schema.num_features * rows,), (schema.num_features, rows)):
        raise InvalidRequest(
            f"{lengths.name} is {list(lengths.shape)[:8]}; the model takes [T * B], key-major: a length for each of "
            f"{schema.num_features} features and {rows} rows"
        )
    validate.id_count(len(values.values), limits)
    counts = _lengths(lengths, (schema.num_features, rows), schema, key_major=True)
    ids, weighs = _integers(values), None if weights is None else _as_float32(weights)
    return validate.jagged(ids, counts, schema, group, key_major=True, weights=weighs)


def _ids_of_features(given: _Given, rows: int, schema: ModelSchema, limits: RequestLimits) -> OneHot | Jagged:
    """A tensor for each feature; where all hold one id for each row, one array of them."""
    bags = rows * schema.num_features
    if 4 * bags > limits.max_bytes:  # of shapes [B, 0] a few bytes would ask for any number
        raise InvalidRequest(
            f"{rows} rows of {schema.num_features} features have {bags} bags; in {limits.max_bytes} bytes "
            f"(--max-message-bytes) there is room for the lengths of {limits.max_bytes // 4}. {limits.advice}"
        )
    parts = [_bags_of(given, feature.name, rows) for feature in schema.features]
    for feature, (ids, _, weighs) in zip(schema.features, parts, strict=True):
        # Held against all ids together, one's weights could weigh another's.
        if weighs is not None:
            validate.check_weights(weighs, len(ids), schema, feature.name)
    validate.id_count(sum(len(values) for values, _, _ in parts), limits)
    values = np.concatenate([values for values, _, _ in parts])
    lengths = np.stack([lengths for _, lengths, _ in parts])
    weights = None
    if any(weighs is not None for _, _, weighs in parts):
        weights = np.concatenate([np.ones(len(ids), np.float32) if w is None else w for ids, _, w in parts])
    return validate.jagged(values, lengths, schema, "ids", key_major=True, weights=weights)


def _bags_of(given: _Given, name: str, rows: int) -> tuple[Ints, NDArray[np.int32], Floats | None]:
    """One feature's ids, (B,) lengths, and weights."""
    tensor = given.pop(name, None)
    if tensor is None:
        values, lengths, weights = _bag_tensors(given, name)
        _expect_shape(lengths, (rows,), "[B]: a length for each row")
        ids, counts = _integers(values), _integers(lengths)
        if len(counts) and (int(counts.min()) < 0 or int(counts.max()) > len(ids)):
            raise InvalidRequest(f"{lengths.name}: a length is negative, or above the {len(ids)} ids of {values.name}")
        if int(counts.sum(dtype=np.int64)) != len(ids):
            raise InvalidRequest(
                f"{lengths.name} add up to {int(counts.sum(dtype=np.int64))} and {values.name} holds {len(ids)} ids"
            )
        weighs = None if weights is None else _as_float32(weights)
        return ids, counts.astype(np.int32), weighs
    if len(tensor.shape) not in (1, 2) or tensor.shape[0] != rows:
        raise InvalidRequest(
            f"{_cut(name)} is {list(tensor.shape)[:8]}; the model takes [B] or [B, k] for {rows} rows: k ids for each"
        )
    ids = _integers(tensor)
    each = tensor.shape[1] if len(tensor.shape) == 2 else 1
    weights = given.pop(name + WEIGHTS, None)
    return ids, np.full(rows, each, np.int32), None if weights is None else _as_float32(weights)


def _bag_tensors(given: _Given, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """NAME.values, NAME.lengths, and NAME.weights where it is there."""
    values, lengths = given.pop(name + VALUES, None), given.pop(name + LENGTHS, None)
    if values is None or lengths is None:
        here, other = (LENGTHS, VALUES) if values is None else (VALUES, LENGTHS)
        raise InvalidRequest(f"{_cut(name)}{here} needs {_cut(name)}{other} beside it")
    return values, lengths, given.pop(name + WEIGHTS, None)


def _lengths(tensor: Tensor, shape: Sizes, schema: ModelSchema, *, key_major: bool) -> NDArray[np.int32]:
    counts = _integers(tensor).reshape(shape)
    if counts.dtype.itemsize == 4:
        return counts.astype(np.int32, copy=False)
    narrow = validate.narrow_lengths(counts if key_major else counts.T, schema, tensor.name)
    return narrow if key_major else np.ascontiguousarray(narrow.T)


def _integers(tensor: Tensor) -> Ints:
    if tensor.datatype not in _INTEGERS:
        raise InvalidRequest(f"{_cut(tensor.name)} has the datatype {tensor.datatype}; send {' or '.join(_INTEGERS)}")
    return tensor.values


def _as_float32(tensor: Tensor) -> Floats:
    """The numbers as FP32. One that is too large for it becomes infinite, and is refused as such."""
    if tensor.datatype == "FP32":
        return tensor.values
    if tensor.datatype == "BF16":
        return (tensor.values.astype(np.uint32) << 16).view(np.float32)
    if tensor.datatype not in _FLOATS:
        raise InvalidRequest(f"{_cut(tensor.name)} has the datatype {tensor.datatype}; send {', '.join(_FLOATS)}")
    with np.errstate(over="ignore"):
        return tensor.values.astype(np.float32)


def _expect_shape(tensor: Tensor, shape: Sizes, meaning: str) -> None:
    if tensor.shape != shape:
        raise InvalidRequest(
            f"{_cut(tensor.name)} is {list(tensor.shape)[:8]}; with {shape[0]} rows the model takes {list(shape)}, "
            f"{meaning}"
        )


def _wanted(schema: ModelSchema) -> str:
    """The inputs that a model takes, for an error."""
    listed = [f"{name} {datatype} {list(shape)}" for name, datatype, shape in inputs_of(schema)]
    others = " (or ids.values with ids.lengths, or a tensor for each feature)" if schema.num_features else ""
    return f"the model takes {' and '.join(listed)}{others}"


def _cut(name: str) -> str:
    return name[:_MOST_SHOWN]
