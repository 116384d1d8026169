"""The compiled backend: the scores of the artifact it was made from, for any architecture; nothing damaged runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

import torch
from click.testing import CliRunner

from narsil.artifacts import compiled_info as compiled_module
from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.compiled_info import processor_flags
from narsil.artifacts.packed import kinds_here
from narsil.backends.base import Backend
from narsil.backends.compiled import InductorBackend, load_compiled
from narsil.backends.fused import FusedBackend
from narsil.backends.registry import load_backend
from narsil.backends.torchscript import TorchScriptBackend
from narsil.bench.servers import narsil_server
from narsil.cli import cli
from narsil.client import Client
from narsil.compile import compiler as compiler_module
from narsil.compile.calibration import Calibration, load_calibration
from narsil.compile.compiler import DEFAULT_LIMITS, compile_artifact
from narsil.compile.gate import replay
from narsil.compile.judge import ArtifactJudge
from narsil.dataflow import Batch, Request
from narsil.engine.engine import Engine
from narsil.engine.served_model import ServedModel
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable
from narsil.packaging.dlrm import DlrmConfig, random_weights
from narsil.packaging.packager import package_dlrm
from tests.fixtures_models import assert_invariant, batch_of
from tests.support import Reply, one_hot

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++"),
    pytest.mark.timeout(600),  # the first compile of a machine builds torch's headers too
    pytest.mark.filterwarnings("ignore"),
]

HERE = kinds_here(processor_flags())
needs_fused = pytest.mark.skipif(not HERE, reason="the fused engine needs AVX-512")
SMALL = DlrmConfig(
    tables=4, rows=(50, 7, 1000, 33), dim=16, dense_features=5, dense_arch=(32, 16), over_arch=(32, 16, 1), seed=7
)
MANY = DlrmConfig(
    tables=40,
    rows=tuple(3 + 7 * number for number in range(40)),
    dim=64,
    dense_features=13,
    dense_arch=(40, 24, 64),
    over_arch=(48, 32, 16, 8, 1),
    pooling="mean",
    seed=2,
)


class Pair:
    """An artifact and what it was compiled to."""

    def __init__(self, config: DlrmConfig, precision: str, folder: Path, engine: str, limit: float | None) -> None:
        self.source = package_dlrm(config, random_weights(config), folder / "source", onnx=False, name="small")
        self.out = folder / "compiled"
        self.asked = {"precision": precision, "engine": engine, "limit": limit}
        self.compiled, self.cached = compile_artifact(self.source, self.out, ArtifactJudge(), **self.asked)
        self.reference = TorchScriptBackend.load(self.source, "cpu", tune=False)
        self.backend: Backend = load_compiled(self.compiled)

    def batch(self, rows: int, longest: int | None, seed: int = 0) -> Batch:
        return batch_of(
            self.source.schema.rows.tolist(), self.source.schema.dense_dim, rows, longest=longest, seed=seed
        )

    def deviation(self, batch: Batch) -> float:
        expected, found = (backend.run(batch)["default"] for backend in (self.reference, self.backend))
        assert found.shape == (batch.rows,)
        assert found.dtype == np.float32
        return float(np.abs(expected - found).max())


@pytest.fixture(scope="module")
def inductor(tmp_path_factory) -> Pair:
    return Pair(MANY, "fp32", tmp_path_factory.mktemp("inductor"), "inductor", None)


@pytest.fixture(scope="module", params=[pytest.param("fused", marks=needs_fused), "inductor"])
def small(request, tmp_path_factory) -> Pair:
    """In low precision, by each engine."""
    precision = "fp32"
    if request.param == "fused":
        precision = HERE[-1]
    elif torch.ops.mkldnn._is_mkldnn_bf16_supported():
        precision = "bf16"
    return Pair(SMALL, precision, tmp_path_factory.mktemp("small"), request.param, 0.1)


@pytest.fixture
def copy(small, tmp_path) -> Artifact:
    """A copy that a test may damage."""
    shutil.copytree(small.out, tmp_path / "copy")
    return open_artifact(tmp_path / "copy")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As lanes run: threads of one forward would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("longest", [None, 0, 1, 5], ids=["one id a bag", "all bags empty", "some empty", "multi-hot"])
@pytest.mark.parametrize("rows", [1, 2, 7, 100, 1000])
def test_inductor_scores_as_the_artifact(inductor, rows, longest):
    assert isinstance(inductor.backend, InductorBackend)
    batch = inductor.batch(rows, longest, seed=rows)
    assert inductor.deviation(batch) <= 1e-5


def test_ids_of_64_bits_score_the_same(small):
    batch = small.batch(10, 3)
    wide = Batch(batch.rows, batch.dense, batch.lengths, batch.values.astype(np.int64), one_hot=False)
    np.testing.assert_array_equal(small.backend.run(wide)["default"], small.backend.run(batch)["default"])


def test_every_id_matters(small):
    batch = small.batch(64, None)
    moved = Batch(batch.rows, batch.dense, batch.lengths, np.ascontiguousarray(batch.values[::-1]) % 3, one_hot=True)
    assert np.abs(small.backend.run(batch)["default"] - small.backend.run(moved)["default"]).max() > 1e-3


def test_low_precision_stays_near(small):
    assert small.deviation(small.batch(500, None)) <= 0.1


def test_the_manifest_says_how_far_it_deviates(small):
    deviation = small.compiled.manifest["compiled"]["deviation"]
    assert deviation["rows"] >= 10_000
    assert 0 < deviation["mean_abs"] <= deviation["max_abs"]
    assert deviation["rank_correlation"] > 0.999
    assert small.compiled.name == "small"


class NotFromTheCache(Exception):
    """A compile got as far as its judge."""


class NeverJudge(ArtifactJudge):
    """For compiles that must not get as far as that."""

    def choose(self, *given: object) -> None:  # type: ignore[override]
        raise NotFromTheCache

    replay = choose  # type: ignore[assignment]


def test_the_same_inputs_are_answered_from_the_cache(small):
    again, cached = compile_artifact(small.source, small.out, NeverJudge(), **small.asked)
    assert cached
    assert again.compiled == small.compiled.compiled
    assert small.cached is False


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["compiled"].update(deviation=None),
        lambda m: m["compiled"].update(limit=m["compiled"]["deviation"]["max_abs"] / 2),
        lambda m: m["compiled"]["deviation"].update(rows="many"),
        lambda m: m["compiled"].update(key="another"),
    ],
    ids=["never judged", "beyond its limit", "damaged", "of other inputs"],
)
def test_a_folder_that_is_no_answer_is_compiled_again(small, copy, change):
    rewrite(copy.path, change)
    with pytest.raises(NotFromTheCache):
        compile_artifact(small.source, copy.path, NeverJudge(), **small.asked)
    assert open_artifact(copy.path, verify=True).compiled is not None
    assert [path.name for path in copy.path.parent.iterdir()] == ["copy"]


@needs_fused
def test_the_key_tells_apart_what_the_code_follows_from(small, monkeypatch):
    script = small.source.torchscript

    def key(calibration: Calibration | None = None, **changed: object) -> str:
        with monkeypatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(compiler_module, name, value)
            return compiler_module._key(small.source, script, ["fp32"], calibration)

    rows = Calibration(np.zeros((1, 5), np.float32), np.zeros((1, 4), np.int32))
    keys = [
        key(),
        key(rows),
        key(replace(rows, labels=np.zeros(1, np.float32))),
        key(_FLAGS=("-O2",)),
        key(_FORWARD=Path(__file__)),
        key(_REVISION=-1),
        key(_compiler=lambda: "another"),
        key(processor_flags=lambda: ("avx512f",)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_compiling_over_the_artifact_itself_would_lose_its_graph(small, tmp_path):
    shutil.copytree(small.source.path, tmp_path / "model")
    graph = tmp_path / "model" / "graph.onnx"
    graph.write_bytes(b"a graph")
    entry = {"file": graph.name, "bytes": 7, "sha256": hashlib.sha256(b"a graph").hexdigest()}
    rewrite(tmp_path / "model", lambda manifest: manifest["files"].update(onnx=entry))
    with pytest.raises(ArtifactError, match="would lose its ONNX graph"):
        compile_artifact(open_artifact(tmp_path / "model"), tmp_path / "model", NeverJudge())
    assert graph.exists()


def test_too_far_a_deviation_leaves_nothing(tmp_path, small):
    with pytest.raises(ArtifactError, match=r"deviate from the artifact's by up to \d.* is allowed"):
        compile_artifact(small.source, tmp_path / "out", ArtifactJudge(), **{**small.asked, "limit": 1e-12})
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


def test_another_lane_scores_the_same_at_the_same_time(small):
    other = small.backend.share()
    batch = small.batch(300, 3)
    expected = small.backend.run(batch)["default"]
    failures: list[str] = []

    def lane(backend: Backend) -> None:
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
    model = ServedModel("small", "1", [backend, backend.share()])
    engine = Engine(2)
    engine.start()
    engine.add(model, [one_hot(rows, 0, backend.schema) for rows in (1, 100)])
    sent = []
    for number in range(60):
        features = one_hot(1 + number % 9, number, backend.schema)
        reply = Reply()
        engine.submit(Request(model, features, reply, arrived=engine.now()))
        sent.append((features, reply))
    for features, reply in sent:
        ids = np.ascontiguousarray(features.sparse.ids).ravel()
        alone = Batch(features.rows, features.dense, np.ones(ids.size, np.int32), ids, one_hot=True)
        expected = small.reference.run(alone)["default"]
        np.testing.assert_allclose(reply.wait().scores["default"], expected, atol=0.1, rtol=0)
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


def compiled_files(artifact: Artifact) -> list[Path]:
    return [path for path in (artifact.compiled, artifact.tables, artifact.weights) if path is not None]


def damage(path: Path, change: Callable[[bytearray], bytes]) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()  # it may be mapped by a backend of another test
    path.write_bytes(change(content))


def flipped(content: bytearray) -> bytes:
    content[len(content) // 2] ^= 1
    return bytes(content)


def test_changed_truncated_and_missing_files_are_refused(copy):
    for path in compiled_files(copy):
        whole = path.read_bytes()
        damage(path, flipped)
        with pytest.raises(ArtifactError, match=f"{path.name} does not match the SHA-256"):
            load_backend(open_artifact(copy.path), "compiled")
        damage(path, lambda content: bytes(content[:-10]))
        with pytest.raises(ArtifactError, match=f"{path.name} has .* bytes where"):
            load_backend(open_artifact(copy.path), "compiled")
        path.unlink()
        with pytest.raises(ArtifactError, match=rf"{path.name} is listed in manifest\.json but is not there"):
            load_backend(open_artifact(copy.path), "compiled")
        path.write_bytes(whole)
    assert load_backend(open_artifact(copy.path), "compiled").name == "compiled"


def test_auto_falls_back_from_a_wrong_checksum_and_compiled_refuses(copy, small, caplog):
    damage(copy.compiled, flipped)
    artifact = open_artifact(copy.path)
    backend = load_backend(artifact, "auto", "cpu")
    assert backend.name == "torch"
    assert "does not match the SHA-256" in caplog.text
    assert "Falling back to the torch backend" in caplog.text
    batch = small.batch(20, 3)
    expected = small.reference.run(batch)["default"]
    np.testing.assert_allclose(backend.run(batch)["default"], expected, atol=1e-5, rtol=0)
    with pytest.raises(ArtifactError, match=r"does not match the SHA-256"):
        load_backend(artifact, "compiled")
    copy.tables.unlink()
    artifact = open_artifact(copy.path)
    assert load_backend(artifact, "auto", "cpu").name == "torch"
    with pytest.raises(ArtifactError, match=r"does not match the SHA-256|tables\.bin is listed"):
        load_backend(artifact, "compiled", "cpu")


def test_a_folder_for_another_device_is_refused_and_auto_falls_back(copy, caplog):
    rewrite(copy.path, lambda manifest: manifest["compiled"].update(device="cuda", engine="inductor"))
    with pytest.raises(ConfigError, match=r"compiled for cuda and cannot run on cpu; use --device cuda"):
        load_backend(open_artifact(copy.path), "compiled", "cpu")
    assert load_backend(open_artifact(copy.path), "auto", "cpu").name == "torch"
    assert "compiled for cuda, not cpu" in caplog.text


@pytest.mark.parametrize("backend", ["auto", "compiled"])
def test_a_damaged_torchscript_beside_it_does_not_stop_what_is_compiled(copy, caplog, backend):
    damage(copy.torchscript, flipped)
    assert load_backend(open_artifact(copy.path), backend, "cpu").name == "compiled"
    assert "model_default.pt does not match" in caplog.text
    with pytest.raises(ArtifactError, match=r"model_default\.pt does not match"):
        load_backend(open_artifact(copy.path), "torch", "cpu")
    damage(copy.compiled, flipped)
    with pytest.raises(ArtifactError, match=r"does not match"):
        open_artifact(copy.path)


def test_serving_a_folder_with_a_wrong_checksum_warns_and_serves_torch(copy):
    damage(copy.compiled, flipped)
    with narsil_server(copy.path, backend="auto", lanes=1) as server, Client(server.address) as client:
        assert client.model(timeout=30).backend == "torch"


def test_a_foreign_package_is_refused_even_with_a_fitting_checksum(copy, inductor):
    foreign = b"no library at all"
    if copy.compiled.suffix == ".pt2":
        damage(copy.compiled, lambda _: inductor.compiled.compiled.read_bytes())
        with pytest.raises(ArtifactError, match="was compiled for another model"):
            load_backend(open_artifact_unchecked(copy), "compiled")
        damage(copy.compiled, lambda _: foreign)
        with pytest.raises(ArtifactError, match="is no package of AOTInductor's"):
            load_backend(open_artifact_unchecked(copy), "compiled")
        return
    damage(copy.compiled, lambda _: foreign)
    with pytest.raises(ArtifactError, match=r"forward\.so cannot be loaded"):
        load_backend(open_artifact_unchecked(copy), "compiled")
    damage(copy.compiled, lambda _: Path(np._core._multiarray_umath.__file__).read_bytes())  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match=r"no build of Narsil's forward|cannot be loaded"):
        load_backend(open_artifact_unchecked(copy), "compiled")


def open_artifact_unchecked(artifact: Artifact) -> Artifact:
    """Opens a folder whose manifest agrees with whatever its files hold now."""
    size = artifact.compiled.stat().st_size
    rewrite(artifact.path, lambda manifest: manifest["files"]["compiled"].update(bytes=size))
    return open_artifact(artifact.path, verify=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.pop("compiled"), "compiled section is damaged"),
        (lambda m: m["compiled"].pop("dim"), "compiled section is damaged"),
        (lambda m: m["compiled"].update(extra=1), "compiled section is damaged"),
        (lambda m: m["compiled"].update(dim="64"), "wrong types"),
        (lambda m: m["compiled"].update(note=7), "wrong types"),
        (lambda m: m["compiled"].update(engine="steam"), "engine 'steam'"),
        (lambda m: m["compiled"].update(layers=[{"inputs": 1}]), "compiled section is damaged"),
        (lambda m: m["compiled"].update(dim=32), "differ"),
        (lambda m: m["compiled"].update(row_alignment=0), "impossible sizes"),
        (lambda m: m["compiled"]["offsets"].__setitem__(0, 1 << 40), "read out of bounds"),
        (lambda m: m["compiled"]["offsets"].__setitem__(0, -1), "read out of bounds"),
        (lambda m: m["schema"]["features"][0].update(rows=10**9), "read out of bounds"),
        (lambda m: m["schema"].update(dense_dim=500), "differ"),
        (lambda m: m["schema"].update(tasks=["default", "other"]), "differ"),
        (lambda m: m["compiled"].update(dim=True), "wrong types"),
        (lambda m: m["compiled"].update(engine="fused", device="cuda"), "engine 'fused' on 'cuda'"),
        (lambda m: m["compiled"].update(limit=float("nan")), "limit or deviation"),
        (lambda m: m["compiled"].update(limit=True), "limit or deviation"),
        (lambda m: m["compiled"].update(limit=-1), "limit or deviation"),
        (lambda m: m["compiled"].update(limit=10**400), "limit or deviation"),
        (lambda m: m["compiled"].update(deviation={}), "compiled section is damaged"),
        (lambda m: m["compiled"]["deviation"].update(max_abs=float("nan")), "limit or deviation"),
        (lambda m: m["compiled"]["deviation"].update(rows="many"), "limit or deviation"),
        (lambda m: m["compiled"]["deviation"].update(auc=0.5), "limit or deviation"),
        (lambda m: m["files"].pop("tables"), "without its tables"),
    ],
)
def test_a_damaged_manifest_is_refused(copy, change, says):
    rewrite(copy.path, change)
    with pytest.raises(ArtifactError, match=says):
        load_backend(open_artifact(copy.path), "compiled")


@needs_fused
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["compiled"]["layers"][0].update(outputs=64), "do not chain"),
        (lambda m: m["compiled"]["layers"][0].update(inputs=6), "do not chain"),
        (lambda m: m["compiled"]["layers"][0].update(kind="fp64"), "unknown kinds"),
        (lambda m: m["compiled"]["layers"][0].update(inputs=0), "impossible sizes"),
        (lambda m: m["compiled"]["layers"][1].update(kind="fp32" if HERE[-1] != "fp32" else "bf16"), "bytes where"),
        (lambda m: m["compiled"]["layers"][-1].update(kind="int8"), "not in fp32"),
        (lambda m: m["compiled"]["layers"].pop(), "do not chain"),
        (lambda m: m["compiled"].update(dense_layers=0), "no DLRM's"),
        (lambda m: m["compiled"].update(dense_layers=4), "no DLRM's"),
        (lambda m: m["files"].pop("weights"), "lacks its weights"),
    ],
)
@pytest.mark.parametrize("small", ["fused"], indirect=True)
def test_layers_that_do_not_fit_their_weights_are_refused(small, tmp_path, change, says):
    assert isinstance(small.backend, FusedBackend)
    shutil.copytree(small.out, tmp_path / "copy")
    rewrite(tmp_path / "copy", change)
    with pytest.raises(ArtifactError, match=says):
        load_backend(open_artifact(tmp_path / "copy"), "compiled")


@needs_fused
def test_auto_takes_what_is_fast_and_says_why(tmp_path):
    source = package_dlrm(SMALL, random_weights(SMALL), tmp_path / "source", onnx=False)
    compiled, _ = compile_artifact(source, tmp_path / "out", ArtifactJudge(), precision="auto")
    info = compiled.manifest["compiled"]
    assert info["precision"] in HERE
    assert info["note"].startswith(f"{info['precision']} pays here: rows a second of one lane within the limit are ")
    assert info["deviation"]["max_abs"] <= DEFAULT_LIMITS["auto"]


def test_batch_invariant_by_inductor(inductor):
    backend = load_compiled(inductor.compiled, batch_invariant=True)
    assert_invariant(backend, backend.share(), inductor.source.schema)


@needs_fused
def test_batch_invariant_asks_for_the_compiled_backend(small):
    with pytest.raises(ConfigError, match=r"batch_invariant needs the compiled backend, not torch.*narsil compile"):
        load_backend(small.source, "torch", batch_invariant=True)
    assert load_backend(small.compiled, "auto", "cpu", batch_invariant=True).name == "compiled"


def test_what_cannot_be_compiled_says_why(small, tmp_path, monkeypatch):
    def compiling(**options: object) -> None:
        compile_artifact(small.source, tmp_path / "out", NeverJudge(), **options)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="precision must be one of fp32, bf16, int8, auto, not 'fp64'"):
        compiling(precision="fp64")
    with pytest.raises(ConfigError, match="engine must be one of"):
        compiling(engine="steam")
    with pytest.raises(ConfigError, match="int8 needs the fused engine"):
        compiling(precision="int8", engine="inductor")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="compiling for cuda needs a GPU"):
            compiling(device="cuda")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ArtifactError, match="holds mine"):
        compiling()
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    assert set(DEFAULT_LIMITS) == {"fp32", "bf16", "int8", "auto"}


def test_a_processor_without_the_instructions_is_told(small, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler_module, "processor_flags", lambda: ("avx2",))
    with pytest.raises(ConfigError, match="the fused engine runs on x86 processors with AVX-512"):
        compile_artifact(small.source, tmp_path / "out", NeverJudge(), engine="fused")
    with pytest.raises(ConfigError, match="int8 needs the fused engine"):
        compile_artifact(small.source, tmp_path / "out", NeverJudge(), precision="int8")
    flags = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c", "fma")
    monkeypatch.setattr(compiler_module, "processor_flags", lambda: flags)
    with pytest.raises(ConfigError, match="no vector instructions for int8"):
        compile_artifact(small.source, tmp_path / "out", NeverJudge(), precision="int8")


def test_a_machine_without_a_compiler_is_told(small, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler_module, "_compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"compiling needs a C\+\+ compiler: install g\+\+"):
        compile_artifact(small.source, tmp_path / "out", NeverJudge())


def test_verify_holds_a_running_server_against_the_artifact(small):
    with narsil_server(small.out, backend="auto", lanes=2) as server:
        given = ["verify", "--target", server.address, "--model", str(small.source.path), "--json"]
        result = CliRunner().invoke(cli, [*given, "--max-deviation", "0.1"])
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["backend"] == "compiled"
        assert told["rows"] >= 10_000
        assert 0 < told["max_abs"] <= 0.1
        strict = CliRunner().invoke(cli, [*given, "--max-deviation", "0"])
        assert isinstance(strict.exception, ArtifactError)


def test_compile_on_the_command_line_is_answered_from_the_cache(small):
    asked = {"--precision": "precision", "--engine": "engine", "--max-deviation": "limit"}
    options = [text for option, name in asked.items() for text in (option, str(small.asked[name]))]
    options += ["--out", str(small.out)]
    result = CliRunner().invoke(cli, ["compile", str(small.source.path), *options])
    assert result.exit_code == 0, result.output
    assert "already compiled from these inputs" in result.stdout
    assert "deviation from the artifact over 10,020 rows" in result.stdout
