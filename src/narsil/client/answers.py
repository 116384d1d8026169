"""The server's answers, from bytes: what scored the rows and how, and what a model takes. Pure functions, no sockets.

The server's half is narsil.transports.codec.narsil_v1; the messages are those of proto/narsil.proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.dataflow import RequestLimits
from narsil.errors import InvalidRequest
from narsil.wire import LEN, VARINT, Field, expect, packed_uints, scan, text


@dataclass(frozen=True)
class Prediction:
    """Scores by task, and how they came about."""

    scores: dict[str, NDArray[np.float32]]  # (B,) each; (B, k) where a task gives k numbers for each row
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
    limits: RequestLimits | None = None  # None: the server does not say
    whole_requests: bool = False  # a row's score depends on its request's others: a request must not be cut in several


@dataclass(frozen=True)
class ModelStatus:
    """One version of a model that a server serves, or should."""

    name: str
    version: str  # empty: none could be told
    state: str  # READY, LOADING, UNAVAILABLE
    reason: str = ""  # of one that is not served


def read_index(body: bytes) -> list[ModelStatus]:
    """A serialized inference.RepositoryIndexResponse. Raises InvalidRequest where it is none."""
    models = []
    for found in scan(body, 0, len(body)):
        if found[0] == 1:
            expect(found, LEN, "models")
            said = {1: "", 2: "", 3: "", 4: ""}
            for inside in scan(body, found[2], found[3]):
                if inside[0] in said:
                    said[inside[0]] = _text(body, inside, "a name")
            models.append(ModelStatus(*said.values()))
    return models


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
    task, values, width = "", b"", 0
    for found in scan(body, message[2], message[3]):
        if found[0] == 1:
            task = _text(body, found, "task")
        elif found[0] == 2:
            expect(found, LEN, "values")
            values = body[found[2] : found[3]]
        elif found[0] == 3:
            expect(found, VARINT, "width")
            width = found[2] & 0xFFFFFFFF
    if len(values) % (4 * max(width, 1)):
        rows = f"rows of {width} float32" if width else "float32"
        raise InvalidRequest(f"scores of task {task}: {len(values)} bytes are no whole number of {rows}")
    scores = np.frombuffer(values, "<f4")
    return task, scores.reshape(-1, width) if width > 1 else scores


def read_model(body: bytes) -> ModelInfo:
    """A serialized narsil.v1.Model as a ModelInfo. Raises InvalidRequest where it is none, ArtifactError where no
    model can be as it says."""
    strings = {1: "", 2: "", 3: ""}
    numbers = {4: 0, 7: 0, 8: 0, 9: 0, 11: 0}
    features: list[Feature] = []
    tasks: list[str] = []
    widths: list[int] = []
    matrices: list[tuple[str, int]] = []
    missing: list[int] = []
    for found in scan(body, 0, len(body)):
        number = found[0]
        if number in strings:
            strings[number] = _text(body, found, "a name")
        elif number in numbers:
            expect(found, VARINT, "dense_dim or a limit")
            numbers[number] = found[2]
        elif number == 5:
            expect(found, LEN, "features")
            features.append(_feature(body, found))
        elif number == 6:
            tasks.append(_text(body, found, "tasks"))
        elif number == 10:
            widths += packed_uints(body, found, "task_widths")
        elif number == 12:
            expect(found, LEN, "matrices")
            matrices.append(_matrix(body, found))
        elif number == 13:
            missing += packed_uints(body, found, "nan_columns")
    schema = ModelSchema(numbers[4], tuple(features), tuple(tasks), tuple(widths), tuple(matrices), tuple(missing))
    limits = RequestLimits(numbers[7], numbers[8], numbers[9])
    told = all((limits.max_rows, limits.max_ids, limits.max_bytes))
    return ModelInfo(strings[1], strings[2], strings[3], schema, limits if told else None, bool(numbers[11]))


def _feature(body: bytes, message: Field) -> Feature:
    strings = {1: "", 2: "", 5: "", 7: ""}
    numbers = {3: 0, 4: 0, 6: 0, 8: 0, 9: 0}
    for found in scan(body, message[2], message[3]):
        if found[0] in strings:
            strings[found[0]] = _text(body, found, "a feature")
        elif found[0] in numbers:
            expect(found, VARINT, "a feature")
            numbers[found[0]] = found[2]
    pooling: Any = strings[5]
    least = numbers[8] - (numbers[8] >> 63 << 64)  # of an int64's bits
    weighted, single = bool(numbers[6]), bool(numbers[9])
    return Feature(strings[1], strings[2], numbers[3], numbers[4], pooling, weighted, strings[7], least, single)


def _matrix(body: bytes, message: Field) -> tuple[str, int]:
    key, width = "", 0
    for found in scan(body, message[2], message[3]):
        if found[0] == 1:
            key = _text(body, found, "a matrix")
        elif found[0] == 2:
            expect(found, VARINT, "a matrix")
            width = found[2]
    return key, width


def _text(body: bytes, found: Field, name: str) -> str:
    expect(found, LEN, name)
    return text(body, found[2], found[3], name)
