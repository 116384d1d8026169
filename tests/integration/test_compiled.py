"""The compiled backend: the scores of the artifact it was made from, for any architecture; nothing damaged runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

import torch
from click.testing import CliRunner

from narsil.artifacts import compiled_info as compiled_module
from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.compiled_info import CompiledInfo
from narsil.artifacts.tbe import table_operators
from narsil.backends.base import Backend
from narsil.backends.compiled import load_compiled
from narsil.backends.fused import FusedBackend
from narsil.backends.inductor import InductorBackend
from narsil.backends.registry import load_backend
from narsil.bench.servers import narsil_server
from narsil.cli import cli
from narsil.client import Client
from narsil.compile import compiler as compiler_module
from narsil.compile import gate
from narsil.compile import options as options_module
from narsil.compile.calibration import load_calibration
from narsil.compile.compiler import compile_artifact
from narsil.compile.core import Core, DlrmParts, Int8Tables, Linear
from narsil.compile.gate import replay, usual_batches
from narsil.compile.options import PRECISIONS
from narsil.dataflow import Batch, Request
from narsil.engine.engine import Engine
from narsil.engine.served_model import ServedModel
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable
from narsil.packaging.packager import package_dlrm, quantized_module
from tests.fixtures_compiled import (
    HERE,
    SMALL,
    damage,
    flipped,
    needs_compiler,
    needs_fused,
    open_artifact_unchecked,
    rewrite,
)
from tests.fixtures_models import assert_invariant, batch_of, weights_of
from tests.float64 import Float64Dlrm, assert_explained
from tests.support import Reply, one_hot

pytestmark = [
    needs_compiler,
    pytest.mark.timeout(600),  # the first compile of a machine builds torch's headers too
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As lanes run: threads of one forward would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("longest", [None, 0, 1, 5], ids=["one id a bag", "all bags empty", "some empty", "multi-hot"])
@pytest.mark.parametrize("rows", [1, 2, 7, 100, 1000])
def test_inductor_scores_as_the_artifact(inductor, rows, longest):
    assert isinstance(inductor.backend, InductorBackend)
    batch = inductor.batch(rows, longest, seed=rows)
    assert_explained(inductor.scores(batch), inductor.true(batch), least=0.2 if longest != 0 else 0)


def test_ids_of_64_bits_score_the_same(pair):
    batch = pair.batch(10, 3)
    wide = Batch(batch.rows, batch.dense, batch.lengths, batch.values.astype(np.int64), one_hot=False)
    np.testing.assert_array_equal(pair.backend.run(wide)["default"], pair.backend.run(batch)["default"])


def test_every_id_matters(pair):
    batch = pair.batch(64, None)
    moved = Batch(batch.rows, batch.dense, batch.lengths, np.ascontiguousarray(batch.values[::-1]) % 3, one_hot=True)
    assert np.abs(pair.backend.run(batch)["default"] - pair.backend.run(moved)["default"]).max() > 1e-3


@pytest.mark.parametrize("longest", [None, 5])
def test_low_precision_deviates_by_what_it_rounds(pair, longest):
    batch = pair.batch(500, longest)
    assert pair.asked["precision"] in pair.kinds
    assert_explained(pair.scores(batch), pair.true(batch))


def test_bf16_takes_the_dense_vector_by_its_leading_bits_and_what_they_leave():
    """Of 1 + 2^-10, a bfloat16 alone would keep the 1."""

    def linear(*weights: list[float]) -> Linear:
        return Linear(torch.tensor(weights), torch.zeros(len(weights)))

    dense = linear([1.0, 0.0], [0.0, 1.0])
    over = (linear([1.0, -1.0, 0.0]), linear([1024.0]))  # their difference; the one product does not count
    parts = DlrmParts((dense,), over, Int8Tables(torch.zeros(0), (0,), 1), 1, 2, "sum")
    score = Core(parts, "bf16")(torch.tensor([[1 + 2.0**-10, 1.0]]), torch.zeros(1, 2))
    assert float(score) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=1e-6)


def test_the_manifest_says_how_far_it_deviates(pair):
    told = pair.compiled.manifest["compiled"]["deviation"]
    batches = list(usual_batches(pair.source.schema))
    found = np.concatenate([pair.scores(batch) for batch in batches])
    true = np.concatenate([pair.true(batch).value for batch in batches])
    assert told["rows"] == len(found) >= 10_000
    assert told["max_abs"] == pytest.approx(np.abs(found - true).max(), rel=1e-6)
    assert told["mean_abs"] == pytest.approx(np.abs(found - true).mean(), rel=1e-6)
    odds = [np.log(scores / (1 - scores)) for scores in (found.astype(np.float64), true)]
    assert told["log_odds"] == pytest.approx(np.abs(odds[0] - odds[1]).max(), rel=0.01, abs=1e-6)
    assert told["bias"] == pytest.approx(found.mean(dtype=np.float64) / true.mean() - 1, rel=1e-3, abs=1e-9)
    assert 0 < told["own_max_abs"] < 2e-6  # in fp32
    assert told["extreme_rows"] > 1_000
    assert told["extreme_mean_abs"] <= pair.compiled.manifest["compiled"]["limit"]
    ranks = np.array([np.argsort(np.argsort(scores)) for scores in (found, true)])
    assert told["rank_correlation"] == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-6)
    assert pair.compiled.name == "small"


class NotFromTheCacheError(Exception):
    """A compile got as far as making code."""


@pytest.fixture
def no_code(pair, monkeypatch) -> None:
    """For compiles that must not get as far as making code, the pair's own aside."""

    def refuse(*given: object, **options: object) -> None:
        raise NotFromTheCacheError

    monkeypatch.setattr(compiler_module, "_first_that_passes", refuse)


