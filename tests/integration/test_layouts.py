"""Ways to lay ids out in a forward's arguments: scores equal to a direct call, and programs that are read of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch import nn

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.signatures import reading_of
from narsil.backends.registry import load_backend
from narsil.bench.servers import narsil_server
from narsil.bench.workload import narsil_body, predictor_body, score_reader
from narsil.client import Client
from narsil.compile.exact import ExactScorer
from narsil.dataflow import Batch, Features, OneHot
from narsil.engine.independence import dependence
from narsil.errors import ArtifactError, ForwardFailed, InvalidRequest
from narsil.program.singles import _features
from narsil.program.values import Unread
from narsil.transports.codec import narsil_v1, predictor
from tests.support import PATIENCE_S, unary

pytest.importorskip("fbgemm_gpu")

NAMES, ROWS, DIM, DENSE = ("a", "b", "c"), (50, 60, 70), 8, 4
AUTO = torch.export.Dim.AUTO


class _Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM) for rows in ROWS)
        self.over = nn.Linear(DENSE + 3 * DIM, 1)

    def scores(self, dense: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
        return torch.sigmoid(self.over(torch.cat([dense, *found], 1))).squeeze(1)


class ByRow(_Tables):
    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found = [dense]
        for at, table in enumerate(self.tables):
            found.append(table(ids[:, at]))
        return torch.sigmoid(self.over(torch.cat(found, 1))).squeeze(1)


class ByFeature(_Tables):
    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found = [dense]
        for at, table in enumerate(self.tables):
            found.append(table(ids[at]))
        return torch.sigmoid(self.over(torch.cat(found, 1))).squeeze(1)


class EachOne(_Tables):
    def forward(self, dense: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        found, every = [dense], [a, b, c]
        for at, table in enumerate(self.tables):
            found.append(table(every[at]))
        return torch.sigmoid(self.over(torch.cat(found, 1))).squeeze(1)


class ListOfThem(_Tables):
    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor]) -> torch.Tensor:
        found = [dense]
        for at, table in enumerate(self.tables):
            found.append(table(ids[at]))
        return torch.sigmoid(self.over(torch.cat(found, 1))).squeeze(1)


class OneTable(nn.Module):
    """Fields in one table, looked up as a matrix; a sum over the fields' vectors and their products."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, DIM)
        self.over = nn.Linear(DENSE + DIM, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found = self.table(ids)  # (B, T, dim)
        summed = found.sum(dim=1)
        return self.over(torch.cat([dense, summed * summed - (found * found).sum(dim=1)], 1)).squeeze(1)


class LastOffsets(nn.Module):
    """Bags by offsets that end with the number of ids, and one feature of a single id beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(rows, DIM, mode="mean", include_last_offset=True) for rows in ROWS[:2]
        )
        self.single = nn.Embedding(ROWS[2], DIM)
        self.over = nn.Linear(DENSE + 3 * DIM, 1)

    def forward(
        self,
        dense: torch.Tensor,
        ids_a: torch.Tensor,
        offsets_a: torch.Tensor,
        ids_b: torch.Tensor,
        offsets_b: torch.Tensor,
        c: torch.Tensor,
    ) -> torch.Tensor:
        found = [dense, self.bags[0](ids_a, offsets_a), self.bags[1](ids_b, offsets_b), self.single(c)]
        return torch.sigmoid(self.over(torch.cat(found, 1))).squeeze(1)


DENSE_INPUT = {"name": "dense", "holds": "dense"}
BY_ROW = [DENSE_INPUT, {"name": "ids", "holds": "ids", "layout": "by_row"}]
INPUTS: dict[type[nn.Module], list[dict[str, Any]]] = {
    ByRow: BY_ROW,
    OneTable: BY_ROW,
    ByFeature: [DENSE_INPUT, {"name": "ids", "holds": "ids", "layout": "by_feature"}],
    EachOne: [DENSE_INPUT, *({"name": name, "holds": "ids", "features": [name]} for name in NAMES)],
    ListOfThem: [DENSE_INPUT, {"name": "ids", "holds": "ids", "layout": "list"}],
    LastOffsets: [
        DENSE_INPUT,
        {"name": "ids_a", "holds": "ids", "features": ["a"]},
        {"name": "offsets_a", "holds": "offsets", "features": ["a"], "last": True},
        {"name": "ids_b", "holds": "ids", "features": ["b"]},
        {"name": "offsets_b", "holds": "offsets", "features": ["b"], "last": True},
        {"name": "c", "holds": "ids", "features": ["c"]},
    ],
}
SIZES: dict[type[nn.Module], tuple[Any, ...]] = {
    ByRow: ({0: AUTO}, {0: AUTO}),
    OneTable: ({0: AUTO}, {0: AUTO}),
    ByFeature: ({0: AUTO}, {1: AUTO}),
    EachOne: ({0: AUTO},) * 4,
    LastOffsets: ({0: AUTO},) * 6,
}


def batch_of(kind: type[nn.Module], rows: int) -> Batch:
    random = np.random.default_rng(rows)
    lengths = np.ones((3, rows), np.int32)
    if kind is LastOffsets:
        lengths[:2] = random.integers(0, 4, (2, rows))
    limits = (50, 50, 50) if kind is OneTable else ROWS
    ids = [random.integers(0, count, int(own.sum())) for count, own in zip(limits, lengths, strict=True)]
    dense = random.standard_normal((rows, DENSE)).astype(np.float32)
    return Batch(rows, dense, lengths.ravel(), np.concatenate(ids).astype(np.int32), bool((lengths == 1).all()))


def arguments_of(kind: type[nn.Module], batch: Batch) -> tuple[Any, ...]:
    """As somebody would make them by hand."""
    lengths = batch.lengths.reshape(3, -1)
    dense = torch.from_numpy(batch.dense)
    own = [torch.from_numpy(part) for part in np.split(batch.values.astype(np.int64), np.cumsum(lengths.sum(1))[:-1])]
    if kind is LastOffsets:
        ends = [torch.from_numpy(np.concatenate([[0], np.cumsum(part)])).long() for part in lengths]
        return dense, own[0], ends[0], own[1], ends[1], own[2]
    if kind in (ByRow, OneTable):
        return dense, torch.stack(own, 1)
    if kind is ByFeature:
        return dense, torch.stack(own, 0)
    return (dense, *own) if kind is EachOne else (dense, own)


def written(kind: type[nn.Module], folder: Path, *, exported: bool) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = kind().eval()
    file = folder / ("model.pt2" if exported else "model.pt")
    if exported:
        given = arguments_of(kind, batch_of(kind, 6))
        torch.export.save(torch.export.export(model, given, dynamic_shapes=SIZES[kind], strict=False), file)
    else:
        torch.jit.script(model).save(str(file))
    rows = (50, 50, 50) if kind is OneTable else ROWS
    pooling = {"a": "mean", "b": "mean"} if kind is LastOffsets else {}
    features = [
        {"name": name, "table": "t_" + name, "rows": count, "dim": DIM, "pooling": pooling.get(name, "sum")}
        for name, count in zip(NAMES, rows, strict=True)
    ]
    content = {"format": "narsil.schema/1", "dense_dim": DENSE, "features": features, "tasks": ["default"]}
    file.with_suffix(".schema.json").write_text(json.dumps({**content, "inputs": INPUTS[kind]}))
    return file, model


FORMS = [(kind, exported) for kind in INPUTS for exported in ((False,) if kind is ListOfThem else (False, True))]


@pytest.mark.parametrize(("kind", "exported"), FORMS)
def test_scores_are_those_of_a_direct_call(tmp_path: Path, kind: type[nn.Module], exported: bool) -> None:
    file, model = written(kind, tmp_path, exported=exported)
    artifact = open_artifact(file)
    backend = load_backend(artifact)
    wanted = [name for name in NAMES if kind is not LastOffsets or name == "c"]
    assert [feature.name for feature in artifact.schema.features if feature.single] == wanted
    for rows in (1, 2, 5, 64):
        batch = batch_of(kind, rows)
        with torch.inference_mode():
            np.testing.assert_allclose(
                backend.run(batch)["default"], model(*arguments_of(kind, batch)).numpy(), rtol=1e-6, atol=1e-6
            )
    assert dependence(backend) is None


@pytest.mark.parametrize(("kind", "exported"), FORMS)
def test_their_programs_are_read(tmp_path: Path, kind: type[nn.Module], exported: bool) -> None:
    file, model = written(kind, tmp_path, exported=exported)
    arguments = open_artifact(file).arguments
    assert arguments is not None
    readings = reading_of(file, arguments).readings
    assert readings is not None
    assert readings.problem == ""
    assert readings.program is not None
    batch = batch_of(kind, 9)
    found = ExactScorer(readings.program)(batch)["default"]
    with torch.no_grad():
        wanted = model.double()(
            *(part.double() if at == 0 else part for at, part in enumerate(arguments_of(kind, batch)))
        )
    np.testing.assert_allclose(np.reshape(found, -1), wanted.numpy(), rtol=1e-9)


def test_the_first_ids_of_longer_bags_are_not_those_of_the_rows() -> None:
    once, longer = np.ones((2, 3), np.int64), np.array([[1, 1, 1], [2, 1, 1]])
    places = torch.arange(3, 6)  # of the second feature
    assert _features(places, once, 3) == (1,)
    assert _features(torch.stack([places, torch.arange(3)], 1), once, 3) == (1, 0)
    for given, lengths in ((places, longer), (places.flip(0), once), (places[:2], once)):
        with pytest.raises(Unread):
            _features(given, lengths, 3)


def test_a_larger_table_than_the_models_is_told(tmp_path: Path) -> None:
    file, _ = written(ByRow, tmp_path, exported=True)
    schema = file.with_suffix(".schema.json")
    schema.write_text(schema.read_text().replace('"rows": 60', '"rows": 61'))
    with pytest.raises(ArtifactError, match="lets ids of b up to 60 in, and the model leads those from 60 on outside"):
        load_backend(open_artifact(file))


@pytest.mark.parametrize(("old", "new"), [('"dim": 8', '"dim": 4'), ('"pooling": "mean"', '"pooling": "sum"')])
def test_another_table_than_the_models_is_told(tmp_path: Path, old: str, new: str) -> None:
    file, _ = written(LastOffsets, tmp_path, exported=True)
    schema = file.with_suffix(".schema.json")
    assert old in schema.read_text()
    schema.write_text(schema.read_text().replace(old, new))
    with pytest.raises(ArtifactError, match=r"differ: the file has .* and the model takes the"):
        load_backend(open_artifact(file))


def test_a_bag_of_several_ids_is_told_whatever_let_it_in(tmp_path: Path) -> None:
    file, _ = written(ByRow, tmp_path, exported=False)
    lengths = np.array([1, 1, 1, 2, 1, 1], np.int32)
    batch = Batch(2, np.zeros((2, DENSE), np.float32), lengths, np.zeros(7, np.int32), one_hot=False)
    with pytest.raises(ForwardFailed, match="feature b, row 1: 2 ids, where the model takes exactly one"):
        load_backend(open_artifact(file)).run(batch)


def test_a_server_gives_the_same_scores_and_tells_what_a_row_must_hold(tmp_path: Path) -> None:
    kind = ByRow
    file, model = written(kind, tmp_path, exported=True)
    batch = batch_of(kind, 6)
    ids = batch.values.reshape(3, 6)
    with torch.inference_mode():
        wanted = model(*arguments_of(kind, batch)).numpy()
    with narsil_server(file, lanes=1) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(server.address)
        assert client.model(timeout=PATIENCE_S).schema == open_artifact(file).schema
        found = [client.predict(batch.dense, ids.T.copy(), timeout=PATIENCE_S).scores["default"]]
        features = Features(6, batch.dense, OneHot(ids))
        for wire, write, method in (
            ("predictor", predictor_body, predictor.METHOD),
            ("narsil", narsil_body, narsil_v1.METHOD),
        ):
            reply = unary(channel, method)(write(features), timeout=PATIENCE_S)
            found.append(score_reader(wire, "default")(reply))  # type: ignore[arg-type]
        lengths = np.ones((6, 3), np.int32)
        lengths[4, 1] = 2
        with pytest.raises(InvalidRequest, match="feature b, row 4: 2 ids, where the model takes exactly one"):
            client.predict(batch.dense, np.zeros(19, np.int32), lengths, timeout=PATIENCE_S)
        client.close()
    for scores in found:
        np.testing.assert_allclose(scores, wanted, rtol=1e-6, atol=1e-6)
