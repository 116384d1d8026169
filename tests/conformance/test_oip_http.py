"""The Open Inference Protocol over HTTP: in JSON and as binary data, with Triton's own clients, and beside gRPC."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from narsil.artifacts.schema import ModelSchema
from narsil.backends.fake import FakeBehaviour
from narsil.catalog.control import ModelControl
from narsil.catalog.manager import ModelManager
from narsil.engine.queue import QueueLimits
from narsil.engine.served_model import RequestLimits
from narsil.telemetry.observer import CountingObserver
from tests.conformance.serving import Answer, ask, http_transport, predict_torchrec
from tests.support import PATIENCE_S, SCHEMA, engine_with, fake_model, grpc_server, one_hot, scores_alone, wait_until
from tests.unit.test_repository import put

INFER = "/v2/models/fake/infer"


def described(name: str, datatype: str, values: np.ndarray[Any, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(values.shape), **more}


def tensors(features) -> list[tuple[str, str, np.ndarray[Any, Any]]]:
    ids = np.ascontiguousarray(features.sparse.ids.T, "<i8")
    return [("dense", "FP32", np.ascontiguousarray(features.dense)), ("ids", "INT64", ids)]


def as_json(features, **fields: Any) -> bytes:
    inputs = [described(name, kind, values, data=values.tolist()) for name, kind, values in tensors(features)]
    return json.dumps({"inputs": inputs, **fields}).encode()


def as_binary(features, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """The body, and the header that it needs."""
    inputs, raw = [], b""
    for name, kind, values in tensors(features):
        inputs.append(described(name, kind, values, parameters={"binary_data_size": values.nbytes}))
        raw += values.tobytes()
    header = json.dumps({"inputs": inputs, **fields}).encode()
    return header + raw, {"Inference-Header-Content-Length": str(len(header))}


def scores(answer: Answer, position: int = 0) -> np.ndarray[Any, Any]:
    assert answer.status == 200, answer.body
    return np.array(answer.json["outputs"][position]["data"], np.float32)


def binary_scores(answer: Answer) -> np.ndarray[Any, Any]:
    assert answer.status == 200, answer.body
    size = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.body[:size])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(answer.body) - size
    assert "data" not in output
    return np.frombuffer(answer.body[size:], "<f4").reshape(output["shape"])


@pytest.fixture(scope="module")
def address():
    with engine_with(None) as engine, http_transport(engine) as (_, where):
        yield where


def test_scores_are_those_of_grpc_to_the_last_bit():
    features = one_hot(301, seed=3)
    body, header = as_binary(features, parameters={"binary_data_output": True})
    with (
        engine_with(None) as engine,
        http_transport(engine) as (_, address),
        grpc_server(engine) as other,
        grpc.insecure_channel(other) as channel,
    ):
        wanted = predict_torchrec(channel, features)
        assert np.array_equal(scores(ask(address, INFER, as_json(features))), wanted)
        assert np.array_equal(binary_scores(ask(address, INFER, body, header)), wanted)


def test_the_answer_names_its_model_and_its_request(address):
    answer = ask(address, INFER, as_json(one_hot(2), id="r7"))
    assert {key: answer.json[key] for key in ("model_name", "model_version", "id")} == {
        "model_name": "fake",
        "model_version": "1",
        "id": "r7",
    }
    assert answer.headers["content-type"] == "application/json"
    assert "id" not in ask(address, "/v2/models/fake/versions/1/infer", as_json(one_hot(2))).json


def test_data_may_be_flat(address):
    features = one_hot(3)
    flat = [described(name, kind, values, data=values.reshape(-1).tolist()) for name, kind, values in tensors(features)]
    answer = ask(address, INFER, json.dumps({"inputs": flat}).encode())
    assert np.array_equal(scores(answer), scores_alone(features))


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP64"])
def test_dense_of_other_datatypes_is_converted(address, datatype):
    features = one_hot(2)
    dense = np.array([[0.5, 1.0, -2.0], [4.0, 0.25, 0.0]], np.float32)  # the same in each
    numbers = {
        "FP16": dense.astype("<f2"),
        "BF16": (dense.view(np.uint32) >> 16).astype("<u2"),
        "FP64": dense.astype("<f8"),
    }[datatype]
    ids = tensors(features)[1]
    inputs = [
        described("dense", datatype, dense, parameters={"binary_data_size": numbers.nbytes}),
        described(*ids, data=ids[2].tolist()),
    ]
    header = json.dumps({"inputs": inputs}).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    wanted = scores_alone(type(features)(2, dense, features.sparse))
    assert np.array_equal(scores(ask(address, INFER, header + numbers.tobytes(), length)), wanted)


def test_each_output_is_answered_as_it_is_asked_for():
    schema = ModelSchema(SCHEMA.dense_dim, SCHEMA.features, tasks=("click", "buy"))
    features = one_hot(2, schema=schema)
    asked = [{"name": "buy", "parameters": {"binary_data": True}}, {"name": "click"}]
    with engine_with(None, schema=schema) as engine, http_transport(engine) as (_, address):
        answer = ask(address, INFER, as_json(features, outputs=asked))
        size = int(answer.headers["inference-header-content-length"])
        buy, click = json.loads(answer.body[:size])["outputs"]
        assert (buy["name"], click["name"]) == ("buy", "click")
        both = ask(address, INFER, as_json(features)).json["outputs"]
        only = ask(address, INFER, as_json(features, outputs=[{"name": "buy"}])).json["outputs"]
    assert [each["name"] for each in both] == ["click", "buy"]
    assert [each["name"] for each in only] == ["buy"]
    assert np.frombuffer(answer.body[size:], "<f4").tolist() == both[1]["data"]
    assert click["data"] == both[0]["data"]


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_are_compressed_both_ways(address, encoding, encode):
    features = one_hot(500)
    body, header = as_binary(features, parameters={"binary_data_output": True})
    sent = {**header, "Content-Encoding": encoding, "Accept-Encoding": f"br, {encoding};q=0.5"}
    answer = ask(address, INFER, encode(body), sent)
    assert answer.headers["content-encoding"] == encoding
    plain = gzip.decompress(answer.body) if encoding == "gzip" else zlib.decompress(answer.body)
    assert np.array_equal(binary_scores(answer._replace(body=plain)), scores_alone(features))
    refused = ask(address, INFER, body, {**header, "Accept-Encoding": f"{encoding};q=0, identity"})
    assert "content-encoding" not in refused.headers


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"parameters": {"sequence_id": 7}}, "the request has the parameter sequence_id: Narsil keeps no state"),
        ({"parameters": {"sequence_start": True}}, "the request has the parameter sequence_start"),
        ({"outputs": [{"name": "default", "parameters": {"classification": 2}}]}, "classes are not ranked here"),
        ({"outputs": [{"name": "clicks"}]}, "output 'clicks' is asked for; the model has default"),
        ({"outputs": [{"name": "default"}, {"name": "default"}]}, "an output is asked for twice"),
        ({"outputs": "default"}, "outputs is missing, or is not an array of objects"),
        ({"outputs": [{"name": "default", "parameters": {"binary_data": 1}}]}, "binary_data must be true or false"),
        ({"parameters": {"timeout": -1}}, "the parameter timeout must be a number of microseconds"),
        ({"parameters": {"timeout": 10**400}}, "the parameter timeout must be a number of microseconds"),
        ({"parameters": []}, "the request: parameters is missing, or is not an object"),
        ({"id": 7}, "id is missing, or is not a string"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(address, fields, says):
    answer = ask(address, INFER, as_json(one_hot(2), **fields))
    assert answer.status == 400
    assert says in answer.error


def one(**changed: Any) -> bytes:
    """A request whose ids are changed."""
    features = one_hot(2)
    (_, _, dense), (_, _, ids) = tensors(features)
    given = described("ids", "INT64", ids, data=ids.tolist()) | changed
    given = {key: value for key, value in given.items() if value is not ...}
    return json.dumps({"inputs": [described("dense", "FP32", dense, data=dense.tolist()), given]}).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (one(data=[[0, 0, 0, 0], [0, 7, 0, 0]]), "feature item, row 1: id 7 is outside its table t_item"),
        (one(data=[[0, 0, 0, 0], [0, 0.5, 0, 0]]), "ids: 0.5 is no INT64"),
        (one(data=[0] * 7 + [1 << 63]), "ids: 9223372036854775808 is no INT64"),
        (one(data=[0] * 7 + [1 << 31], datatype="INT32"), "ids: 2147483648 is no INT32; send INT64"),
        (one(data=[[0, 0], [0, 0], [0, 0], [0, 0]]), "ids: its data is nested otherwise than the shape [2, 4] says"),
        (one(data=[0] * 7), "ids: 7 INT64 are given for the shape [2, 4]"),
        (one(data=["a"], datatype="BYTES"), "ids has the datatype 'BYTES'"),
        (one(data=[True] * 8), "input 'ids': its data is no array of numbers"),
        (one(data=[0.5] * 8, datatype="BF16"), "BF16 has no form in JSON; send it as binary data"),
        (one(shape=[2, -4], data=[0] * 8), "ids: its shape [2, -4] has a negative size"),
        (one(shape=[1] * 9), "input 'ids': shape has more than 8 dimensions"),
        (one(shape=2), "input 'ids': shape is missing, or is not an array of numbers"),
        (one(name=...), "an input's name is missing, or is not a string"),
        (one(name="idz"), "the request holds no ids"),
        (one(data=...), "input 'ids' must have either data or the parameter binary_data_size"),
        (one(parameters={"binary_data_size": 8}), "input 'ids' must have either data or the parameter"),
        (one(data=..., parameters={"binary_data_size": 64}), "the inputs' binary_data_size add up to 64"),
        (one(data=..., parameters={"binary_data_size": -1}), "binary_data_size is no number of bytes"),
        (one(data=..., parameters={"binary_data_size": 1 << 80}), "binary_data_size is no number of bytes"),
        (one(parameters={"shared_memory_region": "r"}), "shared memory is not served here"),
        (as_json(one_hot(2)) + b"x", "something comes after the value"),
        (b"", "at character 0"),
        (b"[]", "the request is missing, or is not an object"),
        (b'{"inputs": [' + b"[" * 100_000, "deep"),
        (b'{"inputs": [' + b'{"a":' * 100_000, "nested more than 16 deep"),
        (b'{"inputs": [' + b"{}," * 30_000, "more than 20000 values"),
        (b'{"inputs": [], "inputs": []}', "the key 'inputs' comes twice"),
        (b'{"inputs": [{"name": "ids", "data": [NaN]}]}', "NaN is no number of JSON"),
        (b'{"inputs": [{"name": "ids", "data": [1, 2', "a comma or ] is expected"),
        (b'{"id": "\xff"}', "it is not UTF-8"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_is_answered(address, body, says):
    answer = ask(address, INFER, body)
    assert answer.status == 400
    assert says in answer.error
    features = one_hot(2)
    assert np.array_equal(scores(ask(address, INFER, as_json(features))), scores_alone(features))


@pytest.mark.parametrize("length", ["0", "-1", "1e3", "99999999", "\u0664", "", "10"])
def test_a_wrong_length_of_the_json_is_refused(address, length):
    body, _ = as_binary(one_hot(2))
    answer = ask(address, INFER, body, {"Inference-Header-Content-Length": length.encode().decode("latin-1")})
    assert answer.status == 400
    assert "no JSON that is read here" in answer.error or "Inference-Header-Content-Length is" in answer.error


def test_what_is_not_there_is_named(address):
    assert ask(address, "/v2/models/other/infer", as_json(one_hot(1))).status == 404
    answer = ask(address, "/v2/models/fake/versions/9/infer", as_json(one_hot(1)))
    assert (answer.status, answer.error) == (404, "version '9' of fake is not served here; '1' is")
    assert ask(address, "/v2/models").status == 404
    wrong = ask(address, INFER)
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert ask(address, "/v2/models/fake", b"{}").status == 405
    assert ask(address, "/v2", b"{}").status == 405


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"Content-Encoding": "br"}, "Content-Encoding br is not read here; send gzip, deflate or none"),
        ({"Content-Type": "application/x-protobuf"}, "Content-Type application/x-protobuf is not read here"),
    ],
)
def test_what_is_encoded_otherwise_is_refused(address, headers, says):
    answer = ask(address, INFER, as_json(one_hot(1)), headers)
    assert answer.status == 415
    assert says in answer.error


@pytest.mark.parametrize(
    ("body", "encoding", "says"),
    [
        (b"{}", "gzip", "incorrect header check"),
        (gzip.compress(b"{}")[:-4], "gzip", "its end is missing"),
        (gzip.compress(b"{}") + b"more", "gzip", "something follows"),
    ],
)
def test_what_is_not_encoded_as_it_says_is_refused(address, body, encoding, says):
    answer = ask(address, INFER, body, {"Content-Encoding": encoding})
    assert answer.status == 400
    assert says in answer.error


def test_a_body_that_is_too_large_is_refused_and_its_sender_reads_that():
    with engine_with(None) as engine, http_transport(engine, max_message_bytes=4096) as (_, address):
        for body, headers in (
            (b"x" * (8 << 20), {}),
            (gzip.compress(b" " * (2 << 20)), {"Content-Encoding": "gzip"}),  # some 2,000 bytes
            (iter([b"x" * 4096] * 1000), {}),  # in chunks
        ):
            answer = ask(address, INFER, body, headers)
            assert answer.status == 413
            assert answer.error == "the body has more than 4096 bytes (--max-message-bytes); send fewer rows"
        assert ask(address, "/v2/health/ready").status == 200


def test_what_all_bodies_hold_is_bounded():
    hold = threading.Event()
    body = as_json(one_hot(2))
    with (
        engine_with(FakeBehaviour(hold=hold)) as engine,
        http_transport(engine, max_held_bytes=len(body) + 10) as (_, address),
        ThreadPoolExecutor(1) as calls,
    ):
        running = calls.submit(ask, address, INFER, body)
        wait_until(lambda: engine.statistics().running == 1)
        answer = ask(address, INFER, body)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert "(--max-queue-bytes). Retry with backoff" in answer.error
        hold.set()
        assert running.result(PATIENCE_S).status == 200
        assert ask(address, INFER, body).status == 200


@pytest.mark.parametrize(
    ("queued", "parameters", "ends"),
    [(1, {}, (200, "")), (2, {"timeout": 1}, (504, "the deadline passed"))],  # microseconds, with the only lane held
)
def test_a_full_queue_and_a_deadline_have_their_codes(queued, parameters, ends):
    hold = threading.Event()
    with (
        engine_with(FakeBehaviour(hold=hold), limits=QueueLimits(max_requests=queued)) as engine,
        http_transport(engine) as (_, address),
        ThreadPoolExecutor(2) as calls,
    ):
        running = calls.submit(ask, address, INFER, as_json(one_hot(1)))
        wait_until(lambda: engine.statistics().running == 1)
        waiting = calls.submit(ask, address, INFER, as_json(one_hot(2), parameters=parameters))
        wait_until(lambda: engine.statistics().queued == 1)
        if queued == 1:
            full = ask(address, INFER, as_json(one_hot(1)))
            assert (full.status, full.headers["retry-after"]) == (429, "1")
            assert full.error.startswith("the queue is full: 1 of 1 requests")
        hold.set()
        assert running.result(PATIENCE_S).status == 200
        ended = waiting.result(PATIENCE_S)
        assert ended.status == ends[0]
        assert ends[1] in ended.json.get("error", "")


def test_a_client_that_goes_away_is_taken_back():
    import http.client

    hold = threading.Event()
    with (
        engine_with(FakeBehaviour(hold=hold)) as engine,
        http_transport(engine) as (_, address),
        ThreadPoolExecutor(1) as calls,
    ):
        running = calls.submit(ask, address, INFER, as_json(one_hot(1)))
        wait_until(lambda: engine.statistics().running == 1)
        leaving = http.client.HTTPConnection(address, timeout=PATIENCE_S)
        leaving.request("POST", INFER, as_json(one_hot(2)))
        wait_until(lambda: engine.statistics().queued == 1)
        leaving.close()
        wait_until(lambda: engine.statistics().cancelled == 1)
        hold.set()
        assert running.result(PATIENCE_S).status == 200


def test_a_failed_forward_is_500_and_says_no_more_than_grpc():
    with engine_with(FakeBehaviour(fail_if=lambda batch: True)) as engine, http_transport(engine) as (_, address):
        answer = ask(address, INFER, as_json(one_hot(1)))
    assert answer.status == 500
    assert answer.error.endswith("the server's log says why")


def test_whoever_watches_is_told_of_what_is_refused_and_of_what_is_answered():
    observer = CountingObserver()
    with (
        engine_with(None, observer=observer) as engine,
        http_transport(engine, observer, observer.model) as (_, address),
    ):
        ask(address, INFER, b"{")
        ask(address, "/v2/models/other/infer", b"{}")
        ask(address, INFER, as_json(one_hot(3)))
        wait_until(lambda: observer.model("fake", "1").batches == 1)
        stats = ask(address, "/v2/models/fake/versions/1/stats").json["model_stats"]
    method = "/v2/models/infer"
    assert observer.refusals() == {(method, "InvalidRequest"): 1, (method, "ModelNotFound"): 1}
    assert observer.model("fake", "1").ends == {"answered": 1}
    assert [(each["name"], each["version"], each["inference_count"]) for each in stats] == [("fake", "1", 3)]
    assert stats[0]["inference_stats"]["success"]["count"] == 1


def test_the_server_and_its_models_are_described_and_a_retired_one_is_live_and_not_ready():
    with engine_with(None) as engine, http_transport(engine) as (transport, address):
        assert [ask(address, path).status for path in ("/livez", "/readyz", "/v2/models/fake/ready")] == [200] * 3
        assert ask(address, "/v2").json["name"] == "narsil"
        model = ask(address, "/v2/models/fake").json
        assert [each["name"] for each in model["inputs"]] == ["dense", "ids"]
        assert model["versions"] == ["1"]
        config = ask(address, "/v2/models/fake/config").json
        assert [each["dims"] for each in config["input"]] == [[-1, SCHEMA.dense_dim], [-1, SCHEMA.num_features]]
        assert ask(address, "/v2/repository/index", b"").json == [
            {"name": "fake", "version": "1", "state": "READY", "reason": ""}
        ]
        assert ask(address, "/livez", method="HEAD").body == b""
        transport.retire()
        for path in ("/readyz", "/v2/health/ready", "/v2/models/fake/ready"):
            assert (ask(address, path).status, ask(address, path).json["ready"]) == (503, False)
        assert ask(address, "/livez").status == 200
        assert ask(address, INFER, as_json(one_hot(1))).status == 200
        engine.drain(PATIENCE_S)
        answer = ask(address, INFER, as_json(one_hot(1)))
        assert (answer.status, answer.error) == (503, "the server is shutting down; retry on another one")


def test_models_are_loaded_and_unloaded_by_tritons_client(tmp_path):
    triton = pytest.importorskip("tritonclient.http", reason="no tritonclient")
    put(tmp_path, "team-ads", "1")
    with engine_with() as engine:
        manager = ModelManager(engine)
        load = lambda folder, held: (fake_model(name=folder.name, version=held.version), [])  # noqa: E731
        control = ModelControl(tmp_path, manager, load, explicit=True)
        control.load_all()
        with http_transport(engine, models=control) as (transport, address):
            manager.subscribe(transport.serve)
            client = triton.InferenceServerClient(address)
            client.unload_model("team-ads")
            assert not client.is_model_ready("team-ads")
            put(tmp_path, "team-ads", "2")
            client.load_model("team-ads")
            assert client.is_model_ready("team-ads", "2")
            assert [(each["version"], each["state"]) for each in client.get_model_repository_index()] == [
                ("2", "READY")
            ]
            client.close()
            load_ = "/v2/repository/models/{}/load"
            assert ask(address, load_.format("none"), b"").status == 404
            assert ask(address, load_.format("..%2F..%2Fetc"), b"").status == 404
            refused = ask(address, load_.format("team-ads"), b'{"parameters": {"config": "{}"}}')
            assert (refused.status, "the parameter 'config' is not taken" in refused.error) == (400, True)
            assert ask(address, load_.format("team-ads"), b'{"parameters": 3}').status == 400
            assert ask(address, load_.format("team-ads"), b'{"parameters": {"unload_dependents": true}}').status == 200
        control.stop()


def test_nothing_is_loaded_over_http_where_that_was_not_allowed():
    with engine_with() as engine, http_transport(engine) as (_, address):
        for what in ("load", "unload"):
            refused = ask(address, f"/v2/repository/models/fake/{what}", b"")
            assert (refused.status, "--model-control explicit" in refused.error) == (400, True)


def test_a_stop_lets_what_is_in_flight_be_answered():
    hold = threading.Event()
    with (
        engine_with(FakeBehaviour(hold=hold)) as engine,
        http_transport(engine) as (transport, address),
        ThreadPoolExecutor(2) as calls,
    ):
        running = calls.submit(ask, address, INFER, as_json(one_hot(1)))
        wait_until(lambda: engine.statistics().running == 1)
        stopping = calls.submit(asyncio.run, transport.stop(PATIENCE_S))
        wait_until(lambda: _refuses(address))
        hold.set()
        assert running.result(PATIENCE_S).status == 200
        stopping.result(PATIENCE_S)


def test_a_stop_leaves_nobody_waiting():
    """Whoever connects while it stops is answered or refused."""

    def until_refused(address: str) -> None:
        while not _refuses(address):
            pass

    for _ in range(20):
        with (
            engine_with(None) as engine,
            http_transport(engine) as (transport, address),
            ThreadPoolExecutor(8) as calls,
        ):
            callers = [calls.submit(until_refused, address) for _ in range(8)]
            asyncio.run(transport.stop(PATIENCE_S))
            for caller in callers:
                caller.result(PATIENCE_S)


def _refuses(address: str) -> bool:
    try:
        ask(address, "/livez")
    except TimeoutError:
        raise
    except OSError:
        return True
    return False


def test_a_model_whose_name_has_slashes_is_found():
    model = fake_model(name="team/ads", version="2026-11")
    with engine_with(None, model=model) as engine, http_transport(engine) as (_, address):
        assert ask(address, "/v2/models/team/ads").json["name"] == "team/ads"
        assert ask(address, "/v2/models/team%2Fads/versions/2026-11/ready").status == 200
        assert ask(address, "/v2/models/team/ads/infer", as_json(one_hot(1))).status == 200


def test_a_missing_number_is_refused_as_over_grpc():
    features = one_hot(1)
    dense = described("dense", "FP32", features.dense, data=[[0.5, None, 1]])
    ids = tensors(features)[1]
    body = json.dumps({"inputs": [dense, described(*ids, data=ids[2].tolist())]}).encode()
    with engine_with(None) as engine, http_transport(engine) as (_, address):
        answer = ask(address, INFER, body)
    assert answer.status == 400
    assert answer.error.startswith("dense: row 0, column 1 is nan; values must be finite")


def test_the_limits_are_those_of_the_model():
    model = fake_model(limits=RequestLimits(max_rows=3))
    with engine_with(None, model=model) as engine, http_transport(engine) as (_, address):
        answer = ask(address, INFER, as_json(one_hot(4)))
    assert answer.status == 400
    assert "it must be 1 to 3 rows (--max-request-rows)" in answer.error


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritons_own_client(address, binary, compression):
    triton = pytest.importorskip("tritonclient.http", reason="no tritonclient")
    features = one_hot(200)
    client = triton.InferenceServerClient(address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("fake")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "narsil"
    assert [each["name"] for each in client.get_model_metadata("fake", "1")["inputs"]] == ["dense", "ids"]
    assert client.get_model_config("fake")["backend"] == "narsil"
    assert client.get_model_repository_index()[0]["name"] == "fake"
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "fake"
    assert client.get_inference_statistics("fake")["model_stats"][0]["version"] == "1"
    inputs = []
    for name, kind, values in tensors(features):
        inputs.append(triton.InferInput(name, list(values.shape), kind))
        inputs[-1].set_data_from_numpy(values, binary_data=binary)
    how = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    outputs = [triton.InferRequestedOutput("default", binary_data=binary)]
    result = client.infer("fake", inputs, request_id="9", outputs=outputs, timeout=20_000_000, priority=1, **how)
    assert np.array_equal(result.as_numpy("default"), scores_alone(features))
    assert result.get_response()["id"] == "9"
    everything = client.infer("fake", inputs)
    assert np.array_equal(everything.as_numpy("default"), scores_alone(features))
    later = client.async_infer("fake", inputs)
    assert np.array_equal(later.get_result().as_numpy("default"), scores_alone(features))
    with pytest.raises(triton.InferenceServerException, match="model 'other' is not served here") as caught:
        client.infer("other", inputs)
    assert caught.value.status() == "404"
    with pytest.raises(triton.InferenceServerException, match="sequence_id"):
        client.infer("fake", inputs, sequence_id=3)
    client.close()


def test_tritons_asyncio_client(address):
    triton = pytest.importorskip("tritonclient.http.aio", reason="no tritonclient")
    features = one_hot(20)
    inputs = []
    for name, kind, values in tensors(features):
        inputs.append(triton.InferInput(name, list(values.shape), kind))
        inputs[-1].set_data_from_numpy(values)

    async def many() -> list[Any]:
        async with triton.InferenceServerClient(address) as client:
            return await asyncio.gather(*(client.infer("fake", inputs) for _ in range(50)))

    for result in asyncio.run(many()):
        assert np.array_equal(result.as_numpy("default"), scores_alone(features))