@pytest.mark.usefixtures("no_code")
def test_the_same_inputs_are_answered_from_the_cache(pair):
    again, cached = compile_artifact(pair.source, pair.out, **pair.asked)
    assert cached
    assert again.compiled == pair.compiled.compiled
    assert pair.cached is False


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
@pytest.mark.usefixtures("no_code")
def test_a_folder_that_is_no_answer_is_compiled_again(pair, copy, change):
    rewrite(copy.path, change)
    with pytest.raises(NotFromTheCacheError):
        compile_artifact(pair.source, copy.path, **pair.asked)
    assert open_artifact(copy.path, verify=True).compiled is not None
    assert [path.name for path in copy.path.parent.iterdir()] == ["copy"]


def test_compiling_over_the_artifact_itself_would_lose_its_graph(pair, tmp_path):
    shutil.copytree(pair.source.path, tmp_path / "model")
    graph = tmp_path / "model" / "graph.onnx"
    graph.write_bytes(b"a graph")
    entry = {"file": graph.name, "bytes": 7, "sha256": hashlib.sha256(b"a graph").hexdigest()}
    rewrite(tmp_path / "model", lambda manifest: manifest["files"].update(onnx=entry))
    with pytest.raises(ArtifactError, match="would lose its ONNX graph"):
        compile_artifact(open_artifact(tmp_path / "model"), tmp_path / "model")
    assert graph.exists()


def test_the_folder_stands_alone(pair, tmp_path):
    """No file of it is another name for one of the source's, which may be written to."""
    source = open_artifact(shutil.copytree(pair.source.path, tmp_path / "source"))
    compiled, _ = compile_artifact(source, tmp_path / "out", **pair.asked)
    theirs = {(path.stat().st_dev, path.stat().st_ino) for path in source.path.iterdir()}
    assert not theirs & {(path.stat().st_dev, path.stat().st_ino) for path in compiled.path.iterdir()}
    with source.torchscript.open("r+b") as file:  # tonight's model, saved in place
        file.write(bytes(1000))
    assert open_artifact(compiled.path, verify=True).damage == {}


