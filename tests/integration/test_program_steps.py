"""Each step's reference gives what torch, and FBGEMM for lookups, compute in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    import torch.nn.functional as F
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from narsil.artifacts.tbe import table_at
from narsil.program.steps import (
    ELEMENTWISE,
    Bags,
    Concat,
    Elementwise,
    IdExpression,
    LayerNorm,
    Linear,
    Lookup,
    MatMul,
    Permute,
    Reduce,
    Reshape,
    Softmax,
    Step,
    Take,
)

pytestmark = pytest.mark.filterwarnings("ignore")

ODD = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, 1e-30, -1e30, 700.0, -700.0, np.inf, -np.inf, np.nan]
SPECIAL = np.array(ODD)


def run(step: Step, **values: Any) -> Any:
    """A step over values v0, v1, ..."""
    given_values = {int(name[1:]): np.asarray(value, np.float64) for name, value in values.items()}
    with np.errstate(all="ignore"):
        return step.reference(given_values, {})


def same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    expected = expected.double().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


UNARY: dict[str, Callable[[Any], Any]] = {
    "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "leaky_relu": F.leaky_relu, "exp": torch.exp,
    "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt, "abs": torch.abs, "neg": torch.neg,
    "reciprocal": torch.reciprocal, "sign": torch.sign, "floor": torch.floor, "isnan": torch.isnan,
    "to_bool": lambda x: x.bool(), "not": torch.logical_not,
    "to_float16": lambda x: x.float().half(), "to_bfloat16": lambda x: x.float().bfloat16(),
}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "maximum": torch.maximum, "minimum": torch.minimum, "remainder": torch.remainder, "gt": torch.gt, "ge": torch.ge,
    "lt": torch.lt, "le": torch.le, "eq": torch.eq, "ne": torch.ne, "and": torch.logical_and, "or": torch.logical_or,
}  # fmt: skip
OTHERS = {"nan_to_num", "clamp", "to_integer", "where"}  # which have tests of their own


def test_every_function_has_a_test() -> None:
    assert set(ELEMENTWISE) == {*UNARY, *BINARY, *OTHERS}


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_operand(name: str) -> None:
    x = np.concatenate([SPECIAL, np.linspace(-6, 6, 101)])[None]
    same(run(Elementwise(1, name, (0,)), v0=x), UNARY[name](torch.from_numpy(x)))


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_operands(name: str) -> None:
    x, y = (axis.reshape(len(ODD), len(ODD)) for axis in np.meshgrid(SPECIAL, SPECIAL))
    same(run(Elementwise(2, name, (0, 1)), v0=x, v1=y), BINARY[name](torch.from_numpy(x), torch.from_numpy(y)))


def test_leaky_relu_of_another_slope() -> None:
    x = SPECIAL[None]
    same(run(Elementwise(1, "leaky_relu", (0,), (0.3,)), v0=x), F.leaky_relu(torch.from_numpy(x), 0.3))


@pytest.mark.parametrize("numbers", [(2.0, 9.0, -9.0), (0.0, 1e4, -1e4)])
def test_nan_to_num(numbers: tuple[float, float, float]) -> None:
    expected = torch.nan_to_num(torch.from_numpy(SPECIAL[None]), *numbers)
    same(run(Elementwise(1, "nan_to_num", (0,), numbers), v0=SPECIAL[None]), expected)


def test_nan_to_num_without_numbers_is_float32s() -> None:
    expected = torch.nan_to_num(torch.from_numpy(SPECIAL[None]).float())
    same(run(Elementwise(1, "nan_to_num", (0,)), v0=SPECIAL[None]), expected, 1e-6)


@pytest.mark.parametrize("limits", [(None, 1.0), (-1.0, None), (-1.0, 1.0), (2.0, -2.0), (0.0, 0.0)])
def test_clamp(limits: tuple[float | None, float | None]) -> None:
    same(
        run(Elementwise(1, "clamp", (0,), limits), v0=SPECIAL[None]),
        torch.clamp(torch.from_numpy(SPECIAL[None]), *limits),
    )


def test_where_and_whole_numbers() -> None:
    x = SPECIAL[None]
    given_x = torch.from_numpy(x)
    condition = given_x > 0
    same(run(Elementwise(1, "where", (2, 0, np.asarray(7.0))), v0=x, v2=x > 0), torch.where(condition, given_x, 7.0))
    finite = np.array([[-2.7, -0.2, 0.0, 0.9, 1e15]])
    same(run(Elementwise(1, "to_integer", (0,)), v0=finite), torch.from_numpy(finite).long())


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32 - 1)


def numbers(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 5), st.integers(1, 5), st.booleans(), SEEDS)
def test_linear(shape: list[int], rows: int, outputs: int, biased: bool, seed: int) -> None:
    x = numbers(seed, rows, *shape)
    weight, bias = numbers(seed + 1, outputs, shape[-1]).astype(np.float32), numbers(seed, outputs).astype(np.float32)
    told = torch.from_numpy(bias).double() if biased else None
    expected = F.linear(torch.from_numpy(x), torch.from_numpy(weight).double(), told)
    same(run(Linear(1, 0, weight, bias if biased else None), v0=x), expected, 1e-10)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 5), st.data(), SEEDS)
def test_layer_norm_and_softmax(shape: list[int], rows: int, data: st.DataObject, seed: int) -> None:
    x = numbers(seed, rows, *shape) * 10
    axes = data.draw(st.integers(1, len(shape)))
    weight, bias = (numbers(seed + n, *shape[-axes:]).astype(np.float32) for n in (1, 2))
    given_x = torch.from_numpy(x)
    for scaled in (False, True):
        step = LayerNorm(1, 0, axes, weight if scaled else None, bias if scaled else None, 1e-3)
        extra = [torch.from_numpy(each).double() if scaled else None for each in (weight, bias)]
        same(run(step, v0=x), F.layer_norm(given_x, shape[-axes:], extra[0], extra[1], 1e-3), 1e-9)
    axis = data.draw(st.integers(0, len(shape) - 1))
    same(run(Softmax(1, 0, axis), v0=x * 100), torch.softmax(given_x * 100, axis + 1), 1e-10)


REDUCED = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}


@settings(deadline=None, max_examples=80)
@given(SHAPES, st.integers(1, 5), st.sampled_from(sorted(REDUCED)), st.booleans(), st.data(), SEEDS)
def test_reduce(shape: list[int], rows: int, name: str, keep: bool, data: st.DataObject, seed: int) -> None:
    x = numbers(seed, rows, *shape)
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))))
    expected = REDUCED[name](torch.from_numpy(x), dim=[axis + 1 for axis in axes], keepdim=keep)
    same(run(Reduce(1, 0, name, axes, keep), v0=x), expected)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 5), st.data(), SEEDS)
def test_steps_that_move(shape: list[int], rows: int, data: st.DataObject, seed: int) -> None:
    x = numbers(seed, rows, *shape)
    given_x, size = torch.from_numpy(x), int(np.prod(shape))
    axes = tuple(data.draw(st.permutations(range(len(shape)))))
    same(run(Permute(1, 0, axes), v0=x), given_x.permute(0, *(axis + 1 for axis in axes)))
    same(run(Reshape(1, 0, (size, 1)), v0=x), given_x.reshape(rows, size, 1))
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6)))
    same(run(Take(1, 0, places), v0=x), given_x.reshape(rows, -1)[:, torch.from_numpy(places)])
    same(run(Take(1, 0, np.array(places[0])), v0=x), given_x.reshape(rows, -1)[:, int(places[0])])
    axis = data.draw(st.integers(0, len(shape) - 1))
    same(run(Concat(1, (0, 2, 0), axis), v0=x, v2=x * 2), torch.cat([given_x, given_x * 2, given_x], axis + 1))


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(1, 4)] * 4), SEEDS)
def test_matrix_products(sizes: tuple[int, int, int, int], seed: int) -> None:
    rows, m, k, n = sizes
    x, y, constant = numbers(seed, rows, m, k), numbers(seed + 1, rows, k, n), numbers(seed + 2, k, n)
    same(run(MatMul(2, 0, 1), v0=x, v1=y), torch.bmm(torch.from_numpy(x), torch.from_numpy(y)), 1e-10)
    same(run(MatMul(2, 0, constant), v0=x), torch.from_numpy(x) @ torch.from_numpy(constant), 1e-10)


# Lookups, against FBGEMM's own operator.


def operator(
    kinds: Sequence[Any], rows: Sequence[int], dims: Sequence[int], pooling: Any, features: Sequence[int]
) -> Any:
    """FBGEMM's operator over tables of random rows: all bytes of codes, scales and biases that differ by row."""
    specs = [
        ("t", count, dim, kind, EmbeddingLocation.HOST) for count, dim, kind in zip(rows, dims, kinds, strict=True)
    ]
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        specs,
        feature_table_map=list(features),
        pooling_mode=pooling,
        device="cpu",
        bounds_check_mode=BoundsCheckMode.NONE,
        output_dtype=SparseType.FP32,
    )
    made.initialize_weights()
    random = np.random.default_rng(5)
    for (weights, scales), kind, count, dim in zip(made.split_embedding_weights(), kinds, rows, dims, strict=True):
        if kind in (SparseType.FP32, SparseType.FP16):
            numpy_kind = np.float32 if kind == SparseType.FP32 else np.float16
            stored = random.standard_normal((count, dim)).astype(numpy_kind).view(np.uint8)
        else:
            stored = random.integers(0, 256, weights.shape).astype(np.uint8)
            pair = random.uniform(-1, 1, (count, 2)).astype(np.float16)
            scales.copy_(torch.from_numpy(pair.view(np.uint8)))
        weights.copy_(torch.from_numpy(stored))
    return made


