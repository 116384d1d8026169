"""Every gRPC method that Narsil answers, in one table. Transports, reflection and health read it; a new wire is a row
here and a codec.

Scoring methods come with a Wire: bytes in, a model and its rows out, and the way back. The others answer by
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import version
from typing import Any, Protocol

from narsil.catalog.catalog import Catalog
from narsil.catalog.control import Standing
from narsil.dataflow import Features, Result
from narsil.engine.served_model import ServedModel
from narsil.errors import InvalidRequest, ModelNotFound, NoModel, Refused, RequestError
from narsil.telemetry.observer import ModelCounts
from narsil.transports.codec import narsil_v1, oip, predictor
from narsil.transports.shared_memory import SharedMemory
from narsil.wire import MODEL_KEY, VERSION_KEY

__all__ = [
    "ALL_SERVICES",
    "ENDPOINTS",
    "MODEL_KEY",
    "REFLECTION",
    "SERVICES",
    "VERSION_KEY",
    "Answer",
    "Control",
    "Counts",
    "Decoded",
    "Endpoint",
    "Kind",
    "Metadata",
    "Models",
    "Wire",
    "no_counts",
    "with_shared_memory",
]

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Kind(Enum):
    """How a method is answered; by these names the native data plane knows it too."""

    PREDICTOR = "predictor"  # scores; native code reads TorchRec's wire
    NARSIL = "narsil"  # scores; native code reads Narsil's wire
    OIP = "oip"  # scores; native code reads the Open Inference Protocol
    SCORES = "scores"  # scores, by its Wire alone: what a new wire begins as
    UNARY = "unary"  # one message in, one out, by ``answer``
    STREAM = "stream"  # each message in gets one out, in order: scores by its Wire, or reflection
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
    timeout_s: float | None = None  # that the message asks for; the call may have a deadline beside it
    priority: int = 0

    def deadline(self, arrived: float, of_call: float | None) -> float | None:
        """The earlier of the call's deadline and the message's, on the engine's clock; None where there is neither."""
        if self.timeout_s is None:
            return of_call
        return arrived + self.timeout_s if of_call is None else min(of_call, arrived + self.timeout_s)


class Models(Protocol):
    """What is known of models beyond those that are served; see narsil.catalog.control.ModelControl."""

    def load(self, name: str) -> Future[bytes]:
        """Serves what the repository holds of a name now, which may take minutes; then nothing, or a RequestError."""

    def unload(self, name: str) -> Future[bytes]:
        """Serves no version of a name any more; then nothing, or a RequestError."""

    def index(self) -> Sequence[tuple[str, str, Standing]]:
        """(name, version, where it stands) of all that is or was to be served."""


Counts = Callable[[str, str], ModelCounts]  # (name, version) -> what has happened


def no_counts(name: str, version: str) -> ModelCounts:
    """For a transport that nobody counts for."""
    return ModelCounts()


@dataclass(frozen=True, slots=True)
class Control:
    """What methods that do not score may ask of the server."""

    catalog: Catalog
    retired: bool = False  # whether it is about to stop
    counts: Counts = no_counts
    models: Models | None = None  # None: those that are served, for good

    @property
    def ready(self) -> bool:
        """Whether it takes requests and has a model for them."""
        return not self.retired and len(self.catalog) > 0

    def versions(self, model: ServedModel) -> list[str]:
        """Of this model's name, those that are served."""
        return [other.version for other in self.catalog if other.name == model.name]

    def counted(self, name: str, version: str) -> dict[tuple[str, str], ModelCounts]:
        """(name, version) -> counts of one version, of all versions of a name, or of all that is served. Raises
        ModelNotFound."""
        chosen = tuple(self.catalog)
        if name or version:
            found = self.catalog.find(name, version)
            chosen = (found,) if version else tuple(model for model in chosen if model.name == found.name)
        return {(each.name, each.version): self.counts(each.name, each.version) for each in chosen}

    def index(self, *, ready_only: bool = False) -> list[tuple[str, str, str, str]]:
        """(name, version, state, reason) of what is or was to be served, or of that alone which is."""
        if self.models is None:
            return [(model.name, model.version, "READY", "") for model in self.catalog]
        return [
            (name, version_, standing.state, standing.reason)
            for name, version_, standing in self.models.index()
            if standing.state == "READY" or not ready_only
        ]

    def changeable(self) -> Models:
        """What loads and unloads. Raises Refused where what is served stays as it is."""
        if self.models is None:
            raise Refused(
                "this server serves the one model that it was started with; start it with --repository and "
                "--model-control explicit to load and unload models"
            )
        return self.models