def test_tables_that_hold_no_numbers_are_not_compiled(pair, tmp_path):
    module = quantized_module(SMALL, weights_of(SMALL), "cpu")
    (tables,) = table_operators(module)
    at = int(tables.weights_offsets[3])
    tables.weights_host[at + 2 : at + 4] = torch.tensor([np.nan], dtype=torch.float16).view(torch.uint8)
    module.save(str(tmp_path / "model_default.pt"))
    source = replace(pair.source, torchscript=tmp_path / "model_default.pt")
    with pytest.raises(ArtifactError, match="row 0 of table t_cat_3 is NaN or infinite"):
        compile_artifact(source, tmp_path / "out", **pair.asked)
    assert not (tmp_path / "out").exists()


def test_too_far_a_deviation_leaves_nothing(tmp_path, pair):
    with pytest.raises(ArtifactError, match=r"scores deviate by up to \d.* is allowed"):
        compile_artifact(pair.source, tmp_path / "out", **{**pair.asked, "limit": 1e-12})
    assert list(tmp_path.iterdir()) == []


def test_labelled_rows_tell_the_change_in_auc(pair, tmp_path):
    schema, random = pair.source.schema, np.random.default_rng(3)
    ids = random.integers(0, schema.rows, (600, schema.num_features)).astype(np.int32)
    labels = random.integers(0, 2, 600)
    np.savez(tmp_path / "rows.npz", dense=random.random((600, schema.dense_dim)), ids=ids, labels=labels)
    found = replay(pair.source, pair.compiled, load_calibration(tmp_path / "rows.npz", schema))["default"]
    assert found.labelled_rows == 600
    assert 0.3 < found.auc < 0.7
    assert abs(found.auc_change) < 0.01
    np.savez(tmp_path / "rows.npz", dense=random.random((600, schema.dense_dim)), ids=ids + 10_000)
    with pytest.raises(ArtifactError, match="outside of the model's tables"):
        load_calibration(tmp_path / "rows.npz", schema)


