"""What every gRPC transport of Narsil does, seen by real clients over a real socket, with the fake backend behind."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import narsil
from narsil.backends.fake import FakeBehaviour
from narsil.bench.workload import predictor_body
from narsil.client import Context, build_request, read_response
from narsil.dataflow import OneHot
from narsil.engine.queue import QueueLimits
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import RequestLimits
from narsil.errors import DeadlineExceeded, ForwardFailed, InvalidRequest, ModelNotFound, QueueFull
from narsil.telemetry.observer import CountingObserver
from narsil.transports.codec import narsil_v1, predictor
from tests.conformance.serving import predict_torchrec, scores_in, serving
from tests.messages import predictor_pb2
from tests.support import (
    PATIENCE_S,
    SCHEMA,
    TRANSPORTS,
    engine_with,
    grpc_server,
    grpc_transport,
    jagged,
    one_hot,
    run,
    scores_alone,
    unary,
    wait_until,
)

WORKER = BatchPolicy(max_requests=1)


@pytest.fixture(params=TRANSPORTS)
def kind(request) -> str:
    """The transport under test."""
    return request.param


@pytest.mark.parametrize("make", [one_hot, jagged])
def test_a_torchrec_client_gets_its_rows_scores(kind, make):
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        for rows in (1, 7, 300):
            features = make(rows, rows)
            np.testing.assert_array_equal(predict_torchrec(channel, features), scores_alone(features))


@pytest.mark.parametrize("make", [one_hot, jagged])
@pytest.mark.parametrize(("lengths", "values"), [("<i4", "<i8"), ("<i8", "<i4"), ("<i8", "<i8")])
def test_a_torchrec_client_may_send_int64_and_no_batch_size(kind, make, lengths, values):
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        for rows in (1, 7, 300):
            features = make(rows, rows)
            request = predictor_pb2.PredictionRequest.FromString(predictor_body(features))
            request.batch_size = 0
            for field, width in (("lengths", lengths), ("values", values)):
                numbers = np.frombuffer(getattr(request.id_list_features, field), "<i4")
                setattr(request.id_list_features, field, numbers.astype(width).tobytes())
            reply = unary(channel, predictor.METHOD)(request.SerializeToString(), timeout=PATIENCE_S)
            np.testing.assert_array_equal(scores_in(reply), scores_alone(features))


def test_features_that_the_model_does_not_take_are_passed_over_and_counted(kind):
    observer, features = CountingObserver(), jagged(5)
    request = predictor_pb2.PredictionRequest.FromString(predictor_body(features))
    request.unary_features.num_features = 2
    request.embedding_features.values = bytes(40)
    with (
        engine_with() as engine,
        grpc_transport(engine, kind=kind, observer=observer) as (_, address, _),
        grpc.insecure_channel(address) as channel,
    ):
        for body in (request.SerializeToString(), predictor_body(features), request.SerializeToString()):
            reply = unary(channel, predictor.METHOD)(body, timeout=PATIENCE_S)
            np.testing.assert_array_equal(scores_in(reply), scores_alone(features))
    assert observer.model("fake", "1").passed_over == {"embedding_features": 2, "unary_features": 2}


def test_narsil_s_client_gets_its_rows_scores_and_how_they_came_about(kind):
    with serving(kind) as (address, _), narsil.Client(address) as client:
        features = one_hot(5)
        prediction = client.predict(features.dense, features.sparse.ids.T, request_id="r1", model="fake", version="1")
        np.testing.assert_array_equal(prediction.scores["default"], scores_alone(features))
        assert (prediction.model_name, prediction.model_version, prediction.request_id) == ("fake", "1", "r1")
        assert (prediction.batch_requests, prediction.batch_rows) == (1, 5)


def test_the_asyncio_client_does_the_same(kind):
    async def body(address: str) -> None:
        async with narsil.AsyncClient(address) as client:
            features = [one_hot(5, seed) for seed in range(20)]
            found = await asyncio.gather(*(client.predict(f.dense, f.sparse.ids.T) for f in features))
            for one, prediction in zip(features, found, strict=True):
                np.testing.assert_array_equal(prediction.scores["default"], scores_alone(one))
            assert (await client.model()).schema == SCHEMA
            with pytest.raises(InvalidRequest, match="batch_size is 0"):
                await client.predict(np.zeros((0, 3)), np.zeros((0, 4), int))

    with serving(kind) as (address, _):
        run(body(address))


def test_a_context_is_sent_once_and_counts_for_every_row(kind):
    with serving(kind) as (address, _), narsil.Client(address) as client:
        whole = client.predict(np.ones((3, 3)), [[9, 1, 2, 3], [9, 4, 5, 6], [9, 0, 0, 0]])
        split = client.predict(
            np.ones((3, 2)),
            [[1, 2, 3], [4, 5, 6], [0, 0, 0]],
            context=Context({"user": [9]}, dense_columns=[1], dense=[1.0]),
        )
        np.testing.assert_array_equal(split.scores["default"], whole.scores["default"])


def test_the_model_s_schema_can_be_asked_for(kind):
    with serving(kind) as (address, _), narsil.Client(address) as client:
        info = client.model()
        assert (info.name, info.version, info.backend, info.schema) == ("fake", "1", "fake", SCHEMA)


def test_requests_in_flight_share_a_forward_and_each_gets_its_own_scores(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour) as (address, engine), grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(predictor.METHOD)
        features = [make(rows, rows) for rows in (1, 5, 30) for make in (one_hot, jagged)]
        first = call.future(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        futures = [call.future(predictor_body(one)) for one in features]
        wait_until(lambda: engine.statistics().queued == len(features))
        behaviour.hold.set()
        for one, future in zip(features, futures, strict=True):
            reply = predictor_pb2.PredictionResponse.FromString(future.result(PATIENCE_S))
            np.testing.assert_array_equal(np.float32(reply.predictions["default"].data), scores_alone(one))
        assert first.result(PATIENCE_S)
        assert behaviour.forwards == [1, 72]


def test_many_channels_and_both_wires_at_once_never_mix_rows_up(kind):
    def client(address: str, seed: int, wrong: list[int]) -> None:
        with (
            grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
            narsil.Client(address) as other,
        ):
            for number in range(25):
                features = (one_hot if number % 2 else jagged)(1 + (seed + number) % 40, seed * 100 + number)
                expected = scores_alone(features)
                if not np.array_equal(predict_torchrec(channel, features), expected):
                    wrong.append(number)
                if isinstance(features.sparse, OneHot):
                    found = other.predict(features.dense, features.sparse.ids.T).scores["default"]
                    if not np.array_equal(found, expected):
                        wrong.append(number)

    wrong: list[int] = []
    with serving(kind, lanes=2) as (address, engine):
        threads = [threading.Thread(target=client, args=(address, seed, wrong)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert wrong == []
        assert engine.statistics().answered == 8 * (25 + 12)


def test_a_request_beyond_the_largest_batch_is_answered_whole(kind):
    behaviour = FakeBehaviour()
    with (
        serving(kind, behaviour, policy=BatchPolicy(max_rows=64)) as (address, _),
        grpc.insecure_channel(address) as channel,
    ):
        features = jagged(1000, 1)
        np.testing.assert_array_equal(predict_torchrec(channel, features), scores_alone(features))
        assert max(behaviour.forwards) == 64


def test_a_broken_payload_is_invalid_argument_and_names_what_is_wrong(kind):
    with serving(kind) as (address, engine), grpc.insecure_channel(address) as channel:
        bad = one_hot(3)
        bad.sparse.ids[1, 2] = 7
        with pytest.raises(grpc.RpcError) as caught:
            predict_torchrec(channel, bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == ("feature item, row 2: id 7 is outside its table t_item; ids are 0 to 6")
        assert engine.statistics().submitted == 0


def test_an_unknown_model_or_version_is_not_found(kind):
    with serving(kind) as (address, _), narsil.Client(address) as client:
        unknown: list[dict[str, Any]] = [{"model": "other"}, {"version": "9"}]
        for names in unknown:
            with pytest.raises(ModelNotFound, match="is not served here"):
                client.predict(np.zeros((1, 3)), np.zeros((1, 4), int), **names)


def test_an_unknown_method_is_unimplemented(kind):
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, "/predictor.Predictor/Train")(b"", timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_full_queue_is_resource_exhausted_at_once(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with (
        engine_with(behaviour, policy=WORKER, limits=QueueLimits(max_requests=1)) as engine,
        grpc_server(engine, kind=kind) as address,
        narsil.Client(address) as client,
        grpc.insecure_channel(address) as channel,
    ):
        call = channel.unary_unary(predictor.METHOD)
        running = call.future(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        waiting = call.future(predictor_body(one_hot(1)))
        wait_until(lambda: engine.statistics().queued == 1)
        with pytest.raises(QueueFull, match="1 of 1 requests"):
            client.predict(np.zeros((1, 3)), np.zeros((1, 4), int))
        behaviour.hold.set()
        assert running.result(PATIENCE_S)
        assert waiting.result(PATIENCE_S)


def test_a_deadline_that_passes_in_the_queue_is_told_and_the_request_never_runs(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with (
        serving(kind, behaviour) as (address, engine),
        narsil.Client(address) as client,
        grpc.insecure_channel(address) as channel,
    ):
        running = unary(channel, predictor.METHOD).future(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        with pytest.raises(DeadlineExceeded):
            client.predict(np.zeros((5, 3)), np.zeros((5, 4), int), timeout=0.05)
        wait_until(lambda: engine.statistics().cancelled + engine.statistics().expired == 1)
        behaviour.hold.set()
        assert running.result(PATIENCE_S)
        client.predict(np.zeros((2, 3)), np.zeros((2, 4), int))
        assert behaviour.forwards == [1, 2]


def test_a_cancelled_request_never_runs(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour) as (address, engine), grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(predictor.METHOD)
        running = call.future(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        gone = call.future(predictor_body(one_hot(5)))
        wait_until(lambda: engine.statistics().queued == 1)
        gone.cancel()
        wait_until(lambda: engine.statistics().cancelled == 1)
        behaviour.hold.set()
        assert running.result(PATIENCE_S)
        assert call(predictor_body(one_hot(2)), timeout=PATIENCE_S)
        assert behaviour.forwards == [1, 2]


def test_a_client_that_goes_away_while_its_request_runs_harms_nobody(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour) as (address, engine), grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(predictor.METHOD)
        gone = call.future(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        gone.cancel()
        behaviour.hold.set()
        features = jagged(4, 4)
        np.testing.assert_array_equal(predict_torchrec(channel, features), scores_alone(features))
        assert engine.statistics().answered == 2


def test_a_failed_forward_is_internal_for_the_guilty_alone(kind):
    behaviour = FakeBehaviour(fail_if=lambda batch: bool((batch.dense == 13.0).any()))
    with serving(kind, behaviour) as (address, _), narsil.Client(address) as client:
        dense = np.zeros((2, 3))
        dense[1, 1] = 13.0
        with pytest.raises(ForwardFailed, match=r"failed on this request \(RuntimeError\)"):
            client.predict(dense, np.zeros((2, 4), int))
        assert client.predict(np.zeros((2, 3)), np.zeros((2, 4), int)).scores["default"].tolist() == [0.0, 0.0]


def test_a_message_beyond_the_limit_is_refused_and_one_just_below_it_is_served(kind):
    with serving(kind, message_bytes=64 * 1024) as (address, _), grpc.insecure_channel(address) as channel:
        assert len(predict_torchrec(channel, one_hot(1000))) == 1000
        with pytest.raises(grpc.RpcError) as caught:
            predict_torchrec(channel, one_hot(1500))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_request_of_more_rows_than_allowed_is_refused_before_anything_of_its_size_is_made(kind):
    with serving(kind, limits=RequestLimits(max_rows=10)) as (address, _), grpc.insecure_channel(address) as channel:
        assert len(scores_of_a_context(channel, 10)) == 10
        for rows in (11, 10**7):
            tracemalloc.start()
            try:
                with pytest.raises(grpc.RpcError) as caught:
                    scores_of_a_context(channel, rows)
                assert tracemalloc.get_traced_memory()[1] < 1 << 20  # bytes at most at once
            finally:
                tracemalloc.stop()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details().startswith(f"batch_size is {rows}; it must be 1 to 10 rows")


def test_a_request_weighs_what_its_context_expands_to(kind):
    """A message of some bytes may fill a queue: it is held against --max-queue-bytes by what it becomes."""
    limits = QueueLimits(max_bytes=100_000)
    with serving(kind, engine_limits=limits) as (address, _), grpc.insecure_channel(address) as channel:
        assert len(scores_of_a_context(channel, 100)) == 100
        with pytest.raises(grpc.RpcError) as caught:
            scores_of_a_context(channel, 10_000)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "this server queues at most 100000 (--max-queue-bytes)" in caught.value.details()


def scores_of_a_context(channel: grpc.Channel, rows: int) -> np.ndarray:
    """Of so many rows of which all are the context: the message is small, whatever their number."""
    everything = Context({feature.name: [1] for feature in SCHEMA.features}, [0, 1, 2], [0.0] * 3)
    body = build_request(np.zeros((rows, 0)), np.zeros((rows, 0), int), context=everything)
    return read_response(unary(channel, narsil_v1.METHOD)(body, timeout=PATIENCE_S)).scores["default"]


def test_arbitrary_bytes_never_end_the_server(kind):
    random = np.random.default_rng(0)
    good = [predictor_body(jagged(3, 1)), build_request(np.zeros((2, 3)), np.zeros((2, 4), int))]
    ended: set[grpc.StatusCode] = set()
    with serving(kind) as (address, engine), grpc.insecure_channel(address) as channel:
        for number in range(300):
            body = bytearray(good[number % 2]) if number % 3 else bytearray(random.bytes(int(random.integers(0, 200))))
            for position in random.integers(0, max(1, len(body)), 3):
                if body:
                    body[position] = random.integers(0, 256)
            for method in (predictor.METHOD, narsil_v1.METHOD, narsil_v1.METHOD_GET_MODEL):
                ended.add(unary(channel, method).future(bytes(body), timeout=PATIENCE_S).code())
        assert ended <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        features = one_hot(3)
        np.testing.assert_array_equal(predict_torchrec(channel, features), scores_alone(features))
        assert engine.statistics().failed == 0


def test_health_says_serving_and_once_retired_not_serving(kind):
    with (
        engine_with() as engine,
        grpc_transport(engine, kind=kind) as (transport, address, on_loop),
        grpc.insecure_channel(address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)

        async def retire() -> None:
            transport.retire()

        def status(service: str) -> int:
            return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status

        services = ("", "predictor.Predictor", "narsil.v1.Inference")
        assert {status(service) for service in services} == {health_pb2.HealthCheckResponse.SERVING}
        on_loop(retire())
        assert {status(service) for service in services} == {health_pb2.HealthCheckResponse.NOT_SERVING}


def test_a_health_watcher_is_told_of_the_change_and_its_call_ends(kind):
    async def retire() -> None:
        transport.retire()

    with (
        engine_with() as engine,
        grpc_transport(engine, kind=kind) as (transport, address, on_loop),
        grpc.insecure_channel(address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="predictor.Predictor"), timeout=PATIENCE_S)
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"), timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        on_loop(retire())
        assert [reply.status for reply in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert list(unknown) == []


def test_health_watchers_are_bounded(kind, monkeypatch):
    monkeypatch.setattr("narsil.transports.health.MAX_WATCHERS", 2)
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S) for _ in range(2)]
        for watch in watches:
            next(watch)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(predict_torchrec(channel, one_hot(1))) == 1
        for watch in watches:
            watch.cancel()


def test_what_should_not_happen_is_internal_and_tells_the_client_nothing(kind, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise ValueError("/a/path/of/the/server")

    monkeypatch.setattr(predictor, "read", broken)
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, predictor.METHOD)(b"", timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "/a/path" not in caught.value.details()
    assert "/a/path/of/the/server" in caplog.text


def test_a_draining_engine_is_unavailable_while_the_transport_still_answers(kind):
    with engine_with() as engine, grpc_server(engine, kind=kind) as address, grpc.insecure_channel(address) as channel:
        assert engine.drain(PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            predict_torchrec(channel, one_hot(1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in caught.value.details()


def test_reflection_lists_the_services_and_describes_their_messages(kind):
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="predictor.Predictor"),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="narsil.v1.Inference"),
        ]
        listed, *files = stub.ServerReflectionInfo(iter(requests), timeout=PATIENCE_S)
        names = {service.name for service in listed.list_services_response.service}
        assert {"predictor.Predictor", "narsil.v1.Inference", "grpc.health.v1.Health"} <= names
        assert all(reply.file_descriptor_response.file_descriptor_proto for reply in files)


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_what_is_no_message_of_grpc_s_own_services_is_refused(kind, method):
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        talk: Any = channel.stream_stream(method)
        with pytest.raises(grpc.RpcError) as caught:
            next(talk(iter([b"\xff"]), timeout=PATIENCE_S))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_stopping_finishes_what_is_in_flight(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour) as engine:
        with grpc_server(engine, kind=kind) as address:
            channel = grpc.insecure_channel(address)
            call = channel.unary_unary(predictor.METHOD)
            features = one_hot(3)
            running = call.future(predictor_body(features))
            wait_until(lambda: behaviour.forwards == [3])
            threading.Timer(0.05, behaviour.hold.set).start()
        reply = predictor_pb2.PredictionResponse.FromString(running.result(PATIENCE_S))
        np.testing.assert_array_equal(np.float32(reply.predictions["default"].data), scores_alone(features))
        channel.close()


def test_a_port_that_is_taken_is_an_error(kind):
    with serving(kind) as (address, engine):
        port = int(address.rpartition(":")[2])
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1"), grpc_server(engine, kind=kind, port=port):
            pass
