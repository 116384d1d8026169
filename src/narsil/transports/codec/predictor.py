"""TorchRec's wire: ``predictor.Predictor/Predict`` of proto/predictor.proto. Key-major.

Ids and lengths are int32, or int64; the message does not say which, nor need it say how many rows it holds. Its bytes
do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Features, Jagged, OneHot, Scores
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports import validate
from narsil.wire import LEN, PREDICT_TORCHREC, VARINT, expect, put_len, scan, signed32

METHOD = PREDICT_TORCHREC

_SCORED = 4  # id lists whose ids have weights

# Groups that models may do without; field number -> name.
_OTHERS = {4: "id_score_list_features", 5: "embedding_features", 6: "unary_features"}

_Span = tuple[int, int]
_Group = dict[int, _Span]  # 1 is num_features, stored as (value, 0); 2 to 4 are spans of the body
_NOTHING: _Span = (0, 0)


@dataclass(slots=True)
class PredictionRequest:
    """A serialized PredictionRequest taken apart as far as that needs no model."""

    body: bytes
    rows: int = 0  # B, as claimed; 0 where it is left out
    dense: _Group = field(default_factory=dict)
    sparse: _Group = field(default_factory=dict)
    others: dict[int, _Group] = field(default_factory=dict)

    def features(self, schema: ModelSchema, limits: RequestLimits) -> Features:
        """The rows, held against the schema: views of the body. Raises InvalidRequest.

        A model whose ids have weights takes them in either group that has room for weights, as TorchRec's clients fill
        the one that the model was packaged with.
        """
        if not schema.plain:
            return _Grouped(self, schema, limits).features()
        if schema.weighted and _holds_anything(self.others.get(_SCORED, {})) and not _holds_anything(self.sparse):
            self.sparse = self.others.pop(_SCORED)
        _check_counts(self, schema)
        rows = validate.batch_size(self.rows, limits) if self.rows else _rows_of_bytes(self, schema, limits)
        dense = validate.array(self.body, *self.dense.get(2, _NOTHING), validate.FLOAT32, "float_features.values")
        return Features(
            rows,
            validate.dense(dense, rows, schema.takes_nan, "float_features.values"),
            _sparse(self.body, rows, self.sparse, schema, limits),
        )

    def passed_over(self) -> tuple[str, ...]:
        """The groups that hold something which is not read. TorchRec's server does not read them either."""
        return tuple(_OTHERS[number] for number, group in self.others.items() if _holds_anything(group))


def read(body: bytes) -> PredictionRequest:
    """A serialized PredictionRequest, not yet held against any schema. Raises InvalidRequest where it is none."""
    out = PredictionRequest(body)
    for found in scan(body, 0, len(body)):
        number, _, start, stop = found
        if number == 1:
            expect(found, VARINT, "batch_size")
            out.rows = signed32(start)
        elif number == 2:
            expect(found, LEN, "float_features")
            _read_group(body, start, stop, "float_features", out.dense)
        elif number == 3:
            expect(found, LEN, "id_list_features")
            _read_group(body, start, stop, "id_list_features", out.sparse)
        elif number in _OTHERS:
            expect(found, LEN, _OTHERS[number])
            _read_group(body, start, stop, _OTHERS[number], out.others.setdefault(number, {}))
    return out


def decode(body: bytes, schema: ModelSchema, limits: RequestLimits) -> Features:
    """A serialized PredictionRequest as Features: views of ``body``. Raises InvalidRequest."""
    return read(body).features(schema, limits)


def encode(scores: Scores) -> bytes:
    """Scores as a serialized PredictionResponse, byte for byte as the protobuf runtime writes it. Those of a task that
    gives several numbers for a row go row by row."""
    out = b""
    for task, values in scores.items():
        packed = values.astype("<f4", copy=False).tobytes()
        vector = put_len(1, packed) if packed else b""
        out += put_len(1, put_len(1, task.encode()) + put_len(2, vector))
    return out


def _read_group(body: bytes, start: int, stop: int, name: str, out: _Group) -> None:
    """Fields of a FloatFeatures or SparseFeatures."""
    for found in scan(body, start, stop):
        number, _, a, b = found
        if number == 1:
            expect(found, VARINT, f"{name}.num_features")
            out[1] = (signed32(a), 0)
        elif number in (2, 3, 4):
            expect(found, LEN, f"{name} field {number}")
            out[number] = (a, b)


def _holds_anything(group: _Group) -> bool:
    """TorchRec's own client sends groups that it has no use for, and sends them empty."""
    return any(a != b for a, b in group.values())


def _check_counts(request: PredictionRequest, schema: ModelSchema) -> None:
    """Raises InvalidRequest where the request has other features than the model takes."""
    columns, features = request.dense.get(1, _NOTHING)[0], request.sparse.get(1, _NOTHING)[0]
    if columns != schema.dense_dim:
        raise InvalidRequest(
            f"float_features.num_features is {columns}; the model takes {schema.dense_dim} dense features"
        )
    if features != schema.num_features:
        names = f" ({schema.features[0].name} .. {schema.features[-1].name})" if schema.features else ""
        raise InvalidRequest(
            f"id_list_features.num_features is {features}; the model takes {schema.num_features} sparse features{names}"
        )
    if schema.weighted and _holds_anything(request.others.get(_SCORED, {})):
        raise InvalidRequest(
            "id_list_features and id_score_list_features both hold ids; this model takes one group, with weights: send "
            "it as either, and leave the other empty"
        )


