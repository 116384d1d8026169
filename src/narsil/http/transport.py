"""HTTP as a transport: Starlette on uvicorn's protocol, on an event loop in a thread of its own, beside the gRPC
transport. Owns the thread, the listening socket and what its connections hold."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from narsil.catalog.catalog import EMPTY, Catalog
from narsil.http.app import MetricsPage, Site
from narsil.http.bodies import Bodies
from narsil.http.connection import Connection, ConnectionCounts, ConnectionLimits
from narsil.telemetry.observer import Observer
from narsil.transports.base import EngineLike, Transport, address_of
from narsil.transports.endpoints import Control, Counts, Models, no_counts
from narsil.transports.scoring import Scoring

__all__ = ["HttpOptions", "HttpTransport"]

log = logging.getLogger(__name__)

_WORKERS = 2  # threads that read and write large bodies
_HANDSHAKE_S = 10.0
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Where and how to listen."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    max_message_bytes: int = 16 << 20  # of a body, as sent and inflated
    max_held_bytes: int = 1 << 29  # of bodies of all requests that are here
    body_seconds: float = 60.0  # for a body to arrive
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    tls_certificate: Path | None = None  # PEM; with it goes the key
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # PEM; given: clients must present a certificate it signed


class HttpTransport(Transport):
    """Serves the Open Inference Protocol, probes and metrics."""

    def __init__(
        self,
        engine: EngineLike,
        options: HttpOptions,
        observer: Observer | None = None,
        counts: Counts = no_counts,
        models: Models | None = None,
        metrics: MetricsPage | None = None,
    ) -> None:
        self._engine = engine
        self._options = options
        self._observer = observer or Observer()
        self._counts, self._models = counts, models
        self._metrics = metrics
        self._catalog = EMPTY
        self._retired = False
        self.statistics = ConnectionCounts()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._grace = 0.0
        self._thread: threading.Thread | None = None

    def serve(self, catalog: Catalog) -> None:
        """See Transport.serve."""
        self._catalog = catalog

    async def start(self) -> str:
        """See Transport.start. Raises OSError when the address cannot be bound."""
        options = self._options
        context = _tls(options)
        listener = _bound(options.host, options.port)
        address = address_of(options.host, listener.getsockname()[1])
        self._observer.watch("http", lambda: asdict(self.statistics))
        listening: Future[None] = Future()
        run = partial(self._run, listener, context, listening)
        self._thread = threading.Thread(target=run, name="narsil-http", daemon=True)
        self._thread.start()
        await asyncio.wrap_future(listening)
        return address

    def retire(self) -> None:
        """See Transport.retire."""
        self._retired = True

    async def stop(self, grace: float) -> None:
        """See Transport.stop."""
        loop, stopping, thread = self._loop, self._stopping, self._thread
        if loop is None or stopping is None or thread is None:
            return
        self._grace = grace
        with suppress(RuntimeError):  # its loop has ended
            loop.call_soon_threadsafe(stopping.set)
        await asyncio.to_thread(thread.join)

    def _run(self, listener: socket.socket, context: ssl.SSLContext | None, listening: Future[None]) -> None:
        try:
            with listener:
                asyncio.run(self._live(listener, context, listening))
        except BaseException as error:
            if listening.done():
                log.exception("HTTP is no longer served")
            else:
                listening.set_exception(error)

    async def _live(self, listener: socket.socket, context: ssl.SSLContext | None, listening: Future[None]) -> None:
        """The thread's whole life."""
        options, loop = self._options, asyncio.get_running_loop()
        self._loop, self._stopping = loop, asyncio.Event()
        workers = ThreadPoolExecutor(_WORKERS, "narsil-http-bodies")
        bodies = Bodies(options.max_message_bytes, options.max_held_bytes, options.body_seconds, workers)
        site = Site(self._control, Scoring(self._engine, self._observer, loop), bodies, self._metrics)
        config = _config(site, options.limits)
        config.load()
        state = ServerState()
        server = await loop.create_server(
            lambda: Connection(config, state, options.limits, self.statistics),
            sock=listener,
            ssl=context,
            ssl_handshake_timeout=_HANDSHAKE_S if context else None,
            backlog=_BACKLOG,
        )
        listening.set_result(None)
        await _tell_the_time(state, self._stopping)
        # asyncio forgets a connection that it has accepted and not yet handed over when its server is closed.
        loop.remove_reader(listener.fileno())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        server.close()
        await _end_all(state, self._grace)
        workers.shutdown()

    def _control(self) -> Control:
        return Control(self._catalog, self._retired, self._counts, self._models)


def _config(site: Site, limits: ConnectionLimits) -> Config:
    return Config(
        site.app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=cast(int, limits.idle_seconds),  # a fraction is as good to its call_later
    )


async def _tell_the_time(state: ServerState, stopping: asyncio.Event) -> None:
    """Keeps the Date of answers, a second at a time, until it is time to stop."""
    while not stopping.is_set():
        state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        try:
            async with asyncio.timeout(1.0):
                await stopping.wait()
        except TimeoutError:
            continue


async def _end_all(state: ServerState, grace: float) -> None:
    """Idle connections are closed at once, others after their answer or after ``grace`` seconds."""
    for connection in list(state.connections):
        connection.shutdown()
    if state.tasks:
        await asyncio.wait(list(state.tasks), timeout=grace)
    for task in list(state.tasks):
        task.cancel()
    if state.tasks:
        await asyncio.wait(list(state.tasks))
    for connection in list(state.connections):
        if connection.transport is not None:
            connection.transport.abort()
    while state.connections:
        await asyncio.sleep(0)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address. Raises OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(f"cannot listen on {address_of(host, port)}: {error.strerror}") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise OSError(f"cannot listen on {address_of(host, port)}: {error.strerror}") from None
    return made


def _tls(options: HttpOptions) -> ssl.SSLContext | None:
    if options.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.tls_certificate, options.tls_key, password=lambda: b"")
    if options.tls_client_ca is not None:
        context.load_verify_locations(options.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
