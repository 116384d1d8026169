"""Request bodies for a load: distinct, precomputed, and the same for the same seed in every process.

Receives a schema and a seed, produces serialized requests. Bodies are generated where they are sent, so that no
process has to ship megabytes to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.client import build_request, read_response
from narsil.dataflow import Features, Ints, Jagged, OneHot
from narsil.errors import InvalidRequest
from narsil.transports.codec import narsil_v1, oip, predictor
from narsil.wire import FIXED32, LEN, Field, put_len, put_text, put_uint, put_varint, scan, text

Protocol = Literal["predictor", "narsil", "oip"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)

_METHODS: dict[Protocol, str] = {
    "predictor": predictor.METHOD,
    "narsil": narsil_v1.METHOD,
    "oip": oip.SERVICE + "ModelInfer",
}


@dataclass(frozen=True)
class Workload:
    """What to send: ``bodies`` distinct requests of ``rows`` rows with 1 to ``max_ids`` uniform ids a bag."""

    schema: ModelSchema
    rows: int = 100
    bodies: int = 2000
    max_ids: int = 1
    seed: int = 0

    def payloads(self, count: int | None = None) -> Iterator[Features]:
        """The first ``count`` payloads (None: all), key-major. The n-th is the same however many are asked for."""
        features = self.schema.num_features
        for number in range(self.bodies if count is None else min(count, self.bodies)):
            random = np.random.default_rng((self.seed, number))
            dense = random.random((self.rows, self.schema.dense_dim), dtype=np.float32)
            limits, kind = self.schema.rows, self.schema.id_dtype
            if self.max_ids == 1:
                ids = random.integers(0, limits[:, None], (features, self.rows)).astype(kind)
                yield Features(self.rows, dense, OneHot(ids))
                continue
            lengths = self.schema.bags(random.integers(0, self.max_ids + 1, (features, self.rows)))
            values = random.integers(0, np.repeat(limits, lengths.sum(axis=1))).astype(kind)
            yield Features(self.rows, dense, Jagged.laid_out(values, lengths))

    def serialized(self, protocol: Protocol, count: int | None = None) -> list[bytes]:
        """The payloads as request bodies of a wire."""
        writers = {"predictor": self._predictor_body, "narsil": narsil_body, "oip": oip_body}
        return [writers[protocol](features) for features in self.payloads(count)]

    def _predictor_body(self, features: Features) -> bytes:
        return predictor_body(features) if self.schema.plain else grouped_body(features, self.schema)


def grouped_body(features: Features, schema: ModelSchema) -> bytes:
    """Key-major features as a serialized predictor.PredictionRequest, each in the group that the model has it in."""
    out = put_uint(1, features.rows)
    sparse = features.sparse
    if isinstance(sparse, OneHot):
        sparse = Jagged.laid_out(sparse.ids.ravel(), np.ones(sparse.ids.shape, np.int32))
    for number, columns in predictor.columns_of(schema).items():
        part = np.ascontiguousarray(features.dense[:, columns])
        out += put_len(number, put_uint(1, len(columns)) + put_len(2, part.tobytes()))
    for number, positions in predictor.features_of(schema).items():
        lengths = sparse.lengths[positions]
        bags = [
            sparse.values[start : start + length]
            for start, length in zip(sparse.starts[positions].ravel(), lengths.ravel(), strict=True)
        ]
        ids = np.concatenate(bags) if bags else np.empty(0, np.int32)
        out += put_len(number, put_uint(1, len(positions)) + put_len(2, lengths.tobytes()) + put_len(3, ids.tobytes()))
    return out


def predictor_body(features: Features) -> bytes:
    """Key-major features as a serialized predictor.PredictionRequest."""
    sparse = features.sparse
    values: Ints
    lengths: Ints
    if isinstance(sparse, OneHot):
        values, lengths = sparse.ids, np.ones(sparse.ids.shape, dtype=np.int32)
    else:
        values, lengths = sparse.values, sparse.lengths
    dense = put_uint(1, int(features.dense.shape[-1])) + put_len(2, features.dense.tobytes())
    ids = put_uint(1, len(lengths)) + put_len(2, lengths.tobytes()) + put_len(3, values.tobytes())
    return put_uint(1, features.rows) + put_len(2, dense) + put_len(3, ids)


def narsil_body(features: Features) -> bytes:
    """Features as a serialized narsil.v1.PredictRequest."""
    sparse = features.sparse
    if isinstance(sparse, OneHot):
        return build_request(features.dense, np.ascontiguousarray(sparse.ids.T))
    return build_request(features.dense, *_by_rows(sparse))


def oip_body(features: Features) -> bytes:
    """Features as a serialized ModelInferRequest of the datatypes that ModelMetadata lists."""
    sparse = features.sparse
    tensors: list[tuple[str, str, NDArray[Any]]] = []
    if features.dense.shape[1]:
        tensors.append(("dense", "FP32", features.dense))
    if isinstance(sparse, Jagged):
        values, lengths = _by_rows(sparse)
        tensors += [("ids.values", "INT64", values.astype("<i8")), ("ids.lengths", "INT32", lengths)]
    elif len(sparse.ids):
        tensors.append(("ids", "INT64", np.ascontiguousarray(sparse.ids.T, "<i8")))
    out = b""
    for name, datatype, values in tensors:
        shape = b"".join(put_varint(size) for size in values.shape)
        out += put_len(5, put_text(1, name) + put_text(2, datatype) + put_len(3, shape))
    return out + b"".join(put_len(7, values.tobytes()) for _, _, values in tensors)


def _by_rows(sparse: Jagged) -> tuple[Ints, Ints]:
    """(N,) ids, all features of row 0 first, and their (B, T) lengths."""
    bags = [
        sparse.values[start : start + length]
        for starts, lengths in zip(sparse.starts.T, sparse.lengths.T, strict=True)
        for start, length in zip(starts, lengths, strict=True)
    ]
    return np.concatenate(bags) if bags else np.empty(0, np.int32), np.ascontiguousarray(sparse.lengths.T)


def method(protocol: Protocol) -> str:
    """The full gRPC method name of a wire."""
    return _METHODS[protocol]


def score_reader(protocol: Protocol, task: str) -> Callable[[bytes], NDArray[np.float32]]:
    """A function that takes a response body to the task's scores, flattened; none where the task is not in it.

    The function raises InvalidRequest where the body is no response.
    """

    def read_narsil(body: bytes) -> NDArray[np.float32]:
        return read_response(body).scores.get(task, np.empty(0, dtype=np.float32)).ravel()

    readers: dict[Protocol, Callable[[bytes], NDArray[np.float32]]] = {
        "predictor": lambda body: _predictor_scores(body, task),
        "narsil": read_narsil,
        "oip": lambda body: _oip_scores(body, task),
    }
    return readers[protocol]


def _predictor_scores(body: bytes, task: str) -> NDArray[np.float32]:
    """The task's scores in a serialized predictor.PredictionResponse. Of entries with one name the last counts."""
    scores = b""
    for entry in _inside(body, (0, 0, 0, len(body)), 1):
        names = [text(body, found[2], found[3], "a task") for found in _inside(body, entry, 1)]
        if (names or [""])[-1] == task:
            floats = [found for vector in _inside(body, entry, 2) for found in scan(body, vector[2], vector[3])]
            # Packed, or one by one: protobuf allows both.
            scores = b"".join(body[a:b] for number, kind, a, b in floats if number == 1 and kind in (LEN, FIXED32))
    return _floats(scores, task)


def _oip_scores(body: bytes, task: str) -> NDArray[np.float32]:
    """The task's scores in a serialized ModelInferResponse: the raw contents beside the first output of its name."""
    message = (0, 0, 0, len(body))
    names = [
        "".join(text(body, name[2], name[3], "an output") for name in _inside(body, output, 1)[-1:])
        for output in _inside(body, message, 5)
    ]
    raw = _inside(body, message, 6)
    if task not in names or names.index(task) >= len(raw):
        return np.empty(0, np.float32)
    _, _, start, stop = raw[names.index(task)]
    return _floats(body[start:stop], task)


def _floats(scores: bytes, task: str) -> NDArray[np.float32]:
    if len(scores) % 4:
        raise InvalidRequest(f"scores of task {task}: {len(scores)} bytes are no whole number of float32")
    return np.frombuffer(scores, "<f4")


def _inside(body: bytes, message: Field, number: int) -> list[Field]:
    """The length-delimited fields of this number in a message."""
    return [found for found in scan(body, message[2], message[3]) if found[0] == number and found[1] == LEN]
