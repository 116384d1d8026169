"""gRPC on Narsil's own data plane: no I/O thread, no event loop. Idle lanes poll the network themselves.

Receives whole calls from native code, which has decoded and validated those of a common form. What it left alone goes
through the portable codec, which knows every form and explains every fault. Owns the plane.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from narsil.dataflow import Request, Result
from narsil.errors import RequestError, status_of
from narsil.extension import NativeFeatures
from narsil.transports import health
from narsil.transports.base import (
    MAX_STREAMS,
    SERVICES,
    UNIX,
    EngineLike,
    ServedModel,
    Transport,
    Wire,
    address_of,
    describe,
    wires,
)
from narsil.transports.codec import narsil_v1, predictor
from narsil.transports.reflection import METHOD as REFLECTION
from narsil.transports.reflection import Reflection

if TYPE_CHECKING:
    from narsil._native import Call

log = logging.getLogger(__name__)

_INTERNAL = 13
_HEALTH = "/grpc.health.v1.Health/"


@dataclass(frozen=True, slots=True)
class NativeOptions:
    """Where and how to listen."""

    host: str = "127.0.0.1"  # or unix:PATH
    port: int = 50051  # 0: any free one
    max_message_bytes: int = 16 << 20
    # Of messages that are still arriving or wait for a lane to take them, and of answers that clients do not read.
    max_buffered_bytes: int = 1 << 29
    limits: Mapping[str, float] = field(default_factory=dict)  # others, by the names that _native.Plane gives them


class _Reply:
    """Where a call's result goes."""

    __slots__ = ("_call", "_context", "_encode", "_transport")

    def __init__(
        self,
        transport: NativeTransport,
        call: Call,
        encode: Callable[[Any, Result], bytes] | None = None,
        context: object = None,
    ) -> None:
        self._transport = transport
        self._call = call
        self._encode = encode  # None: native code encodes
        self._context = context

    @property
    def cancelled(self) -> bool:
        return self._call.cancelled

    def deliver(self, result: Result) -> Callable[[], None]:
        call, transport = self._call, self._transport
        transport.forget(call.id)
        try:
            if result.error is not None:
                _fail(call, result.error)
            elif self._encode is None:
                times = result.times
                call.answer_scores(
                    result.scores or {}, times.batch_requests, times.batch_rows, times.queue, times.execute
                )
            else:
                call.answer(self._encode(self._context, result))
        except Exception:
            _fail_unexpected(call)
        return transport.flush


