"""What both clients do, without doing it: which calls to make, one after the other, and what their ends mean.

A conversation is a generator: it yields an Ask, is sent the answer's bytes or thrown the error that the call ended
with, and returns the result. The clients carry the bytes, each in its own manner.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import grpc
import numpy as np

from narsil.client.answers import ModelInfo, ModelStatus, Prediction, read_index, read_model, read_response
from narsil.client.rows import Rows
from narsil.errors import ArtifactError, InvalidRequest, MessageTooLarge, NarsilError, RequestError, meant_by
from narsil.wire import GET_MODEL, INDEX, LOAD, PREDICT, UNLOAD, VERSION_KEY, put_text

OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

_HEADERS = 64  # bytes at most by which the fields' own headers grow with their contents
_ANY = 1 << 62  # a bound that is none

T = TypeVar("T")


class TransportError(NarsilError):
    """The call failed before or beside the server: unreachable, TLS, or an answer that Narsil does not give."""


@dataclass(frozen=True)
class Ask:
    """One call to make."""

    method: str
    body: bytes
    metadata: tuple[tuple[str, str], ...] = ()


Conversation = Generator[Ask, bytes, T]


@dataclass(frozen=True)
class Bounds:
    """What one request may hold, as far as it is known."""

    rows: int = _ANY
    ids: int = _ANY
    bytes: int = _ANY
    columns: int = 1  # D + T, which a context is written out to for each row


Known = dict[tuple[str, str], Bounds]  # (model, version) as asked for -> what the server has said, a client's memory


def describing(name: str = "", version: str = "") -> Conversation[ModelInfo]:
    """Asks what a model is; the default one, in the version that is served, where nothing is named."""
    metadata = ((VERSION_KEY, version),) if version else ()
    return reading(read_model, (yield Ask(GET_MODEL, put_text(1, name), metadata)))


def listing() -> Conversation[list[ModelStatus]]:
    """Asks which models and versions there are, and where they stand."""
    return reading(read_index, (yield Ask(INDEX, b"")))


def loading(name: str) -> Conversation[None]:
    """Has the server serve what its repository holds of a model now."""
    yield Ask(LOAD, put_text(2, name))


def unloading(name: str) -> Conversation[None]:
    """Has the server serve no version of a model any more."""
    yield Ask(UNLOAD, put_text(2, name))


def predicting(rows: Rows, known: Known) -> Conversation[Prediction]:
    """Asks for the rows' scores: at once, or in parts where they are more than the server takes of one request.

    Limits are asked for when a request has been refused, since most never meet them, and remembered; whether rows may
    be cut at all is asked each time, since the model may be another by now.
    """
    whom = (rows.model, rows.version)
    cuts = cuts_of(rows, known[whom]) if whom in known else [0, len(rows)]
    if len(cuts) > 2 and (yield from _is_whole(rows)):
        del known[whom]
        cuts = [0, len(rows)]
    if len(cuts) == 2:
        try:
            return _scored(rows, (yield Ask(PREDICT, rows.serialized())))
        except (InvalidRequest, MessageTooLarge) as error:
            refusal = error
        if len(rows) < 2:
            raise refusal
        known[whom] = yield from _bounds(rows, refusal)
        cuts = cuts_of(rows, known[whom])
        if len(cuts) == 2:
            raise refusal
    return (yield from _in_parts(rows, cuts))


def _is_whole(rows: Rows) -> Conversation[bool]:
    """Whether the model scores a request's rows together, so that they must not be cut; not, where nobody says so."""
    try:
        return (yield from describing(rows.model, rows.version)).whole_requests
    except NarsilError:
        return False


