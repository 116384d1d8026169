"""Narsil's clients at a server's limits, over a real socket: rows are cut where they can be, and else refused."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import numpy as np
import pytest

import narsil
from narsil.backends.fake import FakeBehaviour
from narsil.client import Context, Prediction
from narsil.dataflow import Jagged, RequestLimits
from narsil.engine.queue import QueueLimits
from narsil.errors import MessageTooLarge, QueueFull
from narsil.transports.codec import narsil_v1
from tests.conformance.serving import serving
from tests.support import PATIENCE_S, TRANSPORTS, jagged, one_hot, run, scores_alone, unary, wait_until


@pytest.fixture(params=TRANSPORTS)
def kind(request) -> str:
    """The transport under test."""
    return request.param


def ask(client: str, address: str, *rows: Any, **options: Any) -> Prediction:
    """By the client of this name."""

    async def body() -> Prediction:
        async with narsil.AsyncClient(address) as asking:
            return await asking.predict(*rows, timeout=PATIENCE_S, **options)

    if client == "AsyncClient":
        return run(body())
    with narsil.Client(address) as asking:
        return asking.predict(*rows, timeout=PATIENCE_S, **options)


CLIENTS = pytest.mark.parametrize("client", ["Client", "AsyncClient"])
LIMITS = {
    "rows": (RequestLimits(max_rows=90), 16 << 20),
    "ids": (RequestLimits(max_ids=900), 16 << 20),
    "bytes": (RequestLimits(max_bytes=5000), 5000),
}


@CLIENTS
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("make", [one_hot, jagged])
def test_rows_beyond_a_limit_are_scored_in_order(kind, client, limit, make):
    limits, message_bytes = LIMITS[limit]
    features = make(1000, 7)
    if make is one_hot:
        rows: tuple[Any, ...] = (features.dense, features.sparse.ids.T)
    else:
        sparse = features.sparse
        assert isinstance(sparse, Jagged)
        bags = [
            sparse.values[start : start + length]
            for start, length in zip(sparse.starts.T.ravel(), sparse.lengths.T.ravel(), strict=True)
        ]
        rows = (features.dense, np.concatenate(bags), sparse.lengths.T)
    with serving(kind, limits=limits, message_bytes=message_bytes) as (address, engine):
        found = ask(client, address, *rows)
        np.testing.assert_array_equal(found.scores["default"], scores_alone(features))
        assert engine.statistics().submitted >= 3


@CLIENTS
def test_a_context_goes_with_every_part(kind, client):
    features = one_hot(500, 3)
    features.sparse.ids[0], features.dense[:, 1] = 9, 0.5
    own = (features.dense[:, [0, 2]], features.sparse.ids[1:].T)
    with serving(kind, limits=RequestLimits(max_ids=1000)) as (address, _):
        found = ask(client, address, *own, context=Context({"user": [9]}, [1], [0.5]))
        np.testing.assert_array_equal(found.scores["default"], scores_alone(features))


@CLIENTS
def test_a_message_that_is_too_large_is_no_full_queue(kind, client):
    with serving(kind, message_bytes=2000, limits=RequestLimits(max_bytes=2000)) as (address, _):
        with pytest.raises(MessageTooLarge, match=r"has 30\d\d bytes; the server, .*, takes 2000 ") as caught:
            ask(client, address, np.zeros((1, 3)), np.zeros((1, 4), int), request_id="r" * 3000)
        assert caught.value.limit == 2000


def test_both_transports_word_it_as_grpc_does(kind):
    with serving(kind, message_bytes=2000) as (address, _), grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, narsil_v1.METHOD)(bytes(2001), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "eceived message larger than max (2001 vs. 2000)" in caught.value.details()


def test_a_full_queue_is_no_message_that_is_too_large(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    rows = (np.zeros((1, 3)), np.zeros((1, 4), int))

    async def body(address: str, engine: Any) -> None:
        async with narsil.AsyncClient(address) as client:
            running = asyncio.create_task(client.predict(*rows))
            await asyncio.to_thread(wait_until, lambda: engine.statistics().running == 1)
            waiting = asyncio.create_task(client.predict(*rows))
            await asyncio.to_thread(wait_until, lambda: engine.statistics().queued == 1)
            with pytest.raises(QueueFull, match="1 of 1 requests"):
                await client.predict(*rows)
            behaviour.hold.set()
            await asyncio.gather(running, waiting)

    with serving(kind, behaviour, engine_limits=QueueLimits(max_requests=1)) as (address, engine):
        run(body(address, engine))


def test_the_model_s_limits_can_be_asked_for(kind):
    limits = RequestLimits(10, 200, 3000)
    with serving(kind, limits=limits) as (address, _), narsil.Client(address) as client:
        assert client.model().limits == limits
        assert client.model(name="fake", version="1").limits == limits
        with pytest.raises(narsil.RequestError, match="not served here"):
            client.model(name="other")
        with pytest.raises(narsil.RequestError, match="not served here"):
            client.model(version="2")
