"""Holds a request's tensors against the model's schema, before the queue and whatever the wire.

Receives raw bytes and counts as a codec found them, produces Features whose every id is inside its table and whose
every bag lies inside the values. A forward reads memory by these numbers without checking them again, so
nothing passes that has not been checked here. Each refusal names the feature, the row and the limit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Floats, Ints, Jagged, OneHot
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest

FLOAT32 = np.dtype("<f4")
INT32 = np.dtype("<i4")
INT64 = np.dtype("<i8")


def batch_size(rows: int, limits: RequestLimits, name: str = "batch_size") -> int:
    """B itself, once it is a number of rows that a request may have."""
    if not 0 < rows <= limits.max_rows:
        raise InvalidRequest(f"{name} is {rows}; it must be 1 to {limits.max_rows} rows (--max-request-rows)")
    return rows


def id_count(ids: int, limits: RequestLimits) -> None:
    """Refuses a request with more ids than the limit."""
    if ids > limits.max_ids:
        raise InvalidRequest(
            f"the request holds {ids} ids in all; the limit is {limits.max_ids} (--max-request-ids). {limits.advice}"
        )


def array(data: bytes, start: int, stop: int, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """data[start:stop] as a read-only array, without a copy. Raises InvalidRequest where bytes are left over."""
    size = stop - start
    if size % dtype.itemsize:
        raise InvalidRequest(f"{name}: {size} bytes are no whole number of {dtype.name} ({dtype.itemsize} bytes each)")
    return np.frombuffer(data, dtype, size // dtype.itemsize, start)


def dense(values: Floats, rows: int, takes_nan: NDArray[np.bool_], name: str) -> Floats:
    """(B, D) float32 from a flat array; ``takes_nan``: (D,) whether NaN is a value of each column. Raises
    InvalidRequest on a wrong count, infinity, or NaN in another column."""
    width = len(takes_nan)
    if len(values) != rows * width:
        raise InvalidRequest(
            f"{name}: {values.nbytes} bytes for {rows} rows; the model takes {width} float32 a row, "
            f"{rows * width * 4} bytes"
        )
    matrix = values.reshape(rows, width)
    if not np.isfinite(values).all():
        outside = ~np.isfinite(matrix) & ~(np.isnan(matrix) & takes_nan)
        if outside.any():
            row, column = (int(place) for place in np.argwhere(outside)[0])
            raise _value_error(matrix[row, column], row, column, takes_nan, name)
    return matrix


def one_hot(ids: Ints, schema: ModelSchema) -> OneHot:
    """Sparse features with exactly one id a bag, from a (T, B) array of any strides; every id inside its table."""
    if ids.size and (ids.min() < schema.max_least or ids.max() >= schema.min_rows):
        outside = (ids < schema.least[:, None]) | (ids >= schema.rows[:, None])
        if outside.any():
            feature, row = np.argwhere(outside)[0]
            raise _id_error(schema, int(feature), int(row), int(ids[feature, row]))
    return OneHot(ids)


def jagged(
    values: Ints,
    lengths: NDArray[np.int32],
    schema: ModelSchema,
    name: str,
    *,
    key_major: bool,
    weights: Floats | None = None,
) -> OneHot | Jagged:
    """Sparse features with bags of any length.

    ``lengths`` is (T, B) when ``key_major``, else (B, T), and values stand in the same order. Every bag ends
    up inside ``values``, and every id inside its table. Comes back as OneHot where every length is 1.
    """
    if weights is None and len(values) == lengths.size and bool((lengths == 1).all()):
        ids = values.reshape(lengths.shape)
        return one_hot(ids if key_major else ids.T, schema)
    ends = check_bags(values, lengths, np.arange(schema.num_features), schema, name, key_major=key_major)
    check_weights(weights, len(values), schema, name)  # after the ids that they are for
    if weights is not None:
        _check_unweighted(weights, lengths if key_major else lengths.T, ends if key_major else ends.T, schema, name)
    starts = ends - lengths
    return Jagged(values, starts, lengths, weights) if key_major else Jagged(values, starts.T, lengths.T, weights)


def narrow_lengths(lengths: NDArray[np.int64], schema: ModelSchema, name: str) -> NDArray[np.int32]:
    """(T, B) lengths as int32. Raises InvalidRequest where one is none: narrowed, it would be another number."""
    outside = (lengths < 0) | (lengths > np.iinfo(np.int32).max)
    if outside.any():
        feature, row = (int(i) for i in np.argwhere(outside)[0])
        raise _length_error(schema, name, feature, row, int(lengths[feature, row]))
    return lengths.astype(np.int32)


def check_lengths(lengths: NDArray[np.int32], positions: NDArray[np.int64], schema: ModelSchema, name: str) -> None:
    """Raises InvalidRequest where one of (features, rows) is negative. ``positions``: the features' in the schema."""
    if lengths.size and int(lengths.min()) < 0:
        feature, row = (int(i) for i in np.argwhere(lengths < 0)[0])
        raise _length_error(schema, name, int(positions[feature]), row, int(lengths[feature, row]))


