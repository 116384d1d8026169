"""What every transport shares: the engine as transports see it, the served model's face, and the wires.

A transport receives bytes, turns them into Requests through a Wire, submits them to the engine and turns each
Result back into bytes. Transports differ in sockets and threads and in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Features, Request, Result
from narsil.engine.engine import Source
from narsil.errors import ModelNotFound
from narsil.transports.codec import narsil_v1, predictor
from narsil.transports.validate import RequestLimits

UNIX = "unix:"  # a host that begins so is the path of a Unix socket
MAX_STREAMS = 1024  # calls in flight on one connection; clients queue more on their side
SERVICES = tuple(method.split("/")[1] for method in (predictor.METHOD, narsil_v1.METHOD))


class EngineLike(Protocol):
    """The engine's side that transports use; see narsil.engine.engine.Engine."""

    def now(self) -> float:
        """Seconds on the engine's clock."""

    def submit(self, request: Request) -> None:
        """Admits a request or raises a RequestError."""

    def cancel(self, request: Request) -> bool:
        """Takes a waiting request back."""

    def attach(self, source: Source | None) -> None:
        """Has idle lanes poll this source, or none."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model's face on the network."""

    name: str
    version: str
    backend: str
    schema: ModelSchema
    limits: RequestLimits = field(default_factory=RequestLimits)


@dataclass(frozen=True, slots=True)
class Wire:
    """One RPC that scores rows. ``decode`` gives Features and a context value that ``encode`` gets back."""

    method: str  # "/package.Service/Method"
    decode: Callable[[bytes], tuple[Features, Any]]
    encode: Callable[[Any, Result], bytes]


class Transport(ABC):
    """Listens, and connects clients with the engine."""

    @abstractmethod
    async def start(self) -> str:
        """Begins to accept; returns the address it is bound to, as HOST:PORT."""

    @abstractmethod
    def retire(self) -> None:
        """Tells health checkers to send no more. Still accepts: the engine, draining, refuses by itself."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Accepts nothing more, lets what is in flight finish for ``grace`` seconds, then closes."""


def wires(model: ServedModel) -> list[Wire]:
    """The wires that score rows on this model."""

    def decode_predictor(body: bytes) -> tuple[Features, None]:
        return predictor.decode(body, model.schema, model.limits), None

    def encode_predictor(_: None, result: Result) -> bytes:
        return predictor.encode(result.scores or {})

    def decode_narsil(body: bytes) -> tuple[Features, narsil_v1.Call]:
        call = narsil_v1.decode(body, model.schema, model.limits)
        check_model(model, call.model_name, call.model_version)
        return call.features, call

    def encode_narsil(call: narsil_v1.Call, result: Result) -> bytes:
        return narsil_v1.encode(call, model.name, model.version, result.scores or {}, result.times)

    return [
        Wire(predictor.METHOD, decode_predictor, encode_predictor),
        Wire(narsil_v1.METHOD, decode_narsil, encode_narsil),
    ]


def describe(model: ServedModel, body: bytes) -> bytes:
    """Answers narsil.v1.Inference/GetModel: a serialized GetModelRequest in, a serialized Model out."""
    check_model(model, narsil_v1.decode_get_model(body), "")
    return narsil_v1.encode_model(model.name, model.version, model.backend, model.schema)


def check_model(model: ServedModel, name: str, version: str) -> None:
    """Raises ModelNotFound unless the name and version, where given, are the served ones."""
    if name and name != model.name:
        raise ModelNotFound(f"model {name[:80]!r} is not served here; this server serves {model.name!r}")
    if version and version != model.version:
        raise ModelNotFound(f"version {version[:80]!r} of {model.name} is not served here; {model.version!r} is")


def address_of(host: str, port: int) -> str:
    """What clients connect to: HOST:PORT, an IPv6 address in brackets; or unix:PATH as it is."""
    if host.startswith(UNIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