class Wire(Protocol):
    """A codec for a scoring method."""

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        """The message's model, and its rows held against that model's schema and limits. Raises RequestError."""

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        """The answer: a serialized message."""

    def refusal(self, error: RequestError) -> bytes | None:
        """The answer to a request that ends with this error, where the wire has a message for it; else the call ends
        with a status."""


class _Unary:
    """A wire whose errors are statuses."""

    def refusal(self, error: RequestError) -> bytes | None:
        return None


class _Predictor(_Unary):
    """TorchRec's wire: metadata names the model."""

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        model = catalog.route(metadata.model_name, metadata.model_version)
        request = predictor.read(body)
        features = request.features(model.schema, model.limits)
        return Decoded(model, features, passed_over=request.passed_over())

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        return predictor.encode(result.scores or {})


class _NarsilV1(_Unary):
    """Narsil's wire: the message names the model, or metadata does."""

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        request = narsil_v1.read(body)
        model = catalog.route(*_named(request.model_name, request.model_version, metadata))
        return Decoded(model, request.features(model.schema, model.limits), request.request_id)

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        model = decoded.model
        return narsil_v1.encode(decoded.echo, model.name, model.version, result.scores or {}, result.times)


class _OpenInference(_Unary):
    """The Open Inference Protocol: the message names the model, or metadata does. Tensors may lie in ``memory``."""

    def __init__(self, memory: SharedMemory | None = None) -> None:
        self._memory = memory

    def decode(self, body: bytes, metadata: Metadata, catalog: Catalog) -> Decoded:
        request = oip.read(body, shared=self._memory is not None)
        model = catalog.route(*_named(request.model_name, request.model_version, metadata))
        features = request.features(model.schema, model.limits, self._memory)
        slots = request.slots(model.schema, features.rows, self._memory)
        echo = (request.request_id, tuple(request.outputs), slots)
        return Decoded(model, features, echo, timeout_s=request.timeout_s, priority=request.priority)

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        (request_id, outputs, slots), model = decoded.echo, decoded.model
        return oip.encode(model.name, model.version, request_id, result.scores or {}, outputs, slots)


class _OpenInferenceStream(_OpenInference):
    """The same in a stream, which goes on after a request that fails."""

    def encode(self, decoded: Decoded, result: Result) -> bytes:
        return oip.encode_streamed(super().encode(decoded, result))

    def refusal(self, error: RequestError) -> bytes | None:
        return oip.encode_stream_error(str(error))


def _found(name: str, version_: str, metadata: Metadata, catalog: Catalog) -> ServedModel:
    """The model that a message and its metadata name."""
    return catalog.find(*_named(name, version_, metadata))


def _named(name: str, version_: str, metadata: Metadata) -> tuple[str, str]:
    """(name, version) that a message and its metadata say together; empty where neither says any."""
    return (
        _one("model", name, metadata.model_name, MODEL_KEY),
        _one("version", version_, metadata.model_version, VERSION_KEY),
    )


def _one(what: str, said: str, meant: str, key: str) -> str:
    if said and meant and said != meant:
        raise InvalidRequest(
            f"the message asks for {what} {said[:80]!r} and the metadata {key} for {meant[:80]!r}; give one of them"
        )
    return said or meant


def _get_model(body: bytes, metadata: Metadata, control: Control) -> bytes:
    """narsil.v1.Inference/GetModel: a serialized GetModelRequest in, a serialized Model out."""
    model = _found(narsil_v1.decode_get_model(body), "", metadata, control.catalog)
    return narsil_v1.encode_model(
        model.name, model.version, model.backend, model.schema, model.limits, whole=model.whole
    )


def _server_live(body: bytes, metadata: Metadata, control: Control) -> bytes:
    return oip.encode_flag(True)


def _server_ready(body: bytes, metadata: Metadata, control: Control) -> bytes:
    return oip.encode_flag(control.ready)


def _model_ready(body: bytes, metadata: Metadata, control: Control) -> bytes:
    try:
        _found(*oip.read_named(body), metadata, control.catalog)
    except (ModelNotFound, NoModel):
        return oip.encode_flag(False)
    return oip.encode_flag(control.ready)


def _server_metadata(body: bytes, metadata: Metadata, control: Control) -> bytes:
    return oip.encode_server(version("narsil"))


def _model_metadata(body: bytes, metadata: Metadata, control: Control) -> bytes:
    model = _found(*oip.read_named(body), metadata, control.catalog)
    return oip.encode_metadata(model.name, control.versions(model), model.backend, model.schema)


def _model_config(body: bytes, metadata: Metadata, control: Control) -> bytes:
    model = _found(*oip.read_named(body), metadata, control.catalog)
    return oip.encode_config(model.name, model.backend, model.schema)


def _model_statistics(body: bytes, metadata: Metadata, control: Control) -> bytes:
    return oip.encode_statistics(control.counted(*_named(*oip.read_named(body), metadata)))


