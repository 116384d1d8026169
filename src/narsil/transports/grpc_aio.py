"""gRPC on grpcio's asyncio server: raw-bytes handlers, health, reflection, TLS.

Receives calls on the event loop's thread, delivers results from lane threads. Owns its sockets.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from narsil.catalog.catalog import EMPTY, Catalog
from narsil.errors import RequestError, status_of
from narsil.telemetry.observer import Observer
from narsil.transports.base import MAX_STREAMS, UNIX, EngineLike, Transport, address_of
from narsil.transports.endpoints import (
    ENDPOINTS,
    MODEL_KEY,
    SERVICES,
    VERSION_KEY,
    Answer,
    Control,
    Counts,
    Endpoint,
    Kind,
    Metadata,
    Models,
    Wire,
    no_counts,
    with_shared_memory,
)
from narsil.transports.health import Health
from narsil.transports.reflection import Reflection
from narsil.transports.scoring import Scoring
from narsil.transports.shared_memory import SharedMemory

log = logging.getLogger(__name__)

KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 60_000, 20_000

_CODES = {code.value[0]: code for code in grpc.StatusCode}

_Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
_Handler: TypeAlias = "Callable[[bytes, _Context], Awaitable[bytes]]"
_MethodHandler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """Where and how to listen."""

    host: str = "127.0.0.1"
    port: int = 50051  # 0: any free one
    max_message_bytes: int = 16 << 20
    max_metadata_bytes: int = 16 << 10
    tls_certificate: bytes | None = None  # PEM; with it goes the key
    tls_key: bytes | None = None
    tls_client_ca: bytes | None = None  # PEM; given: clients must present a certificate it signed
    shared_memory: bool = False  # whether clients may hand tensors over in it


class GrpcAioTransport(Transport):
    """Serves every endpoint."""

    def __init__(
        self,
        engine: EngineLike,
        options: GrpcOptions,
        observer: Observer | None = None,
        counts: Counts = no_counts,
        models: Models | None = None,
    ) -> None:
        self._engine = engine
        self._counts, self._models = counts, models
        self._retired = False
        self._options = options
        self._observer = observer or Observer()
        self._catalog = EMPTY
        self._server: grpc.aio.Server | None = None
        self._health: Health | None = None

    def serve(self, catalog: Catalog) -> None:
        """See Transport.serve."""
        self._catalog = catalog

    async def start(self) -> str:
        """See Transport.start. Raises OSError when the address cannot be bound."""
        options = self._options
        scoring = Scoring(self._engine, self._observer, asyncio.get_running_loop())
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                # Between a soft limit and the hard one gRPC refuses by chance; here the same call ends the same way.
                ("grpc.max_metadata_size", options.max_metadata_bytes),
                ("grpc.absolute_max_metadata_size", options.max_metadata_bytes),
                # A peer that is gone without a word is noticed, and its calls and memory are freed.
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                # A client may ask so too, as often as its load balancer's idle timeout makes it: a ping costs little,
                # and ending its connection for it, as gRPC does by default, costs all its calls.
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.so_reuseport", 0),  # a second server on this port is a mistake, not a second listener
            ],
        )
        self._health = Health(("", *SERVICES))
        rows = with_shared_memory(ENDPOINTS, SharedMemory()) if options.shared_memory else ENDPOINTS
        server.add_generic_rpc_handlers((_RawHandlers({each.method: self._handler(each, scoring) for each in rows}),))
        try:
            port = self._bind(server)
        except RuntimeError as error:
            hint = " (or the TLS files are not what they should be)" if options.tls_certificate else ""
            raise OSError(f"cannot listen on {address_of(options.host, options.port)}{hint}: {error}") from None
        await server.start()
        self._server = server
        self._health.serve()
        return address_of(options.host, port)

    def retire(self) -> None:
        """See Transport.retire."""
        self._retired = True
        if self._health is not None:
            self._health.retire()

    async def stop(self, grace: float) -> None:
        """See Transport.stop."""
        if self._server is not None:
            await self._server.stop(grace)

    def _bind(self, server: grpc.aio.Server) -> int:
        options = self._options
        address = address_of(options.host, options.port)
        if options.host.startswith(UNIX):
            _refuse_a_live_socket(options.host.removeprefix(UNIX))
        if options.tls_certificate is None or options.tls_key is None:
            return int(server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials(
            [(options.tls_key, options.tls_certificate)],
            root_certificates=options.tls_client_ca,
            require_client_auth=options.tls_client_ca is not None,
        )
        return int(server.add_secure_port(address, credentials))

    def _handler(self, endpoint: Endpoint, scoring: Scoring) -> _MethodHandler:
        assert self._health is not None  # noqa: S101 - the caller has made it
        if endpoint.wire is not None and endpoint.kind is Kind.STREAM:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming_handler(endpoint.method, endpoint.wire, scoring)
            )
        if endpoint.wire is not None:
            return grpc.unary_unary_rpc_method_handler(self._scoring_handler(endpoint.method, endpoint.wire, scoring))
        if endpoint.answer is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary_handler(endpoint.answer))
        if endpoint.kind is Kind.HEALTH_CHECK:
            return grpc.unary_unary_rpc_method_handler(self._health.check)
        if endpoint.kind is Kind.HEALTH_WATCH:
            return grpc.unary_stream_rpc_method_handler(self._health.watch)
        return grpc.stream_stream_rpc_method_handler(_reflecting(Reflection()))

    def _scoring_handler(self, method: str, wire: Wire, scoring: Scoring) -> _Handler:
        async def score(body: bytes, context: _Context) -> bytes:
            try:
                return await self._score(method, wire, body, context, scoring)
            except RequestError as error:
                return await _abort(context, error)
            except Exception:
                return await _abort_unexpected(context)

        return score

    def _streaming_handler(
        self, method: str, wire: Wire, scoring: Scoring
    ) -> Callable[[AsyncIterator[bytes], _Context], AsyncIterator[bytes]]:
        async def score_all(requests: AsyncIterator[bytes], context: _Context) -> AsyncIterator[bytes]:
            try:
                async for body in requests:
                    try:
                        answer = await self._score(method, wire, body, context, scoring)
                    except RequestError as error:
                        refusal = wire.refusal(error)
                        if refusal is None:
                            raise
                        answer = refusal
                    yield answer
            except RequestError as error:
                await _abort(context, error)
            except Exception:
                await _abort_unexpected(context)

        return score_all

    async def _score(self, method: str, wire: Wire, body: bytes, context: _Context, scoring: Scoring) -> bytes:
        """One message's answer. Raises what it ends with."""
        decoded = scoring.decoded(method, lambda: wire.decode(body, _metadata(context), self._catalog))
        result = await scoring.run(decoded, len(body), context.time_remaining())
        return scoring.encoded(method, lambda: wire.encode(decoded, result))

    def _unary_handler(self, answer: Answer) -> _Handler:
        async def handle(body: bytes, context: _Context) -> bytes:
            try:
                control = Control(self._catalog, self._retired, self._counts, self._models)
                found = answer(body, _metadata(context), control)
                return found if isinstance(found, bytes) else await asyncio.wrap_future(found)
            except RequestError as error:
                return await _abort(context, error)
            except Exception:
                return await _abort_unexpected(context)

        return handle


