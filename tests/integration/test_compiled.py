"""The compiled backend: the scores of the artifact it was made from, for any architecture; nothing damaged runs."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

import torch
from click.testing import CliRunner

from narsil.backends.compiled import CompiledBackend
from narsil.backends.gate import replay
from narsil.backends.registry import load_backend
from narsil.backends.torchscript import TorchScriptBackend
from narsil.bench.servers import narsil_server
from narsil.cli import cli
from narsil.dataflow import Batch, Request
from narsil.engine.engine import Engine
from narsil.errors import ArtifactError, ConfigError
from narsil.models import compiled as compiled_module
from narsil.models.artifact import Artifact, open_artifact
from narsil.models.calibration import load_calibration
from narsil.models.compiler import DEFAULT_LIMITS, compile_artifact
from narsil.models.dlrm import DlrmConfig, random_weights
from narsil.models.packager import package_dlrm
from tests.fixtures_models import batch_of
from tests.support import Reply, one_hot

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++"),
    pytest.mark.timeout(600),  # the first compile of a machine builds torch's headers too
    pytest.mark.filterwarnings("ignore"),
]

FORTY = tuple(3 + 7 * number for number in range(40))
CONFIGS = {
    "four tables of 16": DlrmConfig(
        tables=4, rows=(50, 7, 1000, 33), dim=16, dense_features=5, dense_arch=(32, 16), over_arch=(32, 16, 1), seed=7
    ),
    "one table of 128, mean": DlrmConfig(
        tables=1, rows=(11,), dim=128, dense_features=3, dense_arch=(128,), over_arch=(24, 1), pooling="mean", seed=1
    ),
    "forty tables of 64": DlrmConfig(
        tables=40,
        rows=FORTY,
        dim=64,
        dense_features=13,
        dense_arch=(40, 24, 64),
        over_arch=(48, 32, 16, 8, 1),
        seed=2,
    ),
}


class Pair:
    """An artifact and what it was compiled to."""

    def __init__(self, name: str, precision: str, folder: Path, limit: float | None = None) -> None:
        config = CONFIGS[name]
        self.source = package_dlrm(config, random_weights(config), folder / "source", onnx=False, name="small")
        self.out = folder / "compiled"
        self.compiled, self.cached = compile_artifact(self.source, self.out, replay, precision=precision, limit=limit)
        self.reference = TorchScriptBackend.load(self.source, "cpu", tune=False)
        self.backend = CompiledBackend.load(self.compiled)

    def batch(self, rows: int, longest: int | None, seed: int = 0) -> Batch:
        return batch_of(
            self.source.schema.rows.tolist(), self.source.schema.dense_dim, rows, longest=longest, seed=seed
        )

    def deviation(self, batch: Batch) -> float:
        expected, found = (backend.run(batch)["default"] for backend in (self.reference, self.backend))
        assert found.shape == (batch.rows,)
        assert found.dtype == np.float32
        return float(np.abs(expected - found).max())


@pytest.fixture(scope="module", params=list(CONFIGS))
def fp32(request, tmp_path_factory) -> Pair:
    return Pair(request.param, "fp32", tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Pair:
    """In bf16 where this processor has it."""
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Pair(next(iter(CONFIGS)), "bf16" if has_bf16 else "fp32", tmp_path_factory.mktemp("small"), limit=0.1)


@pytest.fixture
def copy(small, tmp_path) -> Artifact:
    """A copy that a test may damage."""
    shutil.copytree(small.out, tmp_path / "copy")
    return open_artifact(tmp_path / "copy")


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("longest", [None, 0, 1, 5], ids=["one id a bag", "all bags empty", "some empty", "multi-hot"])
@pytest.mark.parametrize("rows", [1, 2, 7, 100, 1000])
def test_it_scores_as_the_artifact(fp32, rows, longest):
    batch = fp32.batch(rows, longest, seed=rows)
    assert fp32.deviation(batch) <= 1e-5


def test_ids_of_64_bits_score_the_same(fp32):
    batch = fp32.batch(10, 3)
    wide = Batch(batch.rows, batch.dense, batch.lengths, batch.values.astype(np.int64), one_hot=False)
    np.testing.assert_array_equal(fp32.backend.run(wide)["default"], fp32.backend.run(batch)["default"])


def test_every_id_matters(fp32):
    batch = fp32.batch(64, None)
    moved = Batch(batch.rows, batch.dense, batch.lengths, np.ascontiguousarray(batch.values[::-1]) % 3, one_hot=True)
    assert np.abs(fp32.backend.run(batch)["default"] - fp32.backend.run(moved)["default"]).max() > 1e-3


def test_bf16_stays_near(small):
    assert small.deviation(small.batch(500, None)) <= 0.02


def test_the_manifest_says_how_far_it_deviates(small):
    deviation = small.compiled.manifest["compiled"]["deviation"]
    assert deviation["rows"] >= 10_000
    assert 0 < deviation["mean_abs"] <= deviation["max_abs"]
    assert deviation["rank_correlation"] > 0.999
    assert small.compiled.name == "small"


def test_the_same_inputs_are_answered_from_the_cache(small):
    def never(source: Artifact, compiled: Artifact) -> None:
        raise AssertionError("it compiled again")

    info = small.compiled.manifest["compiled"]
    again, cached = compile_artifact(small.source, small.out, never, precision=info["precision"], limit=info["limit"])
    assert cached
    assert again.compiled == small.compiled.compiled
    assert small.cached is False


def test_too_far_a_deviation_leaves_nothing(tmp_path, small):
    with pytest.raises(ArtifactError, match=r"deviate from the artifact's by up to \d.*1e-12 is allowed"):
        compile_artifact(small.source, tmp_path / "out", replay, precision="fp32", limit=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_labelled_rows_tell_the_change_in_auc(small, tmp_path):
    schema, random = small.source.schema, np.random.default_rng(3)
    ids = random.integers(0, schema.rows, (600, schema.num_features)).astype(np.int32)
    labels = random.integers(0, 2, 600)
    np.savez(tmp_path / "rows.npz", dense=random.random((600, schema.dense_dim)), ids=ids, labels=labels)
    found = replay(small.source, small.compiled, load_calibration(tmp_path / "rows.npz", schema))
    assert found.labelled_rows == 600
    assert 0.3 < found.auc < 0.7
    assert abs(found.auc_change) < 0.01
    np.savez(tmp_path / "rows.npz", dense=random.random((600, schema.dense_dim)), ids=ids + 10_000)
    with pytest.raises(ArtifactError, match="outside of the model's tables"):
        load_calibration(tmp_path / "rows.npz", schema)


def test_another_lane_has_its_own_container_and_scores_the_same(small):
    other = small.backend.share()
    assert other._container is not small.backend._container
    assert other._shared is small.backend._shared
    batch = small.batch(300, 3)
    expected = small.backend.run(batch)["default"]
    failures: list[str] = []

    def lane(backend: CompiledBackend) -> None:
        backend.thread_setup()
        for _ in range(200):
            if not np.array_equal(backend.run(batch)["default"], expected):
                failures.append("differs")

    threads = [threading.Thread(target=lane, args=(backend,)) for backend in (small.backend, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    other.close()
    assert not failures


def test_runs_leave_no_memory_behind(small):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    batch = small.batch(64, None)
    for _ in range(2000):
        small.backend.run(batch)
    before = resident()
    for _ in range(20_000):
        small.backend.run(batch)
    assert resident() - before < 1000  # pages: 4 MB, where each run handles over 40 KB


def test_scores_are_the_callers_to_keep(small):
    first = small.backend.run(small.batch(50, None, seed=1))["default"]
    kept = first.copy()
    small.backend.run(small.batch(50, None, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_two_lanes_serve_it(small):
    backend = load_backend(open_artifact(small.out), "auto", "cpu")
    assert backend.name == "compiled"
    engine = Engine([backend, backend.share()])
    engine.start([one_hot(rows, 0, backend.schema) for rows in (1, 100)])
    sent = []
    for number in range(60):
        features = one_hot(1 + number % 9, number, backend.schema)
        reply = Reply()
        engine.submit(Request(features, reply, arrived=engine.now()))
        sent.append((features, reply))
    for features, reply in sent:
        ids = np.ascontiguousarray(features.sparse.ids).ravel()
        alone = Batch(features.rows, features.dense, np.ones(ids.size, np.int32), ids, one_hot=True)
        expected = small.reference.run(alone)["default"]
        np.testing.assert_allclose(reply.wait().scores["default"], expected, atol=0.02, rtol=0)
    assert engine.drain(10)


def test_another_processor_or_torch_is_refused_and_auto_falls_back(copy, monkeypatch, caplog):
    rewrite(copy.path, lambda manifest: manifest["compiled"].update(torch="1.0.0"))
    with pytest.raises(ArtifactError, match=r"compiled with torch 1\.0\.0 .* `narsil compile`"):
        load_backend(open_artifact(copy.path), "compiled")
    assert load_backend(open_artifact(copy.path), "auto", "cpu").name == "torch"
    assert "Falling back to the torch backend" in caplog.text
    rewrite(copy.path, lambda manifest: manifest["compiled"].update(torch=torch.__version__))
    monkeypatch.setattr(compiled_module, "processor_flags", lambda: ("sse2",))
    with pytest.raises(ArtifactError, match=r"compiled for a processor with .* which this one lacks"):
        load_backend(open_artifact(copy.path), "compiled")


@pytest.mark.parametrize("file", ["model.pt2", "tables.bin"])
def test_changed_and_truncated_files_are_refused(copy, file):
    path = copy.path / file
    content = bytearray(path.read_bytes())
    path.unlink()  # it may be a link to the original
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{file} does not match the SHA-256"):
        open_artifact(copy.path)
    path.write_bytes(content[:-10])
    with pytest.raises(ArtifactError, match=f"{file} has .* bytes where"):
        open_artifact(copy.path)


def test_a_foreign_package_is_refused_even_with_a_fitting_checksum(copy, fp32, tmp_path):
    shutil.copy(fp32.out / "model.pt2", copy.path / "model.pt2")
    with pytest.raises(ArtifactError, match="was compiled for another model"):
        load_backend(open_artifact_unchecked(copy.path), "compiled")
    (copy.path / "model.pt2").write_bytes(b"no zip at all")
    with pytest.raises(ArtifactError, match="is no package of AOTInductor's"):
        load_backend(open_artifact_unchecked(copy.path), "compiled")


def open_artifact_unchecked(folder: Path) -> Artifact:
    """Opens a folder whose manifest agrees with whatever its files hold now."""
    size = (folder / "model.pt2").stat().st_size
    rewrite(folder, lambda manifest: manifest["files"]["compiled"].update(bytes=size))
    return open_artifact(folder, verify=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.pop("compiled"), "compiled section is damaged"),
        (lambda m: m["compiled"].pop("dim"), "compiled section is damaged"),
        (lambda m: m["compiled"].update(extra=1), "compiled section is damaged"),
        (lambda m: m["compiled"].update(dim="64"), "wrong types"),
        (lambda m: m["compiled"].update(dim=32), "differ"),
        (lambda m: m["compiled"].update(row_alignment=0), "impossible sizes"),
        (lambda m: m["compiled"]["offsets"].__setitem__(0, 1 << 40), "read out of bounds"),
        (lambda m: m["compiled"]["offsets"].__setitem__(0, -1), "read out of bounds"),
        (lambda m: m["schema"]["features"][0].update(rows=10**9), "read out of bounds"),
        (lambda m: m["schema"].update(dense_dim=500), "differ"),
        (lambda m: m["files"].pop("tables"), "without its tables"),
    ],
)
def test_a_damaged_manifest_is_refused(copy, change, says):
    rewrite(copy.path, change)
    with pytest.raises(ArtifactError, match=says):
        load_backend(open_artifact(copy.path), "compiled")


def test_what_cannot_be_compiled_says_why(small, tmp_path):
    with pytest.raises(ConfigError, match="precision must be"):
        compile_artifact(small.source, tmp_path / "out", replay, precision="fp64")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ArtifactError, match="holds mine"):
        compile_artifact(small.source, tmp_path / "out", replay)
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    assert set(DEFAULT_LIMITS) >= {"fp32", "bf16"}


def test_verify_holds_a_running_server_against_the_artifact(small):
    with narsil_server(small.out, backend="auto", lanes=2) as server:
        given = ["verify", "--target", server.address, "--model", str(small.source.path), "--json"]
        result = CliRunner().invoke(cli, [*given, "--max-deviation", "0.02"])
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["backend"] == "compiled"
        assert told["rows"] >= 10_000
        assert 0 < told["max_abs"] <= 0.02
        strict = CliRunner().invoke(cli, [*given, "--max-deviation", "0"])
        assert isinstance(strict.exception, ArtifactError)


def test_compile_on_the_command_line_is_answered_from_the_cache(small):
    info = small.compiled.manifest["compiled"]
    options = ["--precision", info["precision"], "--max-deviation", str(info["limit"]), "--out", str(small.out)]
    result = CliRunner().invoke(cli, ["compile", str(small.source.path), *options])
    assert result.exit_code == 0, result.output
    assert "already compiled from these inputs" in result.stdout
    assert "deviation from the artifact over 10,020 rows" in result.stdout
