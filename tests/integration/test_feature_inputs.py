"""Models with several groups of id lists or matrices, an input for each feature, and a device beside the dict: scored
by the torch backend and by the program's reference as a direct call scores them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.rows import usual
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.compiled import load_compiled
from narsil.backends.registry import load_backend
from narsil.compile.compiler import compile_artifact
from narsil.compile.exact import exact_scorer
from narsil.dataflow import Batch
from narsil.errors import ArtifactError
from tests.fixtures_compiled import needs_compiler
from tests.torchrec_models import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, script, torch

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES, ROWS = ("b", "c", "a"), (30, 20, 40)


Forward = Callable[..., Any]


def takes(**others: Any) -> Callable[[Forward], Forward]:
    """Says the types of a forward's arguments as torch.fx reads them, which is not as text."""

    tensors: Any = torch.Tensor

    def told(forward: Forward) -> Forward:
        forward.__annotations__ = {"data": dict.__class_getitem__((str, tensors)), **others}
        return forward

    return told


def bags(names: Any, rows: Any, *, weighted: bool = False) -> Any:
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=count, embedding_dim=4, feature_names=[name])
        for name, count in zip(names, rows, strict=True)
    ]
    made = EmbeddingBagCollection(device=torch.device("cpu"), tables=tables, is_weighted=weighted)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


class AnInputEach(torch.nn.Module):
    """As TorchEasyRec has it."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.over = bags(NAMES, ROWS), torch.nn.Linear(14, 1)

    @takes(device=torch.device)
    def forward(self, data: Any, device: Any = "cpu") -> Any:
        sparse = KeyedJaggedTensor(
            keys=list(NAMES),
            lengths=torch.cat([data[f"{name}.lengths"] for name in NAMES]),
            values=torch.cat([data[f"{name}.values"] for name in NAMES]),
        ).to(device)
        logits = self.over(torch.cat([self.bags(sparse).values(), data["price.values"].to(device)], 1)).squeeze(1)
        return {"logits": logits, "probs": logits.sigmoid()}


class Groups(torch.nn.Module):
    """Plain ids beside weighted ones, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.weighted = bags(NAMES, ROWS), bags(["w"], [50], weighted=True)
        self.first, self.over = torch.nn.Linear(2, 4), torch.nn.Linear(23, 1)

    @takes()
    def forward(self, data: Any) -> Any:
        plain = KeyedJaggedTensor(
            keys=list(NAMES), lengths=data["id_list_features.lengths"], values=data["id_list_features.values"]
        )
        scored = KeyedJaggedTensor(
            keys=["w"],
            lengths=data["id_score_list_features.lengths"],
            values=data["id_score_list_features.values"],
            weights=data["id_score_list_features.weights"],
        )
        parts = [self.bags(plain).values(), self.weighted(scored).values(), self.first(data["float_features"])]
        return self.over(torch.cat([*parts, data["embedding_features"]], 1)).sigmoid().squeeze(1)


