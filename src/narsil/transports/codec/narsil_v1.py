"""Narsil's own wire: ``narsil.v1.Inference/Predict`` of proto/narsil.proto. Sample-major, int32 or int64 ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Features, Jagged, OneHot, Scores, StageTimes
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports import validate
from narsil.wire import (
    GET_MODEL,
    LEN,
    PREDICT,
    VARINT,
    Field,
    expect,
    packed_uints,
    put_len,
    put_text,
    put_uint,
    put_varint,
    scan,
    text,
)

METHOD, METHOD_GET_MODEL = PREDICT, GET_MODEL

_MAX_SPANS = 16  # protobuf merges a message that comes in parts; no client sends many

_UNSIGNED = 2**64 - 1  # an int64's varint is that of its bits

_ID_TYPES: dict[int, np.dtype[Any]] = {0: validate.INT32, 1: validate.INT64}


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """A serialized PredictRequest taken apart as far as that needs no model: whom it asks, where its tensors lie."""

    body: bytes
    model_name: str
    model_version: str
    request_id: str
    rows: int  # B, as claimed
    dense: tuple[int, int]
    sparse: tuple[tuple[int, int], ...]  # parts of one message, as context is
    context: tuple[tuple[int, int], ...]

    def features(self, schema: ModelSchema, limits: RequestLimits) -> Features:
        """The rows, held against the schema: views of the body. Raises InvalidRequest."""
        rows, body = validate.batch_size(self.rows, limits), self.body
        values = validate.array(body, *self.dense, validate.FLOAT32, "dense")
        sparse = _read_sparse(body, self.sparse)
        validate.id_count(len(sparse.values), limits)
        if self.context:
            return _with_context(rows, values, sparse, _read_context(body, self.context, schema), schema, limits)
        return Features(rows, validate.dense(values, rows, schema.takes_nan, "dense"), _sparse(rows, sparse, schema))


@dataclass(slots=True)
class _Sparse:
    """Either a SparseFeatures or the sparse half of a Context, as found on the wire."""

    num_features: int | None = None
    names: list[str] = field(default_factory=list)
    dtype: np.dtype[Any] = validate.INT32
    values: NDArray[Any] = field(default_factory=lambda: np.empty(0, validate.INT32))
    lengths: NDArray[np.int32] | None = None
    weights: NDArray[np.float32] | None = None


@dataclass(slots=True)
class _Context:
    columns: list[int] = field(default_factory=list)
    dense: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, validate.FLOAT32))
    sparse: _Sparse = field(default_factory=_Sparse)


def read(body: bytes) -> PredictRequest:
    """A serialized PredictRequest, not yet held against any schema. Raises InvalidRequest where it is none."""
    strings = {1: "", 2: "", 3: ""}
    rows = 0
    dense = _NO_BYTES
    spans: dict[int, list[tuple[int, int]]] = {6: [], 7: []}
    for found in scan(body, 0, len(body)):
        number, _, start, stop = found
        if number in strings:
            name = ("model_name", "model_version", "request_id")[number - 1]
            expect(found, LEN, name)
            strings[number] = text(body, start, stop, name)
        elif number == 4:
            expect(found, VARINT, "batch_size")
            rows = start & 0xFFFFFFFF
        elif number == 5:
            expect(found, LEN, "dense")
            dense = (start, stop)
        elif number in spans:
            expect(found, LEN, "sparse" if number == 6 else "context")
            spans[number].append((start, stop))
    if max(map(len, spans.values())) > _MAX_SPANS:
        raise InvalidRequest(f"sparse or context is given in more than {_MAX_SPANS} parts; send it once")
    return PredictRequest(body, strings[1], strings[2], strings[3], rows, dense, tuple(spans[6]), tuple(spans[7]))


def decode(body: bytes, schema: ModelSchema, limits: RequestLimits) -> Features:
    """A serialized PredictRequest's rows, whomever it asks. Raises InvalidRequest."""
    return read(body).features(schema, limits)


