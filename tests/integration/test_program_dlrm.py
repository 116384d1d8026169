"""A DLRM is recognised in whatever way it is written, with its weights in the fused engine's order; what does anything
more or other is none, and the sentence says what."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    import torch.nn.functional as F

from narsil.compile.dlrm import Dlrm, NoDlrm, recognised
from narsil.program.ragged import IDS, WEIGHTS
from narsil.program.reading import merged, read, record
from narsil.program.steps import Bags, Program
from narsil.program.values import Known, PerId, Structure
from tests.integration.test_program_bags import FEATURES, ROWS, TABLE_ROWS, bags_of, feature, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore")

DENSE, DIM = 6, 4
VECTORS = FEATURES + 1
PAIRS = VECTORS * (VECTORS - 1) // 2
UPPER = np.triu_indices(VECTORS, k=1)
RANDOM = torch.Generator().manual_seed(11)


def weight(*shape: int) -> Any:
    return torch.randn(*shape, generator=RANDOM) * 0.4


DENSE_1, DENSE_2 = (weight(5, DENSE), weight(5)), (weight(DIM, 5), weight(DIM))
OVER_1, OVER_2 = (weight(7, DIM + PAIRS), weight(7)), (weight(1, 7), weight(1))


class Model:
    """A DLRM in parts, each of which a variant replaces."""

    order = tuple(range(VECTORS))  # of the vectors that are multiplied: 0 is the dense one

    def columns(self, x: Any) -> Any:
        return x

    def dense(self, x: Any) -> Any:
        return torch.relu(F.linear(torch.relu(F.linear(x, *DENSE_1)), *DENSE_2))

    def ids(self, values: Any) -> Any:
        return values

    def weights(self, values: Any, weights: Any) -> Any:
        return None

    def pooled(self, vector: Any, lengths: Any) -> Any:
        return vector

    def products(self, vectors: Any) -> Any:
        pairs = torch.bmm(vectors, vectors.transpose(1, 2))
        return pairs[:, torch.from_numpy(UPPER[0]), torch.from_numpy(UPPER[1])]

    def joined(self, hidden: Any, products: Any) -> Any:
        return torch.cat([hidden, products], 1)

    def over(self, joined: Any) -> Any:
        return F.linear(torch.relu(F.linear(joined, *OVER_1)), *OVER_2)

    def score(self, logit: Any, x: Any) -> Any:
        return torch.sigmoid(logit).reshape(-1)

    def __call__(self, batch: Any) -> Any:
        x, lengths, values = batch["x"], batch["g.lengths"], batch["g.values"]
        weights = self.weights(values, batch["g.weights"])
        hidden = self.dense(self.columns(x))
        vectors = [hidden]
        for number in range(FEATURES):
            vectors.append(self.pooled(feature(lengths, self.ids(values), weights, number), lengths))
        stacked = torch.stack([vectors[at] for at in self.order], 1)
        return self.score(self.over(self.joined(hidden, self.products(stacked))), x)


def batch_of(rows: int, most: int = 4) -> tuple[dict[str, Any], Any]:
    lengths, ids, weights = bags_of(rows, most)
    x = torch.randn(rows, DENSE, generator=torch.Generator().manual_seed(rows))
    return {"x": x, **inputs_of(lengths, ids, weights)}, Bags(lengths, ids.astype(np.int32), weights)


def program_of(model: Any) -> Program:
    given = [batch_of(rows) for rows in ROWS]
    recording = merged(*(record(model, {**batch, "g.values": batch["g.values"] * 0}) for batch, _ in given))
    places = [torch.arange(len(bags.values)) for _, bags in given]
    known: dict[int, Known] = {
        recording.inputs["g.lengths"]: Structure("g"),
        recording.inputs["g.values"]: PerId("g", IDS, (places[0], places[1])),
        recording.inputs["g.weights"]: PerId("g", WEIGHTS, (places[0], places[1])),
    }
    groups = {"g": (np.asarray(given[0][1].lengths), np.asarray(given[1][1].lengths))}
    readings = read(recording, ROWS, groups, lambda weights, position: pytest.fail("FBGEMM"), ("x",), known)
    assert readings.program is not None, readings.problem
    return readings.program


def scores_of(found: Dlrm, x: Any, bags: Bags) -> Any:
    """As the fused engine computes them, in float64."""

    def through(layers: Any, values: Any) -> Any:
        for layer in layers:
            values = np.maximum(
                values @ layer.weight.astype(np.float64).T + (0 if layer.bias is None else layer.bias), 0
            )
        return values

    hidden = through(found.dense, x.numpy().astype(np.float64))
    vectors = [hidden]
    for number in range(FEATURES):
        lookup, place = found.tables[number]
        made = lookup.reference({}, {"g": bags})
        start = sum(table.dim for table in lookup.tables[:place])
        vectors.append(made[:, start : start + lookup.tables[place].dim])
    products = np.einsum("bid,bjd->bij", *[np.stack(vectors, 1)] * 2)[:, UPPER[0], UPPER[1]]
    last = found.over[-1]
    before = through(found.over[:-1], np.concatenate([hidden, products], 1))
    logit = before @ last.weight.astype(np.float64).T + (0 if last.bias is None else last.bias)
    return 1 / (1 + np.exp(-logit[:, 0]))


class Permuted(Model):
    order = (2, 0, 3, 1)


class Lower(Model):
    """The products below the diagonal."""

    def products(self, vectors: Any) -> Any:
        pairs = torch.bmm(vectors, vectors.transpose(1, 2))
        return pairs[:, torch.from_numpy(UPPER[1]), torch.from_numpy(UPPER[0])]


class Flat(Model):
    """By their places in the flattened products."""

    def products(self, vectors: Any) -> Any:
        pairs = torch.bmm(vectors, vectors.permute(0, 2, 1)).flatten(1)
        return torch.index_select(pairs, 1, torch.from_numpy(UPPER[0] * VECTORS + UPPER[1]))


class Missing(Model):
    """Without some pairs."""

    def products(self, vectors: Any) -> Any:
        return super().products(vectors)[:, 2:]

    def over(self, joined: Any) -> Any:
        return F.linear(torch.relu(F.linear(joined, OVER_1[0][:, : DIM + PAIRS - 2], OVER_1[1])), *OVER_2)


class Twice(Model):
    """All pairs of the matrix but its diagonal: each twice, with weights of their own."""

    layer = weight(7, DIM + 2 * PAIRS)

    def products(self, vectors: Any) -> Any:
        pairs = torch.bmm(vectors, vectors.transpose(1, 2))
        upper, right = (torch.from_numpy(np.concatenate([UPPER[a], UPPER[b]])) for a, b in ((0, 1), (1, 0)))
        return pairs[:, upper, right]

    def over(self, joined: Any) -> Any:
        return F.linear(torch.relu(F.linear(joined, self.layer, OVER_1[1])), *OVER_2)


class Behind(Model):
    """The dense vector behind the products."""

    def joined(self, hidden: Any, products: Any) -> Any:
        return torch.cat([products, hidden], 1)


class Biasless(Model):
    def dense(self, x: Any) -> Any:
        return torch.relu(F.linear(torch.relu(F.linear(x, DENSE_1[0])), DENSE_2[0]))

    def over(self, joined: Any) -> Any:
        return F.linear(torch.relu(F.linear(joined, OVER_1[0])), OVER_2[0])


class Shallow(Model):
    """One layer in each arch."""

    layer = weight(DIM, DENSE), weight(1, DIM + PAIRS)

    def dense(self, x: Any) -> Any:
        return torch.relu(F.linear(x, self.layer[0]))

    def over(self, joined: Any) -> Any:
        return F.linear(joined, self.layer[1])


class Shaped(Model):
    """Through shapes that change nothing."""

    def columns(self, x: Any) -> Any:
        return x.view(-1, 2, 3).flatten(1).unsqueeze(1).squeeze(1)

    def score(self, logit: Any, x: Any) -> Any:
        return torch.sigmoid(logit.squeeze(1)).unsqueeze(1)[:, 0]


@pytest.mark.parametrize(
    "kind", [Model, Permuted, Lower, Flat, Missing, Twice, Behind, Biasless, Shallow, Shaped], ids=lambda k: k.__name__
)
def test_a_dlrm_is_recognised_and_scores_as_it_did(kind: type[Model]) -> None:
    model = kind()
    program = program_of(model)
    found = recognised(program, "default", "m")
    for rows, most in ((11, 4), (4, 60)):
        batch, bags = batch_of(rows, most)
        expected = program.reference({"x": batch["x"].numpy()}, {"g": bags})["default"].reshape(-1)
        np.testing.assert_allclose(scores_of(found, batch["x"], bags), expected, rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(expected, model(batch).double().numpy(), rtol=1e-5, atol=1e-5)


def variant(**parts: Any) -> type[Model]:
    return type("Variant", (Model,), parts)


NARROW, PROJECTION, PARTS = weight(DIM, DENSE), weight(DIM, 3), weight(3, 5)
NONE = {
    "ids + 1 alone": (variant(ids=lambda self, v: v + 1), r"something to its ids .* \(add\)"),
    "weights made of ids": (variant(weights=lambda self, v, w: (v != 0).float()), "its bags are weighted"),
    "weights of the request": (variant(weights=lambda self, v, w: w), "its bags are weighted"),
    "a clamp on ids": (variant(ids=lambda self, v: v.clamp(0, TABLE_ROWS - 1)), r"something to its ids .* \(clamp\)"),
    "ids + 1": (variant(ids=lambda self, v: (v + 1) % TABLE_ROWS), "something to its ids"),
    "vectors scaled": (variant(pooled=lambda self, v, lengths: v * 2), "dot products take an elementwise mul"),
    "a rule on a column": (
        variant(score=lambda self, y, x: torch.sigmoid(y.view(-1) + (x[:, 0] > 1).float())),
        "logit comes from an elementwise add",
    ),
    "a temperature": (variant(score=lambda self, y, x: torch.sigmoid(y / 1.5)), "logit comes from an elementwise div"),
    "a second sigmoid": (
        variant(score=lambda self, y, x: torch.sigmoid(torch.sigmoid(y))),
        "logit comes from an elementwise sigmoid",
    ),
    "no sigmoid": (variant(score=lambda self, y, x: y), "scores come from a linear layer"),
    "a calibrated score": (
        variant(score=lambda self, y, x: torch.sigmoid(y) * 0.9),
        "scores come from an elementwise mul",
    ),
    "a score as half": (variant(score=lambda self, y, x: torch.sigmoid(y).half()), "scores come from"),
    "a dense arch without relu at its end": (
        variant(dense=lambda self, x: F.linear(torch.relu(F.linear(x, *DENSE_1)), *DENSE_2)),
        "dense vector comes from a linear layer",
    ),
    "a dense arch with tanh at its end": (
        variant(dense=lambda self, x: torch.tanh(F.linear(torch.relu(F.linear(x, *DENSE_1)), *DENSE_2))),
        "dense vector comes from an elementwise tanh",
    ),
    "a layer over parts of the products": (
        variant(
            over=lambda self, v: F.linear(torch.relu(F.linear(v.view(-1, 2, 5), PARTS)).flatten(1), OVER_2[0][:, :6])
        ),
        "a linear layer runs over several vectors",
    ),
    "tanh in the dense arch": (
        variant(dense=lambda self, x: torch.relu(F.linear(torch.tanh(F.linear(x, *DENSE_1)), *DENSE_2))),
        "dense arch takes an elementwise tanh",
    ),
    "tanh in the over arch": (
        variant(over=lambda self, v: F.linear(torch.tanh(F.linear(v, *OVER_1)), *OVER_2)),
        "over arch takes an elementwise tanh",
    ),
    "columns that are clamped": (variant(columns=lambda self, x: x.clamp(-1, 1)), "dense arch takes an elementwise"),
    "columns in another order": (variant(columns=lambda self, x: x[:, [1, 0, 2, 3, 4, 5]]), "dense arch takes"),
    "some of the columns": (
        variant(dense=lambda self, x: torch.relu(F.linear(x[:, :5], NARROW[:, :5]))),
        "dense arch takes",
    ),
    "some of a layer's outputs": (
        variant(dense=lambda self, x: torch.relu(F.linear(torch.relu(F.linear(x, *DENSE_1))[:, :3], NARROW[:, :3]))),
        "dense arch takes",
    ),
    "a layer over parts of a row": (
        variant(dense=lambda self, x: torch.relu(F.linear(x.view(-1, 3, 2), NARROW[:, :2]))[:, 0]),
        "",
    ),
    "products with itself": (
        variant(
            products=lambda self, v: torch.bmm(v, v.transpose(1, 2)).flatten(1)[:, :PAIRS],
        ),
        "product with itself",
    ),
    "products with a weight": (
        variant(products=lambda self, v: torch.matmul(v, PROJECTION).flatten(1)[:, :PAIRS]),
        "over arch takes a linear layer",
    ),
    "columns beside the products": (
        variant(joined=lambda self, h, p: torch.cat([h * 2, p], 1)),
        "over arch takes an elementwise mul beside",
    ),
    "a norm of the products": (
        variant(products=lambda self, v: F.layer_norm(Model.products(self, v), (PAIRS,))),
        "over arch takes",
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_does_anything_else_is_none(name: str) -> None:
    kind, why = NONE[name]
    with pytest.raises(NoDlrm, match=why):
        recognised(program_of(kind()), "default", "m")
