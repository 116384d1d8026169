"""Models as TorchRec's users write and package them. Whatever imports this is skipped where there is no TorchRec.

Owns the steps of TorchRec's packager, and the inputs and scores of a direct call, which is how its server calls one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

from narsil.dataflow import Batch

DENSE = 5  # columns, where nothing else is said


def script(module: Any, path: Path) -> Any:
    """TorchRec's last steps: trace, script, write. Returns the scripted module."""
    graph = Tracer(leaf_modules=["IntNBitTableBatchedEmbeddingBagsCodegen"]).trace(module.eval())
    scripted = torch.jit.script(torch.fx.GraphModule(module, graph))
    scripted.save(str(path))
    return scripted


def package(
    module: Any,
    inputs: Mapping[str, Any],
    path: Path,
    *,
    quantized: bool = True,
    sharded: bool = True,
    dtypes: Mapping[str, Any] | None = None,
) -> Any:
    """TorchRec's steps, of which a team may leave some out: quantize, shard, run, trace, script.

    ``inputs``: of the run, which builds what is built late. ``dtypes``: of tables by name; INT8 where there are none.
    Returns the scripted module. Only what is quantized is sharded.
    """
    logging.disable(logging.WARNING)
    try:
        set_propogate_device(True)
        if quantized:
            module = quantize_inference_model(module, per_table_weight_dtype=dtypes)
        if quantized and sharded:
            weights = {
                table: tuple(part.clone() for part in parts if part is not None)
                for table, parts in get_table_to_weights_from_tbe(module).items()
            }
            module, _ = shard_quant_model(module, compute_device="cpu", sharding_device="cpu")
            assign_weights_to_tbe(module, weights)  # sharding allocates the tables anew and leaves them zero
        module(dict(inputs))
        return script(module, path)
    finally:
        logging.disable(logging.NOTSET)


def inputs_of(batch: Batch, group: str = "id_list_features", columns: str | None = "float_features") -> dict[str, Any]:
    """A direct call's, by these names."""
    inputs = {f"{group}.lengths": torch.from_numpy(batch.lengths), f"{group}.values": torch.from_numpy(batch.values)}
    if batch.weights is not None:
        inputs[f"{group}.weights"] = torch.from_numpy(batch.weights)
    if columns is not None:
        inputs[columns] = torch.from_numpy(batch.dense)
    return inputs


def some_inputs(features: int, dense: int = DENSE) -> dict[str, Any]:
    """Of two rows with one id, 0, in each bag, and weights that most models do not read."""
    return {
        "float_features": torch.rand(2, dense),
        "id_list_features.lengths": torch.ones(features * 2, dtype=torch.int32),
        "id_list_features.values": torch.zeros(features * 2, dtype=torch.int32),
        "id_list_features.weights": torch.ones(features * 2),
    }


def called(module: Any, inputs: Mapping[str, Any]) -> Any:
    """The scores of the task "default"."""
    with torch.inference_mode():
        return module(dict(inputs))["default"].numpy()


def direct(path: Path, batch: Batch) -> Any:
    """The artifact called as TorchRec's own server calls it."""
    return called(torch.jit.load(str(path)), inputs_of(batch))


def distinct_rows(tables: Sequence[EmbeddingBagConfig], *, weighted: bool = False) -> EmbeddingBagCollection:
    """Tables whose rows all differ: TorchRec's packager alone would leave them all zero."""
    bags = EmbeddingBagCollection(tables=list(tables), device=torch.device("cpu"), is_weighted=weighted)
    for number, table in enumerate(bags.embedding_bags.values()):
        torch.nn.init.uniform_(table.weight, -1, 1, generator=torch.Generator().manual_seed(number))
    return bags


class Predict(PredictModule):
    """One task, of a module that takes the dense columns and a KeyedJaggedTensor, as TorchRec's own example has it."""

    def __init__(self, module: Any, keys: Sequence[str]) -> None:
        super().__init__(module, torch.device("cpu"))
        self.keys = list(keys)

    def columns(self, batch: dict[str, Any]) -> Any:
        return batch["float_features"]

    def sparse(self, batch: dict[str, Any]) -> Any:
        return KeyedJaggedTensor(
            keys=self.keys, lengths=batch["id_list_features.lengths"], values=batch["id_list_features.values"]
        )

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        logits = self.predict_module(self.columns(batch), self.sparse(batch))
        return {"default": logits.sigmoid().reshape([logits.size()[0]]).to(torch.device("cpu")).float()}


class Weighted(Predict):
    """Bags whose ids have weights of the request's."""

    def sparse(self, batch: dict[str, Any]) -> Any:
        return KeyedJaggedTensor(
            keys=self.keys,
            lengths=batch["id_list_features.lengths"],
            values=batch["id_list_features.values"],
            weights=batch["id_list_features.weights"],
        )


class Sliced(Predict):
    """Takes the first columns, however many there are."""

    def columns(self, batch: dict[str, Any]) -> Any:
        return super().columns(batch)[:, :DENSE]


class Listwise(Predict):
    """Shares of a request's candidates: a row's score depends on the others."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"default": torch.softmax(super().predict_forward(batch)["default"] * 10, dim=0)}


class Flat(Predict):
    """Scores that are laid out in one go."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"default": self.predict_module(self.columns(batch), self.sparse(batch)).sigmoid().reshape(-1)}


ROWS = (11, 300, 7, 64)
NAMES = ("shop", "user", "ad", "hour")


def dlrm(
    path: Path,
    rows: Sequence[int] = ROWS,
    names: Sequence[str] = NAMES,
    keys: Sequence[str] | None = None,
    averaged: Sequence[str] = (),
    dense: int = DENSE,
) -> Any:
    """TorchRec's own DLRM, whose scripted module it returns.

    ``keys``: the request's order of the features, where it is not the tables'; ``averaged``: pooled by mean.
    """
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
    return package(module, some_inputs(len(names), dense), path)


WIDE = {"c": (17, 16, "sum"), "a": (11, 8, "sum"), "d": (11, 8, "sum"), "b": (13, 16, "mean")}  # in KJT order


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


def wide(path: Path, predict: type[Predict] = Predict) -> Any:
    """The features of WIDE in three tables; returns the scripted module."""
    tables = [
        EmbeddingBagConfig(name="t_ad", embedding_dim=8, num_embeddings=11, feature_names=["a", "d"]),
        EmbeddingBagConfig(
            name="t_b", embedding_dim=16, num_embeddings=13, feature_names=["b"], pooling=PoolingType.MEAN
        ),
        EmbeddingBagConfig(name="t_c", embedding_dim=16, num_embeddings=17, feature_names=["c"]),
    ]
    torch.manual_seed(3)
    return package(predict(Wide(tables, weighted=predict is Weighted), list(WIDE)), some_inputs(len(WIDE)), path)