def _repository_index(body: bytes, metadata: Metadata, control: Control) -> bytes:
    return oip.encode_index(control.index(ready_only=oip.read_index_request(body)))


def _repository_load(body: bytes, metadata: Metadata, control: Control) -> Future[bytes]:
    return control.changeable().load(oip.read_repository_request(body))


def _repository_unload(body: bytes, metadata: Metadata, control: Control) -> Future[bytes]:
    return control.changeable().unload(oip.read_repository_request(body))


# The answer, or what will be it.
Answer = Callable[[bytes, Metadata, Control], "bytes | Future[bytes]"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method."""

    method: str  # "/package.Service/Method"
    kind: Kind
    wire: Wire | None = None  # of methods that score rows
    answer: Answer | None = None  # of Kind.UNARY

    @property
    def service(self) -> str:
        """package.Service."""
        return self.method.split("/")[1]


ENDPOINTS = (
    Endpoint(predictor.METHOD, Kind.PREDICTOR, wire=_Predictor()),
    Endpoint(narsil_v1.METHOD, Kind.NARSIL, wire=_NarsilV1()),
    Endpoint(narsil_v1.METHOD_GET_MODEL, Kind.UNARY, answer=_get_model),
    Endpoint(oip.SERVICE + "ModelInfer", Kind.OIP, wire=_OpenInference()),
    Endpoint(oip.SERVICE + "ModelStreamInfer", Kind.STREAM, wire=_OpenInferenceStream()),
    Endpoint(oip.SERVICE + "ServerLive", Kind.UNARY, answer=_server_live),
    Endpoint(oip.SERVICE + "ServerReady", Kind.UNARY, answer=_server_ready),
    Endpoint(oip.SERVICE + "ModelReady", Kind.UNARY, answer=_model_ready),
    Endpoint(oip.SERVICE + "ServerMetadata", Kind.UNARY, answer=_server_metadata),
    Endpoint(oip.SERVICE + "ModelMetadata", Kind.UNARY, answer=_model_metadata),
    Endpoint(oip.SERVICE + "ModelConfig", Kind.UNARY, answer=_model_config),
    Endpoint(oip.SERVICE + "ModelStatistics", Kind.UNARY, answer=_model_statistics),
    Endpoint(oip.SERVICE + "RepositoryIndex", Kind.UNARY, answer=_repository_index),
    Endpoint(oip.SERVICE + "RepositoryModelLoad", Kind.UNARY, answer=_repository_load),
    Endpoint(oip.SERVICE + "RepositoryModelUnload", Kind.UNARY, answer=_repository_unload),
    Endpoint(REFLECTION, Kind.STREAM),
    Endpoint("/grpc.health.v1.Health/Check", Kind.HEALTH_CHECK),
    Endpoint("/grpc.health.v1.Health/Watch", Kind.HEALTH_WATCH),
)


def with_shared_memory(rows: Sequence[Endpoint], memory: SharedMemory) -> tuple[Endpoint, ...]:
    """The same methods, of which those of the Open Inference Protocol take tensors in shared memory, and those that
    register it."""

    def register(body: bytes, metadata: Metadata, control: Control) -> bytes:
        memory.register(*oip.read_region(body))
        return b""

    def unregister(body: bytes, metadata: Metadata, control: Control) -> bytes:
        memory.unregister(oip.read_named(body)[0])
        return b""

    def status(body: bytes, metadata: Metadata, control: Control) -> bytes:
        return oip.encode_regions(memory.regions(oip.read_named(body)[0]))

    def server(body: bytes, metadata: Metadata, control: Control) -> bytes:
        return oip.encode_server(version("narsil"), (*oip.EXTENSIONS, oip.SHARED_MEMORY))

    changed: dict[str, dict[str, Any]] = {
        oip.SERVICE + "ModelInfer": {"wire": _OpenInference(memory)},
        oip.SERVICE + "ModelStreamInfer": {"wire": _OpenInferenceStream(memory)},
        oip.SERVICE + "ServerMetadata": {"answer": server},
    }
    added = {"Register": register, "Unregister": unregister, "Status": status}
    return (
        *(replace(each, **changed.get(each.method, {})) for each in rows),
        *(
            Endpoint(f"{oip.SERVICE}SystemSharedMemory{name}", Kind.UNARY, answer=answer)
            for name, answer in added.items()
        ),
    )


# Services that carry requests: what health checks may ask for by name.
SERVICES = tuple(dict.fromkeys(each.service for each in ENDPOINTS if each.wire or each.answer))
# All services, as reflection lists them.
ALL_SERVICES = tuple(dict.fromkeys(each.service for each in ENDPOINTS))
