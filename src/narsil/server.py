"""Composes a server out of its parts, and leads it through its life: startup, serving until a signal, shutdown."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import ssl
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from narsil.catalog.control import ModelControl
from narsil.catalog.guard import FileGuard
from narsil.catalog.loading import failed_forward, load_model, warmup_of
from narsil.catalog.manager import ModelManager
from narsil.catalog.repository import CONFIG_FILE, Held, ModelFolder
from narsil.config import ServeSettings
from narsil.dataflow import Features
from narsil.engine.engine import Engine
from narsil.engine.pinning import pin
from narsil.engine.queue import QueueLimits
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.errors import ConfigError, NarsilError, RequestError, first_line
from narsil.extension import AVAILABLE, MISSING
from narsil.process import StopSignals, warn_of, writing
from narsil.telemetry.observer import CountingObserver, Observer
from narsil.transports.base import Transport
from narsil.transports.endpoints import Counts, Models, no_counts
from narsil.transports.grpc_aio import GrpcAioTransport, GrpcOptions

log = logging.getLogger(__name__)

# A lane thread holds the GIL for tens of microseconds at a time; the interpreter's default of 5 ms would let it keep
# the event loop waiting for the length of a whole forward.
SWITCH_INTERVAL_S = 0.0005

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

# A client whose answer was the last one may send again at once. It is told UNAVAILABLE, which it retries elsewhere,
# for this long; a connection closed under its request would look like a cancellation to it.
LINGER_S = 0.2

# How long the last replies may take to leave once the engine has ended every request.
CLOSE_S = 1.0


class Server:
    """Models behind an address, or two."""

    _engine: Engine  # from startup on
    _transports: tuple[Transport, ...]  # from startup on; the first is gRPC's
    _signals: StopSignals  # from startup on
    _guard: FileGuard  # from startup on

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.http_address = ""  # from startup on, where HTTP is served
        self._abandoned = False  # no model is left

    async def serve(self) -> int:
        """Runs until SIGTERM or SIGINT; returns the exit status."""
        address = await self.startup()
        self.announce(address)
        await self._signals.stop.wait()
        return await self.shutdown()

    async def startup(self) -> str:
        """Loads the model, warms every lane, then listens. Returns the bound address."""
        prepare_process()
        settings = self.settings
        grpc_options(settings)  # what is wrong with the TLS files is told before minutes of loading
        self._observer = CountingObserver()
        self._engine = make_engine(settings, self._observer)
        self._engine.start()
        self.models = ModelManager(self._engine)
        self.models.subscribe(lambda catalog: self._observer.serving(tuple(catalog)))
        self._guard = FileGuard(self.models, partial(self._withdrawn, asyncio.get_running_loop()))
        self._control = self._model_control()
        await asyncio.to_thread(self._add_model if self._control is None else self._control.load_all)
        settle_process()
        grpc = make_transport(self._engine, settings, self._observer, self._observer.model, self._control)
        http = make_http(self._engine, settings, self._observer, self.models, self._control)
        self._transports = (grpc,) if http is None else (grpc, http)
        for transport in self._transports:
            self.models.subscribe(transport.serve)
        self._signals = StopSignals()  # from here on there may be something in flight
        try:
            addresses = [await transport.start() for transport in self._transports]
        except OSError as error:
            raise ConfigError(str(error)) from None
        self._guard.start()
        if self._control is not None and settings.model_control == "watch":
            self._control.watch()
        self.http_address = "" if http is None else addresses[1]
        return addresses[0]

    def _add_model(self) -> None:
        settings = self.settings
        model, watch = load_model(settings)
        self._guard.watch(model, watch)
        try:
            self.models.add(model, warmup_of(model, settings.max_batch_rows))
        except NarsilError:
            raise
        except Exception as error:
            raise failed_forward(settings.served, model.backend, error) from error

    def _model_control(self) -> ModelControl | None:
        """What serves a repository's models; None where one model was given."""
        settings = self.settings
        if settings.repository is None:
            return None

        def load(folder: ModelFolder, held: Held) -> tuple[ServedModel, list[Features]]:
            where = folder.versions[0].folder.parent / CONFIG_FILE
            of_model = settings.for_model(held.path, folder.config.settings, where)
            model, watch = load_model(of_model, folder.name, held.version, folder.config.share)
            self._guard.watch(model, watch)
            return model, warmup_of(model, settings.max_batch_rows)

        return ModelControl(settings.repository, self.models, load, explicit=settings.model_control == "explicit")

    def _withdrawn(self, loop: asyncio.AbstractEventLoop, model: ServedModel) -> None:
        """A model has gone out of service. With the last of them the server stops, so that whoever watches over it
        starts it again, on what lies there then."""
        if not len(self.models.catalog):
            self._abandoned = True
            loop.call_soon_threadsafe(self._signals.stop.set)

    def announce(self, address: str) -> None:
        """The one line on standard output that says requests are taken now. Whether anybody can read it changes nothing
        for those who ask."""
        settings = self.settings
        line = (
            f"narsil: serving {settings.served} on {address} "
            f"({settings.execution_mode} mode, {settings.lane_count} lanes, {settings.device}"
            f"{f'; HTTP on {self.http_address}' if self.http_address else ''})"
        )
        with writing(1):
            try:
                print(line, flush=True)
            except OSError as error:
                log.warning("standard output takes no ready line (%s): %s", error.strerror, line)
                raise

    async def shutdown(self) -> int:
        """Serves on for ``shutdown_delay``, refuses what is new, finishes what is in flight, then closes.

        Returns 0, or 1 when work or the last model had to be abandoned.
        """
        for transport in self._transports:
            transport.retire()
        self._guard.stop()
        if self._control is not None:
            self._control.stop()
        await self._serve_on()
        grace = self.settings.drain_seconds
        log.info("stopping: finishing what is in flight, at most %.0f s", grace)
        drained = await asyncio.to_thread(self._engine.drain, grace)
        await asyncio.sleep(LINGER_S)
        await asyncio.gather(*(transport.stop(CLOSE_S if drained else 0.0) for transport in self._transports))
        for model in self.models.catalog:
            self.models.remove(model)
        log.info("stopped: %s", self._observer.watched())
        return 0 if drained and not self._abandoned else 1

    async def _serve_on(self) -> None:
        """Gives routers time to hear that this server is leaving, while it serves what they still send."""
        delay = self.settings.shutdown_delay
        if delay and not self._signals.hurry.is_set():
            log.info(
                "to stop in %g s (shutdown_delay), or at another signal; health says NOT_SERVING from now on", delay
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._signals.hurry.wait(), delay)


