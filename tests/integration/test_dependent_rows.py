"""Models whose rows depend on each other, as TorchRec packages them: refused in batch mode, and in worker mode scored
by a real server as by direct calls, whatever else is in flight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import pytest

import narsil
from narsil.artifacts.artifact import open_artifact
from narsil.bench.servers import ServerDied, ServerProcess, narsil_server
from narsil.bench.workload import narsil_body, predictor_body, score_reader
from narsil.dataflow import Features, OneHot
from narsil.engine.collate import Collator
from narsil.errors import InvalidRequest
from narsil.transports.codec import narsil_v1, predictor
from tests.support import PATIENCE_S, TRANSPORTS, jagged, one_hot, unary
from tests.torchrec_models import Listwise, Predict, called, inputs_of, torch, wide

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2e-5  # of a score; the direct call runs on torch's own kernels
MOST = 304  # rows of a request


class Centred(Predict):
    """Scores less the mean of the request's."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        scores = super().predict_forward(batch)["default"]
        return {"default": scores - scores.mean()}


class Rare(Predict):
    """Events of a base rate of 5e-5, whose scores lean on their mean."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        scores = super().predict_forward(batch)["default"] * 1e-4
        return {"default": scores + scores.mean() * 0.01}


class Direct:
    """An artifact, called as TorchRec's own server calls it: one request a forward."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.schema = open_artifact(path).schema
        self.module = torch.jit.load(str(path))

    def __call__(self, features: Features) -> Any:
        batch = Collator(self.schema).collate([features])
        return called(self.module, inputs_of(batch)).copy()


@pytest.fixture(scope="module", params=[Listwise, Centred, Rare])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Direct:
    path = tmp_path_factory.mktemp("dependent") / "model_default.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide(path, request.param)
        return Direct(path)


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(artifact: Direct, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    # Batches of fewer rows than most requests, so that they would be cut where rows were independent.
    options = {"transport": request.param, "lanes": 2, "max_batch_rows": 8, "max_request_rows": MOST}
    with narsil_server(artifact.path, execution_mode="worker", **options) as process:
        yield process


def requests(artifact: Direct, count: int) -> list[Features]:
    """Of 1 to MOST rows, by turns of one id a bag and of any bags."""
    random = np.random.default_rng(1)
    sizes = [1, 2, 8, 9, MOST, *random.integers(1, MOST, count - 5).tolist()]
    return [(one_hot, jagged)[number % 2](rows, number, artifact.schema) for number, rows in enumerate(sizes)]


def assert_scores(found: Any, artifact: Direct, features: Features) -> None:
    wanted = artifact(features)
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * np.abs(wanted).max())


def test_batch_mode_is_refused_with_the_figures_and_the_way_out(artifact: Direct) -> None:
    with pytest.raises(
        ServerDied,
        match=r"narsil: \S+: rows depend on each other: it scores default of row \d+ \S+ among 24 rows and \S+ beside "
        r"others\. Serve it with --execution-mode worker",
    ) as died:
        narsil_server(artifact.path, lanes=1).start()
    assert "(exit 1)" in str(died.value)
    assert "Traceback" not in str(died.value)


@pytest.mark.parametrize("wire", ["predictor", "narsil"])
def test_worker_mode_scores_as_direct_calls_do_however_many_are_in_flight(
    artifact: Direct, server: ServerProcess, wire: Literal["predictor", "narsil"]
) -> None:
    load = requests(artifact, 60)
    write, method = (predictor_body, predictor.METHOD) if wire == "predictor" else (narsil_body, narsil_v1.METHOD)
    with grpc.insecure_channel(server.address) as channel:
        futures = [unary(channel, method).future(write(features), timeout=PATIENCE_S) for features in load]
        for features, future in zip(load, futures, strict=True):
            assert_scores(score_reader(wire, "default")(future.result()), artifact, features)


def test_these_requests_would_score_otherwise_together_or_in_pieces(artifact: Direct) -> None:
    """A server that fused or cut them could not pass the test above."""
    whole = requests(artifact, 6)[4]
    wanted = artifact(whole)
    pieces = np.concatenate([artifact(whole.slice(at, at + 8)) for at in range(0, whole.rows, 8)])
    assert np.abs(pieces - wanted).max() > 20 * TOLERANCE * np.abs(wanted).max()


def test_the_clients_send_what_one_request_may_hold_and_cut_no_more(artifact: Direct, server: ServerProcess) -> None:
    schema, random = artifact.schema, np.random.default_rng(2)

    def ask(rows: int) -> Any:
        dense = random.random((rows, schema.dense_dim), dtype=np.float32)
        ids = random.integers(0, schema.rows, (rows, schema.num_features), dtype=np.int32)
        features = Features(rows, dense, OneHot(ids.T))
        return features, client.predict(dense, ids, timeout=PATIENCE_S)

    with narsil.Client(server.address) as client:
        assert client.model().whole_requests
        features, found = ask(MOST)
        assert (found.batch_requests, found.batch_rows) == (1, MOST)
        assert_scores(found.scores["default"], artifact, features)
        with pytest.raises(InvalidRequest, match=rf"batch_size is {MOST + 1}; it must be 1 to {MOST} rows"):
            ask(MOST + 1)
