"""gRPC on Narsil's own data plane: no I/O thread, no event loop. Idle lanes poll the network themselves.

Receives whole calls from native code, which has decoded and validated those of a common form. What it left alone goes
through the portable codec, which knows every form and explains every fault. Owns the plane.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from narsil.catalog.catalog import EMPTY, Catalog
from narsil.dataflow import Request, Result
from narsil.engine.served_model import ServedModel
from narsil.errors import RequestError, status_of
from narsil.extension import NativeFeatures
from narsil.telemetry.observer import Careful, Observer
from narsil.transports import health
from narsil.transports.base import MAX_STREAMS, UNIX, EngineLike, Transport, address_of
from narsil.transports.endpoints import (
    ENDPOINTS,
    REFLECTION,
    Answer,
    Control,
    Counts,
    Decoded,
    Kind,
    Metadata,
    Models,
    Wire,
    no_counts,
    with_shared_memory,
)
from narsil.transports.reflection import Reflection
from narsil.transports.shared_memory import SharedMemory

if TYPE_CHECKING:
    from narsil._native import Call, Model

log = logging.getLogger(__name__)

_INTERNAL = 13


@dataclass(frozen=True, slots=True)
class NativeOptions:
    """Where and how to listen."""

    host: str = "127.0.0.1"  # or unix:PATH
    port: int = 50051  # 0: any free one
    max_message_bytes: int = 16 << 20
    max_metadata_bytes: int = 16 << 10
    # Of messages that are still arriving or wait for a lane to take them, and of answers that clients do not read.
    max_buffered_bytes: int = 1 << 29
    max_resets_per_second: int = 200  # of one connection, as a mean over five seconds
    shared_memory: bool = False  # whether clients may hand tensors over in it
    limits: Mapping[str, float] = field(default_factory=dict)  # others, by the names that _native.Plane gives them


class _Reply:
    """Where a call's result goes."""

    __slots__ = ("_call", "_decoded", "_transport", "_wire")

    def __init__(
        self, transport: NativeTransport, call: Call, wire: Wire | None = None, decoded: Decoded | None = None
    ) -> None:
        self._transport = transport
        self._call = call
        self._wire = wire  # None: native code has decoded and encodes
        self._decoded = decoded

    @property
    def cancelled(self) -> bool:
        return self._call.cancelled

    def deliver(self, result: Result) -> Callable[[], None]:
        call, transport = self._call, self._transport
        transport.forget(call.id)
        try:
            if result.error is not None:
                _fail(call, result.error, self._wire)
            elif self._wire is None or self._decoded is None:
                times = result.times
                call.answer_scores(
                    result.scores or {}, times.batch_requests, times.batch_rows, times.queue, times.execute
                )
            else:
                call.answer(self._wire.encode(self._decoded, result))
        except RequestError as error:
            transport.undelivered(call.method, error)
            _fail(call, error, self._wire)
        except Exception as error:
            transport.undelivered(call.method, error)
            _fail_unexpected(call)
        return transport.flush


