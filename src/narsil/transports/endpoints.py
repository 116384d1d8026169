"""Every gRPC method that Narsil answers, in one table. Transports, reflection and health read it; a new wire is a row
here and a codec.

Scoring methods come with a Wire: bytes in, a model and its rows out, and the way back. The others answer by
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from narsil.catalog.catalog import Catalog
from narsil.dataflow import Features, Result
from narsil.engine.served_model import ServedModel
from narsil.errors import InvalidRequest
from narsil.transports.codec import narsil_v1, predictor
from narsil.wire import MODEL_KEY, VERSION_KEY

__all__ = [
    "ALL_SERVICES",
    "ENDPOINTS",
    "MODEL_KEY",
    "REFLECTION",
    "SERVICES",
    "VERSION_KEY",
    "Decoded",
    "Endpoint",
    "Kind",
    "Metadata",
    "Wire",
]

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Kind(Enum):
    """How a method is answered; by these names the native data plane knows it too."""

    PREDICTOR = "predictor"  # scores; native code reads TorchRec's wire
    NARSIL = "narsil"  # scores; native code reads Narsil's wire
    SCORES = "scores"  # scores, by its Wire alone: what a new wire begins as
    UNARY = "unary"  # one message in, one out, by ``answer``
    REFLECTION = "stream"  # each message in gets one out
    HEALTH_CHECK = "health_check"
    HEALTH_WATCH = "health_watch"


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a call's metadata says of the model; empty where it says nothing."""

    model_name: str = ""
    model_version: str = ""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A scoring call's message, and what its answer will need of it."""

    model: ServedModel
    features: Features
    echo: Any = None  # what ``encode`` gets back
    passed_over: tuple[str, ...] = ()  # groups of features that it holds and the model does not take


class Wire(Protocol):
    """A codec for a scoring method."""

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        """The message's model, and its rows held against that model's schema and limits. Raises RequestError."""

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        """The answer: a serialized message."""


class _Predictor:
    """TorchRec's wire: metadata names the model."""

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        model = catalog.find(metadata.model_name, metadata.model_version)
        request = predictor.read(body)
        features = request.features(model.schema, model.limits)
        return Decoded(model, features, passed_over=request.passed_over())

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        return predictor.encode(result.scores or {})


class _NarsilV1:
    """Narsil's wire: the message names the model, or metadata does."""

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        request = narsil_v1.read(body)
        model = catalog.find(
            _one("model", request.model_name, metadata.model_name, MODEL_KEY),
            _one("version", request.model_version, metadata.model_version, VERSION_KEY),
        )
        return Decoded(model, request.features(model.schema, model.limits), request.request_id)

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        model = decoded.model
        return narsil_v1.encode(decoded.echo, model.name, model.version, result.scores or {}, result.times)


def _one(what: str, said: str, meant: str, key: str) -> str:
    if said and meant and said != meant:
        raise InvalidRequest(
            f"the message asks for {what} {said[:80]!r} and the metadata {key} for {meant[:80]!r}; give one of them"
        )
    return said or meant


def _get_model(body: bytes, metadata: Metadata, catalog: Catalog) -> bytes:
    """narsil.v1.Inference/GetModel: a serialized GetModelRequest in, a serialized Model out."""
    name = _one("model", narsil_v1.decode_get_model(body), metadata.model_name, MODEL_KEY)
    model = catalog.find(name, metadata.model_version)
    return narsil_v1.encode_model(
        model.name, model.version, model.backend, model.schema, model.limits, whole=model.whole
    )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method."""

    method: str  # "/package.Service/Method"
    kind: Kind
    wire: Wire | None = None  # of methods that score rows
    answer: Callable[[bytes, Metadata, Catalog], bytes] | None = None  # of Kind.UNARY

    @property
    def service(self) -> str:
        """package.Service."""
        return self.method.split("/")[1]


ENDPOINTS = (
    Endpoint(predictor.METHOD, Kind.PREDICTOR, wire=_Predictor()),
    Endpoint(narsil_v1.METHOD, Kind.NARSIL, wire=_NarsilV1()),
    Endpoint(narsil_v1.METHOD_GET_MODEL, Kind.UNARY, answer=_get_model),
    Endpoint(REFLECTION, Kind.REFLECTION),
    Endpoint("/grpc.health.v1.Health/Check", Kind.HEALTH_CHECK),
    Endpoint("/grpc.health.v1.Health/Watch", Kind.HEALTH_WATCH),
)

# Services that carry requests: what health checks may ask for by name.
SERVICES = tuple(dict.fromkeys(each.service for each in ENDPOINTS if each.wire or each.answer))
# All services, as reflection lists them.
ALL_SERVICES = tuple(dict.fromkeys(each.service for each in ENDPOINTS))
