"""The conversations of both clients, without a network: what is asked, in which order, and what comes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.client import AsyncClient, Client, Context, Prediction, TransportError, aio, blocking
from narsil.client.calls import (
    Ask,
    Bounds,
    Conversation,
    Known,
    cuts_of,
    describing,
    predicting,
)
from narsil.client.rows import Rows, rows_of
from narsil.clock import FakeClock
from narsil.dataflow import RequestLimits, StageTimes
from narsil.errors import (
    InvalidRequest,
    MessageTooLarge,
    ModelNotFound,
    NarsilError,
    QueueFull,
    RequestError,
    status_of,
)
from narsil.transports import endpoints
from narsil.transports.codec import narsil_v1
from narsil.wire import GET_MODEL, PREDICT, VERSION_KEY
from tests.messages import Message, narsil_pb2
from tests.support import SCHEMA, run

T = TypeVar("T")


class Server:
    """Answers as a server with these limits would. A row's score is its first dense value; every call is kept."""

    def __init__(self, limits: RequestLimits, version: str = "3", *, whole: bool = False) -> None:
        self.limits = limits
        self.whole = whole
        self.version = version
        self.asked: list[Ask] = []

    def __call__(self, ask: Ask) -> bytes | NarsilError:
        self.asked.append(ask)
        if ask.method == GET_MODEL:
            return narsil_v1.encode_model("dlrm", self.version, "fake", SCHEMA, self.limits, whole=self.whole)
        if len(ask.body) > self.limits.max_bytes:
            return MessageTooLarge("too large", self.limits.max_bytes)
        request = narsil_v1.read(ask.body)
        if request.model_version not in ("", self.version):
            return ModelNotFound(f"version {request.model_version!r} is not served here")
        try:
            features = request.features(SCHEMA, self.limits)
        except InvalidRequest as error:
            return error
        scores = {"click": features.dense[:, 0], "buy": -features.dense[:, 0]}
        return narsil_v1.encode(request.request_id, "dlrm", self.version, scores, StageTimes(1e-3, 0, 2e-3, 1, 7))

    @property
    def requests(self) -> list[Message]:
        return [narsil_pb2.PredictRequest.FromString(ask.body) for ask in self.asked if ask.method == PREDICT]

    @property
    def methods(self) -> list[str]:
        return [ask.method for ask in self.asked]


def converse(conversation: Conversation[T], server: Callable[[Ask], bytes | NarsilError]) -> T:
    try:
        ask = next(conversation)
        while True:
            said = server(ask)
            ask = conversation.send(said) if isinstance(said, bytes) else conversation.throw(said)
    except StopIteration as done:
        return done.value


def rows(count: int, seed: int = 0, form: str = "one", **options) -> Rows:
    """Distinct rows; ``form``: one id a bag, jagged, or half of the features in a context."""
    random = np.random.default_rng(seed)
    dense = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    if form == "context":
        shared = Context({"user": [1, 2], "shop": [3]}, [1], [0.5])
        ids = random.integers(0, 7, (count, 2))
        return rows_of(dense[:, [0, 2]], ids, context=shared, feature_names=["item", "tags"], **options)
    if form == "jagged":
        lengths = random.integers(0, 5, (count, 4))
        return rows_of(dense, random.integers(0, 7, lengths.sum()), lengths, **options)
    return rows_of(dense, random.integers(0, 7, (count, 4)), **options)


FORMS = st.sampled_from(["one", "jagged", "context"])


def test_rows_that_are_taken_cost_one_call():
    server = Server(RequestLimits())
    found = converse(predicting(rows(5), {}), server)
    assert server.methods == [PREDICT]
    assert found.scores["click"].tolist() == [0, 3, 6, 9, 12]


@given(FORMS, st.integers(2, 40), st.integers(1, 50), st.integers(20, 400), st.integers(120, 3000), st.integers(0, 99))
def test_rows_beyond_any_limit_are_scored_in_parts_that_keep_context_and_order(form, count, most, ids, size, seed):
    server = Server(RequestLimits(most, ids, size))
    asked = rows(count, seed, form, request_id="r")
    try:
        found = converse(predicting(asked, {}), server)
    except MessageTooLarge:
        assert max(len(asked.part(row, row + 1).serialized()) for row in range(count)) > size - 64
        return
    assert found.scores["click"].tolist() == [3.0 * row for row in range(count)]
    assert found.scores["buy"].tolist() == [-3.0 * row for row in range(count)]
    assert (found.model_name, found.model_version, found.request_id) == ("dlrm", "3", "r")
    if len(server.asked) > 1:
        parts = server.requests[1:]
        assert sum(part.batch_size for part in parts) == count
        assert (found.batch_rows, found.queue_us, found.execute_us) == tuple(len(parts) * n for n in (7, 1000, 2000))
        whole = narsil_pb2.PredictRequest.FromString(asked.serialized())
        assert all(part.context == whole.context for part in parts)
        assert all(list(part.sparse.feature_names) == list(whole.sparse.feature_names) for part in parts)
        for field in ("values", "lengths"):
            assert b"".join(getattr(part.sparse, field) for part in parts) == getattr(whole.sparse, field)