class NativeTransport(Transport):
    """Serves what GrpcAioTransport serves, without TLS. A Source for the engine's idle lanes."""

    def __init__(self, engine: EngineLike, model: ServedModel, options: NativeOptions) -> None:
        from narsil._native import Model, Plane

        schema, limits = model.schema, model.limits
        self._engine = engine
        self._options = options
        self._wires: dict[str, Wire] = {wire.method: wire for wire in wires(model)}
        self._controls: dict[str, Callable[[bytes], bytes]] = {
            narsil_v1.METHOD_GET_MODEL: lambda body: describe(model, body),
            REFLECTION: Reflection(SERVICES).answer,
        }
        self._plane = Plane(
            {
                predictor.METHOD: "predictor",
                narsil_v1.METHOD: "narsil",
                narsil_v1.METHOD_GET_MODEL: "unary",
                REFLECTION: "stream",
                f"{_HEALTH}Check": "health_check",
                f"{_HEALTH}Watch": "health_watch",
            },
            {
                "max_message": options.max_message_bytes,
                "max_buffered": options.max_buffered_bytes,
                "max_streams": MAX_STREAMS,
                "max_watchers": health.MAX_WATCHERS,
                **options.limits,
            },
        )
        served = Model(
            model,
            name=model.name,
            version=model.version,
            dense_dim=schema.dense_dim,
            rows=schema.rows.tolist(),
            wide_ids=schema.id_dtype.itemsize == 8,
            max_rows=limits.max_rows,
            max_ids=limits.max_ids,
        )
        self._plane.serve([served])
        self.flush = self._plane.flush  # one object, so that the engine calls it once for many results
        self._requests: dict[int, Request] = {}  # that the engine has, by their calls' ids
        self._attendant = threading.Thread(target=self._attend, name="narsil-attendant", daemon=True)

    async def start(self) -> str:
        """See Transport.start. Raises OSError when the address cannot be bound."""
        host, port = self._options.host, self._options.port
        try:
            if host.startswith(UNIX):
                self._plane.listen_unix(host.removeprefix(UNIX))
            else:
                port = self._plane.listen_tcp(host, port)
        except OSError as error:
            raise OSError(f"cannot listen on {address_of(host, port)}: {error.strerror}") from None
        self._engine.attach(self)
        self._attendant.start()
        return address_of(host, port)

    def retire(self) -> None:
        """See Transport.retire."""
        self._plane.retire()

    async def stop(self, grace: float) -> None:
        """See Transport.stop."""
        self._engine.attach(None)
        await asyncio.to_thread(self._plane.stop, grace)
        if self._attendant.ident is not None:
            await asyncio.to_thread(self._attendant.join)

    def statistics(self) -> dict[str, int]:
        """Counts of connections, calls and bytes; see _native.Plane."""
        return self._plane.statistics()

    def poll(self, timeout: float | None) -> Sequence[Request]:
        """See narsil.engine.engine.Source."""
        try:
            return self._arrived(*self._plane.poll(timeout))
        except MemoryError:  # what it happened to is lost; the lane, which would end by it, is not
            log.exception("short of memory")
            return ()

    def wake(self) -> None:
        """See narsil.engine.engine.Source."""
        self._plane.wake()

    def close(self, why: str) -> None:
        """See narsil.engine.engine.Source."""
        self._plane.refuse(why)

    def forget(self, call_id: int) -> None:
        """The engine has ended this call's request."""
        self._requests.pop(call_id, None)

    def _attend(self) -> None:
        """Admits what comes while all lanes are busy, so that what has to be refused is refused at once."""
        while True:
            calls, gone = self._plane.attend()
            if not calls and not gone:
                return
            for request in self._arrived(calls, gone):
                try:
                    self._engine.submit(request)
                except RequestError as error:
                    request.reply.deliver(Result(error=error))
                    self.flush()

    def _arrived(self, calls: Sequence[Call], gone: Sequence[int]) -> list[Request]:
        """The calls that the engine is to run; others are answered here. Requests whose clients have gone leave it."""
        requests = [request for call in calls if (request := self._request(call)) is not None]
        if len(requests) < len(calls):
            self.flush()
        for call_id in gone:
            request = self._requests.pop(call_id, None)
            if request is not None:
                self._engine.cancel(request)
        return requests

    def _request(self, call: Call) -> Request | None:
        """The call as a request, or None once it has been answered here."""
        if call.decoded:
            request = Request(NativeFeatures(call), _Reply(self, call), call.arrived, call.deadline, call.size)
        else:
            decoded = self._decode(call)
            if decoded is None:
                return None
            request = decoded
        self._requests[call.id] = request
        return request

    def _decode(self, call: Call) -> Request | None:
        """As _request, for what native code has left to the portable codec."""
        try:
            method = call.method
            control = self._controls.get(method)
            if control is not None:
                call.answer(control(call.body))
                return None
            wire = self._wires[method]
            body = call.body
            features, context = wire.decode(body)
            reply = _Reply(self, call, wire.encode, context)
            return Request(features, reply, call.arrived, call.deadline, max(len(body), features.nbytes))
        except RequestError as error:
            _fail(call, error)
        except Exception:
            _fail_unexpected(call)
        return None


def _fail(call: Call, error: RequestError) -> None:
    code, _ = status_of(error)
    call.fail(code, str(error))


def _fail_unexpected(call: Call) -> None:
    """For what should not happen: the log gets the traceback, and the client no detail of this machine."""
    log.exception("a call failed")
    call.fail(_INTERNAL, "internal error; the server's log says why")