def test_another_lane_scores_the_same_at_the_same_time(pair):
    other = pair.backend.share()
    batch = pair.batch(300, 3)
    expected = pair.backend.run(batch)["default"]
    failures: list[str] = []

    def lane(backend: Backend) -> None:
        backend.thread_setup()
        for _ in range(200):
            if not np.array_equal(backend.run(batch)["default"], expected):
                failures.append("differs")

    threads = [threading.Thread(target=lane, args=(backend,)) for backend in (pair.backend, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    other.close()
    assert not failures


def test_runs_leave_no_memory_behind(pair):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    batch = pair.batch(64, None)
    for _ in range(2000):
        pair.backend.run(batch)
    before = resident()
    for _ in range(20_000):
        pair.backend.run(batch)
    assert resident() - before < 1000  # pages: 4 MB, where each run handles over 40 KB


def test_scores_are_the_callers_to_keep(pair):
    first = pair.backend.run(pair.batch(50, None, seed=1))["default"]
    kept = first.copy()
    pair.backend.run(pair.batch(50, None, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_two_lanes_serve_it(pair):
    backend = load_backend(open_artifact(pair.out), "auto", "cpu")
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
        expected = pair.reference.run(alone)["default"]
        np.testing.assert_allclose(reply.wait().scores["default"], expected, atol=0.1, rtol=0)
    assert engine.drain(10)


def test_another_processor_is_refused_and_auto_falls_back(copy, monkeypatch, caplog):
    monkeypatch.setattr(compiled_module, "processor_flags", lambda: ("sse2",))
    with pytest.raises(ArtifactError, match=r"compiled for a processor with .* which this one lacks.*`narsil compile`"):
        load_backend(open_artifact(copy.path), "compiled")
    assert load_backend(open_artifact(copy.path), "auto", "cpu").name == "torch"
    assert "which this one lacks" in caplog.text
    assert "Falling back to the torch backend" in caplog.text


def test_another_torch_matters_to_code_that_calls_into_it(copy, caplog):
    rewrite(copy.path, lambda manifest: manifest["compiled"].update(torch="1.0.0"))
    if copy.weights is not None:  # the fused engine's
        assert load_backend(open_artifact(copy.path), "auto", "cpu").name == "compiled"
        return
    with pytest.raises(ArtifactError, match=r"compiled with torch 1\.0\.0 .* `narsil compile`"):
        load_backend(open_artifact(copy.path), "compiled")
    assert load_backend(open_artifact(copy.path), "auto", "cpu").name == "torch"
    assert "Falling back to the torch backend" in caplog.text


@pytest.mark.parametrize("copy_tables", [True, False])
def test_with_copied_tables_nobody_else_can_change_a_score(copy, pair, copy_tables):
    backend = load_backend(open_artifact(copy.path), "compiled", copy_tables=copy_tables)
    batch = pair.batch(50, 3)
    before = np.array(backend.run(batch)["default"])
    with copy.tables.open("r+b") as file:  # in place, as a careless copy does it
        file.write(bytes(copy.tables.stat().st_size))
    assert np.array_equal(backend.run(batch)["default"], before) == copy_tables


def compiled_files(artifact: Artifact) -> list[Path]:
    return [path for path in (artifact.compiled, artifact.tables, artifact.weights) if path is not None]


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


def test_auto_falls_back_from_a_wrong_checksum_and_compiled_refuses(copy, pair, caplog):
    damage(copy.compiled, flipped)
    artifact = open_artifact(copy.path)
    backend = load_backend(artifact, "auto", "cpu")
    assert backend.name == "torch"
    assert "does not match the SHA-256" in caplog.text
    assert "Falling back to the torch backend" in caplog.text
    batch = pair.batch(20, 3)
    expected = pair.reference.run(batch)["default"]
    np.testing.assert_allclose(backend.run(batch)["default"], expected, atol=1e-5, rtol=0)
    with pytest.raises(ArtifactError, match=r"does not match the SHA-256"):
        load_backend(artifact, "compiled")
    copy.tables.unlink()
    artifact = open_artifact(copy.path)
    assert load_backend(artifact, "auto", "cpu").name == "torch"
    with pytest.raises(ArtifactError, match=r"does not match the SHA-256|tables\.bin is listed"):
        load_backend(artifact, "compiled", "cpu")


def test_tables_that_hold_no_numbers_are_refused_and_auto_falls_back(copy, caplog):
    """As an earlier compile may have written them, checksums and all."""
    compiled = copy.manifest["compiled"]
    feature, start = copy.schema.features[2], compiled["offsets"][2]
    row_bytes = CompiledInfo.from_manifest(copy.manifest, copy.schema, copy.tables.stat().st_size).row_bytes

    def poison(content: bytearray) -> bytes:
        at = start + 5 * row_bytes
        content[at : at + 2] = np.float16(np.inf).tobytes()
        return bytes(content)

    damage(copy.tables, poison)
    checksum = hashlib.sha256(copy.tables.read_bytes()).hexdigest()
    rewrite(copy.path, lambda manifest: manifest["files"]["tables"].update(sha256=checksum))
    with pytest.raises(ArtifactError, match=rf"tables\.bin: row 5 of table {feature.table} is NaN or infinite"):
        load_backend(open_artifact(copy.path), "compiled")
    assert load_backend(open_artifact(copy.path), "auto", "cpu").name == "torch"
    assert "Falling back to the torch backend" in caplog.text


def test_a_folder_for_another_device_is_refused_and_auto_falls_back(copy, caplog):
    rewrite(copy.path, lambda manifest: manifest["compiled"].update(device="cuda", engine="inductor"))
    with pytest.raises(ArtifactError, match=r"compiled for cuda and cannot run on cpu; use --device cuda"):
        load_backend(open_artifact(copy.path), "compiled", "cpu")
    assert load_backend(open_artifact(copy.path), "auto", "cpu").name == "torch"
    assert "compiled for cuda and cannot run on cpu" in caplog.text
    assert "Falling back to the torch backend" in caplog.text


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
        (lambda m: m["schema"]["features"][0].update(least=-1), "begin below 0"),
        (lambda m: m["schema"].update(dense_dim=500), "differ"),
        (lambda m: m["schema"].update(tasks=["default", "other"]), "differ"),
        (lambda m: m["compiled"].update(dim=True), "wrong types"),
        (lambda m: m["compiled"].update(engine="fused", device="cuda"), "engine 'fused' on 'cuda'"),
        (lambda m: m["compiled"].update(limit=float("nan")), "limit or deviation"),
        (lambda m: m["compiled"].update(limit=True), "limit or deviation"),
        (lambda m: m["compiled"].update(limit=-1), "limit or deviation"),
        (lambda m: m["compiled"].update(limit=10**400), "limit or deviation"),
        (lambda m: m["compiled"].update(deviation={}), "compiled section is damaged"),
        (lambda m: m["compiled"].update(deviations=[]), "compiled section is damaged"),
        (lambda m: m["compiled"].update(deviations={"default": {}}), "compiled section is damaged"),
        (
            lambda m: m["compiled"].update(deviations={"a": {**m["compiled"]["deviation"], "max_abs": 7}}),
            "limit or deviation",
        ),
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
def test_layers_that_do_not_fit_their_weights_are_refused(fused, tmp_path, change, says):
    assert isinstance(fused.backend, FusedBackend)
    shutil.copytree(fused.out, tmp_path / "copy")
    rewrite(tmp_path / "copy", change)
    with pytest.raises(ArtifactError, match=says):
        load_backend(open_artifact(tmp_path / "copy"), "compiled")


@needs_fused
def test_auto_takes_what_is_fast_and_says_why(tmp_path):
    source = package_dlrm(SMALL, weights_of(SMALL), tmp_path / "source", onnx=False)
    compiled, _ = compile_artifact(source, tmp_path / "out", precision="auto")
    info = compiled.manifest["compiled"]
    assert info["precision"] in HERE
    assert info["note"].startswith(f"{info['precision']} pays here: rows a second of one lane within the limit are ")
    kinds = [layer["kind"] for layer in info["layers"][:-1]]
    true = Float64Dlrm(SMALL, weights_of(SMALL), source.torchscript)
    backend = load_compiled(compiled)
    for longest in (None, 5):
        batch = batch_of(source.schema.rows.tolist(), source.schema.dense_dim, 500, longest=longest)
        assert_explained(backend.run(batch)["default"], true.scores(batch, kinds))


@needs_compiler
@pytest.mark.parametrize("engine", ["auto", "inductor"])
def test_auto_falls_back_to_fp32_where_the_gate_lets_nothing_else_pass(tmp_path, monkeypatch, engine):
    asked = []

    def limits_for(precision, limit, deviation):
        asked.append(precision)
        return gate.limits_for(precision, limit, deviation) if precision == "fp32" else gate.limits_of(0.0)

    monkeypatch.setattr(compiler_module, "limits_for", limits_for)
    source = package_dlrm(SMALL, weights_of(SMALL), tmp_path / "source", onnx=False)
    compiled, _ = compile_artifact(source, tmp_path / "out", engine=engine)
    info = compiled.manifest["compiled"]
    assert (info["precision"], asked[-1]) == ("fp32", "fp32")
    assert {layer["kind"] for layer in info["layers"]} <= {"fp32"}
    assert info["deviation"]["max_abs"] <= info["limit"] < 1e-5
    batch = batch_of(source.schema.rows.tolist(), source.schema.dense_dim, 100)
    true = Float64Dlrm(SMALL, weights_of(SMALL), source.torchscript).scores(batch, ["fp32"] * (len(SMALL.linears) - 1))
    np.testing.assert_allclose(load_compiled(compiled).run(batch)["default"], true.value, atol=2e-6)


@needs_compiler
def test_what_fails_fails_for_the_last_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler_module, "limits_for", lambda *given: gate.limits_of(0.0))
    source = package_dlrm(SMALL, weights_of(SMALL), tmp_path / "source", onnx=False)
    with pytest.raises(ArtifactError, match=r"compiled in fp32, scores deviate by .* To serve it so, allow more with"):
        compile_artifact(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_invariant_by_inductor(inductor):
    backend = load_compiled(inductor.compiled, batch_invariant=True)
    assert_invariant(backend, backend.share(), inductor.source.schema)


@needs_fused
def test_batch_invariant_asks_for_the_compiled_backend(pair):
    with pytest.raises(ConfigError, match=r"batch_invariant needs the compiled backend, not torch.*narsil compile"):
        load_backend(pair.source, "torch", batch_invariant=True)
    assert load_backend(pair.compiled, "auto", "cpu", batch_invariant=True).name == "compiled"


def test_what_cannot_be_compiled_says_why(pair, tmp_path, monkeypatch):
    def compiling(**options: object) -> None:
        compile_artifact(pair.source, tmp_path / "out", **options)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="precision must be one of auto, fp32, bf16, int8, not 'fp64'"):
        compiling(precision="fp64")
    with pytest.raises(ConfigError, match="engine must be one of"):
        compiling(engine="steam")
    with pytest.raises(ConfigError, match="int8 needs the fused engine"):
        compiling(precision="int8", engine="inductor")
    with pytest.raises(ConfigError, match="between 0 and 1, not nan"):
        compiling(limit=float("nan"))
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="compiling for cuda needs a GPU"):
            compiling(device="cuda")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ArtifactError, match="holds mine"):
        compiling()
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    assert set(PRECISIONS) == {"fp32", "bf16", "int8", "auto"}


def test_a_processor_without_the_instructions_is_told(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(options_module, "processor_flags", lambda: ("avx2",))
    with pytest.raises(ConfigError, match="the fused engine runs on x86 processors with AVX-512"):
        compile_artifact(pair.source, tmp_path / "out", engine="fused")
    with pytest.raises(ConfigError, match="int8 needs the fused engine"):
        compile_artifact(pair.source, tmp_path / "out", precision="int8")
    flags = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c", "fma")
    monkeypatch.setattr(options_module, "processor_flags", lambda: flags)
    with pytest.raises(ConfigError, match="no vector instructions for int8"):
        compile_artifact(pair.source, tmp_path / "out", precision="int8")


def test_a_machine_without_a_compiler_is_told(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"compiling needs a C\+\+ compiler: install g\+\+"):
        compile_artifact(pair.source, tmp_path / "out")


def test_verify_holds_a_running_server_against_the_artifact(pair):
    with narsil_server(pair.out, backend="auto", lanes=2) as server:
        given = ["verify", "--target", server.address, "--model", str(pair.source.path), "--json"]
        result = CliRunner().invoke(cli, [*given, "--max-deviation", "0.1"])
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["backend"] == "compiled"
        assert set(told["tasks"]) == {"default"}
        assert told["tasks"]["default"]["rows"] >= 10_000
        assert 0 < told["tasks"]["default"]["max_abs"] <= 0.1
        strict = CliRunner().invoke(cli, [*given, "--max-deviation", "0"])
        assert isinstance(strict.exception, ArtifactError)


def test_compile_on_the_command_line_is_answered_from_the_cache(pair):
    asked = {"--precision": "precision", "--engine": "engine", "--max-deviation": "limit"}
    options = [text for option, name in asked.items() for text in (option, str(pair.asked[name]))]
    options += ["--out", str(pair.out)]
    result = CliRunner().invoke(cli, ["compile", str(pair.source.path), *options])
    assert result.exit_code == 0, result.output
    assert "already compiled from these inputs" in result.stdout
    assert "deviation from the artifact in float64 over 10,020 rows" in result.stdout
    for line in (
        "log-odds: max deviation",
        "repeated ids or large values: mean deviation",
        "the artifact's own scores",
    ):
        assert line in result.stdout
