"""Several models behind one address: each request is scored by the model that it names, while models come and go."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.fake import FakeBehaviour
from narsil.bench.workload import narsil_body, predictor_body
from narsil.catalog.catalog import Catalog
from narsil.catalog.manager import ModelManager
from narsil.client import Client, TransportError, read_response
from narsil.dataflow import Features, OneHot, Result
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.errors import InvalidRequest, ModelNotFound, RequestError
from narsil.telemetry.observer import CountingObserver
from narsil.transports import endpoints
from narsil.transports.base import Transport
from narsil.transports.endpoints import Decoded, Metadata
from tests.conformance.serving import scores_in
from tests.support import (
    PATIENCE_S,
    SCHEMA,
    TRANSPORTS,
    engine_with,
    fake_model,
    grpc_transport,
    jagged,
    one_hot,
    scores_alone,
    unary,
    wait_until,
)

# Of other counts, rows and id type than SCHEMA, so that a request read by the wrong one is refused or scores otherwise.
OTHER = ModelSchema(
    dense_dim=1,
    features=(Feature("query", "t_query", rows=1 << 40, dim=4), Feature("doc", "t_doc", rows=11, dim=4)),
    tasks=("click", "buy"),
)
PREDICTOR, NARSIL = "/predictor.Predictor/Predict", "/narsil.v1.Inference/Predict"


@pytest.fixture(params=TRANSPORTS)
def kind(request) -> str:
    """The transport under test."""
    return request.param


@contextmanager
def serving(
    kind: str, *models: ServedModel, lanes: int = 2, **policy: int
) -> Iterator[tuple[str, ModelManager, CountingObserver]]:
    """These models behind one address, the first of them the default."""
    observer = CountingObserver()
    policies = BatchPolicy(lanes=lanes, **policy)
    with engine_with(lanes=lanes, model=models[0], policy=policies, observer=observer) as engine:
        manager = ModelManager(engine)
        for model in models:
            manager.add(model)
        with grpc_transport(engine, None, kind, observer) as (transport, address, _):
            subscribe(manager, transport)
            yield address, manager, observer


def subscribe(manager: ModelManager, transport: Transport) -> None:
    manager.subscribe(transport.serve)


def named(rows: Features, model: str) -> bytes:
    """Rows on Narsil's wire, for this model."""
    return b"\x0a" + bytes([len(model)]) + model.encode() + narsil_body(rows)


def small(rows: int, seed: int) -> Features:
    """Rows of SCHEMA: one id a bag, or any number."""
    return (one_hot if seed % 2 else jagged)(rows, seed)


def other(rows: int, seed: int) -> Features:
    """Rows of OTHER, whose ids are int64 on Narsil's wire and small enough for TorchRec's."""
    return one_hot(rows, seed, ModelSchema(1, (Feature("query", "t", 90, 4), Feature("doc", "t2", 11, 4))))


def test_a_request_names_its_model_in_the_message_or_by_metadata(kind):
    with (
        serving(kind, fake_model(lanes=2, name="a"), fake_model(lanes=2, name="b", schema=OTHER)) as (address, _, _),
        grpc.insecure_channel(address) as channel,
    ):
        predict, score = channel.unary_unary(NARSIL), channel.unary_unary(PREDICTOR)
        rows, others = small(3, 1), other(3, 1)
        by_name = read_response(predict(named(others, "b"), timeout=PATIENCE_S))
        assert (by_name.model_name, set(by_name.scores)) == ("b", {"click", "buy"})
        metadata = (("narsil-model", "b"), ("narsil-model-version", "1"))
        for found in (
            by_name,
            read_response(predict(narsil_body(others), metadata=metadata, timeout=PATIENCE_S)),
        ):
            for task in OTHER.tasks:
                np.testing.assert_array_equal(found.scores[task], scores_alone(others, OTHER))
        body = score(predictor_body(others), metadata=metadata, timeout=PATIENCE_S)
        np.testing.assert_array_equal(scores_in(body, "buy"), scores_alone(others, OTHER))
        np.testing.assert_array_equal(scores_in(score(predictor_body(rows), timeout=PATIENCE_S)), scores_alone(rows))


