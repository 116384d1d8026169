"""Health watchers, which clients with healthCheckConfig keep open: many clients, and a client that opens many."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.conformance.http2_client import RawClient
from tests.conformance.serving import serving
from tests.http2_peer import CANCEL, RST_STREAM
from tests.support import wait_until

WATCH, CHECK = "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
RESOURCE_EXHAUSTED = 8


def first_message(client: RawClient, stream: int) -> bytes | None:
    """Of a call that goes on; None once the call has ended without one."""
    while not client.answers.get(stream) or not client.answers[stream].messages:
        if client.answers.get(stream) and client.answers[stream].ended:
            return None
        assert client.read() is not None
    return client.answers[stream].messages[0]


def watch(client: RawClient) -> bytes | None:
    return first_message(client, client.call(b"", WATCH))


@pytest.mark.parametrize("kind", ["grpcio", "native"])
def test_many_clients_watch_at_once(kind):
    with serving(kind) as (address, _), ExitStack() as opened:
        for _ in range(300):
            client = opened.enter_context(RawClient(address))
            assert watch(client) == SERVING


@pytest.mark.parametrize("kind", ["grpcio", "native"])
def test_one_client_s_watchers_are_bounded_and_shut_nobody_out(kind, monkeypatch):
    monkeypatch.setattr("narsil.transports.health.MAX_WATCHERS", 3)
    with serving(kind) as (address, _), RawClient(address) as greedy, RawClient(address) as modest:
        streams = [greedy.call(b"", WATCH) for _ in range(4)]
        assert [first_message(greedy, stream) for stream in streams] == [SERVING] * 3 + [None]
        answer = greedy.answers[streams[-1]]
        assert (answer.status, "more than 3 health watchers" in answer.detail) == (RESOURCE_EXHAUSTED, True)
        assert greedy.ask(b"", CHECK).messages == [SERVING]
        assert watch(modest) == SERVING
        for stream in streams[:3]:
            greedy.frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4))
        greedy.ping()
        wait_until(lambda: watch(greedy) == SERVING)
