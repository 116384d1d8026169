"""The fused engine: the artifact's scores in every kind of number, for any architecture and any bags."""

from __future__ import annotations

import ctypes
import mmap
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

from narsil.artifacts.compiled_info import SCALE_BIAS_BYTES, processor_flags
from narsil.artifacts.packed import kinds_here
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.fused import PARTS, ForwardLibrary, FusedBackend, Geometry, Network
from narsil.backends.torchscript import TorchScriptBackend
from narsil.compile.core import read_model, read_parts, realigned
from narsil.compile.forms import DlrmForm
from narsil.compile.planner import LADDERS, Workbench, climb, plans
from narsil.compile.toolchain import STRICT, build_forward
from narsil.dataflow import Batch
from narsil.errors import ArtifactError, ForwardFailed
from narsil.packaging.dlrm import DlrmConfig
from narsil.packaging.packager import package_dlrm
from tests.fixtures_models import assert_invariant, batch_of, rows_of, weights_of
from tests.float64 import Float64Dlrm, assert_explained

HERE = kinds_here(processor_flags())
pytestmark = [
    pytest.mark.skipif(not HERE, reason="the fused engine needs AVX-512"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="building it needs g++"),
    pytest.mark.filterwarnings("ignore"),
]

CONFIGS = {
    "four tables of 16": DlrmConfig(
        tables=4, rows=(50, 7, 1000, 33), dim=16, dense_features=5, dense_arch=(32, 16), over_arch=(32, 16, 1), seed=7
    ),
    "one table of 128, mean": DlrmConfig(
        tables=1, rows=(11,), dim=128, dense_features=3, dense_arch=(128,), over_arch=(24, 1), pooling="mean", seed=1
    ),
    "dims that fill no vector": DlrmConfig(
        tables=6, rows=90, dim=20, dense_features=1, dense_arch=(7, 20), over_arch=(33, 31, 5, 1), seed=3
    ),
    "the smallest dim": DlrmConfig(
        tables=2, rows=9, dim=4, dense_features=33, dense_arch=(1, 4), over_arch=(1, 1), seed=5
    ),
    "twenty-six tables of 64": DlrmConfig(rows=500, seed=6),
    "a hundred tables of 32": DlrmConfig(
        tables=100,
        rows=tuple(3 + 7 * number for number in range(100)),
        dim=32,
        dense_features=13,
        dense_arch=(40, 24, 32),
        over_arch=(48, 32, 16, 8, 1),
        seed=2,
    ),
}