def _rows_of_bytes(request: PredictionRequest, schema: ModelSchema, limits: RequestLimits) -> int:
    """B of a request that leaves batch_size out, told by the bytes of the dense values or, without any, of the lengths.

    Raises InvalidRequest where the lengths may be those of two numbers of rows.
    """
    if schema.dense_dim:
        name, width, span = "float_features.values", 4 * schema.dense_dim, request.dense.get(2, _NOTHING)
    else:
        name, width, span = "id_list_features.lengths", 4 * schema.num_features, request.sparse.get(2, _NOTHING)
    size = span[1] - span[0]
    rows, left = divmod(size, width)
    if left or not rows:
        raise InvalidRequest(
            f"batch_size is left out, and {name}: {size} bytes are no whole number of rows of {width} bytes; "
            "send batch_size"
        )
    if not schema.dense_dim and rows % 2 == 0 and _add_up(request, validate.INT64):
        if _add_up(request, validate.INT32):
            raise InvalidRequest(
                f"batch_size is left out, and {name}: {size} bytes may be int32 of {rows} rows or int64 of {rows // 2}"
                "; send batch_size"
            )
        rows //= 2
    return validate.batch_size(rows, limits, f"batch_size is left out; as {name} has it, it")


def _add_up(request: PredictionRequest, kind: np.dtype[Any]) -> bool:
    """Whether lengths, read as such numbers, add up to the ids that are there, in either width."""
    lengths = validate.array(request.body, *request.sparse.get(2, _NOTHING), kind, "id_list_features.lengths")
    start, stop = request.sparse.get(3, _NOTHING)
    if not bool(((lengths >= 0) & (lengths <= stop - start)).all()):
        return False
    ids = int(lengths.sum(dtype=np.int64))
    return stop - start in (4 * ids, 8 * ids)


def _sparse(
    body: bytes, rows: int, group: _Group, schema: ModelSchema, limits: RequestLimits, name: str = "id_list_features"
) -> OneHot | Jagged:
    lengths = _lengths(body, rows, *group.get(2, _NOTHING), schema, name)
    # How wide ids are follows from lengths: one that is none would be told as a wrong number of ids, or of weights.
    validate.check_lengths(lengths, np.arange(schema.num_features), schema, name)
    begin, end = group.get(4, _NOTHING)
    weights = None if begin == end else validate.array(body, begin, end, validate.FLOAT32, f"{name}.weights")
    start, stop = group.get(3, _NOTHING)
    size = stop - start
    one_each = size == 4 * lengths.size and bool(
        (lengths == 1).all()
    )  # int32: by far the most common, and quickly seen
    # Ids are int32 unless they are as many as the lengths say as int64 alone: as both they are that many only where
    # there are none.
    wide = size > 0 and not one_each and size == 8 * int(lengths.sum(dtype=np.int64))
    values = validate.array(body, start, stop, validate.INT64 if wide else validate.INT32, f"{name}.values")
    validate.id_count(len(values), limits)
    if one_each and weights is None:
        return validate.one_hot(values.reshape(lengths.shape), schema)
    return validate.jagged(values, lengths, schema, name, key_major=True, weights=weights)


def _lengths(body: bytes, rows: int, start: int, stop: int, schema: ModelSchema, name: str) -> NDArray[np.int32]:
    """(T, B) lengths: int32, or int64 where there are twice the bytes."""
    count = schema.num_features
    if count and stop - start == 8 * count * rows:
        wide = validate.array(body, start, stop, validate.INT64, f"{name}.lengths")
        return validate.narrow_lengths(wide.reshape(count, rows), schema, name)
    lengths = validate.array(body, start, stop, validate.INT32, f"{name}.lengths")
    if len(lengths) != count * rows:
        raise InvalidRequest(
            f"{name}.lengths: {lengths.nbytes} bytes for {count} features x {rows} rows; "
            f"expected {count * rows * 4} bytes of int32, key-major"
        )
    return lengths.reshape(count, rows)


_LISTS = {"id_list_features": 3, "id_score_list_features": 4, "unary_features": 6}
_FLOATS = {"float_features": 2, "embedding_features": 5}


def columns_of(schema: ModelSchema) -> dict[int, list[int]]:
    """Field of a PredictionRequest -> which of the D columns come in it, in its order. Where the model has several
    matrices, those of other names come in float_features."""
    found: dict[int, list[int]] = {}
    first = 0
    for key, width in schema.matrices or (("float_features", schema.dense_dim),):
        found.setdefault(_FLOATS.get(key, 2), []).extend(range(first, first + width))
        first += width
    return found


