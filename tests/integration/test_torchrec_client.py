"""TorchRec's own example client, unchanged, against an artifact of TorchRec's own packager.

It wants the modules that protoc makes of predictor.proto; the classes of tests/messages.py stand in for them.
"""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest

from narsil.bench.servers import ServerProcess, narsil_server
from tests.messages import Message, predictor_pb2
from tests.support import PATIENCE_S, TRANSPORTS
from tests.torchrec_models import called, dlrm, torch

pytestmark = pytest.mark.filterwarnings("ignore")

DENSE, FEATURES = 13, 26  # of its data
TABLE_ROWS = 500
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The file, and the scripted module in it."""
    path = tmp_path_factory.mktemp("torchrec") / "model_default.pt"
    names = [f"cat_{number}" for number in range(FEATURES)]
    return path, dlrm(path, [TABLE_ROWS] * FEATURES, names, dense=DENSE)


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: Any, artifact: tuple[Path, Any]) -> Iterator[ServerProcess]:
    with narsil_server(artifact[0], backend="torch", lanes=1, transport=request.param, tune_kernels=False) as process:
        yield process


Exchange = tuple[Message, Message]


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """What the client sends and is answered, and the modules that it imports."""
    seen: list[Exchange] = []

    class PredictorStub:
        def __init__(self, channel: grpc.Channel) -> None:
            self._call = channel.unary_unary(
                "/predictor.Predictor/Predict",
                request_serializer=predictor_pb2.PredictionRequest.SerializeToString,
                response_deserializer=predictor_pb2.PredictionResponse.FromString,
            )

        def Predict(self, request: Message) -> Message:
            response = self._call(request, timeout=PATIENCE_S)
            seen.append((request, response))
            return response

    for name, contents in (
        ("predictor_pb2", vars(predictor_pb2)),
        ("predictor_pb2_grpc", {"PredictorStub": PredictorStub}),
    ):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def run_client(monkeypatch: pytest.MonkeyPatch, address: str, rows: int) -> None:
    """``python -m torchrec.inference.client`` with these options."""
    host, _, port = address.rpartition(":")
    options = {"ip": host, "port": port, "batch_size": rows, "num_embedding_features": TABLE_ROWS}
    monkeypatch.setattr(sys, "argv", ["client", *(f"--{name}={value}" for name, value in options.items())])
    monkeypatch.delitem(sys.modules, "torchrec.inference.client", raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    runpy.run_module("torchrec.inference.client", run_name="__main__")


def direct(module: Any, request: Message) -> Any:
    """What the module itself scores for the message's tensors."""
    ids = request.id_list_features
    dense = torch.frombuffer(bytearray(request.float_features.values), dtype=torch.float32).reshape(-1, DENSE)
    inputs = {
        "float_features": dense,
        "id_list_features.lengths": torch.frombuffer(bytearray(ids.lengths), dtype=torch.int32),
        "id_list_features.values": torch.frombuffer(bytearray(ids.values), dtype=torch.int64),
    }
    return called(module, inputs)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_its_scores_are_those_of_a_direct_call(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    artifact: tuple[Path, Any],
    server: ServerProcess,
    exchanges: list[Exchange],
    rows: int,
) -> None:
    run_client(monkeypatch, server.address, rows)
    ((request, response),) = exchanges
    assert len(request.id_list_features.values) == 8 * FEATURES * rows, "it sends int64"
    expected = direct(artifact[1], request)
    found = np.array(response.predictions["default"].data, np.float32)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    assert found.std() > 100 * TOLERANCE or rows == 1
    assert "Response:" in capsys.readouterr().out
    # What TorchRec's server does not read.
    request.batch_size = 0
    with grpc.insecure_channel(server.address) as channel:
        sys.modules["predictor_pb2_grpc"].PredictorStub(channel).Predict(request)
    assert exchanges[1][1] == response