def encode(request_id: str, name: str, version: str, scores: Scores, times: StageTimes) -> bytes:
    """A serialized PredictResponse."""
    out = put_len(1, name.encode()) + put_len(2, version.encode()) + put_text(3, request_id)
    for task, values in scores.items():
        width = put_uint(3, values.shape[1]) if values.ndim == 2 else b""
        out += put_len(4, put_len(1, task.encode()) + put_len(2, values.astype("<f4", copy=False).tobytes()) + width)
    provenance = (
        put_uint(1, times.batch_requests)
        + put_uint(2, times.batch_rows)
        + put_uint(3, int(times.queue * 1e6))
        + put_uint(4, int(times.execute * 1e6))
    )
    return out + put_len(5, provenance)


def decode_get_model(body: bytes) -> str:
    """The model name in a serialized GetModelRequest. Raises InvalidRequest."""
    name = ""
    for found in scan(body, 0, len(body)):
        if found[0] == 1:
            expect(found, LEN, "model_name")
            name = text(body, found[2], found[3], "model_name")
    return name


def encode_model(
    name: str, version: str, backend: str, schema: ModelSchema, limits: RequestLimits, *, whole: bool = False
) -> bytes:
    """A serialized Model: the answer to GetModel."""
    out = put_len(1, name.encode()) + put_len(2, version.encode()) + put_len(3, backend.encode())
    out += put_uint(4, schema.dense_dim)
    for feature in schema.features:
        out += put_len(
            5,
            put_len(1, feature.name.encode())
            + put_len(2, feature.table.encode())
            + put_uint(3, feature.rows)
            + put_uint(4, feature.dim)
            + put_len(5, feature.pooling.encode())
            + put_uint(6, int(feature.weighted))
            + put_text(7, feature.group)
            + put_uint(8, feature.least & _UNSIGNED)
            + put_uint(9, int(feature.single)),
        )
    for task in schema.tasks:
        out += put_len(6, task.encode())
    out += put_uint(7, limits.max_rows) + put_uint(8, limits.max_ids) + put_uint(9, limits.max_bytes)
    if set(schema.widths) != {1}:
        out += put_len(10, b"".join(map(put_varint, schema.widths)))
    out += put_uint(11, int(whole))
    for key, width in schema.matrices:
        out += put_len(12, put_len(1, key.encode()) + put_uint(2, width))
    if schema.nan_columns:
        out += put_len(13, b"".join(map(put_varint, schema.nan_columns)))
    return out


_NO_BYTES = (0, 0)


def _read_sparse(body: bytes, spans: Sequence[tuple[int, int]]) -> _Sparse:
    """A SparseFeatures message; several spans are merged, as protobuf has it."""
    fields = [found for span in spans for found in scan(body, *span)]
    out = _Sparse()
    for found in fields:
        if found[0] == 1:
            expect(found, VARINT, "sparse.num_features")
            out.num_features = found[2] & 0xFFFFFFFF
    _read_tensors(body, [f for f in fields if f[0] != 1], 2, "sparse", out)
    return out


def _read_context(body: bytes, spans: Sequence[tuple[int, int]], schema: ModelSchema) -> _Context:
    fields = [found for span in spans for found in scan(body, *span)]
    out = _Context()
    for found in fields:
        if found[0] == 1:
            if found[1] == LEN and found[3] - found[2] > 10 * schema.dense_dim:  # a varint has at most ten bytes
                raise InvalidRequest(f"context.dense_columns holds more than the model's {schema.dense_dim} columns")
            out.columns += packed_uints(body, found, "context.dense_columns")
        elif found[0] == 2:
            expect(found, LEN, "context.dense")
            out.dense = validate.array(body, found[2], found[3], validate.FLOAT32, "context.dense")
    _read_tensors(body, [f for f in fields if f[0] > 2], 3, "context", out.sparse)
    return out


def _read_tensors(body: bytes, fields: Sequence[Field], base: int, name: str, out: _Sparse) -> None:
    """The five fields that SparseFeatures and Context share, numbered from ``base``: names, type, values, ..."""
    spans: dict[int, tuple[int, int]] = {}
    for found in fields:
        number = found[0] - base
        if number == 0:
            expect(found, LEN, f"{name}.feature_names")
            out.names.append(text(body, found[2], found[3], f"{name}.feature_names"))
        elif number == 1:
            expect(found, VARINT, f"{name}.id_type")
            if found[2] not in _ID_TYPES:
                raise InvalidRequest(f"{name}.id_type is {found[2]}; it must be INT32 (0) or INT64 (1)")
            out.dtype = _ID_TYPES[found[2]]
        elif number in (2, 3, 4):
            expect(found, LEN, f"{name} field {found[0]}")
            spans[number] = (found[2], found[3])
    out.values = validate.array(body, *spans.get(2, _NO_BYTES), out.dtype, f"{name}.values")
    if 3 in spans:
        out.lengths = validate.array(body, *spans[3], validate.INT32, f"{name}.lengths")
    if 4 in spans:
        out.weights = validate.array(body, *spans[4], validate.FLOAT32, f"{name}.weights")


