"""Artifacts made by TorchRec's own inference packager are served as they are."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.torchrec import derive_schema
from narsil.backends.registry import load_backend
from narsil.catalog.loading import load_model
from narsil.config import ServeSettings
from narsil.dataflow import Features, Jagged
from narsil.engine.scheduler import BatchPolicy
from narsil.errors import ConfigError
from tests.fixtures_models import batch_of
from tests.support import engine_with
from tests.support import request as asked_for
from tests.torchrec_models import (
    DENSE,
    NAMES,
    ROWS,
    WIDE,
    DLRMPredictModule,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    Listwise,
    Sliced,
    Weighted,
    direct,
    dlrm,
    package,
    some_inputs,
    torch,
    wide,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dlrm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchrec") / "model_default.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dlrm(path)
    return path


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchrec") / "model_default.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide(path)
    return path


def test_the_schema_of_a_dlrm_is_read_from_the_artifact(dlrm_file: Path) -> None:
    schema, device = derive_schema(dlrm_file)
    assert device == "cpu"
    assert schema.dense_dim == DENSE
    assert schema.tasks == ("default",)
    assert [(f.name, f.table, f.rows, f.dim, f.pooling) for f in schema.features] == [
        (name, f"t_{name}", rows, 16, "sum") for name, rows in zip(NAMES, ROWS, strict=True)
    ]


def test_several_dims_poolings_and_shared_tables_keep_the_requests_order(wide_file: Path) -> None:
    schema, _ = derive_schema(wide_file)
    assert {f.name: (f.rows, f.dim, f.pooling) for f in schema.features} == WIDE
    assert [f.name for f in schema.features] == list(WIDE)
    assert [f.table for f in schema.features] == ["t_c", "t_ad", "t_ad", "t_b"]


@pytest.mark.parametrize("longest", [None, 4])
@pytest.mark.parametrize("which", ["dlrm_file", "wide_file"])
def test_scores_are_those_of_a_direct_call(which: str, longest: int | None, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    artifact = open_artifact(path)
    batch = batch_of(artifact.schema.rows.tolist(), DENSE, 33, longest=longest)
    scores = load_backend(artifact, "torch", tune_kernels=False).run(batch)["default"]
    assert np.array_equal(scores, direct(path, batch))
    assert len(np.unique(scores)) == 33


@pytest.mark.parametrize("which", ["dlrm_file", "wide_file"])
def test_the_tables_rows_differ_so_that_the_order_of_ids_shows(which: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    batch = batch_of([7] * 4, DENSE, 20)
    expected = direct(path, batch)
    batch.values[:] = batch.values.reshape(4, 20).T.reshape(-1).copy()
    assert np.abs(direct(path, batch) - expected).max() > 0.01


def test_a_model_that_ranks_a_request_is_served_whole_and_in_worker_mode_alone(tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    wide(path, Listwise)
    with pytest.raises(ConfigError, match=r"rows depend on each other: it scores default of .*-mode worker"):
        load_model(ServeSettings.model_validate({"model": path}))
    model, _ = load_model(ServeSettings.model_validate({"model": path, "execution_mode": "worker", "lanes": 1}))
    assert model.whole
    batch = batch_of(model.schema.rows.tolist(), DENSE, 37, longest=3)
    features = Features(
        37, batch.dense, Jagged.laid_out(batch.values, batch.lengths.reshape(model.schema.num_features, 37))
    )
    with engine_with(model=model, policy=BatchPolicy(max_requests=1, max_rows=8)) as engine:
        asked = asked_for(model=model, features=features)
        engine.submit(asked)
        np.testing.assert_allclose(asked.reply.wait().scores["default"], direct(path, batch), rtol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_ids_with_weights_are_scored_with_them_by_every_backend(tmp_path: Path) -> None:
    from narsil.compile.compiler import compile_artifact

    path = tmp_path / "model_default.pt"
    wide(path, Weighted)
    source = open_artifact(path)
    assert source.schema.weighted
    compiled, _ = compile_artifact(source, tmp_path / "compiled", precision="fp32")
    backends = {name: load_backend(which, name) for name, which in (("torch", source), ("compiled", compiled))}
    plain = batch_of(source.schema.rows.tolist(), DENSE, 60, longest=5)
    weighted = replace(plain, weights=np.random.default_rng(1).normal(1, 1, len(plain.values)).astype(np.float32))
    ones = replace(plain, weights=np.ones(len(plain.values), np.float32))
    for name, backend in backends.items():
        np.testing.assert_allclose(backend.run(weighted)["default"], direct(path, weighted), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(backend.run(plain)["default"], direct(path, ones), atol=1e-5, err_msg=name)
    assert np.abs(direct(path, weighted) - direct(path, ones)).max() > 0.01


def test_a_model_that_takes_any_number_of_columns_is_told_theirs(tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    wide(path, Sliced)
    assert open_artifact(path).schema.dense_dim == DENSE  # those that it takes by their places
    artifact = open_artifact(path, dense_dim=7)
    batch = batch_of(artifact.schema.rows.tolist(), 7, 9, longest=3)
    np.testing.assert_array_equal(load_backend(artifact, tune_kernels=False).run(batch)["default"], direct(path, batch))


def test_narsils_packager_and_torchrecs_score_alike(dlrm_file: Path, tmp_path: Path) -> None:
    """The same FP32 weights through both packagers: the same bytes in the tables, the same scores."""
    from narsil.packaging.dlrm import DlrmConfig, random_weights, table_key
    from narsil.packaging.packager import package_dlrm

    config = DlrmConfig(
        tables=4, rows=ROWS, dim=16, dense_features=DENSE, dense_arch=(32, 16), over_arch=(32, 1), feature_names=NAMES
    )
    weights = random_weights(config)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=16, num_embeddings=count, feature_names=[name])
        for name, count in zip(NAMES, ROWS, strict=True)
    ]
    bags = EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))
    theirs = DLRMPredictModule(bags, DENSE, [32, 16], [32, 1], list(NAMES), torch.device("cpu"))
    load: Callable[[dict[str, Any]], Any] = theirs.predict_module.load_state_dict
    load({name: torch.from_numpy(array) for name, array in weights.items()})  # our names are TorchRec's, strictly
    assert table_key("t_shop") in theirs.predict_module.state_dict()
    package(theirs, some_inputs(4), tmp_path / "theirs.pt")
    ours = package_dlrm(config, weights, tmp_path / "ours", onnx=False)

    batch = batch_of(ROWS, DENSE, 50, longest=3)
    scores = load_backend(ours, "torch").run(batch)["default"]
    assert np.allclose(scores, direct(tmp_path / "theirs.pt", batch), atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
@pytest.mark.parametrize("averaged", [(), ("user", "hour"), NAMES], ids=["sum", "sum and mean", "mean"])
@pytest.mark.parametrize("keys", [NAMES, ("hour", "shop", "ad", "user")], ids=["the tables' order", "another order"])
def test_it_compiles_to_the_same_scores(keys: Sequence[str], averaged: Sequence[str], tmp_path: Path) -> None:
    from narsil.compile.compiler import compile_artifact

    dlrm(tmp_path / "model_default.pt", ROWS, NAMES, keys, averaged)
    source = open_artifact(tmp_path / "model_default.pt")
    assert [feature.name for feature in source.schema.features] == list(keys)
    assert {feature.name for feature in source.schema.features if feature.pooling == "mean"} == set(averaged)
    compiled, _ = compile_artifact(source, tmp_path / "compiled", precision="auto")
    backend = load_backend(compiled, "compiled")
    for longest in (None, 4):
        batch = batch_of(source.schema.rows.tolist(), DENSE, 100, longest=longest)
        expected = direct(tmp_path / "model_default.pt", batch)
        np.testing.assert_allclose(backend.run(batch)["default"], expected, atol=2e-3, rtol=0)