def check_bags(
    values: Ints,
    lengths: NDArray[np.int32],
    positions: NDArray[np.int64],
    schema: ModelSchema,
    name: str,
    *,
    key_major: bool,
) -> NDArray[np.int64]:
    """Where each bag ends in ``values``, once all bags are known to fit it and all ids their tables.

    ``lengths`` is (features, rows) when ``key_major``, else (rows, features); ``positions`` are the schema positions
    of the features along that axis. Raises InvalidRequest.
    """

    def where(first: int, second: int) -> tuple[int, int]:
        feature, row = (first, second) if key_major else (second, first)
        return int(positions[feature]), row

    check_lengths(lengths if key_major else lengths.T, positions, schema, name)
    if schema.singles.any():
        _check_single(lengths if key_major else lengths.T, positions, schema, name)
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if total != len(values):
        raise InvalidRequest(
            f"{name}: lengths add up to {total} ids and values holds {len(values)} {values.dtype.name}"
        )
    if total and (values.min() < schema.max_least or values.max() >= schema.min_rows):
        least, limits = (
            np.repeat(np.broadcast_to(each[:, None] if key_major else each, lengths.shape).ravel(), lengths.ravel())
            for each in (schema.least[positions], schema.rows[positions])
        )
        outside = (values < least) | (values >= limits)
        if outside.any():
            at = int(np.argmax(outside))
            bag = int(np.searchsorted(ends, at, side="right"))
            raise _id_error(schema, *where(*divmod(bag, lengths.shape[1])), int(values[at]))
    return ends.reshape(lengths.shape)


def _check_single(lengths: NDArray[np.int32], positions: NDArray[np.int64], schema: ModelSchema, name: str) -> None:
    """(features, rows) lengths. Raises InvalidRequest where a feature that takes one id a row has none, or several."""
    wrong = (lengths != 1) & schema.singles[positions][:, None]
    if wrong.any():
        feature, row = (int(i) for i in np.argwhere(wrong)[0])
        raise InvalidRequest(
            f"{name}: feature {schema.features[int(positions[feature])].name}, row {row}: {lengths[feature, row]} ids, "
            "where the model takes exactly one"
        )


def check_weights(weights: Floats | None, count: int, schema: ModelSchema, name: str) -> None:
    """Weights are either absent or finite, one per id, for a model whose bags take them."""
    if weights is None:
        return
    if not schema.weighted:
        raise InvalidRequest(
            f"{name}: {len(weights)} weights given, but no table of this model takes weights; send ids alone"
        )
    if len(weights) != count:
        raise InvalidRequest(f"{name}: {len(weights)} weights for {count} ids; there must be one per id")
    if not np.isfinite(weights).all():
        position = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise InvalidRequest(f"{name}: weight {position} is {weights[position]}; weights must be finite")


def _check_unweighted(
    weights: Floats, lengths: NDArray[np.int32], ends: NDArray[np.int64], schema: ModelSchema, name: str
) -> None:
    """Raises InvalidRequest where an id of a feature that takes no weights has one other than 1: it would be lost."""
    for position, feature in enumerate(schema.features):
        if feature.weighted:
            continue
        counts, stops = lengths[position], ends[position]
        rows = np.repeat(np.arange(len(counts)), counts)
        offsets = np.repeat(stops - np.cumsum(counts, dtype=np.int64), counts)
        found = weights[offsets + np.arange(len(rows))]
        if (wrong := found != 1).any():
            at = int(np.argmax(wrong))
            raise InvalidRequest(
                f"{name}: feature {feature.name}, row {rows[at]}: weight {found[at]}, but the feature takes no "
                "weights; send 1"
            )


def _value_error(value: np.float32, row: int, column: int, takes_nan: NDArray[np.bool_], name: str) -> InvalidRequest:
    allowed = "values must be finite"
    if np.isnan(value) and takes_nan.any():
        columns = np.flatnonzero(takes_nan)
        told = ", ".join(map(str, columns[:6])) + (f" .. {columns[-1]}" if len(columns) > 6 else "")
        allowed += f", and NaN is taken in columns {told} alone"
    elif np.isnan(value):
        allowed += ": --allow-nan serves a model that takes NaN for a missing value"
    return InvalidRequest(f"{name}: row {row}, column {column} is {value}; {allowed}")


def _length_error(schema: ModelSchema, name: str, position: int, row: int, found: int) -> InvalidRequest:
    wrong = "is negative" if found < 0 else "is no int32"
    return InvalidRequest(f"{name}: feature {schema.features[position].name}, row {row}: length {found} {wrong}")


def _id_error(schema: ModelSchema, position: int, row: int, found: int) -> InvalidRequest:
    feature = schema.features[position]
    return InvalidRequest(
        f"feature {feature.name}, row {row}: id {found} is outside its table {feature.table}; "
        f"ids are {feature.least} to {feature.rows - 1}"
    )