@given(FORMS, st.integers(2, 60), st.integers(1, 60), st.integers(1, 500), st.integers(100, 3000), st.integers(0, 99))
def test_a_part_is_as_large_as_the_bounds_allow_and_no_larger(form, count, most, ids, size, seed):
    asked = rows(count, seed, form)
    bounds = Bounds(most, ids, size, columns=7)
    cuts = cuts_of(asked, bounds)
    assert cuts[0] == 0
    assert cuts[-1] == count
    assert cuts == sorted(set(cuts))

    def fits(start: int, stop: int, slack: int = 0) -> bool:
        part = asked.part(start, stop)
        held = int(part.ids.size) + len(part) * part.shared_ids
        expanded = len(part) * 7 if form == "context" else 0
        return len(part) <= most and max(held, expanded) <= ids and len(part.serialized()) + slack <= size

    if len(cuts) == 2 and not fits(0, count):
        return  # not even the parts' common fields fit, or no more than one row is left
    for start, stop in pairwise(cuts):
        assert stop == start + 1 or fits(start, stop)
        assert stop == count or not fits(start, stop + 1, slack=64)


SHARED = {"little": Context({"user": [1]}), "much": Context({"user": [1] * 20})}


@pytest.mark.parametrize(
    ("shared", "bounds", "cuts"),
    [
        (None, Bounds(rows=4), [0, 4, 8, 10]),
        (None, Bounds(rows=10), [0, 10]),
        (None, Bounds(ids=15), [0, 3, 6, 9, 10]),  # 4 ids a row
        ("little", Bounds(ids=15, columns=7), [0, 2, 4, 6, 8, 10]),  # 4 ids a row, and 7 columns
        ("much", Bounds(ids=75, columns=7), [0, 3, 6, 9, 10]),  # 23 ids a row
        ("much", Bounds(ids=22, columns=7), list(range(11))),
    ],
)
def test_rows_are_cut_where_the_bounds_say(shared, bounds, cuts):
    context = None if shared is None else SHARED[shared]
    assert cuts_of(rows_of(np.zeros((10, 3)), np.zeros((10, 3 if shared else 4), int), context=context), bounds) == cuts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["one", "jagged", "context"])
def test_parts_have_as_many_bytes_as_they_may(form, weighted):
    asked = rows(1000, 0, form)
    asked = replace(asked, weights=np.ones(asked.ids.size, np.float32)) if weighted else asked
    size = len(asked.part(0, 400).serialized()) + 64
    cuts = cuts_of(asked, Bounds(bytes=size))
    parts = [len(asked.part(start, stop).serialized()) for start, stop in pairwise(cuts)]
    assert max(parts) <= size
    assert cuts[1] >= 400
    assert len(cuts) == 4


def test_weights_go_with_their_ids():
    asked = rows_of([[0.0], [1.0], [2.0]], [1, 2, 3, 4], [[1, 1], [0, 1], [1, 0]], weights=[0.1, 0.2, 0.3, 0.4])
    part = narsil_pb2.PredictRequest.FromString(asked.part(1, 3).serialized()).sparse
    assert np.frombuffer(part.values, "<i8").tolist() == [3, 4]
    assert np.frombuffer(part.lengths, "<i4").tolist() == [0, 1, 1, 0]
    assert np.frombuffer(part.weights, "<f4").tolist() == np.array([0.3, 0.4], np.float32).tolist()


def test_limits_are_kept_for_each_model_and_version_and_whether_rows_may_be_cut_is_asked_each_time():
    server, known = Server(RequestLimits(max_rows=4)), {}
    for _ in range(2):
        converse(predicting(rows(8), known), server)
    assert server.methods == [PREDICT, GET_MODEL, PREDICT, PREDICT, GET_MODEL, PREDICT, PREDICT]
    converse(predicting(rows(8, model="dlrm", version="3"), known), server)
    assert server.methods[7:] == [PREDICT, GET_MODEL, PREDICT, PREDICT]
    assert server.asked[8].metadata == ((VERSION_KEY, "3"),)
    assert narsil_v1.decode_get_model(server.asked[8].body) == "dlrm"


