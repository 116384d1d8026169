"""Programs lowered to plans and run by the fused engine, each held against its float64 reference: every operation over
odd sizes, every function, every kind of table, and manifests that say what is not so."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil.artifacts.compiled_info import processor_flags
from narsil.artifacts.packed import kinds_here
from narsil.artifacts.plan import FUNCTIONS, Plan, Stream
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends import plans
from narsil.backends.fused import ForwardLibrary
from narsil.backends.plans import PlanBackend, PlanNetwork
from narsil.compile.forms import PlanForm, plan_of
from narsil.compile.lowering import lowered
from narsil.compile.toolchain import STRICT, build_forward
from narsil.dataflow import Batch
from narsil.errors import ArtifactError, ForwardFailed
from narsil.program.steps import (
    Bags,
    Concat,
    Elementwise,
    IdArray,
    IdExpression,
    Laid,
    LayerNorm,
    Lengths,
    Linear,
    Lookup,
    MatMul,
    Permute,
    Program,
    Reduce,
    Reshape,
    Softmax,
    Step,
    Table,
    Take,
)

HERE = kinds_here(processor_flags())
pytestmark = [
    pytest.mark.skipif(not HERE, reason="the fused engine needs AVX-512"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="building it needs g++"),
]

SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 65, 100)
ROWS = (1, 2, 11, 12, 13, 64, 65, 130)
IDS, WEIGHTS = IdExpression("ids"), IdExpression("weights")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ForwardLibrary:
    path = tmp_path_factory.mktemp("library") / "forward.so"
    build_forward(path, (*STRICT, *os.environ.get("BUILD_CXXFLAGS", "").split()))  # of `make sanitize`
    return ForwardLibrary(path)


@dataclass
class Model:
    """A program beside the backend that runs its plan."""

    program: Program
    schema: ModelSchema
    form: PlanForm

    def backend(self, kind: str = "fp32") -> PlanBackend:
        return self.form.backend((kind,) * len(self.form.linears))

    def batch(self, rows: int, longest: int | None = None, seed: int = 0, *, weights: bool = False) -> Batch:
        random = np.random.default_rng(seed)
        shape = (self.schema.num_features, rows)
        lengths = np.ones(shape, np.int32) if longest is None else random.integers(0, longest + 1, shape, np.int32)
        values = random.integers(0, np.repeat(self.schema.rows, lengths.sum(axis=1))).astype(np.int32)
        dense = random.standard_normal((rows, self.schema.dense_dim)).astype(np.float32)
        given_weights = random.random(len(values), np.float32) if weights else None
        return Batch(rows, dense, lengths.ravel(), values, longest is None, given_weights)

    def true(self, batch: Batch) -> dict[str, Any]:
        bags = Bags(batch.lengths.reshape(-1, batch.rows), batch.values, batch.weights)
        return self.program.reference({"dense": batch.dense}, {"ids": bags} if self.program.groups else {})

    def agrees(self, batch: Batch, atol: float = 2e-6, rtol: float = 2e-6) -> None:
        found = self.backend().run(batch)
        for task, expected in self.true(batch).items():
            wanted = expected.reshape(found[task].shape)
            np.testing.assert_allclose(found[task], wanted, atol=atol, rtol=rtol, err_msg=f"{task}, {batch.rows} rows")


def model(
    library: ForwardLibrary,
    dense: int,
    steps: Sequence[Step],
    shapes: dict[int, tuple[int, ...]],
    outputs: dict[str, int],
    rows: Sequence[int] = (9,),
) -> Model:
    """Value 0 is the dense columns."""
    groups = {"ids": len(rows)} if any(isinstance(step, Lookup | Laid) for step in steps) else {}
    program = Program({"dense": 0}, groups, tuple(steps), outputs, {0: (dense,), **shapes})
    features = tuple(Feature(f"f{n}", f"t{n}", count, 1) for n, count in enumerate(rows))
    schema = ModelSchema(dense, features, tuple(outputs))
    made = lowered(program, tuple(outputs), "model")
    tables = np.concatenate([*made.stored, np.zeros(64, np.uint8)])
    return Model(program, schema, PlanForm(library, schema, made, tables))


def weight(outputs: int, inputs: int, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).standard_normal((outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)


def bias(outputs: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed + 99).standard_normal(outputs).astype(np.float32)


@pytest.mark.parametrize("relu", [False, True])
def test_layers_of_any_size(library, relu):
    rows = itertools.cycle(ROWS)
    for inputs, outputs in itertools.product(SIZES, SIZES):
        steps: list[Step] = [Linear(1, 0, weight(outputs, inputs), bias(outputs))]
        if relu:
            steps.append(Elementwise(2, "relu", (1,)))
        # Another layer reads what the first one leaves behind its width.
        steps.append(Linear(3, 2 if relu else 1, weight(9, outputs, 1), None))
        steps.append(Reduce(4, 3, "sum", (0,), keep=False))
        made = model(library, inputs, steps, {1: (outputs,), 2: (outputs,), 3: (9,), 4: ()}, {"score": 4})
        made.agrees(made.batch(next(rows)), atol=2e-5)


def test_layers_over_several_rows_of_a_row(library):
    """(B, 5, 7) through a layer: each of the five is a row of its own."""
    for inputs, outputs in itertools.product((7, 32, 40), (3, 16, 33)):
        steps = [
            Reshape(1, 0, (5, inputs)),
            Linear(2, 1, weight(outputs, inputs), bias(outputs)),
            Elementwise(3, "relu", (2,)),
            Reduce(4, 3, "max", (0, 1), keep=False),
        ]
        shapes = {1: (5, inputs), 2: (5, outputs), 3: (5, outputs), 4: ()}
        made = model(library, 5 * inputs, steps, shapes, {"score": 4})
        for rows in (1, 13, 70):
            made.agrees(made.batch(rows), atol=2e-5)


ONE = [name for name in FUNCTIONS if FUNCTIONS.index(name) < FUNCTIONS.index("add")] + ["not"]
TWO = [name for name in FUNCTIONS if FUNCTIONS.index("add") <= FUNCTIONS.index(name) < FUNCTIONS.index("not")]
NUMBERS: dict[str, list[tuple[float | None, ...]]] = {
    "leaky_relu": [(0.01,), (0.5,)],
    "clamp": [(-0.5, 1.0), (None, 0.25), (0.25, None)],
    "nan_to_num": [(), (0.5, 3.0, -2.0), (None, None, -1.0)],
}
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 88.5, -103.0, 1e-30, 3.4e38, -1e-3, 0.14, 0.16], np.float32)


@pytest.mark.parametrize("function", ONE)
def test_functions_of_one_number(library, function):
    for numbers, width in itertools.product(NUMBERS.get(function, [()]), (1, 15, 17, 50)):
        steps = [Elementwise(1, function, (0,), numbers)]
        made = model(library, width, steps, {1: (width,)}, {"score": 1})
        batch = made.batch(12)
        if function in ("log", "sqrt", "log1p"):
            np.abs(batch.dense, out=batch.dense)
        made.agrees(batch, atol=4e-7, rtol=1e-6)
        # Numbers that are none, and the ends of what float32 has.
        batch.dense.flat[: len(SPECIAL)] = SPECIAL[: batch.dense.size]
        found, expected = made.backend().run(batch)["score"], made.true(batch)["score"]
        with np.errstate(over="ignore"):
            wanted = expected.astype(np.float32).reshape(found.shape)
        np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("function", [*TWO, "where"])
@pytest.mark.parametrize("form", ["values", "constant right", "constant left", "column", "number"])
def test_functions_of_several_numbers(library, function, form):
    width = 21
    constant = np.round(np.random.default_rng(3).uniform(0.5, 3, width), 1).astype(np.float32)  # as torch has them
    second: Any = {"values": 1, "column": 3, "number": np.array(2.0)}.get(form, constant)
    operands = (second, 1) if form == "constant left" else (1, second)
    steps: list[Step] = [
        Elementwise(1, "abs", (0,)),
        Take(3, 0, np.array([2])),
        Elementwise(2, function, (4, *operands) if function == "where" else operands),
    ]
    if function == "where":
        steps.insert(2, Elementwise(4, "gt", (0, np.array(0.2, np.float32))))
    made = model(library, width, steps, {1: (width,), 2: (width,), 3: (1,), 4: (width,)}, {"score": 2})
    batch = made.batch(14)
    np.round(batch.dense, 1, out=batch.dense)  # so that equal numbers meet
    batch.dense[batch.dense == 0] = 0.1
    if function == "remainder":  # a quotient next to a whole number is either in float32
        batch.dense[:] += 0.03
    with np.errstate(all="ignore"):
        made.agrees(batch, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("vectors", "dim"), [(2, 1), (3, 16), (5, 10), (8, 17), (27, 64), (13, 32)])
def test_dot_products_of_all_pairs_in_any_order(library, vectors, dim):
    upper, right = np.triu_indices(vectors, k=1)
    order = np.random.default_rng(1).permutation(len(upper))
    places = (right * vectors + upper)[order]  # below the diagonal as well as above
    steps = [
        Reshape(1, 0, (vectors, dim)),
        Permute(2, 1, (1, 0)),
        MatMul(3, 1, 2),
        Take(4, 3, places),
        Linear(5, 4, weight(1, len(places)), bias(1)),
    ]
    shapes = {1: (vectors, dim), 2: (dim, vectors), 3: (vectors, vectors), 4: (len(places),), 5: (1,)}
    made = model(library, vectors * dim, steps, shapes, {"score": 5})
    assert "pairs" in [step.operation for step in made.form.lowered.steps]
    made.agrees(made.batch(23), atol=2e-4)


def test_dot_products_with_themselves_are_multiplied_out(library):
    steps = [Reshape(1, 0, (4, 5)), Permute(2, 1, (1, 0)), MatMul(3, 1, 2), Reduce(4, 3, "sum", (0,), keep=False)]
    made = model(library, 20, steps, {1: (4, 5), 2: (5, 4), 3: (4, 4), 4: (4,)}, {"score": 4})
    assert "matmul" in [step.operation for step in made.form.lowered.steps]
    made.agrees(made.batch(9), atol=2e-5)


@pytest.mark.parametrize("function", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_reductions_over_any_axes(library, function, axes):
    shape = (3, 5, 4)
    left = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    steps = [Reshape(1, 0, shape), Reduce(2, 1, function, axes, keep=False)]
    made = model(library, 60, steps, {1: shape, 2: left}, {"score": 2})
    made.agrees(made.batch(17))


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_and_layer_norm(library, axis):
    scale, shift = bias(6, 1), bias(6, 2)
    steps = [
        Reshape(1, 0, (5, 6)),
        Softmax(2, 1, axis),
        LayerNorm(3, 1, 1, scale, shift, 1e-5),
        LayerNorm(4, 1, 2, None, None, 1e-3),
        Elementwise(5, "add", (2, 3)),
        Elementwise(6, "mul", (5, 4)),
    ]
    made = model(library, 30, steps, dict.fromkeys(range(1, 7), (5, 6)), {"score": 6})
    made.agrees(made.batch(19), atol=1e-5)


def test_moves_of_every_sort_and_several_tasks(library):
    steps = [
        Take(1, 0, np.arange(29)[::-3]),
        Concat(2, (1, 0), 0),
        Reshape(3, 0, (1, 29)),
        Permute(4, 3, (1, 0)),
        Reshape(5, 4, (29,)),
        Elementwise(6, "sub", (5, np.arange(29.0))),
        Linear(7, 2, weight(33, 39), None),
        Reduce(8, 7, "sum", (0,), keep=True),
    ]
    shapes = {1: (10,), 2: (39,), 3: (1, 29), 4: (29, 1), 5: (29,), 6: (29,), 7: (33,), 8: (1,)}
    made = model(library, 29, steps, shapes, {"taken": 1, "joined": 2, "less": 6, "sum": 8, "itself": 0})
    made.agrees(made.batch(31), atol=2e-5)


def table(kind: int, rows: int, dim: int, scale_bytes: int = 4, padding: int = 0, seed: int = 0) -> Table:
    """A table of FBGEMM's kind, of random rows."""
    random = np.random.default_rng(seed)
    if kind < 2:
        values = random.standard_normal((rows, dim)).astype(np.float32 if kind == 0 else np.float16)
        stored = values.view(np.uint8)
    else:
        width = {2: dim, 3: -(-dim // 2), 4: -(-dim // 4)}[kind]
        pair = random.uniform(0.01, 1, (rows, 2)).astype(np.float16 if scale_bytes == 4 else np.float32)
        stored = np.concatenate([pair.view(np.uint8), random.integers(0, 256, (rows, width), np.uint8)], axis=1)
    stored = np.concatenate([stored, random.integers(0, 256, (rows, padding), np.uint8)], axis=1)
    before = random.integers(0, 256, 24, np.uint8)
    data = np.concatenate([before, stored.ravel()])
    return Table(f"t{seed}", data, 24, rows, dim, kind, stored.shape[1], scale_bytes)


KINDS = [(0, 0), (1, 0), (2, 4), (2, 8), (3, 4), (3, 8), (4, 4)]


@pytest.mark.parametrize(("kind", "scale_bytes"), KINDS)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lookups_in_tables_of_every_kind(library, kind, scale_bytes, pooling, weighted):
    for dim in (1, 3, 4, 16, 17, 33, 64, 65, 130):
        tables = (table(kind, 7, dim, scale_bytes, 5), table(kind, 300, dim, scale_bytes, 0, 1))
        lookup = Lookup(1, "ids", (1, 0), tables[::-1], pooling, IDS, WEIGHTS if weighted else None)
        made = model(library, 2, [lookup], {1: (2 * dim,)}, {"score": 1}, rows=(7, 300))
        for longest in (None, 4, 100):
            made.agrees(made.batch(20, longest, weights=weighted), atol=1e-3, rtol=1e-5)


def test_bags_are_counted(library):
    tables = [table(0, 9, 3, 0, seed=feature) for feature in range(3)]
    steps: list[Step] = [
        Lookup(1, "ids", (0, 1, 2), tuple(tables), "sum", IDS),
        Lengths(2, "ids"),
        Concat(3, (1, 2), 0),
    ]
    made = model(library, 1, steps, {1: (9,), 2: (3,), 3: (12,)}, {"score": 3}, (9, 9, 9))
    for rows in ROWS:
        made.agrees(made.batch(rows, 12, rows))
        made.agrees(made.batch(rows))  # one id each


@pytest.mark.parametrize(("m", "k", "n", "batch"), [(2, 3, 4, 5), (1, 7, 1, 3), (3, 1, 2, 2), (4, 5, 17, 1)])
def test_products_of_several_matrices(library, m, k, n, batch):
    right = weight(batch * k, n).reshape(batch, k, n)
    steps: list[Step] = [
        Reshape(1, 0, (batch, m, k)),
        MatMul(2, 1, right),
        Elementwise(3, "mul", (2, np.asarray(2.0))),
        MatMul(4, 2, right.transpose(0, 2, 1)),
    ]
    shapes: dict[int, tuple[int, ...]] = {1: (batch, m, k), 2: (batch, m, n), 3: (batch, m, n), 4: (batch, m, k)}
    made = model(library, batch * m * k, steps, shapes, {"one": 3, "other": 4})
    for rows in (1, 12, 65):
        made.agrees(made.batch(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "scale_bytes"), KINDS)
def test_bags_are_laid_out_at_any_length(library, kind, scale_bytes):
    """Longer bags are cut, and shorter ones filled up; what the model does to ids comes before."""
    plus_one = IdExpression("add", (IDS, 1))
    for dim, length in itertools.product((1, 4, 17, 65, 130), (1, 3, 8)):
        steps = [
            Laid(1, "ids", 1, table(kind, 8, dim, scale_bytes, 5), plus_one, length, 0.0),
            Laid(2, "ids", 0, table(kind, 300, dim, scale_bytes, 0, 1), IDS, length, -2.5),
            Reduce(3, 1, "sum", (0,), keep=False),
        ]
        shapes = {1: (length, dim), 2: (length, dim), 3: (dim,)}
        made = model(library, 2, steps, shapes, {"one": 1, "other": 2, "sum": 3}, rows=(300, 7))
        for longest in (None, 4, 40):
            made.agrees(made.batch(20, longest), atol=1e-3, rtol=1e-5)
    batch = made.batch(3, 4)
    batch.values[-1] = 7
    batch.lengths[-1] = 8 + batch.lengths[-1]
    with pytest.raises(ForwardFailed, match="do not add up"):
        made.backend().run(batch)
    batch = made.batch(3)
    batch.values[-1] = 7
    with pytest.raises(ForwardFailed, match="outside of its feature's table"):
        made.backend().run(batch)


def test_a_table_that_features_share_is_kept_once_and_each_pools_its_own_bags(library):
    shared = table(2, 50, 8)
    steps = [
        Lookup(1, "ids", (0, 2), (shared, shared), "sum", IDS),
        Lookup(2, "ids", (1,), (table(2, 9, 8, seed=4),), "mean", IDS),
    ]
    made = model(library, 1, steps, {1: (16,), 2: (8,)}, {"a": 1, "b": 2}, rows=(50, 9, 50))
    assert sum(part.size for part in made.form.lowered.stored) == 59 * 12
    made.agrees(made.batch(30, 5), atol=1e-4)


@pytest.mark.parametrize(
    ("expression", "weights"),
    [
        (IdExpression("add", (IDS, 1)), None),
        (IdExpression("remainder", (IdExpression("mul", (IDS, 1_000_003)), 9)), None),
        (IdExpression("clamp", (IdExpression("sub", (IDS, 3)), 0, 8)), None),
        (IDS, IdExpression("ne", (IDS, 0))),
        (IDS, IdExpression("reciprocal", (IdExpression("add", (IDS, 1)),))),
        (IDS, IdExpression("mul", (WEIGHTS, 2.5))),
    ],
    ids=["plus one", "hashed", "clamped", "padding masked", "by the id", "scaled"],
)
def test_what_is_done_to_ids_and_weights_before_they_are_looked_up(library, expression, weights):
    lookup = Lookup(1, "ids", (0,), (table(2, 9, 8),), "sum", expression, weights)
    limit = 8 if expression.function == "add" else 2**31 if expression.function == "remainder" else 9
    made = model(library, 1, [lookup], {1: (8,)}, {"score": 1}, rows=(limit,))
    made.agrees(made.batch(40, 6, weights=True), atol=1e-3, rtol=1e-4)


def test_each_feature_is_remapped_by_arrays_of_its_own(library):
    """As managed collision does it: ids that are known have a place, the others share one; another feature's are not
    touched, and a third's are taken out of a list."""
    known, places = IdArray(np.array([3, 7, 8, 40])), IdArray(np.array([2, 0, 8, 5]))
    listed = IdArray(np.random.default_rng(1).integers(0, 9, 50))
    at = IdExpression("clamp", (IdExpression("search", (known, IDS)), None, 3))
    found = IdExpression("eq", (IdExpression("take", (known, at)), IDS))
    managed = IdExpression("where", (found, IdExpression("take", (places, at)), 1))
    ids = IdExpression("by_feature", (managed, IDS, IdExpression("take", (listed, IDS))))
    tables = tuple(table(2, 9, 8, seed=number) for number in range(3))
    made = model(
        library, 1, [Lookup(1, "ids", (2, 0, 1), tables, "sum", ids)], {1: (24,)}, {"score": 1}, rows=(50, 9, 50)
    )
    for longest in (None, 6):
        made.agrees(made.batch(60, longest), atol=1e-3, rtol=1e-4)
    batch = made.batch(5, 4)
    batch.lengths[0] += 1
    with pytest.raises(ForwardFailed, match="do not add up"):
        made.backend().run(batch)


@pytest.mark.parametrize("number", [1, -1, 1.0, True, "0"])
def test_a_stream_that_takes_ids_out_of_no_array_is_refused(number):
    arrays: list[Any] = [np.arange(3), np.arange(3, dtype=np.float32)]
    with pytest.raises(ArtifactError, match="out of no array"):
        plans._stream(Stream(["take", ["array", number], "ids"]), arrays)


def test_an_id_outside_of_its_table_is_no_answer(library):
    made = model(
        library, 1, [Lookup(1, "ids", (0,), (table(2, 9, 8),), "sum", IDS)], {1: (8,)}, {"score": 1}, rows=(9,)
    )
    for wrong in (9, -1, 2**31 - 1):
        batch = made.batch(3)
        batch.values[1] = wrong
        with pytest.raises(ForwardFailed, match="outside of its feature's table"):
            made.backend().run(batch)
    batch = made.batch(3, 4)
    batch.lengths[0] += 1
    with pytest.raises(ForwardFailed, match="do not add up"):
        made.backend().run(batch)


def everything(library: ForwardLibrary) -> Model:
    """A model with one of each operation."""
    steps: list[Step] = [
        Lookup(1, "ids", (0, 1), (table(2, 9, 16), table(3, 40, 16, seed=1)), "sum", IDS),
        Linear(2, 0, weight(16, 13), bias(16)),
        Elementwise(3, "relu", (2,)),
        Concat(4, (3, 1), 0),
        Reshape(5, 4, (3, 16)),
        Permute(6, 5, (1, 0)),
        MatMul(7, 5, 6),
        Take(8, 7, np.array([1, 2, 5])),
        Concat(9, (3, 8), 0),
        LayerNorm(10, 9, 1, bias(19), bias(19, 1), 1e-5),
        Linear(11, 10, weight(40, 19), bias(40)),
        Elementwise(12, "relu", (11,)),
        Linear(13, 12, weight(20, 40), bias(20)),
        Softmax(14, 13, 0),
        Elementwise(15, "mul", (14, bias(20))),
        Reduce(16, 15, "sum", (0,), keep=True),
        Elementwise(17, "sigmoid", (16,)),
    ]
    shapes = {
        **{1: (32,), 2: (16,), 3: (16,), 4: (48,), 5: (3, 16), 6: (16, 3), 7: (3, 3), 8: (3,), 9: (19,), 10: (19,)},
        **{11: (40,), 12: (40,), 13: (20,), 14: (20,), 15: (20,), 16: (1,), 17: (1,)},
    }
    return model(library, 13, steps, shapes, {"score": 17}, rows=(9, 40))


@pytest.mark.parametrize("kind", HERE)
def test_a_row_has_the_same_bits_in_any_batch_and_at_any_place(library, kind):
    made = everything(library)
    backend, batch = made.backend(kind), made.batch(150)
    together = backend.run(batch)["score"]
    for start, rows in ((0, 1), (3, 12), (77, 65), (149, 1)):
        ids = batch.values.reshape(2, -1)[:, start : start + rows]
        part = Batch(rows, batch.dense[start : start + rows], np.ones(2 * rows, np.int32), ids.ravel(), one_hot=True)
        np.testing.assert_array_equal(backend.run(part)["score"], together[start : start + rows])


@pytest.mark.parametrize("kind", HERE)
def test_layers_in_every_kind_of_number_score_about_the_same(library, kind):
    made = everything(library)
    batch = made.batch(200, 5)
    found, expected = made.backend(kind).run(batch)["score"], made.true(batch)["score"].ravel()
    allowed = {"fp32": 1e-6, "int16": 2e-3, "bf16": 1e-2, "int8": 2e-2}[kind]
    assert np.abs(found - expected).max() < allowed


def test_int64_ids_are_looked_up_as_well(library):
    made = everything(library)
    batch = made.batch(9, 4)
    wide = replace(batch, values=batch.values.astype(np.int64))
    np.testing.assert_array_equal(made.backend().run(wide)["score"], made.backend().run(batch)["score"])


def test_a_plan_comes_back_from_a_manifest_as_it_was(library):
    made = everything(library)
    layers = made.form.layers(("fp32",) * len(made.form.linears))
    plan = plan_of(made.form.lowered, made.schema, layers)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    plan.check(2, 13, [1], made.form.tables.size)


@settings(max_examples=400)
@given(data=st.data())
def test_a_manifest_that_was_changed_is_refused_or_stays_inside_its_memory(library, data):
    """Under the sanitizers a step that leaves its memory ends this test."""
    made = everything(library)
    layers = made.form.layers(("fp32",) * len(made.form.linears))
    lowered_plan = made.form.lowered
    manifest = json.loads(json.dumps(plan_of(lowered_plan, made.schema, layers).to_dict()))
    changed = copy.deepcopy(manifest)
    path: list[Any] = []
    here: Any = changed
    while isinstance(here, dict | list) and here:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else list(range(len(here)))))
        path.append(key)
        parent, here = here, here[key]
    numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**40, 2**63, None, "x", 0.5, True, [], {}])
    parent[path[-1]] = data.draw(numbers)
    try:
        plan = Plan.from_dict(changed)
        plan.check(2, 13, [1], made.form.tables.size)
        network = PlanNetwork(library, plan, layers, lowered_plan.data, made.form.tables)
    except ArtifactError:
        return
    with suppress(ForwardFailed):
        PlanBackend(network, made.schema).run(made.batch(30, 3))
