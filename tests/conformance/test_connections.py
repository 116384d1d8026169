"""What both transports do about a connection: pings, sockets that are there already, metadata."""

from __future__ import annotations

import socket

import grpc
import numpy as np
import pytest

from narsil.bench.workload import predictor_body
from tests.conformance.http2_client import connected
from tests.conformance.serving import predict_torchrec, serving
from tests.support import PATIENCE_S, TRANSPORTS, engine_with, grpc_server, one_hot, scores_alone


@pytest.fixture(params=TRANSPORTS)
def kind(request) -> str:
    """The transport under test."""
    return request.param


def test_a_client_may_ask_as_often_as_it_likes_whether_the_server_is_there(kind):
    with serving(kind) as (address, _), connected(address) as client:
        for _ in range(20):
            client.ping()
        assert client.ask(predictor_body(one_hot(1))).status == 0
        for _ in range(20):  # without a call in flight too
            client.ping()
        assert client.goaway is None


def test_a_live_server_s_unix_socket_is_not_taken_away(kind, tmp_path):
    host = f"unix:{tmp_path}/narsil.sock"
    with engine_with() as engine, engine_with() as other, grpc_server(engine, None, kind, host=host) as address:
        with pytest.raises(OSError, match="cannot listen on"), grpc_server(other, None, kind, host=host):
            pass
        with grpc.insecure_channel(address) as channel:
            features = one_hot(3)
            np.testing.assert_array_equal(predict_torchrec(channel, features), scores_alone(features))


def test_a_dead_server_s_unix_socket_is_replaced(kind, tmp_path):
    path = tmp_path / "narsil.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with (
        engine_with() as engine,
        grpc_server(engine, None, kind, host=f"unix:{path}") as address,
        grpc.insecure_channel(address) as channel,
    ):
        predict_torchrec(channel, one_hot(1))


@pytest.mark.parametrize("size", [17_000, 63_000, 300_000])
def test_metadata_beyond_the_limit_ends_its_call_alone_and_says_so(kind, size):
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/predictor.Predictor/Predict")
        with pytest.raises(grpc.RpcError) as caught:
            call(predictor_body(one_hot(1)), metadata=(("baggage", "x" * size),), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "16384" in caught.value.details()
        predict_torchrec(channel, one_hot(1))