def _sparse(rows: int, sparse: _Sparse, schema: ModelSchema) -> OneHot | Jagged:
    """Sparse features without a context: T columns in the schema's order, or in the order that names give."""
    order = _columns(sparse, range(schema.num_features), schema)
    if order is None and sparse.lengths is None and sparse.weights is None:
        return validate.one_hot(_ids(rows, sparse, schema.num_features, "sparse").T, schema)
    values, lengths = sparse.values, _lengths(rows, sparse, schema.num_features, "sparse")
    weights = sparse.weights
    if order is not None:
        validate.check_weights(weights, len(values), schema, "sparse")  # while they stand where the client put them
        values, lengths, weights = _reorder(values, lengths, weights, order)
    return validate.jagged(values, lengths, schema, "sparse", key_major=False, weights=weights)


def _ids(rows: int, sparse: _Sparse, columns: int, name: str) -> NDArray[Any]:
    """(B, columns) ids of a payload without lengths."""
    if len(sparse.values) != rows * columns:
        raise InvalidRequest(
            f"{name}.values: {sparse.values.nbytes} bytes for {rows} rows x {columns} features; without lengths each "
            f"bag holds one {sparse.dtype.name}, {rows * columns * sparse.dtype.itemsize} bytes in all"
        )
    return sparse.values.reshape(rows, columns)


def _lengths(rows: int, sparse: _Sparse, columns: int, name: str) -> NDArray[np.int32]:
    """(B, columns) lengths, given or implied."""
    if sparse.lengths is None:
        _ids(rows, sparse, columns, name)
        return np.ones((rows, columns), dtype=np.int32)
    if len(sparse.lengths) != rows * columns:
        raise InvalidRequest(
            f"{name}.lengths: {sparse.lengths.nbytes} bytes for {rows} rows x {columns} features; "
            f"expected {rows * columns * 4} bytes of int32, sample-major"
        )
    return sparse.lengths.reshape(rows, columns)


def _columns(sparse: _Sparse, allowed: Sequence[int], schema: ModelSchema) -> NDArray[np.int64] | None:
    """Where each of the ``allowed`` schema positions stands in the payload; None when it is in that order already."""
    positions = _positions(sparse.names, "sparse", schema)
    if positions:
        missing = [schema.features[p].name for p in sorted(set(allowed) - set(positions))]
        extra = [schema.features[p].name for p in sorted(set(positions) - set(allowed))]
        if missing:
            raise InvalidRequest(f"sparse.feature_names lacks {_some(missing)}")
        if extra:
            raise InvalidRequest(f"sparse.feature_names gives {_some(extra)}, which the context gives already")
    count = len(positions) if sparse.num_features is None else sparse.num_features
    if count != len(allowed):
        names = _some([schema.features[p].name for p in allowed])
        raise InvalidRequest(f"sparse.num_features is {count}; the model takes {len(allowed)} here ({names})")
    if not positions or positions == list(allowed):
        return None
    place = {position: column for column, position in enumerate(positions)}
    return np.array([place[position] for position in allowed], dtype=np.int64)


