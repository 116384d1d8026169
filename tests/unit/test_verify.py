"""``narsil verify``: every task's served scores against the artifact's own, and all of them said."""

from __future__ import annotations

import json
from dataclasses import replace
from types import TracebackType

import numpy as np
import pytest
from click.testing import CliRunner

from narsil import client as client_module
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.schema import ModelSchema
from narsil.backends import registry
from narsil.backends.fake import fake_scores
from narsil.cli import verify
from narsil.cli.verify import sample_major
from narsil.client import ModelInfo
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError
from tests.support import SCHEMA

TWO = replace(SCHEMA, tasks=("click", "buy"), widths=())
DEVIATION = 0.125


class Reference:
    """The artifact's own scores, different for each task."""

    def run(self, batch: Batch) -> Scores:
        scores = (np.sin(fake_scores(batch)) / 4 + 0.5).astype(np.float32)
        return {"click": scores, "buy": scores * np.float32(0.5)}


class Server:
    """A client of a server whose scores of some tasks deviate."""

    deviating: tuple[str, ...] = ()
    schema: ModelSchema = TWO

    def __init__(self, target: str) -> None:
        self.target = target

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def model(self, *, timeout: float) -> ModelInfo:
        return ModelInfo("dlrm", "3", "compiled", self.schema)

    def predict(
        self, dense: np.ndarray, ids: np.ndarray, lengths: np.ndarray, *, weights: None, timeout: float
    ) -> Server:
        batch = Batch(len(lengths), dense, *key_major(ids, lengths), one_hot=False)
        own = Reference().run(batch)
        self.scores = {
            task: scores + np.float32(DEVIATION if task in self.deviating else 0) for task, scores in own.items()
        }
        return self


def key_major(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((T * B,) lengths, (N,) values) of sample-major bags."""
    rows, features = lengths.shape
    stops = np.cumsum(lengths).reshape(rows, features)
    bags = [
        ids[stops[row, feature] - lengths[row, feature] : stops[row, feature]]
        for feature in range(features)
        for row in range(rows)
    ]
    return lengths.T.ravel().copy(), np.concatenate(bags)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "open_artifact", lambda path: Artifact(path, "dlrm", "3", TWO, "cpu", torchscript=path))
    monkeypatch.setattr(registry, "load_backend", lambda *given, **options: Reference())

    def run(deviating: tuple[str, ...], *options: str):
        monkeypatch.setattr(client_module, "Client", type("Client", (Server,), {"deviating": deviating}))
        given = ["--target", "127.0.0.1:1", "--model", str(tmp_path), *options]
        return CliRunner().invoke(verify.command, given)

    return run


@pytest.mark.parametrize("deviating", [("click",), ("buy",), ("click", "buy")])
def test_a_task_that_deviates_is_named_whichever_it_is(run, deviating):
    result = run(deviating)
    assert isinstance(result.exception, ArtifactError)
    assert f"served, of {deviating[0]}, scores deviate by up to {DEVIATION:.2e}" in str(result.exception)


def test_every_task_is_told(run):
    result = run((), "--max-deviation", "0")
    assert result.exit_code == 0, result.output
    first, *tasks = result.output.splitlines()
    assert first == "dlrm version 3 on 127.0.0.1:1 (compiled backend), 10,020 rows, 2 tasks:"
    assert [line.split(":")[0].strip() for line in tasks] == ["click"] * 3 + ["buy"] * 3
    for told in (
        "max deviation 0.00e+00, mean 0.0e+00",
        "log-odds: max deviation 0.00e+00",
        "repeated ids or large val",
    ):
        assert sum(told in line for line in tasks) == 2
    told = json.loads(run(("buy",), "--json", "--max-deviation", "1").output)["tasks"]
    assert {task: one["max_abs"] for task, one in told.items()} == {"click": 0, "buy": pytest.approx(DEVIATION, 1e-3)}


def test_a_server_of_some_tasks_is_held_to_those_in_its_order_with_their_labels(run, monkeypatch, tmp_path):
    rows, random = 40, np.random.default_rng(0)
    labels = np.stack([np.arange(rows) % 2, np.arange(rows) < 5], 1)
    np.savez(
        tmp_path / "rows.npz",
        dense=random.random((rows, SCHEMA.dense_dim), np.float32),
        ids=random.integers(0, SCHEMA.rows, (rows, SCHEMA.num_features)),
        labels=labels,
    )
    given = ("--calibration", str(tmp_path / "rows.npz"), "--json", "--max-deviation", "1")

    def told(*tasks: str):
        monkeypatch.setattr(Server, "schema", TWO.picking(tasks))
        return json.loads(run((), *given).output)["tasks"]

    both, some, turned = told("click", "buy"), told("buy"), told("buy", "click")
    assert both["click"]["auc"] != both["buy"]["auc"]
    assert some == {"buy": both["buy"]}
    assert list(turned) == ["buy", "click"]
    assert turned == both


@pytest.mark.parametrize(
    "schema",
    [
        replace(TWO, tasks=("click", "sell")),
        replace(TWO, tasks=("sell",), widths=()),
        replace(TWO, widths=(1, 2)),
        replace(TWO, dense_dim=1),
    ],
)
def test_a_server_of_another_model_is_refused(run, monkeypatch, schema):
    monkeypatch.setattr(Server, "schema", schema)
    assert "whose schema is not that of" in str(run(()).exception)


def test_the_rows_that_are_sent_are_those_that_are_scored():
    lengths = np.array([2, 0, 1, 1, 3, 0], np.int32)  # two features, three rows
    place, sent = sample_major(Batch(3, np.zeros((3, 1), np.float32), lengths, np.arange(7) + 10, one_hot=False), 2)
    assert sent.tolist() == [[2, 1], [0, 3], [1, 0]]
    assert place.tolist() == [0, 1, 3, 4, 5, 6, 2]