def test_rows_of_a_model_that_has_come_to_need_them_together_are_no_longer_cut():
    server, known = Server(RequestLimits(max_rows=4)), {}
    converse(predicting(rows(8), known), server)
    server.whole = True
    with pytest.raises(InvalidRequest, match="batch_size is 8; it must be 1 to 4 rows"):
        converse(predicting(rows(8), known), server)
    assert max(request.batch_size for request in server.requests[-1:]) == 8
    server.limits = RequestLimits(max_rows=8)
    assert converse(predicting(rows(8), known), server).scores["click"].tolist() == [3.0 * row for row in range(8)]


def test_a_server_that_takes_less_than_it_did_is_asked_again():
    server, known = Server(RequestLimits(max_rows=4)), {}
    converse(predicting(rows(8), known), server)
    server.limits = RequestLimits(max_rows=2)
    found = converse(predicting(rows(4), known), server)
    assert found.scores["click"].tolist() == [0, 3, 6, 9]


def test_all_parts_are_scored_by_the_version_that_scored_the_first():
    server = Server(RequestLimits(max_rows=2))

    def swapped(ask: Ask) -> bytes | NarsilError:
        said = server(ask)
        server.version = "4" if len(server.requests) == 2 else server.version
        return said

    with pytest.raises(
        ModelNotFound, match="rows 2 to 3 of 4, sent by themselves and counted from 0: version '3' is not"
    ):
        converse(predicting(rows(4), {}), swapped)
    assert [part.model_version for part in server.requests] == ["", "", "3"]


@pytest.mark.parametrize("form", ["one", "jagged", "context"])
def test_a_row_that_is_wrong_is_named_by_the_part_that_it_went_in(form):
    server = Server(RequestLimits(max_rows=2))
    asked = rows(5, 0, form)
    if form == "jagged":
        asked.lengths[3, 1], asked.lengths[3, 2] = asked.lengths[3, 1:3].sum(), 0
        asked = rows_of(
            asked.dense, np.where(np.arange(asked.ids.size) == asked.ends[4] - 1, 5000, asked.ids), asked.lengths
        )
    else:
        asked.ids[3, -1] = 5000
    with pytest.raises(
        InvalidRequest, match=r"rows 2 to 3 of 5, sent by themselves and counted from 0: feature \w+, row 1: id 5000"
    ):
        converse(predicting(asked, {}), server)


def test_a_row_that_is_wrong_among_few_is_told_as_the_server_tells_it():
    asked = rows(3)
    asked.ids[1, 3] = 5000
    with pytest.raises(InvalidRequest, match=r"^feature shop, row 1: id 5000 is outside its table"):
        converse(predicting(asked, {}), Server(RequestLimits()))


@pytest.mark.parametrize(
    "broken",
    [
        rows_of(np.zeros((4, 3)), np.zeros((3, 4), int)),
        rows_of(np.zeros((4, 3)), np.zeros(5, int), np.ones((4, 4), int)),
        rows_of(np.zeros((4, 3)), np.zeros(14, int), np.array([[1, 1, 1, 1], [1, 1, 1, -1], *[[1] * 4] * 2])),
        rows_of(np.zeros((4, 3)), np.zeros((4, 4), int), weights=np.ones(3)),
    ],
)
def test_rows_whose_parts_disagree_are_not_cut_and_the_server_says_why(broken):
    assert not broken.divisible
    server = Server(RequestLimits(max_rows=4))
    with pytest.raises(InvalidRequest, match=r"(bytes for 4 rows|lengths add up|is negative|weights given)"):
        converse(predicting(broken, {}), server)
    assert len(server.requests) == 1


def test_a_request_whose_rows_depend_on_each_other_is_not_cut():
    server = Server(RequestLimits(4, 1 << 20, 1 << 20), whole=True)
    with pytest.raises(InvalidRequest, match="batch_size is 9; it must be 1 to 4 rows"):
        converse(predicting(rows(9), {}), server)
    assert server.methods == [PREDICT, GET_MODEL]


def test_a_single_row_that_is_too_large_is_asked_once():
    server = Server(RequestLimits(max_bytes=100))
    with pytest.raises(MessageTooLarge):
        converse(predicting(rows(1, request_id="r" * 100), {}), server)
    assert server.methods == [PREDICT]


def test_where_nothing_fits_beside_what_the_rows_share_the_refusal_is_told():
    server = Server(RequestLimits(max_bytes=100))
    with pytest.raises(MessageTooLarge, match=r"^too large$"):
        converse(predicting(rows(10, request_id="r" * 100), {}), server)
    assert server.methods == [PREDICT, GET_MODEL]


