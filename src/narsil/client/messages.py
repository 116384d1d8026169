"""The client's half of ``narsil.v1``: requests to bytes, answers from bytes. Pure functions, no sockets.

The server's half is narsil.transports.codec.narsil_v1; the messages are those of proto/narsil.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.errors import InvalidRequest
from narsil.wire import LEN, VARINT, Field, Part, expect, put_len, put_parts, put_text, put_uint, put_varint, scan, text

_INT32, _INT64 = 0, 1  # IdType


@dataclass(frozen=True)
class Context:
    """Features that all rows of a request share, sent once."""

    features: Mapping[str, Sequence[int]]  # sparse feature name -> its bag of ids
    dense_columns: Sequence[int] = ()  # which dense columns are given here, ascending
    dense: Sequence[float] = ()


@dataclass(frozen=True)
class Prediction:
    """Scores by task, and how they came about."""

    scores: dict[str, NDArray[np.float32]]  # (B,) each
    model_name: str
    model_version: str
    request_id: str
    batch_requests: int  # requests that shared the forward
    batch_rows: int
    queue_us: int
    execute_us: int


@dataclass(frozen=True)
class ModelInfo:
    """What the server serves."""

    name: str
    version: str
    backend: str
    schema: ModelSchema


def build_request(
    dense: ArrayLike,
    ids: ArrayLike,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    context: Context | None = None,
    feature_names: Sequence[str] = (),
    model: str = "",
    version: str = "",
    request_id: str = "",
) -> bytes:
    """A serialized narsil.v1.PredictRequest; arguments as in Client.predict. Ids stay int32 if they are, else int64."""
    rows_dense = np.ascontiguousarray(dense, dtype="<f4")
    values, id_type = _ids(ids)
    if lengths is None:
        columns = values.shape[1] if values.ndim == 2 else 0
    else:
        lengths = np.ascontiguousarray(lengths, dtype="<i4")
        columns = lengths.shape[1] if lengths.ndim == 2 else 0
    sparse = [
        put_uint(1, columns),
        *(put_len(2, name.encode()) for name in feature_names),
        put_uint(3, id_type),
        *_put_array(4, values),
    ]
    if lengths is not None:
        sparse += _put_array(5, np.asarray(lengths))
    if weights is not None:
        sparse += _put_array(6, np.ascontiguousarray(weights, dtype="<f4"))
    parts = [
        put_text(1, model),
        put_text(2, version),
        put_text(3, request_id),
        put_uint(4, rows_dense.shape[0] if rows_dense.ndim else 0),
        *_put_array(5, rows_dense),
        *put_parts(6, sparse),
    ]
    if context is not None:
        parts += put_parts(7, _context(context))
    return b"".join(parts)


def _context(context: Context) -> list[Part]:
    """The fields of a Context message."""
    bags = [np.atleast_1d(np.asarray(bag, dtype="<i8")) for bag in context.features.values()]
    columns = b"".join(map(put_varint, context.dense_columns))
    return [
        *(put_parts(1, [columns]) if columns else ()),
        *_put_array(2, np.asarray(context.dense, dtype="<f4")),
        *(put_len(3, name.encode()) for name in context.features),
        put_uint(4, _INT64),
        *_put_array(5, np.concatenate(bags) if bags else np.empty(0, dtype="<i8")),
        *_put_array(6, np.array([len(bag) for bag in bags], dtype="<i4")),
    ]


def _put_array(number: int, array: NDArray[Any]) -> list[Part]:
    """A contiguous array's bytes as a field, uncopied; nothing for an empty one, as proto3 has it."""
    return put_parts(number, [array.ravel().view(np.uint8).data]) if array.size else []


def _ids(ids: ArrayLike) -> tuple[NDArray[Any], int]:
    array = np.asarray(ids)
    if array.dtype.newbyteorder("=") == np.int32:
        return np.ascontiguousarray(array, dtype="<i4"), _INT32
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"ids must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype="<i8"), _INT64


def read_response(body: bytes) -> Prediction:
    """A serialized narsil.v1.PredictResponse as a Prediction. Raises InvalidRequest where it is none."""
    strings = {1: "", 2: "", 3: ""}
    scores: dict[str, NDArray[np.float32]] = {}
    about = {1: 0, 2: 0, 3: 0, 4: 0}
    for found in scan(body, 0, len(body)):
        number = found[0]
        if number in strings:
            strings[number] = _text(body, found, "a name")
        elif number == 4:
            expect(found, LEN, "scores")
            scores.update([_task_scores(body, found)])
        elif number == 5:
            expect(found, LEN, "provenance")
            for inside in scan(body, found[2], found[3]):
                if inside[0] in about:
                    expect(inside, VARINT, "provenance")
                    about[inside[0]] = inside[2] & 0xFFFFFFFF
    return Prediction(
        scores,
        model_name=strings[1],
        model_version=strings[2],
        request_id=strings[3],
        batch_requests=about[1],
        batch_rows=about[2],
        queue_us=about[3],
        execute_us=about[4],
    )


def _task_scores(body: bytes, message: Field) -> tuple[str, NDArray[np.float32]]:
    task, values = "", b""
    for found in scan(body, message[2], message[3]):
        if found[0] == 1:
            task = _text(body, found, "task")
        elif found[0] == 2:
            expect(found, LEN, "values")
            values = body[found[2] : found[3]]
    if len(values) % 4:
        raise InvalidRequest(f"scores of task {task}: {len(values)} bytes are no whole number of float32")
    return task, np.frombuffer(values, "<f4")


def read_model(body: bytes) -> ModelInfo:
    """A serialized narsil.v1.Model as a ModelInfo. Raises InvalidRequest where it is none, ArtifactError where no
    model can be as it says."""
    strings = {1: "", 2: "", 3: ""}
    dense_dim = 0
    features: list[Feature] = []
    tasks: list[str] = []
    for found in scan(body, 0, len(body)):
        number = found[0]
        if number in strings:
            strings[number] = _text(body, found, "a name")
        elif number == 4:
            expect(found, VARINT, "dense_dim")
            dense_dim = found[2]
        elif number == 5:
            expect(found, LEN, "features")
            features.append(_feature(body, found))
        elif number == 6:
            tasks.append(_text(body, found, "tasks"))
    return ModelInfo(strings[1], strings[2], strings[3], ModelSchema(dense_dim, tuple(features), tuple(tasks)))


def _feature(body: bytes, message: Field) -> Feature:
    strings = {1: "", 2: "", 5: ""}
    numbers = {3: 0, 4: 0, 6: 0}
    for found in scan(body, message[2], message[3]):
        if found[0] in strings:
            strings[found[0]] = _text(body, found, "a feature")
        elif found[0] in numbers:
            expect(found, VARINT, "a feature")
            numbers[found[0]] = found[2]
    pooling: Any = strings[5]
    return Feature(strings[1], strings[2], numbers[3], numbers[4], pooling, bool(numbers[6]))


def _text(body: bytes, found: Field, name: str) -> str:
    expect(found, LEN, name)
    return text(body, found[2], found[3], name)