def test_a_request_that_names_two_models_or_one_that_is_not_served_is_told_so(kind):
    with (
        serving(kind, fake_model(lanes=2, name="a"), fake_model(lanes=2, name="b")) as (address, _, observer),
        grpc.insecure_channel(address) as channel,
    ):
        for body, metadata, code, text in (
            (named(small(1, 1), "a"), [("narsil-model", "b")], "INVALID_ARGUMENT", "give one of them"),
            (named(small(1, 1), "c"), [], "NOT_FOUND", "this server serves 'a', 'b'"),
            (narsil_body(small(1, 1)), [("narsil-model", "c")], "NOT_FOUND", "'c' is not served here"),
            (narsil_body(small(1, 1)), [("narsil-model-version", "7")], "NOT_FOUND", "version '7' of a"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                unary(channel, NARSIL)(body, metadata=metadata, timeout=PATIENCE_S)
            assert caught.value.code().name == code
            assert text in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, PREDICTOR)(predictor_body(small(1, 1)), metadata=[("narsil-model", "c")], timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        counted = observer.refusals()
    assert counted == {
        (NARSIL, "InvalidRequest"): 1,
        (NARSIL, "ModelNotFound"): 3,
        (PREDICTOR, "ModelNotFound"): 1,
    }


def test_each_model_s_schema_can_be_asked_for(kind):
    models = [fake_model(lanes=2, name="a"), fake_model(lanes=2, name="b", schema=OTHER)]
    with serving(kind, *models) as (address, _, _), grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/narsil.v1.Inference/GetModel")
        with Client(address) as client:
            assert client.model().schema == SCHEMA
        assert b"t_query" in ask(b"\x0a\x01b", timeout=PATIENCE_S)
        assert b"t_query" in ask(b"", metadata=(("narsil-model", "b"),), timeout=PATIENCE_S)


def test_a_new_version_takes_over_and_the_old_one_can_still_be_named(kind):
    with serving(kind, fake_model(lanes=2)) as (address, manager, _), Client(address) as client:
        rows = one_hot(2)

        def version(**names: Any) -> str:
            return client.predict(rows.dense, rows.sparse.ids.T, **names).model_version

        assert version() == "1"
        manager.add(fake_model(lanes=2, version="2"))
        assert version() == "2"
        assert version(version="1") == "1"
        manager.remove(manager.catalog.find("fake", "1"))
        assert version() == "2"
        with pytest.raises(ModelNotFound, match="'2' is"):
            version(version="1")


def test_without_any_model_calls_are_unavailable_and_with_the_next_one_they_are_served(kind):
    with serving(kind, fake_model(lanes=2)) as (address, manager, _), Client(address) as client:
        rows = one_hot(2)
        manager.remove(manager.catalog.find())
        with pytest.raises(TransportError, match=r"UNAVAILABLE.*serves no model now"):
            client.predict(rows.dense, rows.sparse.ids.T)
        manager.add(fake_model(lanes=2, name="next"))
        assert client.predict(rows.dense, rows.sparse.ids.T).model_name == "next"


def test_wide_tasks_and_names_of_any_text_come_through_whole_and_in_pieces(kind):
    task, feature = '点击率 (7d) | "q"', Feature("user id", "table of users", rows=1000, dim=4)
    schema = ModelSchema(2, (feature, Feature("b", "t", 9, 4)), ("one", task), (1, 3))
    with (
        serving(kind, fake_model(lanes=2, schema=schema), max_rows=32) as (address, *_),
        Client(address) as client,
        grpc.insecure_channel(address) as channel,
    ):
        assert client.model().schema == schema
        for count in (1, 2, 77):
            random = np.random.default_rng(count)
            sparse = OneHot(random.integers(0, 9, (2, count), np.int32))
            rows = Features(count, random.random((count, 2), np.float32), sparse)
            one = scores_alone(rows, schema)
            wide = one[:, None] + np.arange(3, dtype=np.float32)
            named: dict[str, Any] = {"feature_names": ["b", "user id"]}
            for ids, names in ((sparse.ids.T, {}), (sparse.ids[::-1].T, named)):
                found = client.predict(rows.dense, ids, **names).scores
                assert list(found) == ["one", task]
                np.testing.assert_array_equal(found["one"], one)
                np.testing.assert_array_equal(found[task], wide)
            reply = unary(channel, PREDICTOR)(predictor_body(rows), timeout=PATIENCE_S)
            np.testing.assert_array_equal(scores_in(reply, task), wide.ravel())
            np.testing.assert_array_equal(scores_in(reply, "one"), one)


def test_an_error_names_a_feature_of_any_text(kind):
    schema = ModelSchema(1, (Feature("用户 %41 id", "t", 9, 4),))
    with (
        serving(kind, fake_model(lanes=2, schema=schema)) as (address, *_),
        Client(address) as client,
        pytest.raises(InvalidRequest, match="feature 用户 %41 id, row 1: id 9 is outside"),
    ):
        client.predict(np.zeros((2, 1)), np.array([[0], [9]]))


class Traffic:
    """Clients that mix models and wires, and check every answer."""

    def __init__(self, address: str, each: int) -> None:
        self.address, self.each = address, each
        self.sent = {"base": 0, "guest": 0}
        self.answered = {"base": 0, "guest": 0}
        self.refused = 0  # guests that came after it had gone
        self.wrong: list[str] = []
        self.may_refuse = threading.Event()
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            calls = [channel.unary_unary(PREDICTOR), channel.unary_unary(NARSIL)]
            for number in range(self.each):
                name = ("base", "guest")[int(random.integers(2))]
                wire = int(random.integers(2))
                rows = (small if name == "base" else other)(int(random.integers(1, 9)), number * 7919 + seed)
                self._one(calls[wire], wire, name, rows)

    def _one(self, call: Any, wire: int, name: str, rows: Features) -> None:
        schema, tasks = (SCHEMA, ("default",)) if name == "base" else (OTHER, OTHER.tasks)
        body = (predictor_body if wire == 0 else narsil_body)(rows)
        may_refuse = self.may_refuse.is_set()
        with self._lock:
            self.sent[name] += 1
        try:
            reply = call(body, metadata=[("narsil-model", name)], timeout=PATIENCE_S)
        except grpc.RpcError as error:
            expected = name == "guest" and error.code() is grpc.StatusCode.NOT_FOUND and self.may_refuse.is_set()
            with self._lock:
                if expected:
                    self.refused += 1
                else:
                    self.wrong.append(f"{name}: {error.code()} {error.details()} {may_refuse}")
            return
        scores = {task: scores_in(reply, task) for task in tasks} if wire == 0 else read_response(reply).scores
        right = all(np.array_equal(scores[task], scores_alone(rows, schema)) for task in tasks)
        with self._lock:
            self.answered[name] += 1
            if not right or set(scores) != set(tasks):
                self.wrong.append(f"{name}: {scores}")


@pytest.mark.timeout(300)
def test_a_model_joins_and_leaves_under_ten_thousand_mixed_requests_and_every_score_is_right(kind):
    base, guest = fake_model(lanes=2, name="base"), fake_model(lanes=2, name="guest", schema=OTHER)
    with serving(kind, base) as (address, manager, observer):
        manager.add(guest, [other(rows, rows) for rows in (1, 16)])
        traffic = Traffic(address, each=1250)
        clients = [threading.Thread(target=traffic.client, args=(seed,)) for seed in range(8)]
        for thread in clients:
            thread.start()
        wait_until(lambda: sum(traffic.answered.values()) > 6000)
        traffic.may_refuse.set()
        manager.remove(guest)
        for thread in clients:
            thread.join(PATIENCE_S * 3)
        ends = {name: observer.model(name, "1").ends for name in ("base", "guest")}
        gone = weakref.ref(guest)
        del guest
        wait_until(lambda: gc.collect() >= 0 and gone() is None)
    assert traffic.wrong == []
    assert sum(traffic.sent.values()) == 10_000
    assert traffic.answered["base"] == traffic.sent["base"] == ends["base"]["answered"]
    assert traffic.answered["guest"] == ends["guest"]["answered"] == traffic.sent["guest"] - traffic.refused
    assert traffic.answered["guest"] > 2000
    assert traffic.refused > 500  # it did leave while requests for it went on


def test_lanes_belong_to_the_process_and_not_to_a_model(kind):
    before = set(threading.enumerate())
    with serving(kind, fake_model(lanes=2, name="a"), fake_model(lanes=2, name="b")):
        lanes = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("lane-")]
    assert sorted(lanes) == ["lane-0", "lane-1"]


class Broken(CountingObserver):
    """Counts, and then raises."""

    def refused(self, method: str, error: Exception) -> None:
        super().refused(method, error)
        raise OSError("the disk is full")

    def undelivered(self, method: str, error: Exception) -> None:
        super().undelivered(method, error)
        raise OSError("the disk is full")


def test_an_observer_that_raises_changes_no_answer(kind):
    observer = Broken()
    with engine_with(observer=observer) as engine, grpc_transport(engine, None, kind, observer) as (_, address, _):
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            unary(channel, NARSIL)(b"\xff", timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert observer.refusals() == {(NARSIL, "InvalidRequest"): 1}


class Planted:
    """A new wire that scores: one row of SCHEMA, whatever is sent. Its answers cannot be written."""

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        return Decoded(catalog.find(), one_hot(1))

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        raise ValueError("no such field")

    def refusal(self, error: RequestError) -> bytes | None:
        return None


NEW_WIRE = "/new.Wire/Score"


@pytest.fixture
def planted(monkeypatch):
    rows = (*endpoints.ENDPOINTS, endpoints.Endpoint(NEW_WIRE, endpoints.Kind.SCORES, wire=Planted()))
    for module in ("endpoints", "grpc_aio", "native"):
        monkeypatch.setattr(f"narsil.transports.{module}.ENDPOINTS", rows)


@pytest.mark.usefixtures("planted")
def test_a_new_wire_is_a_row_its_calls_can_be_taken_back_and_what_it_cannot_write_is_told(kind):
    behaviour, observer = FakeBehaviour(hold=threading.Event()), CountingObserver()
    assert behaviour.hold is not None
    with (
        engine_with(behaviour, policy=BatchPolicy(max_requests=1), observer=observer) as engine,
        grpc_transport(engine, None, kind, observer) as (_, address, _),
        grpc.insecure_channel(address) as channel,
    ):
        call = unary(channel, NEW_WIRE)
        running = call.future(b"", timeout=PATIENCE_S)
        wait_until(lambda: len(behaviour.forwards) == 1)
        waiting = call.future(b"", timeout=PATIENCE_S)
        wait_until(lambda: engine.statistics().queued == 1)
        waiting.cancel()
        wait_until(lambda: engine.statistics().queued == 0)
        behaviour.hold.set()
        with pytest.raises(grpc.RpcError) as caught:
            running.result()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert engine.statistics().cancelled == 1
    assert observer.failures() == {NEW_WIRE: 1}