class NoIds(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.over = torch.nn.Linear(6, 1)

    @takes()
    def forward(self, data: Any) -> Any:
        return self.over(data["float_features"]).sigmoid().squeeze(1)


def direct(schema: ModelSchema, batch: Batch, kind: Any) -> dict[str, Any]:
    """The dict of a direct call, its parts cut out one by one."""
    inputs, lengths = {}, batch.lengths.reshape(-1, batch.rows)
    ends = np.cumsum([0, *lengths.sum(axis=1)])
    for group, positions in schema.groups:
        ids = slice(ends[positions.start], ends[positions.stop])
        inputs[f"{group}.lengths"] = torch.tensor(lengths[positions].ravel())
        inputs[f"{group}.values"] = torch.tensor(batch.values[ids])
        if schema.features[positions.start].weighted:
            assert batch.weights is not None
            inputs[f"{group}.weights"] = torch.tensor(batch.weights[ids])
    first = 0
    for key, width in schema.matrices or (("price.values" if kind is AnInputEach else "float_features", 0),):
        inputs[key] = torch.tensor(batch.dense[:, first : first + width] if width else batch.dense)
        first += width
    return inputs


@pytest.mark.parametrize("kind", [AnInputEach, Groups, NoIds])
def test_it_is_scored_as_a_direct_call_scores_it(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    torch.manual_seed(5)
    module = kind().eval()
    script(module, path)
    artifact = open_artifact(path)
    backend, exact = load_backend(artifact, "torch"), exact_scorer(artifact)
    assert exact is not None
    loaded = load_torchscript(path, "cpu")
    for batch in islice(usual(artifact.schema, np.random.default_rng(3)), 9):
        wanted = loaded(direct(artifact.schema, batch, kind))
        wanted = {"default": wanted} if isinstance(wanted, torch.Tensor) else wanted
        found, precise = backend.run(batch), exact(batch)
        for task, scores in wanted.items():
            np.testing.assert_allclose(found[task], scores.detach().numpy(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found[task], precise[task], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("kind", [Groups, NoIds])
def test_it_is_compiled_to_the_same_scores(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    torch.manual_seed(5)
    script(kind().eval(), path)
    artifact, loaded = open_artifact(path), load_torchscript(path, "cpu")
    compiled, _ = compile_artifact(artifact, tmp_path / "compiled", precision="fp32")
    assert compiled.schema == artifact.schema
    backend = load_compiled(compiled)
    for batch in islice(usual(artifact.schema, np.random.default_rng(3)), 9):
        wanted = loaded(direct(artifact.schema, batch, kind)).detach().numpy()
        np.testing.assert_allclose(backend.run(batch)["default"], wanted, rtol=1e-5, atol=1e-5)


class TwoUnknown(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.over = torch.nn.Linear(6, 1)

    @takes()
    def forward(self, data: Any) -> Any:
        return self.over(torch.cat([data["x"], data["y"]], 1))


class Columns(torch.nn.Module):
    """Numbers of a column each, beside a matrix whose width is plain to see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.over = torch.nn.Linear(5, 2), torch.nn.Linear(5, 1)

    @takes()
    def forward(self, data: Any) -> Any:
        every = torch.cat([data["c.values"], data["a.values"], data["b.values"], self.first(data["wide"])], 1)
        return self.over(every).sigmoid().squeeze(1)


class Spread(torch.nn.Module):
    """Takes one column of x, or four."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.over = torch.nn.Parameter(torch.ones(4)), torch.nn.Linear(5, 1)

    @takes()
    def forward(self, data: Any) -> Any:
        return self.over(torch.cat([data["x"] * self.scale, data["y"]], 1))


class OneMore(torch.nn.Module):
    @takes(scale=int)
    def forward(self, data: Any, scale: Any) -> Any:
        return data["x"] * scale


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (TwoUnknown, "how many columns x and y have is not plain to see; give their numbers with --dense-dim x=N,y=N"),
        (Spread, "how many columns x and y have is not plain to see"),
        (OneMore, "a device at most"),
    ],
)
def test_what_cannot_be_told_is_refused_in_a_sentence(kind: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    script(kind(), path)
    with pytest.raises(ArtifactError, match=why):
        open_artifact(path)


def scripted(kind: Any, path: Path) -> Path:
    torch.manual_seed(5)
    script(kind(), path)
    return path


def test_several_columns_of_one_number_each_are_found(tmp_path: Path) -> None:
    schema = open_artifact(scripted(Columns, tmp_path / "model_default.pt")).schema
    assert schema.matrices == (("a.values", 1), ("b.values", 1), ("c.values", 1), ("wide", 5))


@pytest.mark.parametrize(("kind", "widths"), [(TwoUnknown, {"x": 2, "y": 4}), (Spread, {"x": 4, "y": 1})])
def test_widths_that_are_given_by_name_are_taken(kind: Any, widths: dict[str, int], tmp_path: Path) -> None:
    path = scripted(kind, tmp_path / "model_default.pt")
    artifact = open_artifact(path, dense_dim=widths)
    assert artifact.schema.matrices == tuple(widths.items())
    backend, loaded = load_backend(artifact, "torch"), load_torchscript(path, "cpu")
    batch = next(iter(usual(artifact.schema, np.random.default_rng(3))))
    found = backend.run(batch)["default"].reshape(batch.rows, -1)
    wanted = loaded(direct(artifact.schema, batch, kind)).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_width_of_what_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    path = scripted(TwoUnknown, tmp_path / "model_default.pt")
    with pytest.raises(ArtifactError, match="forward takes no numbers as z, whose width is given; it takes x, y"):
        open_artifact(path, dense_dim={"x": 2, "z": 4})
