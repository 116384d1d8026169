"""The plane's set of models: which of them a request means, and how long each of them lives."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.bench.workload import predictor_body
from narsil.catalog.catalog import Catalog, Routes
from narsil.client import build_request
from narsil.extension import AVAILABLE
from narsil.transports.codec import narsil_v1, predictor
from tests.messages import narsil_pb2
from tests.support import PATIENCE_S, fake_model, one_hot

if not AVAILABLE:
    pytest.skip("built without the native extension", allow_module_level=True)

from narsil._native import Call, Model, Plane, collate
from tests.conformance.http2_client import RawClient, request_headers
from tests.http2_peer import DATA, END_HEADERS, END_STREAM, HEADERS, grpc_message, hpack
from tests.unit.test_native_plane import next_call

NARROW = ModelSchema(dense_dim=1, features=(Feature("a", "t_a", rows=10, dim=4),))
BROAD = ModelSchema(dense_dim=2, features=(Feature("a", "t_a", rows=5, dim=4), Feature("b", "t_b", rows=5, dim=4)))
KINDS: dict[str, Any] = {predictor.METHOD: "predictor", narsil_v1.METHOD: "narsil"}


class Served:
    """Stands for what Narsil serves; can be asked whether it still lives."""

    def __init__(self, name: str, version: str = "1", schema: ModelSchema = NARROW) -> None:
        self.name, self.version, self.schema = name, version, schema

    def __repr__(self) -> str:
        return f"{self.name}/{self.version}"


def native(served: Served) -> Model:
    schema = served.schema
    return Model(
        served,
        name=served.name,
        version=served.version,
        dense_dim=schema.dense_dim,
        nan_columns=list(schema.nan_columns),
        rows=schema.rows.tolist(),
        least=schema.least.tolist(),
        wide_ids=schema.id_dtype.itemsize == 8,
        max_rows=10,
        max_ids=100,
    )


def body_for(schema: ModelSchema, wire: str = narsil_v1.METHOD, name: str = "", version: str = "") -> bytes:
    if wire == predictor.METHOD:
        return predictor_body(one_hot(2, schema=schema))
    dense, ids = np.ones((2, schema.dense_dim), np.float32), np.ones((2, schema.num_features), np.int64)
    message = narsil_pb2.PredictRequest.FromString(build_request(dense, ids))
    message.model_name, message.model_version = name, version
    return message.SerializeToString()


def metadata(name: str = "", version: str = "") -> list[tuple[str, str]]:
    pairs = (("narsil-model", name), ("narsil-model-version", version))
    return [(key, value) for key, value in pairs if value]


@pytest.fixture
def plane() -> Iterator[Plane]:
    made = Plane(KINDS)
    yield made
    made.stop(0)


@pytest.fixture
def client(plane, tmp_path) -> Iterator[RawClient]:
    path = str(tmp_path / "socket")
    plane.listen_unix(path)
    with RawClient(f"unix:{path}") as made:
        yield made


def take(plane: Plane, client: RawClient, schema: ModelSchema, wire: str = narsil_v1.METHOD) -> tuple[int, Call]:
    stream = client.call(body_for(schema, wire), wire)
    return stream, next_call(plane)


@pytest.mark.parametrize(
    ("message", "extra", "meant"),
    [
        (("", ""), ("", ""), "b/2"),
        (("b", ""), ("", ""), "b/2"),
        (("b", "1"), ("", ""), "b/1"),
        (("", "1"), ("", ""), "b/1"),
        (("a", ""), ("", ""), "a/1"),
        (("a", "2"), ("", ""), None),
        (("c", ""), ("", ""), None),
        (("", "3"), ("", ""), None),
        (("", ""), ("b", ""), "b/2"),
        (("", ""), ("b", "1"), "b/1"),
        (("", ""), ("", "1"), "b/1"),
        (("", ""), ("a", ""), "a/1"),
        (("", ""), ("a", "2"), None),
        (("", ""), ("c", ""), None),
        (("a", ""), ("a", ""), "a/1"),
        (("b", ""), ("b", "1"), "b/1"),
        (("b", "1"), ("b", "1"), "b/1"),
        (("a", ""), ("b", ""), None),
        (("b", "1"), ("b", "2"), None),
        (("", "1"), ("", "2"), None),
        (("b", ""), ("bb", ""), None),
        (("bb", ""), ("b", ""), None),
    ],
)
def test_a_request_means_the_model_that_it_names(plane, client, message, extra, meant):
    plane.serve([native(Served("a")), native(Served("b", "2")), native(Served("b", "1"))], default=1)
    client.call(body_for(NARROW, name=message[0], version=message[1]), narsil_v1.METHOD, metadata(*extra))
    call = next_call(plane)
    assert (repr(call.served) if call.decoded else None) == meant
    assert (call.model_name, call.model_version) == extra
    if message == ("", ""):
        client.call(body_for(NARROW, predictor.METHOD), predictor.METHOD, metadata(*extra))
        call = next_call(plane)
        assert (repr(call.served) if call.decoded else None) == meant
        assert (call.model_name, call.model_version) == extra


def test_the_first_listed_of_a_name_is_meant_without_a_version(plane, client):
    for versions in (["1", "2"], ["2", "1"]):
        plane.serve([native(Served("a")), *(native(Served("b", version)) for version in versions)])
        client.call(body_for(NARROW, name="b"), narsil_v1.METHOD)
        assert next_call(plane).served.version == versions[0]


def drawn(plane: Plane, client: RawClient, count: int, **said: str) -> list[str]:
    """The versions that as many requests are decoded for."""
    found = []
    for _ in range(count):
        client.call(body_for(NARROW, **said), narsil_v1.METHOD)
        call = next_call(plane)
        found.append(call.served.version if call.decoded else "")
    return found


def test_routes_deal_out_requests_as_the_catalog_does(plane, client):
    models = [fake_model(name="ads", version=version) for version in ("1", "2", "3")]
    catalog = Catalog(models, {"ads": Routes({"stable": "1"}, {"2": 3.0, "stable": 1.0})})
    places = {model.version: place for place, model in enumerate(models)}
    routes = [
        (name, label, [(places[model.version], share) for model, share in parts])
        for name, label, parts in catalog.routes()
    ]
    plane.serve([native(Served("ads", model.version)) for model in models], default=2, routes=routes)
    assert drawn(plane, client, 40) == [catalog.route().version for _ in range(40)]
    assert sorted(set(drawn(plane, client, 4, name="ads"))) == ["1", "2"]
    assert drawn(plane, client, 2, version="stable") == ["1", "1"]
    assert drawn(plane, client, 1, name="ads", version="3") == ["3"]
    assert drawn(plane, client, 1, version="canary") == [""]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(1, 1.0)], "the place of no model"),
        ([(0, 0.0)], "above 0"),
        ([(0, float("nan"))], "above 0"),
        ([(0, float("inf"))], "above 0"),
        ([], "leads nowhere"),
    ],
)
def test_a_route_leads_to_models_that_are_there(plane, parts, said):
    with pytest.raises(ValueError, match=said):
        plane.serve([native(Served("a"))], routes=[("a", "", parts)])


def test_a_request_is_held_against_the_schema_of_the_model_that_it_names(plane, client):
    plane.serve([native(Served("narrow")), native(Served("broad", schema=BROAD))])
    for wire in KINDS:
        for name, schema in (("narrow", NARROW), ("broad", BROAD)):
            for sent in (NARROW, BROAD):
                client.call(body_for(sent, wire), wire, metadata(name))
                call = next_call(plane)
                assert call.decoded == (sent is schema)
                if call.decoded:
                    assert call.served.name == name
                    assert call.arrays()[0].shape == (2, schema.dense_dim)


def test_metadata_that_comes_twice_names_no_model_and_bytes_that_are_no_text_are_readable(plane, client):
    plane.serve([native(Served("a"))])
    client.call(body_for(NARROW), narsil_v1.METHOD, [*metadata("a"), *metadata("a")])
    call = next_call(plane)
    assert (call.model_name, call.decoded, call.served) == ("a,a", False, None)
    no_text = b"\x00\x0cnarsil-model\x02\xff\xfe"
    client.frame(HEADERS, END_HEADERS, 3, hpack(request_headers(narsil_v1.METHOD)) + no_text)
    client.frame(DATA, END_STREAM, 3, grpc_message(body_for(NARROW)))
    call = next_call(plane)
    assert (call.model_name, call.decoded) == ("\ufffd\ufffd", False)


def test_without_models_nothing_is_decoded(plane, client):
    for _ in range(2):
        for wire in KINDS:
            _, call = take(plane, client, NARROW, wire)
            assert (call.decoded, call.served) == (False, None)
            with pytest.raises(ValueError, match="not decoded"):
                call.answer_scores({}, 1, 1, 0.0, 0.0)
        plane.serve([native(Served("a"))])
        plane.serve([])


def test_a_model_lives_until_it_is_out_of_the_set_and_its_last_call_has_gone(plane, client):
    gc.disable()  # by plain counting of references
    try:
        first, second = Served("one"), Served("two", schema=BROAD)
        lives = weakref.ref(first), weakref.ref(second)
        plane.serve([native(first), native(second)], default=0)
        del first, second
        _, of_first = take(plane, client, NARROW)
        _, also_of_first = take(plane, client, NARROW, predictor.METHOD)
        plane.serve([native(lives[1]())])
        _, of_second = take(plane, client, BROAD)
        assert [life() is not None for life in lives] == [True, True]
        plane.serve([])
        del of_first
        assert [life() is not None for life in lives] == [True, True]
        assert also_of_first.served is lives[0]()
        del also_of_first
        assert [life() is not None for life in lives] == [False, True]
        del of_second
        assert [life() is not None for life in lives] == [False, False]
    finally:
        gc.enable()


def test_a_model_without_calls_is_freed_when_the_set_is_swapped_and_with_its_plane(tmp_path):
    gc.disable()
    try:
        plane = Plane(KINDS)
        lives = []
        for number in range(3):
            served = Served(str(number))
            lives.append(weakref.ref(served))
            plane.serve([native(served)])
            del served
            assert [life() is not None for life in lives] == [False] * number + [True]
        plane.stop(0)
        assert lives[-1]() is not None
        del plane
        assert lives[-1]() is None
    finally:
        gc.enable()


def test_what_a_model_s_end_calls_may_use_the_plane(plane):
    ends = []
    served = Served("a")
    weakref.finalize(served, lambda: ends.append(plane.statistics()["calls"]))
    plane.serve([native(served)])
    del served
    plane.serve([])
    assert ends == [0]


def test_a_call_that_was_not_taken_when_its_model_went_is_not_decoded(plane, client):
    served = Served("a")
    life = weakref.ref(served)
    plane.serve([native(served), native(Served("b"))])
    del served
    stream = client.call(body_for(NARROW, name="a"), narsil_v1.METHOD)
    plane.serve([native(Served("b"))])
    assert life() is None
    call = next_call(plane)
    assert (call.decoded, call.served) == (False, None)
    call.fail(5, "gone")
    plane.flush()
    assert client.answer(stream).status == 5


def test_a_call_is_answered_and_fused_as_its_own_model_says_after_a_swap(plane, client):
    plane.serve([native(Served("old", "7"))])
    stream, call = take(plane, client, NARROW)
    plane.serve([native(Served("new", "8", BROAD))])
    values = np.full(2, -1, np.int32)
    collate([call], 2, np.empty(2, np.float32), values, None)
    assert values.tolist() == [1, 1]
    assert call.arrays()[0].shape == (2, 1)
    call.answer_scores({"t": np.zeros(2, np.float32)}, 1, 2, 0.0, 0.0)
    plane.flush()
    reply = narsil_pb2.PredictResponse.FromString(client.answer(stream).messages[0])
    assert (reply.model_name, reply.model_version) == ("old", "7")


def test_calls_of_two_models_are_not_fused(plane, client):
    same = Served("a")
    plane.serve([native(same)])
    assert plane.statistics()["decoded"] == 0
    _, one = take(plane, client, NARROW)
    _, other = take(plane, client, NARROW)
    assert plane.statistics()["decoded"] == 2
    dense, values = np.empty(4, np.float32), np.empty(4, np.int32)
    collate([one, other], 4, dense, values, None)
    plane.serve([native(same)])  # an equal schema, and another model
    _, later = take(plane, client, NARROW)
    with pytest.raises(ValueError, match="different models"):
        collate([one, later], 4, dense, values, None)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"rows": [0]}, "at least one row"),
        ({"max_rows": -1}, "no schema"),
        ({"dense_dim": -1}, "no schema"),
    ],
)
def test_what_makes_no_model_is_refused(arguments, why):
    usual = {
        "name": "",
        "version": "",
        "dense_dim": 1,
        "nan_columns": [],
        "rows": [1],
        "least": [0],
        "wide_ids": False,
        "max_rows": 1,
        "max_ids": 1,
    }
    with pytest.raises(ValueError, match=why):
        Model(None, **{**usual, **arguments})


def test_what_makes_no_set_is_refused_and_the_set_before_stays(plane, client):
    plane.serve([native(Served("a"))])
    with pytest.raises(ValueError, match="two models are b, version 1"):
        plane.serve([native(Served("b")), native(Served("c")), native(Served("b"))])
    with pytest.raises(ValueError, match="default is the place of no model"):
        plane.serve([native(Served("b"))], default=1)
    assert take(plane, client, NARROW)[1].served.name == "a"


def test_models_swapped_while_several_threads_poll_are_all_freed_and_no_call_is_decoded_for_two(plane, client):
    calls: list[Call] = []
    wrong: list[str] = []
    over = threading.Event()

    def poll() -> None:
        while not over.is_set():
            for call in plane.poll(None)[0]:
                width = call.arrays()[0].shape[1] if call.decoded else 0
                if call.decoded and width != call.served.schema.dense_dim:
                    wrong.append(repr(call.served))
                call.fail(0, "")
                calls.append(call)
            plane.flush()

    threads = [threading.Thread(target=poll) for _ in range(3)]
    lives = []
    for thread in threads:
        thread.start()
    try:
        for number in range(100):
            served = Served("m", str(number), (NARROW, BROAD)[number % 2])
            lives.append(weakref.ref(served))
            plane.serve([native(served)])
            del served
            streams = [client.call(body_for(schema), narsil_v1.METHOD) for schema in (NARROW, BROAD, NARROW)]
            assert [client.answer(stream).status for stream in streams[: number % 4]] == [0] * (min(3, number % 4))
    finally:
        over.set()
        for _ in threads:
            plane.wake()
        for thread in threads:
            thread.join(PATIENCE_S)
    plane.serve([])
    assert not wrong
    assert any(call.decoded for call in calls)
    assert {life().version for life in lives if life() is not None} == {c.served.version for c in calls if c.decoded}
    calls.clear()
    assert [life() for life in lives if life() is not None] == []
