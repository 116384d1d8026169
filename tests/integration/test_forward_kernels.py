"""Each kernel of csrc/forward against its scalar reference, over odd sizes: exact where sums are of integers, and
within what rounding explains where they are of floats."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
from collections.abc import Iterator
from ctypes import byref, c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil.artifacts.compiled_info import processor_flags
from narsil.artifacts.packed import Packed, kinds_here, rounded_up
from narsil.backends.fused import ForwardLibrary, FusedBackend, Geometry, Network, _Model, _Rows, described
from narsil.compile.packing import pack, pack_logit
from narsil.compile.toolchain import STRICT, build_forward
from narsil.dataflow import Batch, Floats
from tests.support import SCHEMA

HERE = kinds_here(processor_flags())
INTEGERS = tuple(kind for kind in HERE if kind.startswith("int"))
pytestmark = [
    pytest.mark.skipif(not HERE, reason="the fused engine needs AVX-512"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="building it needs g++"),
]

UNIT = 2.0**-24  # half a unit in the last place of 1 in float32
TINY = 2.0**-120  # absolute: products that round to zero
GUARD = np.float32(-123.25)  # what a kernel must leave as it was
SIZES = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 130)
ROWS = (1, 2, 11, 12, 13, 24, 25, 36, 64, 65)
DIMS = (1, 3, 4, 8, 15, 16, 17, 20, 31, 32, 33, 48, 63, 64, 65, 80, 100, 127, 128, 130, 200)


@dataclass
class Linear:
    weight: Floats
    bias: Floats


class Kernels:
    """The test build of the forward."""

    def __init__(self, path: Path) -> None:
        code = ctypes.CDLL(str(path))
        self.forward = ForwardLibrary(path)
        self._of = code
        code.narsil_test_codes.restype = code.narsil_reference_codes.restype = c_float
        code.narsil_test_logit.restype, code.narsil_reference_logit.restype = c_float, c_double

    def call(self, name: str, *arguments: Any) -> Any:
        """A function by its name; arrays are lent, structures passed by reference, numbers as int64."""
        lent = [
            c_void_p(argument.ctypes.data)
            if isinstance(argument, np.ndarray)
            else byref(argument)
            if isinstance(argument, ctypes.Structure)
            else c_int64(argument)
            for argument in arguments
        ]
        return getattr(self._of, f"narsil_{name}")(*lent)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Kernels:
    path = tmp_path_factory.mktemp("kernels") / "testing.so"
    sanitizers = os.environ.get("BUILD_CXXFLAGS", "").split()  # of `make sanitize`
    build_forward(path, (*STRICT, *sanitizers), source="testing.cpp")
    assert (b"__asan_report_" in path.read_bytes()) == ("-fsanitize=address,undefined" in sanitizers)
    return Kernels(path)


def gamma(terms: int) -> float:
    """The largest relative error of a sum of so many float32 terms, in any order, against its magnitude."""
    return terms * UNIT / (1 - terms * UNIT)


def linear(outputs: int, inputs: int, random: np.random.Generator) -> Linear:
    weight = random.standard_normal((outputs, inputs)).astype(np.float32)
    return Linear(weight, random.standard_normal(outputs).astype(np.float32))


def given_rows(rows: int, inputs: int, random: np.random.Generator, *, signed: bool) -> Floats:
    """(rows, width) as a layer finds them: zeros up to a multiple of 32 inputs, and anything at all behind."""
    values = random.standard_normal((rows, inputs)).astype(np.float32) * 10.0 ** random.integers(-3, 4, (rows, 1))
    found = np.full((rows, rounded_up(max(inputs, 192), 64)), GUARD)
    found[:, : rounded_up(inputs, 32)] = 0
    found[:, :inputs] = values if signed else np.abs(values)
    return found


def shapes() -> Iterator[tuple[int, int, int]]:
    """(inputs, outputs, rows): all pairs of SIZES, and every number of inputs and of outputs from 1 to 130."""
    rows = itertools.cycle(ROWS)
    yield from ((inputs, outputs, next(rows)) for inputs, outputs in itertools.product(SIZES, SIZES))
    yield from ((inputs, 131 - inputs, 1 + inputs % 65) for inputs in range(1, 131))


def run_layer(kernels: Kernels, packed: Packed, given: Floats) -> Floats:
    """(rows, outputs) by the kernel, which must write whole panels and nothing else, zeros beyond the outputs."""
    rows, width = given.shape
    out = np.full((rows, width), GUARD)
    kernels.call("test_layer", described(packed), given, rows, width, out)
    outputs, written = packed.shape.outputs, rounded_up(packed.shape.outputs, 32)
    numbers = np.isfinite(given[:, : packed.shape.inputs]).all(axis=1)  # NaN times a zero weight is NaN
    assert not out[numbers, outputs:written].any()
    assert (out[:, written:] == GUARD).all()
    return out[:, :outputs]


@pytest.mark.parametrize("kind", [kind for kind in HERE if kind not in INTEGERS])
def test_floating_layers(kernels, kind):
    random = np.random.default_rng(1)
    for inputs, outputs, rows in shapes():
        packed = pack(linear(outputs, inputs, random), kind, signed=True)
        given = given_rows(rows, inputs, random, signed=True)
        expected, magnitude = np.empty((rows, outputs)), np.empty((rows, outputs))
        kernels.call("reference_layer", described(packed), given, rows, given.shape[1], expected, magnitude)
        bound = gamma(inputs + 2) * magnitude + TINY
        wrong = np.abs(run_layer(kernels, packed, given) - expected) > bound
        assert not wrong.any(), (inputs, outputs, rows)
        assert (expected > 100 * bound).any() or outputs < 8  # a bound that would let zeros pass is none


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_layers_are_exact(kernels, kind, signed):
    random = np.random.default_rng(2)
    for inputs, outputs, rows in shapes():
        packed = pack(linear(outputs, inputs, random), kind, signed=signed)
        given = given_rows(rows, inputs, random, signed=signed)
        expected = np.empty((rows, outputs))
        kernels.call("reference_layer", described(packed), given, rows, given.shape[1], expected, 0)
        np.testing.assert_array_equal(run_layer(kernels, packed, given), expected, str((inputs, outputs, rows)))


@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_layers_are_exact_at_their_largest_sums(kernels, kind):
    """Every weight and every input at its most, and inputs by the thousand: the sums fill 32 bits."""
    for inputs, signed, sign in itertools.product((1000, 4097), (True, False), (1, -1)):
        layer = Linear(np.full((33, inputs), sign, np.float32), np.zeros(33, np.float32))
        packed = pack(layer, kind, signed=signed)
        given = np.zeros((3, rounded_up(inputs, 64)), np.float32)
        given[:, :inputs] = 7 * sign if signed else 7
        expected = np.empty((3, 33))
        kernels.call("reference_layer", described(packed), given, 3, given.shape[1], expected, 0)
        np.testing.assert_array_equal(run_layer(kernels, packed, given), expected)
        assert expected.max() == pytest.approx(7 * inputs if signed or sign > 0 else 0, rel=0.01)


ODD = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3.4e38, 0.5, 1.5, 2.5, -0.5, 1.00390625, 1.01171875, 1e-30, 7e-31]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", HERE[1:])
def test_inputs_become_numbers_of_their_kind(kernels, kind, signed):
    random = np.random.default_rng(3)
    types = {"bf16": np.uint16, "int16": np.int16, "int8": np.uint8}
    for inputs, case in itertools.product(range(1, 131), ("normal", "odd", "zeros", "nan", "infinity")):
        packed = pack(linear(1, inputs, random), kind, signed=signed)
        given = given_rows(1, inputs, random, signed=signed)
        if case != "normal":
            odd = {"odd": random.choice(ODD, inputs), "zeros": np.zeros(inputs)}.get(case, given[0, :inputs])
            given[0, :inputs] = odd if signed else np.abs(odd)
        if case in ("nan", "infinity"):
            given[0, random.integers(inputs)] = np.nan if case == "nan" else np.inf
        found, expected = np.full(256, 77, types[kind]), np.zeros(inputs, np.int32)
        step = kernels.call("test_codes", described(packed), given, found)
        wanted = kernels.call("reference_codes", described(packed), given, expected)
        np.testing.assert_equal(step, wanted)
        if np.isfinite(wanted):  # else the row's scores are NaN, whatever its integers
            np.testing.assert_array_equal(found[:inputs], expected.astype(types[kind]), f"{case} {inputs}")
        assert (found[rounded_up(inputs, 32) :] == 77).all()


@pytest.mark.parametrize("kind", HERE)
def test_a_row_that_holds_no_number_is_none_and_touches_no_other(kernels, kind):
    random = np.random.default_rng(4)
    for inputs, rows in itertools.product((1, 17, 64, 100), (2, 13, 30)):
        packed = pack(linear(40, inputs, random), kind, signed=True)
        given = given_rows(rows, inputs, random, signed=True)
        before = run_layer(kernels, packed, given)
        given[rows // 2, random.integers(inputs)] = np.nan
        after = run_layer(kernels, packed, given)
        assert np.isnan(after[rows // 2]).all()
        others = np.arange(rows) != rows // 2
        np.testing.assert_array_equal(after[others], before[others])


def test_the_logit(kernels):
    random = np.random.default_rng(5)
    for inputs in range(1, 131):
        packed = pack_logit(linear(1, inputs, random))
        given = given_rows(1, inputs, random, signed=True)
        magnitude = np.empty(1)
        found = kernels.call("test_logit", described(packed), given)
        expected = kernels.call("reference_logit", described(packed), given, magnitude)
        assert abs(found - expected) <= gamma(inputs + 5) * magnitude[0]


@pytest.mark.parametrize("dim", DIMS)
def test_the_interaction(kernels, dim):
    random = np.random.default_rng(6)
    stride = rounded_up(dim, 16)
    for count in (*range(2, 14), 16, 17, 27, 40, 41):
        vectors = np.zeros((rounded_up(count, 4), stride), np.float32)
        vectors[:count, :dim] = random.standard_normal((count, dim))
        vectors[count:] = 5  # anything finite
        pairs = count * (count - 1) // 2
        found, expected, magnitude = np.full(pairs + 8, GUARD), np.empty(pairs), np.empty(pairs)
        kernels.call("test_interact", vectors, count, stride, found)
        kernels.call("reference_interact", vectors, count, dim, stride, expected, magnitude)
        assert (np.abs(found[:pairs] - expected) <= gamma(dim + 5) * magnitude).all(), count
        assert (found[pairs:] == GUARD).all()


class Tables:
    """Three INT8 tables with rows padded to ``alignment`` bytes, and the model that holds nothing else."""

    ROWS = (1, 7, 300)

    def __init__(self, dim: int, alignment: int, *, mean: bool, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.dim, self.row_bytes = dim, rounded_up(dim + 4, alignment)
        self.data = random.integers(0, 256, (sum(self.ROWS), self.row_bytes)).astype(np.uint8)
        head = random.standard_normal((sum(self.ROWS), 2)).astype(np.float16)
        head[::5] *= np.float16(1e-5)  # some are below FP16's normal numbers
        self.data[:, :4] = head.view(np.uint8)
        self.starts = tuple(int(rows) * self.row_bytes for rows in np.cumsum([0, *self.ROWS[:-1]]))
        self.mean = (mean,) * 3
        self._kept: list[np.ndarray] = [
            np.array(self.starts, np.int64),
            np.array(self.ROWS, np.int64),
            np.array(self.mean, np.uint8),
        ]
        self.model = _Model(tables=3, dim=dim, row_bytes=self.row_bytes, table_bytes=self.data.ctypes.data)
        names = ("table_starts", "table_rows", "mean")
        for name, array in zip(names, self._kept, strict=True):
            setattr(self.model, name, array.ctypes.data)


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_lookup_and_pooling(kernels, kind, mean):
    random = np.random.default_rng(7)
    for dim, alignment in itertools.product(DIMS, (1, 16)):
        tables = Tables(dim, alignment, mean=mean, seed=dim)
        for table, count in itertools.product(range(3), (0, 1, 2, 3, 31, 32, 33, 65, 200)):
            ids = random.integers(0, tables.ROWS[table], count).astype(kind)
            padded, wide = rounded_up(dim, 16), kind is np.int64
            found, expected, magnitude = np.full(padded + 16, GUARD), np.empty(dim), np.empty(dim)
            assert kernels.call("test_pool", tables.model, table, ids, count, wide, found)
            assert kernels.call("reference_pool", tables.model, table, ids, count, wide, expected, magnitude)
            assert (np.abs(found[:dim] - expected) <= gamma(2 * count + 3) * magnitude).all(), (dim, table, count)
            assert not found[dim:padded].any()
            assert (found[padded:] == GUARD).all()


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_ids_outside_of_their_table_are_refused(kernels, kind):
    tables = Tables(16, 1, mean=False, seed=0)
    out, magnitude = np.empty(16, np.float64), np.empty(16)
    for table, place in itertools.product(range(3), (0, 4, 39)):
        for bad in (-1, tables.ROWS[table], np.iinfo(kind).max, np.iinfo(kind).min):
            ids = np.zeros(40, kind)
            ids[place] = bad
            assert not kernels.call("test_pool", tables.model, table, ids, 40, kind is np.int64, out)
            assert not kernels.call("reference_pool", tables.model, table, ids, 40, kind is np.int64, out, magnitude)


MODELS = {
    "four tables of 16": (3, 16, (5, 32, 16), (32, 16, 1)),
    "dims that fill no vector": (3, 20, (1, 7, 20), (33, 31, 5, 1)),
    "wide": (3, 64, (13, 130, 64), (129, 65, 1)),
    "narrow": (3, 4, (33, 1, 4), (1, 1)),
}


@pytest.mark.parametrize("ids", [np.int32, np.int64])
@pytest.mark.parametrize("kind", HERE)
@pytest.mark.parametrize("name", MODELS)
def test_tiles_blocks_and_neighbours_change_no_bit(kernels, name, kind, ids):
    """The whole forward against one that takes row after row, with fresh memory for each."""
    count, dim, dense, over = MODELS[name]
    random, tables = np.random.default_rng(8), Tables(dim, 1, mean=name == "wide", seed=9)
    wide = (dim + count * (count + 1) // 2, *over)
    layers = [
        pack(linear(outputs, inputs, random), kind, signed=number == 0)
        for widths in (dense, wide[:-1])
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    ]
    geometry = Geometry(dense[0], dim, tables.row_bytes, tables.starts, tables.ROWS, tables.mean)
    layers.append(pack_logit(linear(1, wide[-2], random)))
    data = np.concatenate([tables.data.ravel(), np.zeros(64, np.uint8)])
    network = Network(kernels.forward, geometry, layers, len(dense) - 1, data)
    backend = FusedBackend(network, SCHEMA)
    for rows, longest in itertools.product((*range(1, 14), 25, 63, 64, 65, 66, 130, 200), (None, 0, 2, 40)):
        batch = batch_of(tables, dense[0], rows, longest, ids, random)
        lengths = 0 if longest is None else batch.lengths
        lent = _Rows(rows, batch.values.size, ids is np.int64, batch.dense.ctypes.data, batch.values.ctypes.data)
        lent.lengths = lengths.ctypes.data if isinstance(lengths, np.ndarray) else None
        expected = np.empty(rows, np.float32)
        assert kernels.call("test_row_by_row", network.model, lent, expected) == 0
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(backend.score(batch).view(np.uint32), expected.view(np.uint32))
        backend._scratch[:] = 255  # NaN, as floats: what a forward leaves behind is nothing to the next one


def batch_of(
    tables: Tables, dense_dim: int, rows: int, longest: int | None, kind: Any, random: np.random.Generator
) -> Batch:
    shape = (len(tables.ROWS), rows)
    lengths = np.ones(shape, np.int32) if longest is None else random.integers(0, longest + 1, shape, np.int32)
    values = random.integers(0, np.repeat(tables.ROWS, lengths.sum(axis=1))).astype(kind)
    dense = random.standard_normal((rows, dense_dim)).astype(np.float32)
    return Batch(rows, dense, lengths.ravel(), values, one_hot=longest is None)


def test_every_compiler_here_builds_it_without_a_warning(tmp_path, monkeypatch):
    for compiler in filter(shutil.which, ("g++", "clang++")):
        monkeypatch.setenv("CXX", compiler)
        for source in ("forward.cpp", "testing.cpp"):
            build_forward(tmp_path / "code.so", STRICT, source=source)
