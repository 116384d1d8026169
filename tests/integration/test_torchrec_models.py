"""Models as TorchRec's users write and package them: each has the schema that its forward says, and is scored by the
torch backend as a direct call scores it, alone and beside padding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.torchrec import read_module
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.registry import load_backend
from narsil.compile.compiler import compile_artifact
from narsil.dataflow import Batch
from narsil.engine.independence import dependence
from narsil.errors import ArtifactError
from narsil.program.steps import Bags
from tests.fixtures_models import batch_of, rows_of
from tests.torchrec_models import (
    DENSE,
    EmbeddingBagConfig,
    KeyedJaggedTensor,
    PoolingType,
    PredictModule,
    called,
    distinct_rows,
    inputs_of,
    package,
    torch,
)

pytestmark = pytest.mark.filterwarnings("ignore")

NARROW, WIDE = 2**31, 2**63 - 1


@dataclass(frozen=True)
class Kind:
    """How a model is made."""

    tables: tuple[tuple[str, int, int, str, str], ...] = (  # name, rows, dim, pooling, features
        ("t_a", 40, 8, "sum", "a"),
        ("t_bc", 30, 16, "mean", "b c"),
    )
    keys: tuple[str, ...] = ("c", "a", "b")
    columns: str | None = "float_features"
    group: str = "id_list_features"
    change: str = ""  # what is done to ids
    kjts: int = 1  # KeyedJaggedTensors that are built of the same ids
    order: tuple[int, ...] = ()  # in which features are taken out of the KeyedJaggedTensor, if in another one
    quantized: bool = True
    sharded: bool = True
    dtype: Any = torch.qint8
    rows: tuple[int, ...] = (30, 40, 30)  # that the schema gives, in the keys' order


class Towers(torch.nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        torch.manual_seed(3)
        pooling = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
        tables = [
            EmbeddingBagConfig(
                name=name, num_embeddings=rows, embedding_dim=dim, feature_names=names.split(), pooling=pooling[how]
            )
            for name, rows, dim, how, names in kind.tables
        ]
        self.embedding_bag_collection = distinct_rows(tables)
        width = sum(table.embedding_dim * len(table.feature_names) for table in tables) * kind.kjts
        self.over = torch.nn.Linear(width + (DENSE if kind.columns else 0), 1)
        torch.nn.init.normal_(self.over.weight, std=0.2)

    def forward(self, dense: Any, every: list[Any]) -> Any:
        pooled = [self.embedding_bag_collection(sparse).values() for sparse in every]
        return self.over(torch.cat(pooled if dense is None else [dense, *pooled], 1))


class Predict(PredictModule):
    def __init__(self, kind: Kind) -> None:
        super().__init__(Towers(kind), torch.device("cpu"))
        self.kind = kind

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        kind = self.kind
        values, lengths = batch[f"{kind.group}.values"], batch[f"{kind.group}.lengths"]
        if kind.change == "+ 1":
            values = values + 1
        if kind.change == "% 7":
            values = values % 7
        if kind.change == "% 7 of magnitudes":
            values = torch.fmod(values.abs(), 7)
        if kind.change == "long hash":
            values = values.long()
        if kind.change == "int hash":
            values = values.int()
        if kind.change.endswith("hash"):
            values = (values ^ (values >> 16)) * 73244475 % 7
        if kind.change == "cross":
            c, a, b = values.view(3, -1)
            values = torch.cat([c, (a.long() * 1_000_003 + b) % 40, b])
        if kind.change == "clamp":
            values = torch.clamp(values, max=9)
        every = [KeyedJaggedTensor(keys=list(kind.keys), lengths=lengths, values=values) for _ in range(kind.kjts)]
        every = [each.permute(list(kind.order)) if kind.order else each for each in every]
        dense = None if kind.columns is None else batch[kind.columns]
        return {"default": self.predict_module(dense, every).sigmoid().reshape(-1)}


def packaged(kind: Kind, path: Path, predict: type[Predict] = Predict) -> None:
    package(
        predict(kind),
        inputs_for(kind, batch_of([5] * len(kind.keys), DENSE, 2)),
        path,
        quantized=kind.quantized,
        sharded=kind.sharded,
        dtypes={name: kind.dtype for name, *_ in kind.tables},
    )


def inputs_for(kind: Kind, batch: Batch) -> dict[str, Any]:
    return inputs_of(batch, kind.group, kind.columns)


PLAIN = Kind()
KINDS: dict[str, Kind] = {
    "INT8": PLAIN,
    "INT4": Kind(dtype=torch.quint4x2),
    "FP16": Kind(dtype=torch.float16, sharded=False),
    "FP32": Kind(dtype=torch.float32, sharded=False),
    "not sharded": Kind(sharded=False),
    "not quantized": Kind(quantized=False),
    "no columns": Kind(columns=None),
    "other names": Kind(columns="dense", group="sparse"),
    "a feature that is never looked up": Kind(keys=("c", "idle", "a", "b"), rows=(30, NARROW, 40, 30)),
    "a feature in two tables": Kind(
        tables=(("deep", 30, 8, "sum", "a b"), ("wide", 20, 4, "sum", "a")), keys=("b", "a"), rows=(30, 20)
    ),
    "+ 1": Kind(change="+ 1", rows=(29, 39, 29)),
    "% 7": Kind(change="% 7", rows=(WIDE,) * 3),
    "% 7 of magnitudes": Kind(change="% 7 of magnitudes", rows=(NARROW,) * 3),
    "clamp(max)": Kind(change="clamp", rows=(WIDE,) * 3),
    "a hash of int64": Kind(change="long hash", rows=(WIDE,) * 3),
    "a hash of int32": Kind(change="int hash", rows=(NARROW,) * 3),
    "several KeyedJaggedTensors": Kind(kjts=2),
    "features in another order": Kind(keys=("c", "idle", "a", "b"), order=(3, 0, 2), rows=(30, NARROW, 40, 30)),
}


def batches(kind: Kind) -> Sequence[Batch]:
    """Rows with one id in each bag, none to 4, and none to 60."""
    limits, columns = (
        [min(rows, 20 if kind.change == "clamp" else 10**6) for rows in kind.rows],
        DENSE if kind.columns else 0,
    )
    return [batch_of(limits, columns, 9, longest=longest, seed=longest or 1) for longest in (None, 4, 60)]


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a kind, which all tests share."""

    @cache
    def made(name: str) -> Path:
        path: Path = tmp_path_factory.mktemp("kind") / "model_default.pt"
        packaged(KINDS[name], path)
        return path

    return made