def make_engine(settings: ServeSettings, observer: Observer | None = None) -> Engine:
    """The engine that the settings ask for; it serves no model yet."""
    pinned = settings.pin_lanes and settings.device == "cpu"
    return Engine(
        settings.lane_count,
        BatchPolicy(settings.batch_size, settings.max_batch_rows, settings.batch_timeout_ms / 1e3, settings.lane_count),
        QueueLimits(
            settings.max_queue_requests, settings.max_queue_rows, settings.max_queue_ids, settings.max_queue_bytes
        ),
        observer=observer,
        thread_setup=pin(settings.lane_count, settings.intra_op_threads) if pinned else None,
    )


def prepare_process() -> None:
    """What a process that serves asks of its interpreter and its C library, before anything is loaded."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_freed_memory()


def settle_process() -> None:
    """What has been loaded by now lives as long as the server: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks instead of handing their pages back to the kernel after every forward, which would
    fault them in again in the next one. Where the C library is another, nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def make_transport(
    engine: Engine,
    settings: ServeSettings,
    observer: Observer | None = None,
    counts: Counts = no_counts,
    models: Models | None = None,
) -> Transport:
    """What the settings ask for. Raises ConfigError where the native data plane is asked for and was not built."""
    if settings.transport == "native" and not AVAILABLE:
        raise ConfigError(
            f"--transport native: {MISSING}. Install a C++ compiler and libnghttp2 with its header (Debian: "
            "libnghttp2-dev), then install Narsil again"
        )
    if settings.transport == "grpcio" or settings.tls_certificate is not None or not AVAILABLE:
        log.info("transport: grpcio%s", f" (no native one: {MISSING})" if MISSING else "")
        warn_of(settings.given_in_vain(transport="grpcio"))
        return GrpcAioTransport(engine, grpc_options(settings), observer, counts, models)
    from narsil.transports.native import NativeOptions, NativeTransport

    log.info("transport: native")
    return NativeTransport(
        engine,
        NativeOptions(
            settings.host,
            settings.port,
            settings.max_message_bytes,
            settings.max_metadata_bytes,
            settings.max_queue_bytes,
            settings.max_resets_per_second,
            settings.shared_memory,
        ),
        observer,
        counts,
        models,
    )