def test_a_proxy_s_smaller_limit_counts_and_is_kept():
    server, proxy = Server(RequestLimits()), 300

    def through_proxy(ask: Ask) -> bytes | NarsilError:
        return MessageTooLarge("too large", proxy) if len(ask.body) > proxy else server(ask)

    known: Known = {}
    for _ in range(2):
        found = converse(predicting(rows(20), known), through_proxy)
        assert found.scores["click"].tolist() == [3.0 * row for row in range(20)]
    assert known["", ""].bytes == proxy


@pytest.mark.parametrize("answer", [TransportError("gone"), narsil_pb2.Model().SerializeToString()])
def test_a_server_that_does_not_tell_its_limits_still_tells_the_bytes(answer):
    server = Server(RequestLimits(max_bytes=400))
    found = converse(predicting(rows(20), {}), lambda ask: answer if ask.method == GET_MODEL else server(ask))
    assert found.scores["click"].tolist() == [3.0 * row for row in range(20)]


def test_a_server_that_does_not_tell_its_limits_has_the_last_word():
    server = Server(RequestLimits(max_rows=4))
    with pytest.raises(InvalidRequest, match="batch_size is 8; it must be 1 to 4 rows"):
        converse(predicting(rows(8), {}), lambda ask: ModelNotFound("no") if ask.method == GET_MODEL else server(ask))


@pytest.mark.parametrize("error", [QueueFull("full"), TransportError("gone"), ModelNotFound("no")])
def test_other_ends_are_passed_on_at_once(error):
    asked: list[Ask] = []

    def server(ask: Ask) -> NarsilError:
        asked.append(ask)
        return error

    with pytest.raises(type(error), match=str(error)):
        converse(predicting(rows(8), {}), server)
    assert len(asked) == 1


def test_a_full_queue_in_the_middle_is_a_full_queue():
    server = Server(RequestLimits(max_rows=4))
    with pytest.raises(QueueFull, match="rows 4 to 7 of 8, sent by themselves and counted from 0: full"):
        converse(predicting(rows(8), {}), lambda ask: QueueFull("full") if len(server.asked) == 3 else server(ask))


def test_an_answer_with_too_few_scores_is_no_answer():
    server = Server(RequestLimits())
    few = server(Ask(PREDICT, rows(3).serialized()))
    with pytest.raises(TransportError, match="3 scores of task click for 5 rows"):
        converse(predicting(rows(5), {}), lambda ask: few)


def test_a_model_is_described_with_its_limits():
    limits = RequestLimits(10, 20, 3000)
    info = converse(describing("dlrm", "3"), Server(limits))
    assert (info.schema, info.limits) == (SCHEMA, limits)
    silent = converse(describing(), lambda ask: narsil_v1.encode_model("m", "1", "b", SCHEMA, RequestLimits(0, 0, 0)))
    assert silent.limits is None


def test_methods_and_keys_are_those_of_the_endpoints():
    assert {PREDICT, GET_MODEL} == {e.method for e in endpoints.ENDPOINTS if e.service == "narsil.v1.Inference"}
    assert VERSION_KEY == endpoints.VERSION_KEY


def test_both_clients_take_the_same_arguments():
    for name in ("__init__", "predict", "model"):
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name))


def test_rows_of_no_length_are_left_to_the_server():
    assert cuts_of(replace(rows(2), dense=np.empty((0, 3), np.float32)), Bounds(1, 1, 1)) == [0, 0]


class Ended(grpc.RpcError):
    """As grpcio raises it."""

    def __init__(self, error: RequestError) -> None:
        self.error = error

    def code(self) -> grpc.StatusCode:
        return next(code for code in grpc.StatusCode if code.value[0] == status_of(self.error))

    def details(self) -> str:
        return str(self.error)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_the_timeout_is_for_all_calls_together(kind, monkeypatch):
    server, now, left = Server(RequestLimits(max_rows=4)), FakeClock(), []

    def call(method: str) -> Callable[..., Any]:
        def answer(body: bytes, timeout: float, metadata: tuple) -> bytes:
            left.append(timeout)
            now.advance(1)
            said = server(Ask(method, body, metadata))
            if isinstance(said, bytes):
                return said
            assert isinstance(said, RequestError)
            raise Ended(said)

        async def answer_later(*arguments: Any, **named: Any) -> bytes:
            return answer(*arguments, **named)

        return answer if kind is Client else answer_later

    async def ask() -> Prediction:
        client = kind("127.0.0.1:1")
        client._methods = {method: call(method) for method in (PREDICT, GET_MODEL)}
        predicted = client.predict(np.ones((8, 3)), np.zeros((8, 4), int), timeout=10)
        return predicted if kind is Client else await predicted

    module = blocking if kind is Client else aio
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=now.now))
    assert run(ask()).scores["click"].tolist() == [1] * 8
    assert left == [10, 9, 8, 7]
