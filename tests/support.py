"""What tests share: a small schema, request builders, replies that can be waited for. No sleeping."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.fake import FakeBackend, FakeBehaviour, fake_scores
from narsil.catalog.catalog import Catalog
from narsil.clock import Clock
from narsil.dataflow import Features, Jagged, OneHot, Request, Result, Served
from narsil.engine.collate import Collator
from narsil.engine.engine import Engine
from narsil.engine.queue import QueueLimits
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import RequestLimits, ServedModel
from narsil.extension import AVAILABLE
from narsil.telemetry.observer import Observer
from narsil.transports.base import Transport
from narsil.transports.endpoints import Counts, Models, no_counts
from narsil.transports.grpc_aio import GrpcAioTransport, GrpcOptions

T = TypeVar("T")
# How long a test waits for what must happen; reached only by a failing test, of which ``make mutants`` has many.
PATIENCE_S = float(os.environ.get("TEST_PATIENCE_S", "30"))

# Tables of different sizes, so that a feature's limit is its own.
SCHEMA = ModelSchema(
    dense_dim=3,
    features=(
        Feature("user", "t_user", rows=50, dim=8),
        Feature("item", "t_item", rows=7, dim=8),
        Feature("tags", "t_tags", rows=1000, dim=8),
        Feature("shop", "t_shop", rows=20, dim=8),
    ),
)


class Reply:
    """A reply handle that remembers every delivery."""

    def __init__(self) -> None:
        self.cancelled = False
        self.results: list[Result] = []
        self._delivered = threading.Event()

    def deliver(self, result: Result) -> None:
        self.results.append(result)
        self._delivered.set()

    def wait(self) -> Result:
        assert self._delivered.wait(PATIENCE_S), "no result was delivered"
        return self.results[0]


class OneHotFeatures(Features):
    """Features of which tests may read the ids."""

    sparse: OneHot


class JaggedFeatures(Features):
    """Features of which tests may read the bags."""

    sparse: Jagged


class ARequest(Request):
    """A request of which tests may ask what became of it."""

    features: Features
    reply: Reply


def one_hot(rows: int, seed: int = 0, schema: ModelSchema = SCHEMA) -> OneHotFeatures:
    random = np.random.default_rng(seed)
    dense = random.random((rows, schema.dense_dim), dtype=np.float32)
    ids = random.integers(0, schema.rows[:, None], (schema.num_features, rows)).astype(np.int32)
    return OneHotFeatures(rows, dense, OneHot(ids))


def jagged(rows: int, seed: int = 0, schema: ModelSchema = SCHEMA, longest: int = 4) -> JaggedFeatures:
    """Bags of 0 .. longest ids, key-major."""
    random = np.random.default_rng(seed)
    dense = random.random((rows, schema.dense_dim), dtype=np.float32)
    lengths = random.integers(0, longest + 1, (schema.num_features, rows)).astype(np.int32)
    values = random.integers(0, np.repeat(schema.rows, lengths.sum(axis=1))).astype(np.int32)
    starts = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape) - lengths
    return JaggedFeatures(rows, dense, Jagged(values, starts, lengths))


def fake_model(
    behaviour: FakeBehaviour | None = None,
    *,
    lanes: int = 1,
    schema: ModelSchema = SCHEMA,
    name: str = "fake",
    version: str = "1",
    limits: RequestLimits | None = None,
    share: float = 1.0,
) -> ServedModel:
    """A served model of fake backends, one per lane."""
    backend = FakeBackend(schema, behaviour)
    backends = [backend, *(backend.share() for _ in range(lanes - 1))]
    return ServedModel(name, version, backends, limits, share=share)


class AnEngine(Engine):
    """An engine whose tests need not name the one model that it serves."""

    model: ServedModel


NOBODY = fake_model()  # of requests that no engine sees


def request(
    rows: int = 1,
    *,
    model: Served = NOBODY,
    arrived: float = 0.0,
    deadline: float | None = None,
    features: Features | None = None,
    size: int = 0,
) -> ARequest:
    return ARequest(model, features or one_hot(rows), Reply(), arrived, deadline, size)


def scores_alone(features: Features, schema: ModelSchema = SCHEMA) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the fake backend scores for these rows when they run alone."""
    return fake_scores(Collator(schema).collate([features]))


def unary(channel: grpc.Channel | grpc.aio.Channel, method: str) -> Any:
    """Calls a method with bytes and gives the reply's bytes."""
    return channel.unary_unary(method)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """An asyncio test body, bounded in time."""
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE_S))


def wait_until(condition: Callable[..., bool]) -> None:
    """Returns once the condition holds; looks again without a fixed sleep."""
    ended = threading.Event()
    timer = threading.Timer(PATIENCE_S, ended.set)
    timer.start()
    try:
        while not condition():
            assert not ended.wait(0.001), "the condition never came true"
    finally:
        timer.cancel()


@contextmanager
def engine_with(
    behaviour: FakeBehaviour | None = None,
    *,
    lanes: int = 1,
    policy: BatchPolicy | None = None,
    limits: QueueLimits | None = None,
    clock: Clock | None = None,
    schema: ModelSchema = SCHEMA,
    observer: Observer | None = None,
    model: ServedModel | None = None,
) -> Iterator[AnEngine]:
    """A started engine that serves a fake model, drained at the end."""
    engine = AnEngine(lanes, policy, limits, clock, observer)
    engine.start()
    try:
        engine.model = model or fake_model(behaviour, lanes=lanes, schema=schema)
        engine.add(engine.model)
        yield engine
    finally:
        if behaviour is not None and behaviour.hold is not None:
            behaviour.hold.set()
        assert engine.drain(PATIENCE_S)


OnLoop = Callable[[Coroutine[Any, Any, Any]], Any]


TRANSPORTS = ["grpcio", pytest.param("native", marks=pytest.mark.skipif(not AVAILABLE, reason="built without it"))]


@contextmanager
def grpc_transport(
    engine: AnEngine,
    limits: RequestLimits | None = None,
    kind: str = "grpcio",
    observer: Observer | None = None,
    counts: Counts = no_counts,
    models: Models | None = None,
    **options: Any,
) -> Iterator[tuple[Transport, str, OnLoop]]:
    """The engine's model behind a real gRPC socket on loopback, on an event loop in a thread of its own.

    Yields the transport, its address, and a function that runs a coroutine on that loop.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def on_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE_S)

    async def make() -> tuple[Transport, str]:
        options.setdefault("port", 0)
        transport: Transport
        if kind == "native":
            from narsil.transports.native import NativeOptions, NativeTransport

            transport = NativeTransport(engine, NativeOptions(**options), observer, counts, models)
        else:
            transport = GrpcAioTransport(engine, GrpcOptions(**options), observer, counts, models)
        engine.model.limits = limits or engine.model.limits
        transport.serve(Catalog([engine.model]))
        return transport, await transport.start()

    try:
        transport, address = on_loop(make())
        try:
            yield transport, address, on_loop
        finally:
            on_loop(transport.stop(PATIENCE_S))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


@contextmanager
def grpc_server(
    engine: AnEngine, limits: RequestLimits | None = None, kind: str = "grpcio", **options: Any
) -> Iterator[str]:
    """As grpc_transport; yields the address alone."""
    with grpc_transport(engine, limits, kind, **options) as (_, address, _):
        yield address
