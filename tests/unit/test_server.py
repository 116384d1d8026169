"""The server's composition: what startup makes of models that fail, how a stop begins, a ready line nobody takes."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import narsil
from narsil import server
from narsil.artifacts.watching import Finding
from narsil.backends.fake import FakeBackend
from narsil.config import ServeSettings
from narsil.dataflow import Batch, Scores
from narsil.engine.served_model import ServedModel
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable
from narsil.extension import AVAILABLE
from narsil.server import Server, make_transport
from narsil.transports.grpc_aio import GrpcAioTransport
from tests.conformance.serving import ask
from tests.support import PATIENCE_S, SCHEMA, engine_with

TRANSPORTS = ["grpcio", pytest.param("native", marks=pytest.mark.skipif(not AVAILABLE, reason="not built"))]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """Tests leave the process as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interval = sys.getswitchinterval()
    for number in handlers:
        signal.signal(number, lambda *_: None)  # a signal that no server takes ends no tests
    yield
    sys.setswitchinterval(interval)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Broken(FakeBackend):
    """Raises at every forward."""

    def __init__(self, error: Exception) -> None:
        super().__init__(SCHEMA)
        self.error = error

    def run(self, batch: Batch) -> Scores:
        raise self.error


class Full(io.StringIO):
    """A file on a disk without space."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Watched:
    """Files of a model; a test may say that they have changed."""

    finding: Finding | None = None

    def look(self) -> Finding | None:
        return self.finding


class Announcing(Server):
    """Tells where it listens by a future too."""

    address: asyncio.Future[str]

    def announce(self, address: str) -> None:
        super().announce(address)
        self.address.set_result(address)


def live(
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[str], Awaitable[None]],
    backend: FakeBackend | None = None,
    watch: Watched | None = None,
    **settings: Any,
) -> int:
    """Has a server serve a fake model; once it does, ``meanwhile`` is run. Returns the exit status."""
    model = ServedModel("mine", "1", [backend or FakeBackend(SCHEMA)])
    monkeypatch.setattr(server, "load_model", lambda _: (model, watch or Watched()))

    async def main() -> int:
        serving = Announcing(ServeSettings(**{"model": "models/mine", "lanes": 1, "port": 0, **settings}))
        serving.address = asyncio.get_running_loop().create_future()
        life = asyncio.create_task(serving.serve())
        ends: set[asyncio.Future[Any]] = {life, serving.address}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not life.done():
            await meanwhile(serving.address.result())
        return await asyncio.wait_for(life, PATIENCE_S)

    return asyncio.run(main())


async def predict(address: str) -> narsil.Prediction:
    async with narsil.AsyncClient(address) as client:
        return await client.predict(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.int32), timeout=PATIENCE_S)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGINT])
def test_with_a_shutdown_delay_it_serves_on_while_health_says_not_serving(monkeypatch, transport, ends):
    async def meanwhile(address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert (await watch.read()).status == SERVING
            signal.raise_signal(signal.SIGTERM)
            assert (await watch.read()).status == NOT_SERVING
            check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert check.status == NOT_SERVING
        assert (await predict(address)).model_name == "mine"
        signal.raise_signal(ends)

    assert live(monkeypatch, meanwhile, transport=transport, shutdown_delay=3600) == 0


@pytest.mark.parametrize(
    ("signals", "settings"),
    [
        ([signal.SIGTERM], {"shutdown_delay": 0.01}),  # it passes
        ([signal.SIGINT], {"shutdown_delay": 3600}),  # nobody routes to a server in a terminal
        ([signal.SIGTERM], {}),
    ],
)
def test_the_delay_ends_by_itself_and_is_not_for_ctrl_c_nor_there_by_default(monkeypatch, signals, settings):
    async def meanwhile(address: str) -> None:
        for number in signals:
            signal.raise_signal(number)

    assert live(monkeypatch, meanwhile, **settings) == 0


def test_a_signal_while_it_begins_to_listen_stops_it_in_order(monkeypatch):
    """From here on there may be calls in flight, which ending at once would lose."""
    start = GrpcAioTransport.start

    async def started(self: GrpcAioTransport) -> str:
        address = await start(self)
        signal.raise_signal(signal.SIGTERM)
        return address

    monkeypatch.setattr(GrpcAioTransport, "start", started)

    async def meanwhile(address: str) -> None:
        pass

    assert live(monkeypatch, meanwhile, transport="grpcio") == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_http_is_served_beside_grpc_and_says_so_until_the_server_stops(monkeypatch, capsys, transport):
    async def meanwhile(address: str) -> None:
        await predict(address)
        (http,) = re.findall(r"; HTTP on (\S+)\)$", capsys.readouterr().out, re.MULTILINE)
        assert (await asyncio.to_thread(ask, http, "/readyz")).status == 200
        signal.raise_signal(signal.SIGTERM)
        while (answer := await asyncio.to_thread(ask, http, "/readyz")).status == 200:
            pass  # the signal has not been heard yet
        assert (answer.status, answer.json) == (503, {"ready": False})
        assert (await asyncio.to_thread(ask, http, "/v2/models/mine")).json["name"] == "mine"
        signal.raise_signal(signal.SIGTERM)

    assert live(monkeypatch, meanwhile, transport=transport, http_port=0, shutdown_delay=3600) == 0


def test_an_http_port_that_is_taken_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            live(monkeypatch, stop, http_port=port, transport="grpcio")


async def stop(address: str) -> None:
    await predict(address)
    signal.raise_signal(signal.SIGTERM)


def test_a_ready_line_that_cannot_be_written_is_logged_and_the_server_serves(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdout", Full())
    kept = os.dup(1)
    try:
        assert live(monkeypatch, stop) == 0
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert (
        "standard output takes no ready line (No space left on device): narsil: serving models/mine on" in caplog.text
    )


def test_a_server_without_standard_output_serves(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert live(monkeypatch, stop) == 0


def test_a_model_whose_forward_fails_in_warm_up_is_one_sentence_with_torch_s_last_word(monkeypatch):
    error = RuntimeError("The following operation failed in the TorchScript interpreter.\n  line 3\nshapes differ\n")
    with pytest.raises(
        ArtifactError, match=r"models/mine loads, but .* fake backend fails on it \(RuntimeError: shapes differ\);"
    ) as raised:
        live(monkeypatch, stop, Broken(error))
    assert raised.value.__cause__ is error


def test_what_narsil_itself_says_of_a_model_in_warm_up_is_left_as_it_is(monkeypatch):
    with pytest.raises(DeviceUnavailable, match=r"^no such GPU$"):
        live(monkeypatch, stop, Broken(DeviceUnavailable("no such GPU")))


def test_a_server_whose_last_model_goes_out_of_service_stops_and_says_that_it_did_not_mean_to(monkeypatch, caplog):
    monkeypatch.setattr("narsil.catalog.guard.INTERVAL_S", 0.01)
    watch = Watched()

    async def meanwhile(address: str) -> None:
        assert (await predict(address)).model_name == "mine"
        watch.finding = Finding("tables.bin has been overwritten in place", True)

    assert live(monkeypatch, meanwhile, watch=watch) == 1
    assert "model mine is out of service: tables.bin has been overwritten in place" in caplog.text


def test_a_file_that_is_merely_replaced_is_told_and_the_model_is_served_on(monkeypatch, caplog):
    monkeypatch.setattr("narsil.catalog.guard.INTERVAL_S", 0.01)
    watch = Watched()

    async def meanwhile(address: str) -> None:
        watch.finding = Finding("tables.bin has been replaced", False)
        while "has been replaced" not in caplog.text:
            await predict(address)
        assert (await predict(address)).model_name == "mine"
        signal.raise_signal(signal.SIGTERM)

    assert live(monkeypatch, meanwhile, watch=watch) == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("asked", [False, True])
def test_shared_memory_is_served_where_it_is_asked_for(transport, asked):
    given: dict[str, Any] = {"model": "m", "transport": transport, "shared_memory": asked}
    with engine_with() as engine:
        made: Any = make_transport(engine, ServeSettings(**given))
    assert made._options.shared_memory is asked


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (None, r"cannot read .*: No such file"),
        ("no PEM", r"tls_certificate .* and tls_key .* are no PEM chain and its unencrypted key \("),
    ],
)
def test_what_is_wrong_with_the_tls_files_is_told_before_the_model_is_loaded(monkeypatch, tmp_path, held, sentence):
    monkeypatch.setattr(server, "load_model", lambda settings: pytest.fail("loaded"))
    certificate = tmp_path / "certificate.pem"
    if held is not None:
        certificate.write_text(held)
    given: dict[str, Any] = {"model": tmp_path, "lanes": 1, "tls_certificate": certificate, "tls_key": certificate}
    with pytest.raises(ConfigError, match=sentence):
        asyncio.run(Server(ServeSettings(**given)).startup())