class Subject:
    """A packaged DLRM beside the workbench that runs it in any kinds."""

    def __init__(self, config: DlrmConfig, library: Path, folder: Path) -> None:
        weights = weights_of(config)
        artifact = package_dlrm(config, weights, folder, onnx=False)
        assert artifact.torchscript is not None
        self.true = Float64Dlrm(config, weights, artifact.torchscript)
        parts = read_parts(read_model(load_torchscript(artifact.torchscript, "cpu"), artifact.schema, "model"), "model")
        reference = TorchScriptBackend.load(artifact, "cpu", tune=False)
        self.schema = artifact.schema
        tables = parts.int8
        row_bytes = -(-(parts.dim + SCALE_BIAS_BYTES) // tables.row_alignment) * tables.row_alignment
        geometry = Geometry(
            parts.dense_dim,
            parts.dim,
            row_bytes,
            tables.offsets,
            tuple(self.schema.rows.tolist()),
            (parts.pooling == "mean",) * parts.tables,
        )
        self.form = DlrmForm(ForwardLibrary(library), geometry, self.schema, parts, np.asarray(tables.data))
        self.bench = Workbench(self.form, self.schema, reference.run)

    def backend(self, kind: str) -> FusedBackend:
        return self.form.backend((kind,) * len(self.form.linears))

    def batch(self, rows: int, longest: int | None, seed: int = 0) -> Batch:
        return batch_of(self.schema.rows.tolist(), self.schema.dense_dim, rows, longest=longest, seed=seed)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library") / "forward.so"
    build_forward(path, STRICT)
    return path


@pytest.fixture(scope="module", params=list(CONFIGS))
def subject(request, library, tmp_path_factory) -> Subject:
    return Subject(CONFIGS[request.param], library, tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def small(library, tmp_path_factory) -> Subject:
    return Subject(next(iter(CONFIGS.values())), library, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("kind", HERE)
def test_it_scores_as_the_artifact(subject, kind):
    backend = subject.backend(kind)
    for rows in (1, 2, 7, 12, 13, 100, 333):
        for longest in (None, 0, 1, 5):  # one id a bag, all bags empty, some empty, multi-hot
            batch = subject.batch(rows, longest, seed=rows)
            found = backend.run(batch)["default"]
            assert found.shape == (rows,)
            true = subject.true.scores(batch, [kind] * len(subject.form.linears))
            assert_explained(found, true, least=0.2 if longest != 0 else 0)


@pytest.mark.parametrize("kind", HERE)
def test_a_rows_score_is_the_same_bits_in_any_batch(subject, kind):
    backend = subject.backend(kind)
    assert_invariant(backend, backend.share(), subject.schema)


def test_tables_of_another_alignment_score_the_same(subject):
    form, batch = subject.form, subject.batch(50, 3)
    tables = realigned(form.parts.int8, form.geometry.rows, form.parts.dim, 16)
    row_bytes = -(-(form.parts.dim + SCALE_BIAS_BYTES) // 16) * 16
    geometry = replace(form.geometry, row_bytes=row_bytes, starts=tables.offsets)
    layers = form.layers(("fp32",) * len(form.linears))
    network = Network(form.library, geometry, layers, len(form.parts.dense), np.asarray(tables.data))
    expected = subject.backend("fp32").run(batch)["default"]
    np.testing.assert_array_equal(FusedBackend(network, subject.schema).run(batch)["default"], expected)


@pytest.mark.parametrize("kind", HERE)
def test_layers_may_differ_in_kind(small, kind):
    for number in range(len(small.form.linears)):
        kinds = tuple(kind if number == other else "fp32" for other in range(len(small.form.linears)))
        batch = small.batch(500, 3)
        assert_explained(small.form.backend(kinds).score(batch), small.true.scores(batch, kinds))


def test_rows_that_are_picked_one_by_one_are_the_batchs(small):
    batch = small.batch(20, 4)
    same = rows_of(batch, small.schema.num_features, range(20))
    np.testing.assert_array_equal(same.values, batch.values)
    np.testing.assert_array_equal(same.lengths, batch.lengths)


def test_arrays_of_other_types_and_strides_score_the_same(small):
    backend, batch = small.backend("fp32"), small.batch(30, 3)
    expected = backend.run(batch)["default"]
    strided = np.asfortranarray(batch.dense)
    for other in (
        replace(batch, values=batch.values.astype(np.int64)),
        replace(batch, lengths=batch.lengths.astype(np.int64)),
        replace(batch, dense=strided),
    ):
        np.testing.assert_array_equal(backend.run(other)["default"], expected)


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("one_hot", [True, False])
def test_an_id_outside_of_its_table_is_never_looked_up(small, bad, one_hot):
    batch = small.batch(30, None if one_hot else 3)
    values = batch.values.copy()
    values[5] = bad
    with pytest.raises(ForwardFailed, match="an id lies outside"):
        small.backend("fp32").run(replace(batch, values=values))
    wide = values.astype(np.int64)
    wide[5] = 2**40
    with pytest.raises(ForwardFailed, match="an id lies outside"):
        small.backend("fp32").run(replace(batch, values=wide))


def test_lengths_that_do_not_add_up_are_refused(small):
    backend, batch = small.backend("fp32"), small.batch(30, 3)
    for lengths in (batch.lengths + 1, -batch.lengths):
        with pytest.raises(ForwardFailed, match="do not add up"):
            backend.run(replace(batch, lengths=lengths.astype(np.int32)))
    with pytest.raises(ForwardFailed, match="do not add up"):
        backend.run(replace(batch, values=batch.values[:-1]))
    with pytest.raises(ForwardFailed, match="do not make 30 rows"):
        backend.run(replace(batch, lengths=batch.lengths[:-1]))
    with pytest.raises(ForwardFailed, match="do not add up"):
        backend.run(replace(small.batch(30, None), values=batch.values[:7]))


@pytest.mark.parametrize("kind", HERE)
def test_a_number_that_is_none_stays_one_and_touches_no_other_row(small, kind):
    batch, backend = small.batch(3, None), small.backend(kind)
    expected = backend.run(batch)["default"]
    for column in range(small.schema.dense_dim):
        dense = batch.dense.copy()
        dense[1, column] = np.nan
        found = backend.run(replace(batch, dense=dense))["default"]
        assert np.isnan(found[1])
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.skipif("int8" not in HERE, reason="needs VNNI")
@pytest.mark.parametrize("kind", ["int16", "int8"])
def test_an_infinity_is_no_number_once_it_is_to_be_an_integer(small, kind):
    batch = small.batch(3, None)
    dense = batch.dense.copy()
    dense[1, 2] = -np.inf
    found = small.backend(kind).run(replace(batch, dense=dense))["default"]
    assert np.isnan(found[1])
    assert np.isfinite(found[[0, 2]]).all()


def test_no_rows_have_no_scores(small):
    batch = small.batch(1, None)
    none = Batch(0, batch.dense[:0], batch.lengths[:0], batch.values[:0], one_hot=True)
    for empty in (none, replace(none, one_hot=False)):
        assert small.backend("fp32").run(empty)["default"].shape == (0,)


def test_nothing_beyond_the_last_tables_last_byte_is_read(subject):
    tables = before_a_wall(np.asarray(subject.form.parts.int8.data))
    layers = subject.form.layers(("fp32",) * len(subject.form.linears))
    network = Network(subject.form.library, subject.form.geometry, layers, len(subject.form.parts.dense), tables)
    batch = subject.batch(20, 40)
    last = np.repeat(subject.schema.rows - 1, batch.lengths.reshape(-1, 20).sum(axis=1))
    batch = replace(batch, values=last.astype(np.int32))
    expected = subject.backend("fp32").run(batch)["default"]
    np.testing.assert_array_equal(FusedBackend(network, subject.schema).run(batch)["default"], expected)


def before_a_wall(data: np.ndarray) -> np.ndarray:
    """A copy whose last byte lies before a page that cannot be read."""
    size = -(-data.size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    protected = ctypes.CDLL(None, use_errno=True).mprotect(
        ctypes.c_void_p(pages.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0
    )
    assert protected == 0
    pages[size - data.size : size] = data
    return pages[size - data.size : size]


def test_the_time_of_each_part_is_told(small):
    seconds = np.zeros(len(PARTS))
    small.backend("fp32").score(small.batch(300, None), seconds)
    assert (seconds[:4] > 0).all()
    assert seconds.sum() < 1


@pytest.mark.skipif("int8" not in HERE, reason="needs VNNI")
def test_layers_climb_until_the_limit_is_kept(small):
    loose, _ = climb(small.bench, "int8", HERE, 0.5)
    assert set(loose) == {"int8"}
    exact, deviation = climb(small.bench, "int8", HERE, 1e-7)
    assert set(exact) == {"fp32"}
    worst = small.bench.errors(loose).largest
    between, found = climb(small.bench, "int8", HERE, worst * 0.7)
    assert set(between) > {"int8"}
    assert deviation <= found <= 0.85 * 0.7 * worst


def test_the_choice_says_what_it_is(small):
    (plan,) = plans(small.bench, "fp32", HERE, 1e-5)
    assert (plan.precision, plan.note) == ("fp32", "dense arch fp32 fp32, over arch fp32 fp32 fp32")
    assert {kind for ladder in LADDERS.values() for kind in ladder} == {"fp32", "bf16", "int16", "int8"}


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "forward.so").write_bytes(b"\x7fELF")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        ForwardLibrary(tmp_path / "forward.so")
