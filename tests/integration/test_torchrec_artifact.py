"""Artifacts made by TorchRec's own inference packager are served as they are."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchrec")
    from torchrec.distributed.global_settings import set_propogate_device
    from torchrec.fx.tracer import Tracer
    from torchrec.inference.dlrm_predict import DLRMPredictModule
    from torchrec.inference.modules import (
        PredictModule,
        assign_weights_to_tbe,
        get_table_to_weights_from_tbe,
        quantize_inference_model,
        shard_quant_model,
    )
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.modules.mlp import MLP
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.torchrec import derive_schema
from narsil.backends.registry import load_backend
from narsil.catalog.loading import load_model
from narsil.config import ServeSettings
from narsil.dataflow import Features, Jagged
from narsil.engine.scheduler import BatchPolicy
from narsil.errors import ArtifactError, ConfigError
from tests.fixtures_models import batch_of
from tests.support import engine_with
from tests.support import request as asked_for

pytestmark = pytest.mark.filterwarnings("ignore")

DENSE = 5


def distinct_rows(tables: Sequence[EmbeddingBagConfig], *, weighted: bool = False) -> EmbeddingBagCollection:
    """Tables whose rows all differ: TorchRec's packager alone would leave them all zero."""
    bags = EmbeddingBagCollection(tables=list(tables), device=torch.device("cpu"), is_weighted=weighted)
    for number, table in enumerate(bags.embedding_bags.values()):
        torch.nn.init.uniform_(table.weight, -1, 1, generator=torch.Generator().manual_seed(number))
    return bags


def package(module: Any, features: int, path: Path, dense: int = DENSE) -> Any:
    """TorchRec's steps: quantize, shard, trace, script. Returns the scripted module."""
    logging.disable(logging.WARNING)
    try:
        set_propogate_device(True)
        quantized = quantize_inference_model(module)
        weights = {
            table: tuple(part.clone() for part in parts)
            for table, parts in get_table_to_weights_from_tbe(quantized).items()
        }
        sharded, _ = shard_quant_model(quantized, compute_device="cpu", sharding_device="cpu")
        assign_weights_to_tbe(sharded, weights)  # sharding allocates the tables anew and leaves them zero
        sharded(
            {
                "float_features": torch.rand(2, dense),
                "id_list_features.lengths": torch.ones(features * 2, dtype=torch.int32),
                "id_list_features.values": torch.zeros(features * 2, dtype=torch.int32),
                "id_list_features.weights": torch.ones(features * 2),
            }
        )
        graph = Tracer(leaf_modules=["IntNBitTableBatchedEmbeddingBagsCodegen"]).trace(sharded)
        scripted = torch.jit.script(torch.fx.GraphModule(sharded, graph))
        scripted.save(str(path))
    finally:
        logging.disable(logging.NOTSET)
    return scripted


def dlrm(
    path: Path,
    rows: Sequence[int],
    names: Sequence[str],
    keys: Sequence[str] | None = None,
    averaged: Sequence[str] = (),
    dense: int = DENSE,
) -> Any:
    """``keys``: the request's order of the features, where it is not the tables'; ``averaged``: pooled by mean."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            embedding_dim=16,
            num_embeddings=count,
            feature_names=[name],
            pooling=PoolingType.MEAN if name in averaged else PoolingType.SUM,
        )
        for name, count in zip(names, rows, strict=True)
    ]
    torch.manual_seed(3)
    module = DLRMPredictModule(
        embedding_bag_collection=distinct_rows(tables),
        dense_in_features=dense,
        dense_arch_layer_sizes=[32, 16],
        over_arch_layer_sizes=[32, 1],
        id_list_features_keys=list(keys or names),
        dense_device=torch.device("cpu"),
    )
    return package(module, len(names), path, dense)


class Wide(torch.nn.Module):  # type: ignore[name-defined]
    """A model over tables of several dims and poolings, which a DLRM cannot have."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig], *, weighted: bool = False) -> None:
        super().__init__()
        self.embedding_bag_collection = distinct_rows(tables, weighted=weighted)
        self.dense_arch = MLP(DENSE, [8, 8], device=torch.device("cpu"))
        width = sum(len(table.feature_names) * table.embedding_dim for table in tables)
        self.over_arch = torch.nn.Linear(8 + width, 1)

    def forward(self, dense: Any, sparse: Any) -> Any:
        return self.over_arch(torch.cat([self.dense_arch(dense), self.embedding_bag_collection(sparse).values()], 1))


