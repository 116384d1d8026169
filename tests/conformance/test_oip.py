"""The Open Inference Protocol over both transports: with protobuf's messages, and with Triton's own client."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from narsil.backends.fake import FakeBehaviour
from narsil.telemetry.observer import CountingObserver, Observer
from tests.conformance.serving import predict_torchrec, serving
from tests.messages import inference_pb2 as pb
from tests.support import (
    PATIENCE_S,
    SCHEMA,
    TRANSPORTS,
    engine_with,
    grpc_transport,
    one_hot,
    scores_alone,
    wait_until,
)

SERVICE = "/inference.GRPCInferenceService/"
pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)


def call(channel, method, request, response):
    stub = channel.unary_unary(
        SERVICE + method, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
    )
    return stub(request, timeout=PATIENCE_S)


def infer_request(features, **fields):
    request = pb.ModelInferRequest(**fields)
    ids = np.ascontiguousarray(features.sparse.ids.T, "<i8")
    for name, values, datatype in (("dense", features.dense, "FP32"), ("ids", ids, "INT64")):
        request.inputs.add(name=name, datatype=datatype, shape=values.shape)
        request.raw_input_contents.append(values.tobytes())
    return request


def scores(reply):
    return np.frombuffer(reply.raw_output_contents[0], "<f4")


def test_scores_are_those_of_the_model(kind):
    features = one_hot(5)
    with serving(kind) as (address, engine), grpc.insecure_channel(address) as channel:
        reply = call(channel, "ModelInfer", infer_request(features, id="r7"), pb.ModelInferResponse)
        assert reply.id == "r7"
        assert (reply.model_name, reply.model_version) == (engine.model.name, engine.model.version)
        assert np.array_equal(scores(reply), predict_torchrec(channel, features))


def test_a_request_is_refused_with_a_status_and_the_next_is_answered(kind):
    features = one_hot(2)
    wrong = infer_request(features)
    wrong.inputs[1].name = "idz"
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "ModelInfer", wrong, pb.ModelInferResponse)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the request holds no ids; the model takes dense FP32" in caught.value.details()
        unknown = infer_request(features, model_name="other")
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "ModelInfer", unknown, pb.ModelInferResponse)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert len(scores(call(channel, "ModelInfer", infer_request(features), pb.ModelInferResponse))) == 2


def test_a_stream_is_answered_in_order_and_goes_on_after_a_fault(kind):
    requests = [infer_request(one_hot(n), id=str(n)) for n in (1, 2, 3)]
    requests[1].inputs[0].datatype = "BYTES"
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        stub = channel.stream_stream(
            SERVICE + "ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        replies = list(stub(iter(requests), timeout=PATIENCE_S))
    assert [reply.infer_response.id for reply in replies] == ["1", "", "3"]
    assert [len(scores(r.infer_response)) for r in (replies[0], replies[2])] == [1, 3]
    assert "BYTES" in replies[1].error_message


class Arrivals(Observer):
    """Remembers when requests came, on the engine's clock."""

    def __init__(self):
        self.seen = []

    def ended(self, ends):
        self.seen += [request.arrived for request, _ in ends]