@pytest.mark.parametrize("name", KINDS)
def test_it_is_scored_as_a_direct_call_scores_it(name: str, artifact_of: Callable[[str], Path]) -> None:
    kind, path = KINDS[name], artifact_of(name)
    artifact = open_artifact(path)
    assert artifact.schema.dense_dim == (DENSE if kind.columns else 0)
    assert [feature.name for feature in artifact.schema.features] == list(kind.keys)
    assert tuple(feature.rows for feature in artifact.schema.features) == kind.rows
    backend, module = load_backend(artifact, "torch", tune_kernels=False), torch.jit.load(str(path))
    for batch in batches(kind):
        expected = called(module, inputs_for(kind, batch))
        assert len(np.unique(expected)) > 5
        np.testing.assert_array_equal(backend.run(batch)["default"], expected)
        for row in (0, 4):
            alone = backend.run(rows_of(batch, len(kind.keys), [row]))["default"]
            np.testing.assert_allclose(alone, expected[row : row + 1], atol=1e-6)
        padded = backend.run(rows_of(batch, len(kind.keys), [*range(9), 0, 0, 0]))["default"]
        np.testing.assert_allclose(padded[:9], expected, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_its_program_computes_the_same(name: str, artifact_of: Callable[[str], Path]) -> None:
    kind = KINDS[name]
    module = load_torchscript(artifact_of(name), "cpu")
    readings = read_module(module, "m").readings
    assert readings is not None
    assert readings.program is not None, readings.problem
    for batch in batches(kind):
        expected = called(module, inputs_for(kind, batch))
        bags = Bags(batch.lengths.reshape(len(kind.keys), batch.rows), batch.values)
        columns = {} if kind.columns is None else {kind.columns: batch.dense}
        found = readings.program.reference(columns, {kind.group: bags})["default"]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_id_of_each_feature_is_scored_as_a_direct_call_scores_it_and_never_beside_others(tmp_path: Path) -> None:
    """Ids of two features are crossed, which is only done where each row has one of both."""
    kind, path = Kind(change="cross", rows=(30, WIDE, 30)), tmp_path / "model_default.pt"
    packaged(kind, path)
    artifact = open_artifact(path)
    assert tuple(feature.rows for feature in artifact.schema.features) == kind.rows
    backend, module = load_backend(artifact, "torch", tune_kernels=False), torch.jit.load(str(path))
    batch = batch_of([30, 10**9, 30], DENSE, 9)
    with torch.inference_mode():
        expected = module(
            {key: tensor.long() for key, tensor in inputs_for(kind, batch).items() if "id_" in key}
            | {"float_features": torch.from_numpy(batch.dense)}
        )["default"].numpy()
    np.testing.assert_array_equal(backend.run(batch)["default"], expected)
    told = dependence(backend)
    assert told is not None
    assert told.startswith("it takes one id of each feature and fails on bags of 0 to 3 (")
    with pytest.raises(ArtifactError, match="cannot be compiled"):
        compile_artifact(artifact, tmp_path / "compiled")


def test_a_branch_that_no_trial_shows_leaves_requests_whole(tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    torch.jit.script(Many()).save(str(path))
    backend = load_backend(open_artifact(path), "torch", tune_kernels=False)
    told = dependence(backend)
    assert told is not None
    assert re.match(r"forward branches on a number .* if dense.shape\[0\] > 400.*, so that no trial tells", told)
    assert dependence(backend.share()) == told


class Many(torch.nn.Module):
    """Does other things to more rows than are tried."""

    def __init__(self) -> None:
        super().__init__()
        self.over = torch.nn.Linear(DENSE, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dense = batch["float_features"]
        if dense.shape[0] > 400:
            dense = dense * 2
        return {"default": self.over(dense).sigmoid().reshape(-1)}


def test_ids_that_lead_outside_of_their_table_are_refused(tmp_path: Path) -> None:
    one_row = Kind(tables=(("t_a", 1, 8, "sum", "a"),), keys=("a",), change="+ 1")
    packaged(one_row, tmp_path / "model_default.pt")
    with pytest.raises(ArtifactError, match=r"the id 0 becomes 1 to 1 on its way to the table .* of 1 rows"):
        open_artifact(tmp_path / "model_default.pt")


def test_a_hash_that_is_another_in_32_bits_than_in_64_is_refused(tmp_path: Path) -> None:
    packaged(Kind(change="hash"), tmp_path / "model_default.pt")
    with pytest.raises(
        ArtifactError, match=r"to the ids of a wraps around where they are int32, .* ids\.long\(\) or ids"
    ):
        open_artifact(tmp_path / "model_default.pt")


def test_what_a_model_raises_is_told_as_it_said_it(tmp_path: Path) -> None:
    packaged(Kind(), tmp_path / "model_default.pt")
    with pytest.raises(ArtifactError, match=r"does not run on rows of 4 columns: .*mat1 and mat2"):
        read_module(load_torchscript(tmp_path / "model_default.pt", "cpu"), "m", 4)