def features_of(schema: ModelSchema) -> dict[int, list[int]]:
    """Field of a PredictionRequest -> which of the T features come in it, in its order. Groups of other names come in
    id_list_features or, where their ids have weights, in id_score_list_features."""
    found: dict[int, list[int]] = {}
    for position, feature in enumerate(schema.features):
        other = 4 if feature.weighted else 3
        found.setdefault(_LISTS.get(feature.group, other), []).append(position)
    return found


class _Grouped:
    """A request for a model with several groups of id lists, or several matrices of numbers. Each comes in the group of
    its name. Others come, in the schema's order, in float_features and in id_list_features, or, where their ids have
    weights, id_score_list_features."""

    def __init__(self, request: PredictionRequest, schema: ModelSchema, limits: RequestLimits) -> None:
        self._request = request
        self._schema = schema
        self._limits = limits
        columns, features = columns_of(schema), features_of(schema)
        self._columns = {name: columns.get(number, []) for name, number in _FLOATS.items()}
        self._features = {name: features.get(number, []) for name, number in _LISTS.items()}
        self._given = {2: request.dense, 3: request.sparse, **request.others}

    def features(self) -> Features:
        """The rows. Raises InvalidRequest."""
        for name, number in _FLOATS.items():
            self._check_count(name, number, len(self._columns[name]), "columns")
        for name, number in _LISTS.items():
            self._check_count(name, number, len(self._features[name]), "features")
        rows = validate.batch_size(self._request.rows, self._limits) if self._request.rows else self._rows_of_bytes()
        parts = [part for name in _LISTS if self._features[name] for part in [self._sparse(name, rows)]]
        validate.id_count(sum(part.count for part in parts), self._limits)
        for number in (number for name, number in (_FLOATS | _LISTS).items() if self._takes(name)):
            self._request.others.pop(number, None)
        return Features(rows, self._dense(rows), self._joined(parts, rows))

    def _takes(self, name: str) -> bool:
        return bool((self._columns | self._features)[name])

    def _group(self, number: int) -> _Group:
        return self._given.get(number, {})

    def _check_count(self, name: str, number: int, wanted: int, what: str) -> None:
        """A group that the model does not take is passed over, but for those of plain numbers and ids."""
        found = self._group(number).get(1, _NOTHING)[0]
        if found != wanted and (wanted or number in (2, 3)):
            raise InvalidRequest(f"{name}.num_features is {found}; the model takes {wanted} {what} there")

    def _rows_of_bytes(self) -> int:
        """B of a request that leaves batch_size out, as float_features or embedding_features tell it."""
        for name, number in _FLOATS.items():
            if width := 4 * len(self._columns[name]):
                start, stop = self._group(number).get(2, _NOTHING)
                rows, left = divmod(stop - start, width)
                if left or not rows:
                    raise InvalidRequest(
                        f"batch_size is left out, and {name}.values: {stop - start} bytes are no whole number of rows "
                        f"of {width} bytes; send batch_size"
                    )
                return validate.batch_size(rows, self._limits, f"batch_size is left out; as {name}.values has it, it")
        raise InvalidRequest("batch_size is left out, and the model takes no numbers that tell it; send batch_size")

    def _dense(self, rows: int) -> NDArray[np.float32]:
        """(B, D): the parts of both groups in the schema's order."""
        body, dense = self._request.body, np.empty((rows, self._schema.dense_dim), np.float32)
        for name, number in _FLOATS.items():
            label = f"{name}.values"
            flat = validate.array(body, *self._group(number).get(2, _NOTHING), validate.FLOAT32, label)
            if self._columns[name]:
                takes_nan = self._schema.takes_nan[self._columns[name]]
                dense[:, self._columns[name]] = validate.dense(flat, rows, takes_nan, label)
        return dense

    def _sparse(self, name: str, rows: int) -> Jagged:
        """One group's bags, held against its own features."""
        positions, group = self._features[name], self._group(_LISTS[name])
        own = replace(
            self._schema,
            dense_dim=0,
            matrices=(),
            nan_columns=(),
            features=tuple(self._schema.features[at] for at in positions),
        )
        return _sparse(self._request.body, rows, group, own, self._limits, name).jagged()

    def _joined(self, parts: list[Jagged], rows: int) -> OneHot | Jagged:
        """All groups' bags over one pool of ids, in the schema's order of features."""
        if not parts:
            return OneHot(np.empty((0, rows), validate.INT32))
        order = np.argsort([at for name in _LISTS for at in self._features[name]])
        bases = np.cumsum([0, *(len(part.values) for part in parts[:-1])])
        starts = np.concatenate([part.starts + base for part, base in zip(parts, bases, strict=True)])[order]
        lengths = np.concatenate([part.lengths for part in parts])[order]
        values, weights = np.concatenate([part.values for part in parts]), None
        if any(part.weights is not None for part in parts):
            weights = np.concatenate([part.weights_or_ones() for part in parts])
        if weights is None and bool((lengths == 1).all()):
            return OneHot(values[starts])
        return Jagged(values, starts, lengths, weights)