def test_a_request_of_a_stream_comes_with_its_message(kind):
    observer, messages = Arrivals(), queue.Queue()
    with (
        engine_with(None, observer=observer) as engine,
        grpc_transport(engine, kind=kind, observer=observer) as (_, address, _),
        grpc.insecure_channel(address) as channel,
    ):
        stub = channel.stream_stream(
            SERVICE + "ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        replies = stub(iter(messages.get, None), timeout=PATIENCE_S)
        messages.put(infer_request(one_hot(1)))
        next(replies)
        between = engine.now()
        messages.put(infer_request(one_hot(1)))
        next(replies)
        messages.put(None)
        wait_until(lambda: len(observer.seen) == 2)
    assert observer.seen[0] < between <= observer.seen[1]


def test_a_failed_forward_in_a_stream_is_a_message(kind):
    with (
        serving(kind, FakeBehaviour(fail_if=lambda batch: True)) as (address, _),
        grpc.insecure_channel(address) as channel,
    ):
        stub = channel.stream_stream(
            SERVICE + "ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        (reply,) = stub(iter([infer_request(one_hot(2))]), timeout=PATIENCE_S)
    assert reply.error_message
    assert not reply.HasField("infer_response")


def test_the_timeout_parameter_is_a_deadline(kind):
    hold = threading.Event()
    with (
        serving(kind, FakeBehaviour(hold=hold)) as (address, engine),
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(2) as calls,
    ):
        running = calls.submit(call, channel, "ModelInfer", infer_request(one_hot(1)), pb.ModelInferResponse)
        wait_until(lambda: engine.statistics().running == 1)
        late = infer_request(one_hot(2))
        late.parameters["timeout"].int64_param = 1  # a microsecond, with the only lane held
        waiting = calls.submit(call, channel, "ModelInfer", late, pb.ModelInferResponse)
        wait_until(lambda: engine.statistics().submitted == 2)
        hold.set()
        assert len(scores(running.result(PATIENCE_S))) == 1
        with pytest.raises(grpc.RpcError) as caught:
            waiting.result(PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        patient = infer_request(one_hot(2))
        patient.parameters["timeout"].int64_param = int(PATIENCE_S * 1e6)
        assert len(scores(call(channel, "ModelInfer", patient, pb.ModelInferResponse))) == 2


def test_the_server_and_its_models_are_described(kind):
    observer = CountingObserver()
    with (
        engine_with(None, observer=observer) as engine,
        grpc_transport(engine, kind=kind, observer=observer, counts=observer.model) as (transport, address, _),
        grpc.insecure_channel(address) as channel,
    ):
        name, version = engine.model.name, engine.model.version
        assert call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse).live
        assert call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready
        ready = lambda **asked: call(channel, "ModelReady", pb.ModelReadyRequest(**asked), pb.ModelReadyResponse).ready  # noqa: E731
        assert ready(name=name)
        assert ready(name=name, version=version)
        assert not ready(name="other")
        server = call(channel, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
        assert server.name == "narsil"
        metadata = call(channel, "ModelMetadata", pb.ModelMetadataRequest(name=name), pb.ModelMetadataResponse)
        assert [each.name for each in metadata.inputs] == ["dense", "ids"]
        config = call(channel, "ModelConfig", pb.ModelConfigRequest(name=name), pb.ModelConfigResponse).config
        assert [list(each.dims) for each in config.input] == [[-1, SCHEMA.dense_dim], [-1, SCHEMA.num_features]]
        call(channel, "ModelInfer", infer_request(one_hot(4)), pb.ModelInferResponse)
        for asked in (pb.ModelStatisticsRequest(), pb.ModelStatisticsRequest(name=name, version=version)):
            (stats,) = call(channel, "ModelStatistics", asked, pb.ModelStatisticsResponse).model_stats
            assert (stats.name, stats.inference_stats.success.count) == (name, 1)
        index = call(channel, "RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)
        assert [(each.name, each.version, each.state) for each in index.models] == [(name, version, "READY")]
        transport.retire()
        assert not call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready
        assert not ready(name=name)
        assert call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse).live


def test_tritons_own_client(kind):
    triton = pytest.importorskip("tritonclient.grpc", reason="no tritonclient")
    features = one_hot(6)
    ids = np.ascontiguousarray(features.sparse.ids.T)
    with serving(kind) as (address, engine):
        client = triton.InferenceServerClient(address)
        name = engine.model.name
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(name)
        assert client.get_server_metadata().name == "narsil"
        assert [each.name for each in client.get_model_metadata(name).inputs] == ["dense", "ids"]
        assert client.get_model_config(name).config.backend == "narsil"
        assert client.get_model_repository_index().models[0].name == name
        assert client.get_inference_statistics(name).model_stats[0].name == name
        inputs = [
            triton.InferInput("dense", list(features.dense.shape), "FP32"),
            triton.InferInput("ids", list(ids.shape), "INT32"),
        ]
        inputs[0].set_data_from_numpy(np.ascontiguousarray(features.dense))
        inputs[1].set_data_from_numpy(ids.astype(np.int32))
        wanted = scores_alone(features)
        result = client.infer(
            name, inputs, request_id="9", outputs=[triton.InferRequestedOutput("default")], timeout=20_000_000
        )
        assert np.array_equal(result.as_numpy("default"), wanted)
        assert result.get_response().id == "9"
        answers: queue.Queue = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(name, inputs)
        client.async_stream_infer("other", inputs)
        client.async_stream_infer(name, inputs)
        found = [answers.get(timeout=PATIENCE_S) for _ in range(3)]
        client.stop_stream()
        client.close()
    assert [error is None for _, error in found] == [True, False, True]
    assert "model 'other' is not served here" in str(found[1][1])
    assert np.array_equal(found[2][0].as_numpy("default"), wanted)


def test_message_and_metadata_may_not_name_two_models(kind):
    features = one_hot(1)
    with serving(kind) as (address, engine), grpc.insecure_channel(address) as channel:
        stub = channel.unary_unary(
            SERVICE + "ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        request = infer_request(features, model_name=engine.model.name)
        assert stub(request, metadata=(("narsil-model", engine.model.name),), timeout=PATIENCE_S).outputs
        with pytest.raises(grpc.RpcError) as caught:
            stub(request, metadata=(("narsil-model", "other"),), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