class WidePredict(PredictModule):
    def __init__(self, module: Wide, keys: Sequence[str]) -> None:
        super().__init__(module, torch.device("cpu"))
        self.keys = list(keys)

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        logits = self.predict_module(
            batch["float_features"],
            KeyedJaggedTensor(
                keys=self.keys,
                lengths=batch["id_list_features.lengths"],
                values=batch["id_list_features.values"],
            ),
        )
        return {"default": logits.sigmoid().reshape([logits.size()[0]]).to(torch.device("cpu")).float()}


class Weighted(WidePredict):
    """Bags whose ids have weights of the request's."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        sparse = KeyedJaggedTensor(
            keys=self.keys,
            lengths=batch["id_list_features.lengths"],
            values=batch["id_list_features.values"],
            weights=batch["id_list_features.weights"],
        )
        logits = self.predict_module(batch["float_features"], sparse)
        return {"default": logits.sigmoid().reshape([logits.size()[0]])}


class Sliced(WidePredict):
    """Takes the first columns, however many there are."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        sparse = KeyedJaggedTensor(
            keys=self.keys, lengths=batch["id_list_features.lengths"], values=batch["id_list_features.values"]
        )
        logits = self.predict_module(batch["float_features"][:, :DENSE], sparse)
        return {"default": logits.sigmoid().reshape([logits.size()[0]])}


class Listwise(WidePredict):
    """Shares of a request's candidates: a row's score depends on the others."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"default": torch.softmax(super().predict_forward(batch)["default"] * 10, dim=0)}


ROWS = (11, 300, 7, 64)
NAMES = ("shop", "user", "ad", "hour")
WIDE = {"c": (17, 16, "sum"), "a": (11, 8, "sum"), "d": (11, 8, "sum"), "b": (13, 16, "mean")}  # in KJT order


def wide(path: Path, predict: type[WidePredict] = WidePredict) -> Any:
    tables = [
        EmbeddingBagConfig(name="t_ad", embedding_dim=8, num_embeddings=11, feature_names=["a", "d"]),
        EmbeddingBagConfig(
            name="t_b", embedding_dim=16, num_embeddings=13, feature_names=["b"], pooling=PoolingType.MEAN
        ),
        EmbeddingBagConfig(name="t_c", embedding_dim=16, num_embeddings=17, feature_names=["c"]),
    ]
    torch.manual_seed(3)
    return package(predict(Wide(tables, weighted=predict is Weighted), list(WIDE)), len(WIDE), path)


@pytest.fixture(scope="module")
def dlrm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchrec") / "model_default.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dlrm(path, ROWS, NAMES)
    return path


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchrec") / "model_default.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide(path)
    return path


def direct(path: Path, batch: Any) -> Any:
    """The artifact called as TorchRec's own server calls it."""
    module = torch.jit.load(str(path))
    inputs = {
        "float_features": torch.from_numpy(batch.dense),
        "id_list_features.lengths": torch.from_numpy(batch.lengths),
        "id_list_features.values": torch.from_numpy(batch.values),
    }
    if batch.weights is not None:
        inputs["id_list_features.weights"] = torch.from_numpy(batch.weights)
    with torch.inference_mode():
        return module(inputs)["default"].numpy()


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
    with pytest.raises(ArtifactError, match=r"runs with 5, 6 and other numbers of dense columns.*--dense-dim"):
        open_artifact(path)
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
    package(theirs, 4, tmp_path / "theirs.pt")
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