class NativeTransport(Transport):
    """Serves what GrpcAioTransport serves, without TLS. A Source for the engine's idle lanes."""

    def __init__(
        self,
        engine: EngineLike,
        options: NativeOptions,
        observer: Observer | None = None,
        counts: Counts = no_counts,
        models: Models | None = None,
    ) -> None:
        from narsil._native import Plane

        self._engine = engine
        self._counts, self._models = counts, models
        self._retired = False
        self._options = options
        self._observer = Careful(observer or Observer())
        self._catalog = EMPTY
        rows = with_shared_memory(ENDPOINTS, SharedMemory()) if options.shared_memory else ENDPOINTS
        self._wires: dict[str, Wire] = {each.method: each.wire for each in rows if each.wire}
        # Their calls last longer than a message: a request's time begins when it is taken from its stream.
        self._streams = frozenset(each.method for each in rows if each.kind is Kind.STREAM)
        self._controls: dict[str, Answer] = {each.method: each.answer for each in rows if each.answer}
        reflection = Reflection()
        self._controls[REFLECTION] = lambda body, metadata, control: reflection.answer(body)
        self._plane = Plane(
            {each.method: each.kind.value for each in rows},
            {
                "max_message": options.max_message_bytes,
                "max_metadata": options.max_metadata_bytes,
                "max_resets_per_second": options.max_resets_per_second,
                "max_buffered": options.max_buffered_bytes,
                "max_streams": MAX_STREAMS,
                "max_watchers": health.MAX_WATCHERS,
                **options.limits,
            },
        )
        self.flush = self._plane.flush  # one object, so that the engine calls it once for many results
        self._requests: dict[int, Request] = {}  # that the engine has, by their calls' ids
        self._attendant = threading.Thread(target=self._attend, name="narsil-attendant", daemon=True)
        self._observer.watch("plane", self.statistics)

    def serve(self, catalog: Catalog) -> None:
        """See Transport.serve."""
        from narsil._native import Model

        self._catalog = catalog
        models = catalog.by_preference()
        routes = [
            (name, label, [(models.index(model), share) for model, share in parts])
            for name, label, parts in catalog.routes()
        ]
        self._plane.serve([_native_model(Model, model) for model in models], routes=routes)

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
        self._retired = True
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

    def undelivered(self, method: str, error: Exception) -> None:
        """An answer could not be written."""
        self._observer.undelivered(method, error)

    def forget(self, call_id: int) -> None:
        """The engine has ended this call's request."""
        self._requests.pop(call_id, None)

    def _attend(self) -> None:
        """Admits what comes while all lanes are busy, so that what has to be refused is refused at once."""
        while self._attend_once():
            pass

    def _attend_once(self) -> bool:
        """A function of its own, so that nothing that came holds on to its model while the attendant waits."""
        calls, gone = self._plane.attend()
        for request in self._arrived(calls, gone):
            try:
                self._engine.submit(request)
            except RequestError as error:
                request.reply.deliver(Result(error=error))
                self.flush()
        return bool(calls or gone)

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
        model: ServedModel | None = call.served
        if model is not None:
            reply = _Reply(self, call)
            request = Request(model, NativeFeatures(call), reply, call.arrived, call.deadline, call.size)
        else:
            decoded = self._decode(call)
            if decoded is None:
                return None
            request = decoded
        self._requests[call.id] = request
        return request

    def _decode(self, call: Call) -> Request | None:
        """As _request, for what native code has left to the portable codec."""
        method, metadata = call.method, Metadata(call.model_name, call.model_version)
        wire = self._wires.get(method)
        try:
            control = self._controls.get(method)
            if control is not None:
                answer = control(call.body, metadata, self._control())
                if isinstance(answer, bytes):
                    call.answer(answer)
                else:
                    answer.add_done_callback(partial(self._answer_later, call))
                return None
            body = call.body
            assert wire is not None  # noqa: S101 - every other method scores
            try:
                decoded = wire.decode(body, metadata, self._catalog)
            except Exception as error:
                self._observer.refused(method, error)
                raise
            if decoded.passed_over:
                self._observer.passed_over(decoded.model, decoded.passed_over)
            reply, features = _Reply(self, call, wire, decoded), decoded.features
            size = max(len(body), features.nbytes)
            arrived = self._engine.now() if method in self._streams else call.arrived
            deadline = decoded.deadline(arrived, call.deadline)
            return Request(decoded.model, features, reply, arrived, deadline, size, decoded.priority)
        except RequestError as error:
            _fail(call, error, wire)
        except Exception:
            _fail_unexpected(call)
        return None

    def _answer_later(self, call: Call, done: Future[bytes]) -> None:
        """In whichever thread it was done."""
        try:
            call.answer(done.result())
        except RequestError as error:
            _fail(call, error)
        except Exception:
            _fail_unexpected(call)
        self.flush()

    def _control(self) -> Control:
        return Control(self._catalog, self._retired, self._counts, self._models)


def _native_model(make: type[Model], model: ServedModel) -> Model:
    schema, limits = model.schema, model.limits
    # Native code decodes messages for models with one group of each kind alone, and of bags of any length.
    own = schema.plain and schema.num_features > 0 and not schema.singles.any()
    return make(
        model,
        name=model.name,
        version=model.version,
        dense_dim=schema.dense_dim,
        nan_columns=list(schema.nan_columns),
        rows=schema.rows.tolist(),
        least=schema.least.tolist(),
        wide_ids=schema.id_dtype.itemsize == 8,
        max_rows=limits.max_rows if own else 0,
        max_ids=limits.max_ids,
        features=[feature.name for feature in schema.features],
        tasks=schema.tasks,
    )


def _fail(call: Call, error: RequestError, wire: Wire | None = None) -> None:
    refusal = None if wire is None else wire.refusal(error)
    if refusal is not None:
        call.answer(refusal)
        return
    code = status_of(error)
    call.fail(code, str(error))


def _fail_unexpected(call: Call) -> None:
    """For what should not happen: the log gets the traceback, and the client no detail of this machine."""
    log.exception("a call failed")
    call.fail(_INTERNAL, "internal error; the server's log says why")
