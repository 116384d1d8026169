"""The real server, as a process, on real artifacts: scores equal a direct call, alone and coalesced, on both wires."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import narsil
from narsil.artifacts.artifact import Artifact
from narsil.backends.registry import load_backend
from narsil.bench.servers import ServerDied, ServerProcess, narsil_server
from narsil.bench.workload import Workload, narsil_body, predictor_body, score_reader
from narsil.dataflow import Features
from narsil.engine.collate import Collator
from narsil.transports.codec import narsil_v1, predictor
from tests.support import PATIENCE_S, jagged, one_hot, unary

# FP32 sums come in another order when rows are coalesced.
TOLERANCE = 1e-5


class Direct:
    """A direct call of the artifact, one request a forward."""

    def __init__(self, artifact: Artifact, backend: str) -> None:
        self.backend = load_backend(artifact, backend, tune_kernels=False)
        self.collator = Collator(self.backend.schema)

    def __call__(self, features: Features) -> np.ndarray:
        return np.array(self.backend.run(self.collator.collate([features]))["default"])


@pytest.fixture(scope="module", params=["torch", "onnx"])
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def direct(small_artifact, backend) -> Direct:
    return Direct(small_artifact, backend)


@pytest.fixture(scope="module", params=["batch", "worker"])
def server(request, small_artifact, backend) -> Iterator[ServerProcess]:
    # A small row limit, so that large requests run in several forwards.
    with narsil_server(
        small_artifact.path, backend=backend, execution_mode=request.param, lanes=2, max_batch_rows=256
    ) as process:
        yield process


@pytest.mark.parametrize("rows", [1, 3, 100, 700])
@pytest.mark.parametrize("make", [one_hot, jagged])
@pytest.mark.parametrize("wire", ["predictor", "narsil"])
def test_a_request_alone_scores_as_a_direct_call(server, direct, small_artifact, wire, make, rows):
    features = make(rows, rows, small_artifact.schema)
    write, method = (predictor_body, predictor.METHOD) if wire == "predictor" else (narsil_body, narsil_v1.METHOD)
    with grpc.insecure_channel(server.address) as channel:
        reply = unary(channel, method)(write(features), timeout=PATIENCE_S)
    scores = score_reader(wire, "default")(reply)
    assert scores.std() > 0 or rows == 1
    np.testing.assert_allclose(scores, direct(features), atol=TOLERANCE, rtol=0)


def test_requests_of_mixed_sizes_wires_and_kinds_in_flight_together_score_as_direct_calls(
    server, direct, small_artifact
):
    random = np.random.default_rng(0)
    load: list[tuple[Any, Features]] = []
    for number in range(120):
        make = (one_hot, jagged)[number % 2]
        wire = ("predictor", "narsil")[number // 2 % 2]
        load.append((wire, make(int(random.integers(1, 60)), number, small_artifact.schema)))
    with grpc.insecure_channel(server.address) as channel:
        futures = []
        for wire, features in load:
            method, write = (
                (predictor.METHOD, predictor_body) if wire == "predictor" else (narsil_v1.METHOD, narsil_body)
            )
            futures.append(unary(channel, method).future(write(features), timeout=PATIENCE_S))
        for (wire, features), future in zip(load, futures, strict=True):
            scores = score_reader(wire, "default")(future.result())
            np.testing.assert_allclose(scores, direct(features), atol=TOLERANCE, rtol=0)


def test_key_major_ids_read_as_sample_major_would_score_otherwise(server, direct, small_artifact):
    """The tables hold distinct rows: a server that mixed the layouts up could not pass the tests above."""
    schema = small_artifact.schema
    ids = np.random.default_rng(1).integers(0, schema.min_rows, (schema.num_features, 20)).astype(np.int32)
    features = one_hot(20, 1, schema)
    right = Features(20, features.dense, type(features.sparse)(ids))
    wrong = Features(20, features.dense, type(features.sparse)(ids.reshape(20, -1).T.copy()))
    assert np.abs(direct(right) - direct(wrong)).max() > 100 * TOLERANCE


def test_a_running_server_reports_its_model(server, small_artifact, backend):
    with narsil.Client(server.address) as client:
        info = client.model()
    assert (info.name, info.version, info.backend, info.schema) == ("small", "1", backend, small_artifact.schema)


def test_sigterm_under_load_answers_what_was_admitted_and_exits_zero(small_artifact):
    server = narsil_server(small_artifact.path, backend="torch", lanes=1)
    server.start()
    body = Workload(small_artifact.schema, rows=200, bodies=1).serialized("predictor")[0]
    outcomes: list[grpc.StatusCode] = []
    started = threading.Event()

    def client() -> None:
        with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_unary(predictor.METHOD)
            while True:
                try:
                    call(body, timeout=PATIENCE_S)
                    outcomes.append(grpc.StatusCode.OK)
                    started.set()
                except grpc.RpcError as error:
                    outcomes.append(error.code())
                    return

    clients = [threading.Thread(target=client) for _ in range(8)]
    for thread in clients:
        thread.start()
    assert started.wait(PATIENCE_S)
    server.send_signal(signal.SIGTERM)
    server.send_signal(signal.SIGTERM)  # an impatient supervisor changes nothing
    for thread in clients:
        thread.join(PATIENCE_S)
    assert server.stop() == 0
    # Whoever came too late was told so; nobody who was in was dropped with another error.
    assert set(outcomes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert outcomes.count(grpc.StatusCode.UNAVAILABLE) == len(clients)


def test_a_second_server_on_a_taken_port_says_so_and_exits(server, small_artifact):
    port = server.address.rpartition(":")[2]
    with pytest.raises(ServerDied, match=f"cannot listen on 127.0.0.1:{port}"):
        narsil_server(small_artifact.path, backend="onnx", lanes=1, port=port).start()


def test_a_damaged_artifact_is_refused_at_start_in_one_sentence(small_artifact, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in small_artifact.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = bytearray((copy / "model_default.pt").read_bytes())
    model[len(model) // 2] ^= 1
    (copy / "model_default.pt").write_bytes(model)
    with pytest.raises(ServerDied, match=r"narsil: .*model_default\.pt"):
        narsil_server(copy).start()


def test_a_device_that_is_not_here_is_refused_at_start(small_artifact):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ServerDied, match=r"narsil: .*cuda"):
        narsil_server(small_artifact.path, device="cuda").start()
