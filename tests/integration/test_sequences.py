"""Sequences, as TorchRec's EmbeddingCollection gives them: models that lay them out at a fixed length are read, and
their programs compute what they do; others stay what they are to the torch backend."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.torchrec_models import DENSE, Flat, called, direct, inputs_of, package, torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.torchrec import read_module
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.registry import load_backend
from narsil.program.steps import Bags
from tests.fixtures_models import batch_of, rows_of

pytestmark = pytest.mark.filterwarnings("ignore")

KEYS, ROWS, LENGTH, DIM = ["c", "a", "b"], [30, 40, 30], 6, 8

Pool = Callable[[Any], Any]  # of a JaggedTensor: (B, DIM)


def laid(values: Any, sequence: Any, fill: float = 0.0) -> Any:
    return torch.ops.fbgemm.jagged_to_padded_dense(values, [sequence.offsets()], [LENGTH], fill)


def attended(sequence: Any) -> Any:
    history = laid(sequence.values(), sequence)
    weights = torch.softmax((history * history[:, :1]).sum(2), 1)
    return torch.bmm(weights.unsqueeze(1), history).squeeze(1)


def largest_of_batch(sequence: Any) -> Any:
    return sequence.to_padded_dense().sum(1)


READ: dict[str, Pool] = {
    "mean": lambda sequence: laid(sequence.values(), sequence).mean(1),
    "largest": lambda sequence: laid(sequence.values(), sequence, -3.0).amax(1),
    "attention": attended,
    "to_padded_dense": lambda sequence: sequence.to_padded_dense(LENGTH).sum(1),
}
UNREAD: dict[str, tuple[Pool, str]] = {
    "as long as the batch's longest": (largest_of_batch, "jagged_to_padded_dense"),
    "each vector changed first": (
        lambda sequence: laid(sequence.values() * 2, sequence).sum(1),
        "aten.mul: it takes a vector",
    ),
    "half of each vector": (lambda sequence: laid(sequence.values()[:, :DIM], sequence).sum(1), "aten.slice"),
}


class Sequences(torch.nn.Module):
    """a and c share a table."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        torch.manual_seed(3)
        tables = [("t_ac", 30, ["c", "b"]), ("t_b", 40, ["a"])]
        self.sequences: Any = EmbeddingCollection(
            device=torch.device("cpu"),
            tables=[
                EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=keys)
                for name, rows, keys in tables
            ],
        )
        for weight in self.sequences.parameters():
            torch.nn.init.uniform_(weight, -1.0, 1.0)
        self.pool = pool
        self.over = torch.nn.Linear(DIM * len(KEYS) + DENSE, 1)

    def forward(self, dense: Any, sparse: Any) -> Any:
        found = self.sequences(sparse)
        return self.over(torch.cat([dense, *(self.pool(found[key]) for key in KEYS)], 1))


def packaged(pool: Pool, path: Path, sharded: bool = True, quantized: bool = True) -> None:
    inputs = inputs_of(batch_of(ROWS, DENSE, 2))
    package(Flat(Sequences(pool), KEYS), inputs, path, sharded=sharded, quantized=quantized)


@pytest.mark.parametrize(
    ("name", "sharded", "quantized"),
    [*itertools.product(READ, (True, False), (True,)), ("attention", False, False), ("to_padded_dense", False, False)],
)
def test_its_program_computes_the_same(name: str, sharded: bool, quantized: bool, tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    packaged(READ[name], path, sharded, quantized)
    module = load_torchscript(path, "cpu")
    reading = read_module(module, "m")
    assert [feature.rows for feature in reading.schema.features] == ROWS
    assert reading.readings is not None
    assert reading.readings.program is not None, reading.readings.problem
    for longest in (None, 4, 20):
        batch = batch_of(ROWS, DENSE, 9, longest=longest, seed=2)
        expected = called(module, inputs_of(batch))
        assert len(np.unique(expected)) > 5
        bags = Bags(batch.lengths.reshape(len(KEYS), batch.rows), batch.values)
        program = reading.readings.program
        found = program.reference({"float_features": batch.dense}, {"id_list_features": bags})["default"]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", UNREAD)
def test_others_have_no_program_and_are_scored_as_a_direct_call_scores_them(name: str, tmp_path: Path) -> None:
    pool, why = UNREAD[name]
    path = tmp_path / "model_default.pt"
    packaged(pool, path)
    readings = read_module(load_torchscript(path, "cpu"), "m").readings
    assert readings is not None
    assert readings.program is None
    assert why in readings.problem
    backend = load_backend(open_artifact(path), "torch", tune_kernels=False)
    batch = batch_of(ROWS, DENSE, 9, longest=4, seed=2)
    expected = direct(path, batch)
    np.testing.assert_array_equal(backend.run(batch)["default"], expected)
    padded = backend.run(rows_of(batch, len(KEYS), [*range(9), 0, 0, 0]))["default"]
    np.testing.assert_allclose(padded[:9], expected, atol=1e-6)
