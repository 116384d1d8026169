"""A transport of either kind over a fake engine, as every test of this suite wants it."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import numpy as np

from narsil.backends.fake import FakeBehaviour
from narsil.bench.workload import predictor_body
from narsil.catalog.catalog import Catalog
from narsil.dataflow import Features
from narsil.engine.queue import QueueLimits
from narsil.engine.served_model import RequestLimits
from narsil.http.transport import HttpOptions, HttpTransport
from narsil.telemetry.observer import Observer
from narsil.transports.endpoints import Counts, Models, no_counts
from tests.messages import predictor_pb2
from tests.support import PATIENCE_S, AnEngine, engine_with, grpc_transport


@contextmanager
def serving(kind: str, behaviour: FakeBehaviour | None = None, **options: Any) -> Iterator[tuple[str, AnEngine]]:
    """As serving_transport; yields the address and the engine alone."""
    with serving_transport(kind, behaviour, **options) as (address, made, _):
        yield address, made


@contextmanager
def serving_transport(
    kind: str,
    behaviour: FakeBehaviour | None = None,
    *,
    limits: RequestLimits | None = None,
    message_bytes: int = 16 << 20,
    engine_limits: QueueLimits | None = None,
    **engine: Any,
) -> Iterator[tuple[str, AnEngine, Any]]:
    """Yields the address, the engine and the transport. Whatever a test holds is let go of at the end."""
    with (
        engine_with(behaviour, limits=engine_limits, **engine) as made,
        grpc_transport(made, limits, kind, max_message_bytes=message_bytes) as (
            transport,
            address,
            _,
        ),
    ):
        try:
            yield address, made, transport
        finally:
            if behaviour is not None and behaviour.hold is not None:
                behaviour.hold.set()


@contextmanager
def native_transport(engine: AnEngine, **options: Any) -> Iterator[tuple[Any, str]]:
    """The native transport with these NativeOptions, and its address. It needs no event loop to live in."""
    from narsil.transports.native import NativeOptions, NativeTransport

    transport = NativeTransport(engine, NativeOptions(**{"port": 0, **options}))
    transport.serve(Catalog([engine.model]))
    try:
        yield transport, asyncio.run(transport.start())
    finally:
        asyncio.run(transport.stop(PATIENCE_S))


def predict_torchrec(channel: grpc.Channel, features: Features, timeout: float = PATIENCE_S) -> Any:
    """Scores, by a client that knows predictor.proto alone."""
    call = channel.unary_unary(
        "/predictor.Predictor/Predict", response_deserializer=predictor_pb2.PredictionResponse.FromString
    )
    reply = call(predictor_body(features), timeout=timeout)
    return np.array(reply.predictions["default"].data, dtype=np.float32)


def scores_in(message: bytes, task: str = "default") -> Any:
    """Of a serialized PredictionResponse."""
    reply = predictor_pb2.PredictionResponse.FromString(message)
    return np.array(reply.predictions[task].data, dtype=np.float32)


@contextmanager
def http_transport(
    engine: AnEngine,
    observer: Observer | None = None,
    counts: Counts = no_counts,
    metrics: Any = None,
    models: Models | None = None,
    **options: Any,
) -> Iterator[tuple[HttpTransport, str]]:
    """The engine's model over HTTP, with these HttpOptions, and the address. It needs no event loop to live in."""
    transport = HttpTransport(engine, HttpOptions(**{"port": 0, **options}), observer, counts, models, metrics)
    transport.serve(Catalog([engine.model]))
    address = asyncio.run(transport.start())
    try:
        yield transport, address
    finally:
        asyncio.run(transport.stop(PATIENCE_S))


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


def ask(
    address: str,
    path: str,
    body: bytes | Iterator[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    method: str = "",
) -> Answer:
    """One request over a connection of its own: POST where there is a body."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, dict(headers or {}))
        reply = connection.getresponse()
        return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    finally:
        connection.close()
