"""TorchRec's wire: ``predictor.Predictor/Predict`` of proto/predictor.proto. Key-major, int32 ids."""

from __future__ import annotations

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Features, Floats, Jagged, OneHot, Scores
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports import validate
from narsil.wire import LEN, PREDICT_TORCHREC, VARINT, expect, put_len, scan, signed32

METHOD = PREDICT_TORCHREC

# Features that TorchRec's message can carry and no model served here takes; field number -> name.
_UNUSED = {4: "id_score_list_features", 5: "embedding_features", 6: "unary_features"}

_Span = tuple[int, int]
_NOTHING: _Span = (0, 0)


def decode(body: bytes, schema: ModelSchema, limits: RequestLimits) -> Features:
    """A serialized PredictionRequest as Features: views of ``body``. Raises InvalidRequest."""
    rows = 0
    floats: dict[int, _Span] = {}
    ids: dict[int, _Span] = {}
    for field in scan(body, 0, len(body)):
        number, _, start, stop = field
        if number == 1:
            expect(field, VARINT, "batch_size")
            rows = signed32(start)
        elif number == 2:
            expect(field, LEN, "float_features")
            _read_group(body, start, stop, "float_features", floats)
        elif number == 3:
            expect(field, LEN, "id_list_features")
            _read_group(body, start, stop, "id_list_features", ids)
        elif number in _UNUSED:
            expect(field, LEN, _UNUSED[number])
            _refuse_unused(body, start, stop, _UNUSED[number])
    validate.batch_size(rows, limits)
    return Features(rows, _dense(body, rows, floats, schema), _sparse(body, rows, ids, schema, limits))


def encode(scores: Scores) -> bytes:
    """Scores as a serialized PredictionResponse, byte for byte as the protobuf runtime writes it."""
    out = b""
    for task, values in scores.items():
        packed = values.astype("<f4", copy=False).tobytes()
        vector = put_len(1, packed) if packed else b""
        out += put_len(1, put_len(1, task.encode()) + put_len(2, vector))
    return out


def _read_group(body: bytes, start: int, stop: int, name: str, out: dict[int, _Span]) -> None:
    """Fields of a FloatFeatures or SparseFeatures: 1 is num_features, stored as (value, 0); others are spans."""
    for field in scan(body, start, stop):
        number, _, a, b = field
        if number == 1:
            expect(field, VARINT, f"{name}.num_features")
            out[1] = (signed32(a), 0)
        elif number in (2, 3, 4):
            expect(field, LEN, f"{name} field {number}")
            out[number] = (a, b)


def _dense(body: bytes, rows: int, group: dict[int, _Span], schema: ModelSchema) -> Floats:
    name = "float_features"
    count = group.get(1, _NOTHING)[0]
    if count != schema.dense_dim:
        raise InvalidRequest(f"{name}.num_features is {count}; the model takes {schema.dense_dim} dense features")
    values = validate.array(body, *group.get(2, _NOTHING), validate.FLOAT32, f"{name}.values")
    return validate.dense(values, rows, schema.dense_dim, f"{name}.values")


def _sparse(
    body: bytes, rows: int, group: dict[int, _Span], schema: ModelSchema, limits: RequestLimits
) -> OneHot | Jagged:
    name = "id_list_features"
    count = group.get(1, _NOTHING)[0]
    if count != schema.num_features:
        names = f"{schema.features[0].name} .. {schema.features[-1].name}"
        raise InvalidRequest(
            f"{name}.num_features is {count}; the model takes {schema.num_features} sparse features ({names})"
        )
    lengths = validate.array(body, *group.get(2, _NOTHING), validate.INT32, f"{name}.lengths")
    if len(lengths) != count * rows:
        raise InvalidRequest(
            f"{name}.lengths: {lengths.nbytes} bytes for {count} features x {rows} rows; "
            f"expected {count * rows * 4} bytes of int32, key-major"
        )
    values = validate.array(body, *group.get(3, _NOTHING), validate.INT32, f"{name}.values")
    validate.id_count(len(values), limits)
    weights = None
    if group.get(4, _NOTHING) != _NOTHING and group[4][0] != group[4][1]:
        weights = validate.array(body, *group[4], validate.FLOAT32, f"{name}.weights")
    return validate.jagged(values, lengths.reshape(count, rows), schema, name, key_major=True, weights=weights)


def _refuse_unused(body: bytes, start: int, stop: int, name: str) -> None:
    """TorchRec's own client sends these groups empty; anything in them has no place in the model."""
    group: dict[int, _Span] = {}
    _read_group(body, start, stop, name, group)
    count = group.pop(1, _NOTHING)[0]
    if count or any(b > a for a, b in group.values()):
        raise InvalidRequest(f"{name} holds {count} features; this model takes none (extra features are refused)")