def make_http(
    engine: Engine,
    settings: ServeSettings,
    observer: CountingObserver,
    models: ModelManager,
    control: ModelControl | None = None,
) -> Transport | None:
    """HTTP beside the other transport, where the settings ask for it."""
    if settings.http_port is None:
        return None
    from narsil.http.connection import ConnectionLimits
    from narsil.http.transport import HttpOptions, HttpTransport
    from narsil.telemetry.exposition import Exposition

    def feature_names(name: str, version: str) -> list[str]:
        try:
            return [feature.name for feature in models.catalog.find(name, version).schema.features]
        except RequestError:  # it has gone
            return []

    options = HttpOptions(
        settings.http_host,
        settings.http_port,
        settings.max_message_bytes,
        settings.max_queue_bytes,
        limits=ConnectionLimits(settings.http_connections, settings.max_metadata_bytes),
        tls_certificate=settings.tls_certificate,
        tls_key=settings.tls_key,
        tls_client_ca=settings.tls_client_ca,
    )
    metrics = Exposition(observer, engine.waiting, feature_names).page
    return HttpTransport(engine, options, observer, observer.model, control, metrics)


def grpc_options(settings: ServeSettings) -> GrpcOptions:
    """The transport's part of the settings, key files read. Raises ConfigError where these cannot be used."""
    _check_tls(settings)

    def read(path: Path | None) -> bytes | None:
        if path is None:
            return None
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None

    return GrpcOptions(
        settings.host,
        settings.port,
        settings.max_message_bytes,
        settings.max_metadata_bytes,
        read(settings.tls_certificate),
        read(settings.tls_key),
        read(settings.tls_client_ca),
        settings.shared_memory,
    )


def _check_tls(settings: ServeSettings) -> None:
    """Raises ConfigError where the TLS files are not what gRPC can use; gRPC itself does not say what is wrong."""
    certificate, key, authority = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("DEFAULT@SECLEVEL=0")  # how strong keys must be is for gRPC to say
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key, password=lambda: b"")  # None would ask the terminal for one
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_certificate {certificate} and tls_key {key} are no PEM chain and its unencrypted key "
            f"({error.reason or first_line(error)}); give files that belong together"
        ) from None
    except OSError:
        return  # who reads them says which
    try:
        if authority is not None:
            context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_client_ca {authority} holds no PEM certificate ({error.reason or first_line(error)}); give the "
            "authority's certificate"
        ) from None
    except OSError:
        return


def run(settings: ServeSettings) -> int:
    """Blocks until the server has stopped; returns its exit status. Raises NarsilError when it cannot start."""
    logging.getLogger("narsil").setLevel(settings.log_level.upper())
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )

    async def main() -> int:
        return await Server(settings).serve()

    return asyncio.run(main())
