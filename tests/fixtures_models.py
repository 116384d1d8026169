"""Small models: tables of different rows, packaged once per test run. Nothing is built until a test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.dataflow import Batch, Floats
from narsil.packaging.dlrm import DlrmConfig, random_weights

MakeBatch = Callable[..., Batch]


def small(pooling: str = "sum", rows: int | tuple[int, ...] = (50, 7, 1000, 33)) -> DlrmConfig:
    return DlrmConfig(
        tables=4,
        rows=rows,
        dim=16,
        dense_features=5,
        dense_arch=(32, 16),
        over_arch=(32, 16, 1),
        pooling=pooling,  # type: ignore[arg-type]
        seed=7,
    )


def weights_of(config: DlrmConfig) -> dict[str, Floats]:
    """Random weights with biases that are not zero, as trained ones are: one that is left out shows."""
    weights, random = random_weights(config), np.random.default_rng(config.seed)
    for prefix, _, outputs in config.linears[:-1]:
        weights[f"{prefix}.bias"] = random.uniform(-0.3, 0.3, outputs).astype(np.float32)
    return weights


@pytest.fixture(scope="session")
def small_config() -> DlrmConfig:
    return small()


@pytest.fixture(scope="session")
def small_weights(small_config: DlrmConfig) -> dict[str, Floats]:
    return random_weights(small_config)


@pytest.fixture(scope="session")
def small_artifact(
    small_config: DlrmConfig, small_weights: dict[str, Floats], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The small DLRM, packaged for the CPU: TorchScript with INT8 tables and ONNX with FP32 ones."""
    pytest.importorskip("fbgemm_gpu")
    pytest.importorskip("onnx")
    from narsil.packaging.packager import package_dlrm

    out: Path = tmp_path_factory.mktemp("artifacts") / "small"
    return package_dlrm(small_config, small_weights, out, name="small", onnx=True)


@pytest.fixture(scope="session")
def mean_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The small DLRM with mean pooling."""
    pytest.importorskip("fbgemm_gpu")
    pytest.importorskip("onnx")
    from narsil.packaging.packager import package_dlrm

    config = small("mean")
    return package_dlrm(config, random_weights(config), tmp_path_factory.mktemp("artifacts") / "mean", onnx=True)


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    return batch_of


def batch_of(
    rows_per_table: Sequence[int], dense_dim: int, rows: int, *, longest: int | None = None, seed: int = 0
) -> Batch:
    """A batch of random valid rows: one id per bag, or 0 .. longest ids."""
    rng = np.random.default_rng(seed)
    bags = len(rows_per_table) * rows
    lengths = np.ones(bags, np.int32) if longest is None else rng.integers(0, longest + 1, bags, dtype=np.int32)
    counts = lengths.reshape(len(rows_per_table), rows).sum(axis=1)
    ids = [rng.integers(0, limit, count) for limit, count in zip(rows_per_table, counts, strict=True)]
    return Batch(
        rows=rows,
        dense=rng.random((rows, dense_dim), dtype=np.float32),
        lengths=lengths,
        values=np.concatenate(ids).astype(np.int32),
        one_hot=longest is None,
    )


def rows_of(batch: Batch, tables: int, rows: Sequence[int]) -> Batch:
    """Some of a batch's rows, in the given order."""
    starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
    bags = (np.arange(tables)[:, None] * batch.rows + np.asarray(rows)).ravel()
    lengths = batch.lengths[bags]
    picked = [batch.values[starts[bag] : starts[bag] + batch.lengths[bag]] for bag in bags]
    dense = np.ascontiguousarray(batch.dense[list(rows)])
    return Batch(len(rows), dense, lengths, np.concatenate(picked), batch.one_hot)


def assert_invariant(backend: Backend, other: Backend, schema: ModelSchema) -> None:
    """Rows score the same bits alone, and at any place among any rows, in each of two lanes."""
    task = schema.tasks[0]
    rng = np.random.default_rng(4)
    for longest in (None, 3):
        pool = batch_of(schema.rows.tolist(), schema.dense_dim, 300, longest=longest, seed=5)
        alone = np.concatenate(
            [backend.run(rows_of(pool, schema.num_features, [row]))[task] for row in range(pool.rows)]
        )
        for size in (2, 3, 12, 13, 63, 64, 65, 100, 127, 129, 200, 300):
            rows = rng.permutation(pool.rows)[:size]
            for lane in (backend, other):
                together = lane.run(rows_of(pool, schema.num_features, rows.tolist()))[task]
                np.testing.assert_array_equal(together.view(np.uint32), alone[rows].view(np.uint32))