KINDS = [SparseType.FP32, SparseType.FP16, SparseType.INT8, SparseType.INT4, SparseType.INT2]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"], ids=lambda kind: str(getattr(kind, "name", kind)))
def test_lookups_give_what_fbgemms_operator_gives(kind: Any, pooling: Any, weighted: bool) -> None:
    """Bags of none to 100 ids, of a table that two features share, of odd dims."""
    kinds = [SparseType.INT8, SparseType.INT4, SparseType.FP16] if kind == "mixed" else [kind] * 3
    rows, dims, features = [11, 1, 300], [12, 4, 20], [0, 1, 2, 0]
    mode = PoolingMode.SUM if pooling == "sum" else PoolingMode.MEAN
    made = operator(kinds, rows, dims, mode, features)
    random = np.random.default_rng(9)
    count = 13
    lengths = random.integers(0, 5, (4, count))
    lengths[2, 3], lengths[:, 0] = 100, 0
    values = np.concatenate(
        [random.integers(0, rows[table], lengths[number].sum()) for number, table in enumerate(features)]
    )
    weights = random.standard_normal(len(values)).astype(np.float32) if weighted else None
    offsets = np.concatenate([[0], np.cumsum(lengths.ravel())])
    expected = made(
        torch.from_numpy(values).int(),
        torch.from_numpy(offsets).int(),
        None if weights is None else torch.from_numpy(weights),
    )
    tables = tuple(table_at(made, position, "made") for position in range(4))
    expression = IdExpression("weights") if weighted else None
    step = Lookup(0, "ids", (0, 1, 2, 3), tables, pooling, IdExpression("ids"), expression)
    found = step.reference({}, {"ids": Bags(lengths, values, weights)})
    same(found, expected, 2e-5)
    assert np.abs(found).max() > 1
    assert (found[0] == 0).all()  # empty bags


def test_a_lookup_does_not_leave_its_table() -> None:
    made = operator([SparseType.INT8] * 2, [3, 5], [8, 8], PoolingMode.SUM, [0, 1])
    for table, wrong in ((0, 3), (0, -1), (1, 5)):
        step = Lookup(0, "ids", (0,), (table_at(made, table, "made"),), "sum", IdExpression("ids"))
        with pytest.raises(IndexError, match="outside of the table"):
            step.reference({}, {"ids": Bags(np.array([[1]]), np.array([wrong]))})