def _bounds(rows: Rows, refusal: RequestError) -> Conversation[Bounds]:
    """What the model's server says that it takes, or a proxy before it has just said."""
    bounds = Bounds()
    try:
        model = yield from describing(rows.model, rows.version)
    except NarsilError:  # the refusal itself tells more
        pass
    else:
        if model.whole_requests:
            raise refusal
        if model.limits is not None:
            columns = model.schema.dense_dim + model.schema.num_features
            bounds = Bounds(model.limits.max_rows, model.limits.max_ids, model.limits.max_bytes, columns)
    if isinstance(refusal, MessageTooLarge) and refusal.limit is not None:
        bounds = replace(bounds, bytes=min(bounds.bytes, refusal.limit))
    return bounds


def cuts_of(rows: Rows, bounds: Bounds) -> list[int]:
    """Where to cut the rows so that no part is beyond the bounds: 0, ..., B. What cannot be cut is left whole, and a
    single row that is beyond them too: the server says what is wrong with it."""
    count = len(rows)
    if count < 2 or not rows.divisible:
        return [0, count]
    most = bounds.rows if rows.context is None else min(bounds.rows, bounds.ids // bounds.columns)
    ids = rows.ends + np.arange(count + 1) * rows.shared_ids
    sizes = rows.ends * (rows.ids.itemsize + (4 if rows.weights is not None else 0))
    row = rows.dense.shape[1] + (rows.columns if rows.lengths is not None else 0)
    sizes += np.arange(count + 1) * 4 * row
    left = bounds.bytes - len(rows.part(0, 0).serialized())
    if left <= 0:  # no row fits beside what all share
        return [0, count]
    room = max(0, left - _HEADERS)  # where it is 0 a row may still fit by itself
    cuts = [0]
    while cuts[-1] < count:
        start = cuts[-1]
        fitting = (
            np.searchsorted(total, total[start] + most_, "right") - 1
            for total, most_ in ((ids, bounds.ids), (sizes, room))
        )
        cuts.append(max(start + 1, min(count, start + most, *map(int, fitting))))
    return cuts


def _in_parts(rows: Rows, cuts: list[int]) -> Conversation[Prediction]:
    """One request after the other, all to the version that scored the first."""
    found: list[Prediction] = []
    for start, stop in pairwise(cuts):
        part = rows.part(start, stop)
        if found:
            part = replace(part, model=found[0].model_name, version=found[0].model_version)
        try:
            answer = yield Ask(PREDICT, part.serialized())
        except RequestError as error:
            where = f"rows {start} to {stop - 1} of {len(rows)}, sent by themselves and counted from 0"
            raise type(error)(f"{where}: {error}") from None
        found.append(_scored(part, answer))
    return joined(found)


def joined(parts: list[Prediction]) -> Prediction:
    """The parts' scores one after the other. They took their times one after the other too."""
    first = parts[0]
    return replace(
        first,
        scores={task: np.concatenate([part.scores[task] for part in parts]) for task in first.scores},
        batch_requests=max(part.batch_requests for part in parts),
        batch_rows=sum(part.batch_rows for part in parts),
        queue_us=sum(part.queue_us for part in parts),
        execute_us=sum(part.execute_us for part in parts),
    )


def _scored(rows: Rows, answer: bytes) -> Prediction:
    prediction = reading(read_response, answer)
    for task, scores in prediction.scores.items():
        if len(scores) != len(rows):
            raise TransportError(f"the server's answer has {len(scores)} scores of task {task} for {len(rows)} rows")
    return prediction


def error_of(error: grpc.RpcError) -> NarsilError:
    """The RequestError that the server meant, or TransportError; a foreign exception is translated here alone."""
    code = error.code() if hasattr(error, "code") else None
    details = error.details() if hasattr(error, "details") else None
    meant = None
    if code is not None and code is not grpc.StatusCode.UNAVAILABLE:
        meant = meant_by(code.value[0], details or code.name)
    return meant or TransportError(f"{code.name if code else 'call failed'}: {details or error}")


def reading(read: Callable[[bytes], T], answer: bytes) -> T:
    """``read(answer)``, whose faults are the server's and not the request's."""
    try:
        return read(answer)
    except (InvalidRequest, ArtifactError) as error:
        raise TransportError(f"the server's answer cannot be read: {error}") from None