def _some(names: Sequence[str]) -> str:
    """At most six names, for an error text."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])} .. {names[-1]}"


def _positions(names: Sequence[str], name: str, schema: ModelSchema) -> list[int]:
    positions: dict[int, None] = {}  # in order, and quick to ask
    for feature in names:
        position = schema.index.get(feature)
        if position is None:
            raise InvalidRequest(f"{name}.feature_names: the model has no feature {feature[:80]!r}")
        if position in positions:
            raise InvalidRequest(f"{name}.feature_names: feature {feature} is given twice")
        positions[position] = None
    return list(positions)


def _reorder(
    values: NDArray[Any],
    lengths: NDArray[np.int32],
    weights: NDArray[np.float32] | None,
    order: NDArray[np.int64],
) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.float32] | None]:
    """Columns of a sample-major payload in another order; weights are one per id. Lengths are checked first, since they
    index values."""
    moved = np.ascontiguousarray(lengths[:, order])
    if int(lengths.min(initial=0)) < 0 or int(lengths.sum(dtype=np.int64)) != len(values):
        return values, moved, weights  # whoever checks the bags refuses them, by feature and row
    ends = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape)
    starts = (ends - lengths)[:, order].ravel()
    begins = np.cumsum(moved, dtype=np.int64) - moved.ravel()
    source = np.repeat(starts - begins, moved.ravel()) + np.arange(len(values))
    return values[source], moved, None if weights is None else weights[source]


def _with_context(
    rows: int,
    dense: NDArray[np.float32],
    sparse: _Sparse,
    context: _Context,
    schema: ModelSchema,
    limits: RequestLimits,
) -> Features:
    """Rows whose shared features come once: written out for every row, then validated like any others."""
    columns = context.columns
    if any(b <= a for a, b in itertools.pairwise(columns)) or any(c >= schema.dense_dim for c in columns):
        raise InvalidRequest(f"context.dense_columns must ascend and be below {schema.dense_dim}")
    if len(context.dense) != len(columns):
        raise InvalidRequest(
            f"context.dense: {context.dense.nbytes} bytes for {len(columns)} columns; expected {4 * len(columns)}"
        )
    validate.id_count(rows * (schema.dense_dim + schema.num_features), limits)
    given = set(columns)
    own = [column for column in range(schema.dense_dim) if column not in given]
    matrix = np.empty((rows, schema.dense_dim), dtype=np.float32)
    if len(dense) != rows * len(own):
        raise InvalidRequest(
            f"dense: {dense.nbytes} bytes for {rows} rows x {len(own)} columns beside the context's; "
            f"expected {rows * len(own) * 4} bytes"
        )
    matrix[:, own] = dense.reshape(rows, len(own))
    matrix[:, columns] = context.dense
    return Features(
        rows,
        validate.dense(matrix.ravel(), rows, schema.takes_nan, "dense"),
        _expand_sparse(rows, sparse, context.sparse, schema, limits),
    )


def _expand_sparse(
    rows: int, sparse: _Sparse, shared: _Sparse, schema: ModelSchema, limits: RequestLimits
) -> OneHot | Jagged:
    _refuse_weights(sparse, shared)
    validate.id_count(rows * len(shared.values) + len(sparse.values), limits)
    theirs = _positions(shared.names, "context", schema)
    given = set(theirs)
    own = [position for position in range(schema.num_features) if position not in given]
    order = _columns(sparse, own, schema)
    own_values, own_lengths = sparse.values, _lengths(rows, sparse, len(own), "sparse")
    if order is not None:
        own_values, own_lengths, _ = _reorder(own_values, own_lengths, None, order)
    shared_lengths = _lengths(1, shared, len(theirs), "context")
    shared_ends = validate.check_bags(
        shared.values, shared_lengths, np.array(theirs, dtype=np.int64), schema, "context", key_major=False
    )
    own_ends = validate.check_bags(
        own_values, own_lengths, np.array(own, dtype=np.int64), schema, "sparse", key_major=False
    )
    # One pool of ids, the context's first; every row's bag of a shared feature is the same span of it.
    values = np.concatenate([shared.values, own_values])
    lengths = np.empty((schema.num_features, rows), dtype=np.int32)
    starts = np.empty((schema.num_features, rows), dtype=np.int64)
    lengths[theirs] = shared_lengths.T
    starts[theirs] = (shared_ends - shared_lengths).T
    lengths[own] = own_lengths.T
    starts[own] = (own_ends - own_lengths).T + len(shared.values)
    if bool((lengths == 1).all()):
        return OneHot(values[starts])
    return Jagged(values, starts, lengths)


def _refuse_weights(*parts: _Sparse) -> None:
    for part in parts:
        if part.weights is not None:
            raise InvalidRequest("weights together with a context are not supported; send the rows without a context")