def _metadata(context: _Context) -> Metadata:
    """What the call's metadata says of the model."""
    found: dict[str, list[str]] = {MODEL_KEY: [], VERSION_KEY: []}
    for key, value in context.invocation_metadata() or ():
        if key in found:
            found[key].append(value if isinstance(value, str) else value.decode("utf-8", "replace"))
    # As HTTP has it, several are one, joined by commas.
    return Metadata(",".join(found[MODEL_KEY]), ",".join(found[VERSION_KEY]))


def _refuse_a_live_socket(path: str) -> None:
    """gRPC replaces whatever socket file is there. Raises OSError where a server still listens on it."""
    probe = socket.socket(socket.AF_UNIX)
    probe.setblocking(False)
    with probe:
        if probe.connect_ex(path) in (0, errno.EAGAIN):
            raise OSError(errno.EADDRINUSE, f"cannot listen on {UNIX}{path}: another server does")


class _RawHandlers(grpc.GenericRpcHandler):
    """Routes methods to handlers of raw bytes: no message objects are made."""

    def __init__(self, handlers: dict[str, _MethodHandler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _MethodHandler | None:
        return self._handlers.get(handler_call_details.method)


def _reflecting(reflection: Reflection) -> Callable[[AsyncIterator[bytes], _Context], AsyncIterator[bytes]]:
    async def reflect(requests: AsyncIterator[bytes], context: _Context) -> AsyncIterator[bytes]:
        try:
            async for body in requests:
                yield reflection.answer(body)
        except RequestError as error:
            await _abort(context, error)
        except Exception:
            await _abort_unexpected(context)

    return reflect


async def _abort(context: _Context, error: RequestError) -> bytes:
    code = status_of(error)
    await context.abort(_CODES[code], str(error))
    raise AssertionError("abort raises")


async def _abort_unexpected(context: _Context) -> bytes:
    """For what should not happen: the log gets the traceback, and the client no detail of this machine."""
    log.exception("a handler failed")
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log says why")
    raise AssertionError("abort raises")
