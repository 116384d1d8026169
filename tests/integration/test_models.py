"""From weights to scores: what is packaged scores as the FP32 model does, on every backend and shape of batch."""

from __future__ import annotations

import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fbgemm_gpu")
pytest.importorskip("onnxruntime")

from click.testing import CliRunner  # noqa: E402

from narsil.artifacts.artifact import MANIFEST, Artifact, open_artifact  # noqa: E402
from narsil.artifacts.tbe import check_table_values  # noqa: E402
from narsil.artifacts.torchrec import derive_schema  # noqa: E402
from narsil.backends.onnx import OnnxBackend  # noqa: E402
from narsil.backends.registry import load_backend  # noqa: E402
from narsil.cli import cli  # noqa: E402
from narsil.dataflow import Batch, Floats  # noqa: E402
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable, NarsilError  # noqa: E402
from narsil.packaging.checkpoint import load_checkpoint  # noqa: E402
from narsil.packaging.dlrm import DlrmConfig, random_weights, table_key  # noqa: E402
from narsil.packaging.modules import Dlrm, fp32_model, fp32_scores, load_weights  # noqa: E402
from narsil.packaging.packager import package_dlrm, quantized_module  # noqa: E402
from tests.fixtures_models import batch_of, small  # noqa: E402

ONNX_DATA = "narsil_dlrm_default.onnx.data"
INT8_ERROR = 0.03  # of a score, with rows of 255 steps and up to a dozen ids per bag
ROUNDING = 1e-5


def batch_for(artifact: Artifact, rows: int, longest: int | None = None) -> Batch:
    return batch_of(artifact.schema.rows.tolist(), artifact.schema.dense_dim, rows, longest=longest)


def reference(config: DlrmConfig, weights: dict[str, Floats], batch: Batch) -> Floats:
    return fp32_scores(fp32_model(config, weights), batch.dense, batch.lengths, batch.values)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("longest", [None, 0, 1, 3, 12], ids=lambda n: "one-hot" if n is None else f"up to {n} ids")
@pytest.mark.parametrize("rows", [1, 3, 257])
def test_scores_are_those_of_the_fp32_model(
    small_artifact: Artifact, mean_artifact: Artifact, backend: str, pooling: str, longest: int | None, rows: int
) -> None:
    artifact = small_artifact if pooling == "sum" else mean_artifact
    config = small(pooling)
    batch = batch_for(artifact, rows, longest)
    scores = load_backend(artifact, backend).run(batch)["default"]
    expected = reference(config, random_weights(config), batch)
    assert scores.shape == (rows,)
    assert scores.dtype == np.float32
    assert np.abs(scores - expected).max() < (ROUNDING if backend == "onnx" else INT8_ERROR)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_scores_spread_so_that_mistakes_show(small_artifact: Artifact, backend: str) -> None:
    scores = load_backend(small_artifact, backend).run(batch_for(small_artifact, 500))["default"]
    logits = np.log(scores / (1 - scores))
    assert 0.5 < logits.std() < 2
    assert len(np.unique(scores)) > 490


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_sample_major_ids_taken_for_key_major_change_the_scores(small_artifact: Artifact, backend: str) -> None:
    rows, tables = 20, small_artifact.schema.num_features
    batch = batch_of([7] * tables, 5, rows)  # ids valid in every table, so that only their order can tell
    model = load_backend(small_artifact, backend)
    swapped = replace(batch, values=np.ascontiguousarray(batch.values.reshape(tables, rows).T).reshape(-1))
    difference = np.abs(model.run(batch)["default"] - model.run(swapped)["default"])
    assert difference.max() > 0.05


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("longest", [None, 3])
def test_a_row_scores_the_same_in_every_company(small_artifact: Artifact, backend: str, longest: int | None) -> None:
    rows, tables = 40, small_artifact.schema.num_features
    batch = batch_for(small_artifact, rows, longest)
    model = load_backend(small_artifact, backend)
    together = model.run(batch)["default"]
    starts = np.concatenate([[0], batch.lengths.cumsum()[:-1]]).reshape(tables, rows)
    lengths = batch.lengths.reshape(tables, rows)
    for row in (0, 17, rows - 1):
        bags = [batch.values[start : start + size] for start, size in zip(starts[:, row], lengths[:, row], strict=True)]
        alone = Batch(
            1,
            batch.dense[row : row + 1],
            lengths[:, row].copy(),
            np.concatenate(bags),
            bool((lengths[:, row] == 1).all()),
        )
        assert model.run(alone)["default"][0] == pytest.approx(together[row], abs=1e-6)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_read_only_arrays_and_int64_ids_run_too(small_artifact: Artifact, backend: str) -> None:
    batch = batch_for(small_artifact, 9)
    model = load_backend(small_artifact, backend)
    expected = model.run(batch)["default"]
    for array in (batch.dense, batch.lengths, batch.values):
        array.flags.writeable = False
    assert np.array_equal(model.run(batch)["default"], expected)
    wide = replace(batch, values=batch.values.astype(np.int64))
    assert np.array_equal(model.run(wide)["default"], expected)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_lanes_over_the_same_weights_agree(small_artifact: Artifact, backend: str) -> None:
    first = load_backend(small_artifact, backend)
    batches = [batch_of(small_artifact.schema.rows.tolist(), 5, 64, seed=seed) for seed in range(20)]
    expected = [first.run(batch)["default"] for batch in batches]
    found: dict[int, list[Floats]] = {}

    def lane(number: int) -> None:
        backend = first.share()
        backend.thread_setup()
        found[number] = [backend.run(batch)["default"] for batch in batches]
        backend.close()

    threads = [threading.Thread(target=lane, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scores in found.values():
        assert all(np.allclose(score, want, atol=1e-6) for score, want in zip(scores, expected, strict=True))
    assert len(found) == 3


# -- artifacts ---------------------------------------------------------------------------------------------------------


def test_the_schema_read_from_torchscript_is_the_manifests(small_artifact: Artifact) -> None:
    assert small_artifact.torchscript is not None
    assert derive_schema(small_artifact.torchscript) == (small_artifact.schema, "cpu")


def test_a_bare_artifact_is_named_after_its_folder_as_far_as_that_is_a_name(
    small_artifact: Artifact, tmp_path: Path
) -> None:
    assert small_artifact.torchscript is not None
    (tmp_path / "my modèl (1)").mkdir()
    shutil.copy(small_artifact.torchscript, tmp_path / "my modèl (1)" / "model_default.pt")
    assert open_artifact(tmp_path / "my modèl (1)").name == "my_mod_l__1_"


def test_torchscript_alone_is_an_artifact(small_artifact: Artifact, tmp_path: Path) -> None:
    assert small_artifact.torchscript is not None
    shutil.copy(small_artifact.torchscript, tmp_path / "model_default.pt")
    bare = open_artifact(tmp_path)
    assert bare.manifest is None
    assert bare.schema == small_artifact.schema
    assert load_backend(bare).name == "torch"


def test_the_artifact_has_the_submodules_that_torchrecs_has(small_artifact: Artifact) -> None:
    module = torch.jit.load(str(small_artifact.torchscript))
    paths = {path for path, _ in module.named_modules()}
    assert {
        "_module.dense_arch.model._mlp.0._linear",
        "_module.dense_arch.model._mlp.1._linear",
        "_module.sparse_arch.embedding_bag_collection.tbes.0",
        "_module.over_arch.model.0._mlp.0._linear",
        "_module.over_arch.model.0._mlp.1._linear",
        "_module.over_arch.model.1",
    } <= paths


def test_auto_prefers_torch_and_takes_onnx_where_there_is_nothing_else(small_artifact: Artifact) -> None:
    assert load_backend(small_artifact).name == "torch"
    assert load_backend(replace(small_artifact, torchscript=None)).name == "onnx"
    assert load_backend(replace(small_artifact, device="cuda:0"), device="cpu").name == "onnx"


@pytest.mark.parametrize(
    ("lost", "served"), [("model_default.pt", "onnx"), ("narsil_dlrm_default.onnx", "torch"), (ONNX_DATA, "torch")]
)
def test_a_lost_file_stops_nobody_who_does_not_need_it(
    small_artifact: Artifact, tmp_path: Path, lost: str, served: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_artifact.path, copy)
    (copy / lost).unlink()
    artifact = open_artifact(copy)
    assert load_backend(artifact, served).name == served
    if served == "torch":
        assert load_backend(artifact, "auto").name == served
    else:  # whose scores are others: nobody gets them without asking
        with pytest.raises(ArtifactError, match=f"{lost} is listed in"):
            load_backend(artifact, "auto")
    assert f"{lost} is listed in manifest.json but is not there" in caplog.text
    with pytest.raises(ArtifactError, match=f"{lost} is listed in"):
        load_backend(artifact, "onnx" if served == "torch" else "torch")
    inspected = CliRunner().invoke(cli, ["inspect", str(copy), "--json"])
    assert f"{lost} is listed in" in str(inspected.exception)
    assert {file["file"]: file["checksum"] for file in json.loads(inspected.output)["files"]} == {
        "model_default.pt": "ok",
        "narsil_dlrm_default.onnx": "ok",
        ONNX_DATA: "ok",
    } | {lost: "damaged"}


@pytest.mark.parametrize("copied", [False, True])
def test_copied_onnx_tables_are_out_of_reach_of_what_is_written_to_the_file(
    small_artifact: Artifact, tmp_path: Path, copied: bool
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_artifact.path, copy)
    backend = OnnxBackend.load(open_artifact(copy), copy_tables=copied)
    batch = batch_for(small_artifact, 20)
    before = backend.run(batch)["default"]
    assert np.array_equal(before, load_backend(small_artifact, "onnx").run(batch)["default"])
    with (copy / ONNX_DATA).open("r+b") as file:
        file.write(bytes((copy / ONNX_DATA).stat().st_size))
    assert np.array_equal(backend.run(batch)["default"], before) == copied


def test_backends_that_cannot_run_say_why(small_artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="has no TorchScript file; use --backend onnx"):
        load_backend(replace(small_artifact, torchscript=None), "torch")
    with pytest.raises(ArtifactError, match="has no ONNX graph"):
        load_backend(replace(small_artifact, onnx=None), "onnx")
    with pytest.raises(ArtifactError, match="is packaged for cpu and cannot run on cuda"):
        load_backend(small_artifact, "torch", "cuda")
    with pytest.raises(DeviceUnavailable, match="the onnx backend runs on the cpu"):
        load_backend(small_artifact, "onnx", "cuda")
    with pytest.raises(ConfigError, match="backend must be auto, torch, onnx or compiled"):
        load_backend(small_artifact, "tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_cuda_where_there_is_none_is_refused(
    small_artifact: Artifact, small_config: DlrmConfig, tmp_path: Path
) -> None:
    with pytest.raises(DeviceUnavailable, match="cuda is not on this machine"):
        package_dlrm(small_config, random_weights(small_config), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DeviceUnavailable, match="is packaged for cuda:0, which is not on this machine"):
        load_backend(replace(small_artifact, device="cuda:0"), "torch", "cuda")


def test_a_manifest_that_promises_more_rows_than_the_tables_have_is_refused(
    small_artifact: Artifact, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_artifact.path, copy)
    manifest: dict[str, Any] = json.loads((copy / MANIFEST).read_text())
    manifest["schema"]["features"][1]["rows"] = 8
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="feature cat_1 has 7 rows of 16, the manifest says cat_1, 8 of 16"):
        load_backend(open_artifact(copy), "torch")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "is a torch.save pickle, not TorchScript"),
        (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "does not take one Dict"),
    ],
)
def test_foreign_files_are_told_apart(tmp_path: Path, make: Any, message: str) -> None:
    file = tmp_path / "model_default.pt"
    make(str(file))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(file)


@pytest.mark.parametrize(
    ("attribute", "position", "value", "message"),
    [
        ("rows_per_table", 3, 10_000, "table 3 lies from byte .*: ids would be read out of bounds"),
        ("weights_offsets", 2, 10**9, "table 2 lies from byte 1000000000"),
        ("weights_offsets", 2, -64, "table 2 lies from byte -64"),
        ("D_offsets", 1, 4096, "dims do not add up"),
        ("weights_tys", 0, 0, "table 0 lies from byte 0 to 3200"),
        ("weights_tys", 0, 77, "tables of FBGEMM's type 77 are unknown"),
    ],
)
def test_tables_that_would_be_read_out_of_bounds_are_refused(
    tmp_path: Path, attribute: str, position: int, value: int, message: str
) -> None:
    config = small(rows=50)
    module = quantized_module(config, random_weights(config), "cpu")
    tbe = dict(module.named_modules())["_module.sparse_arch.embedding_bag_collection.tbes.0"]
    getattr(tbe, attribute)[position] = value
    module.save(str(tmp_path / "model_default.pt"))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(tmp_path)


TBE = "_module.sparse_arch.embedding_bag_collection.tbes.0"


def spoil_scale(module: Any) -> None:
    """Of row 5 of table t_cat_2."""
    tbe = dict(module.named_modules())[TBE]
    at = int(tbe.weights_offsets[2]) + 5 * (16 + 4)
    tbe.weights_host[at : at + 2] = torch.tensor([float("inf")], dtype=torch.float16).view(torch.uint8)


def spoil_layer(module: Any) -> None:
    dict(module.named_parameters())["_module.over_arch.model.1.bias"].fill_(float("-inf"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_scale, r"model_default\.pt: row 5 of table t_cat_2 is NaN or infinite"),
        (spoil_layer, r"row 0 of _module\.over_arch\.model\.1\.bias is NaN or infinite"),
    ],
)
def test_a_module_whose_weights_are_no_numbers_is_never_served(
    small_artifact: Artifact, small_config: DlrmConfig, tmp_path: Path, spoil: Any, message: str
) -> None:
    module = quantized_module(small_config, random_weights(small_config), "cpu")
    spoil(module)
    module.save(str(tmp_path / "model_default.pt"))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(tmp_path)  # bare: the schema is derived
    with pytest.raises(ArtifactError, match=message):
        load_backend(replace(small_artifact, torchscript=tmp_path / "model_default.pt"), "torch")


@pytest.mark.parametrize(("kind", "value"), [(torch.float32, float("nan")), (torch.float16, float("inf"))])
def test_tables_of_plain_floats_are_looked_at_too(kind: Any, value: float) -> None:
    stored = torch.zeros(3, 8, dtype=kind)
    stored[2, 7] = value
    size = stored.element_size()
    tbe = SimpleNamespace(
        rows_per_table=torch.tensor([3]),
        feature_table_map=[0],
        D_offsets=torch.tensor([0, 8]),
        weights_offsets=torch.tensor([0]),
        weights_tys=torch.tensor([0 if size == 4 else 1]),
        weights_placements=torch.tensor([3]),
        weights_host=stored.view(torch.uint8).flatten(),
        scale_bias_size_in_bytes=4,
        row_alignment=1,
    )
    with pytest.raises(ArtifactError, match="m: row 2 of table number 0 is NaN or infinite"):
        check_table_values(tbe, "m")


def test_a_truncated_archive_is_refused(small_artifact: Artifact, tmp_path: Path) -> None:
    assert small_artifact.torchscript is not None
    whole = small_artifact.torchscript.read_bytes()
    file = tmp_path / "model_default.pt"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="is truncated or damaged"):
        open_artifact(file)


def test_a_damaged_graph_is_refused(small_artifact: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_artifact.path, copy)
    graph = copy / "narsil_dlrm_default.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_backend(open_artifact(copy, verify=False), "onnx")


# -- quantization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: -70_000.0}, r"table t_cat_1: row 3 holds weights from -70000 to .*: their scale and bias are FP16"),
        ({3: 1e38}, r"table t_cat_1: row 3 holds weights from .* to 1e\+38"),
    ],
    ids=["the bias overflows", "the scale overflows"],
)
def test_finite_weights_that_int8_rows_cannot_hold_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    config, weights = small(), random_weights(small())
    for row, value in change.items():
        weights[table_key("t_cat_1")][row, 2] = value
    with pytest.raises(ArtifactError, match=message):
        package_dlrm(config, weights, tmp_path / "model", onnx=False)
    assert not (tmp_path / "model").exists()


def test_weights_at_the_edge_of_what_int8_rows_hold_are_served(tmp_path: Path) -> None:
    config, weights = small(), random_weights(small())
    weights[table_key("t_cat_1")][3] = -65_504.0
    artifact = package_dlrm(config, weights, tmp_path / "model", onnx=False)
    batch = batch_for(artifact, 200)
    assert 3 in batch.values
    assert np.isfinite(load_backend(artifact, "torch").run(batch)["default"]).all()


# -- packaging ---------------------------------------------------------------------------------------------------------


def test_packaging_again_replaces_the_earlier_artifact_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    first, second = small(), replace(small(), rows=(9, 9, 9, 9))
    package_dlrm(first, random_weights(first), out, onnx=True)
    package_dlrm(second, random_weights(second), out, onnx=False)
    artifact = open_artifact(out)
    assert artifact.schema == second.schema
    assert {entry.name for entry in out.iterdir()} == {MANIFEST, "model_default.pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a b"], "name must be made of 1 to 256 letters, digits and _.-/:, not 'a b'"),
        (["--name", ""], "name must be made of"),
        (["--version", "v\n1"], r"version must be made of .*, not 'v\\n1'"),
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N, not 'tpu'"),
        (["--out", "file"], "file is a file; give the folder"),
        (["--out", "file/model"], "file/model cannot be written: Not a directory"),
        (["--out", "others"], r"others holds thesis\.tex, which is no part of an earlier artifact"),
    ],
)
def test_what_is_bound_to_fail_is_refused_before_the_work_and_leaves_the_earlier_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    package_dlrm(small(), random_weights(small()), Path("model"), onnx=False, name="good")
    Path("file").write_text("x")
    Path("others").mkdir()
    Path("others/thesis.tex").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("narsil.cli.package.random_weights", lambda _: pytest.fail("the work has begun"))
    done = CliRunner().invoke(cli, ["package", "dlrm", "--out", "model", *options])
    assert isinstance(done.exception, NarsilError), done.output
    assert re.search(message, str(done.exception))
    assert open_artifact("model").name == "good"
    assert sorted(tmp_path.rglob("*")) == before


def test_compile_looks_at_out_before_it_reads_the_model(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = CliRunner().invoke(cli, ["compile", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert "holds thesis.tex" in str(done.exception)


def test_other_peoples_files_are_never_replaced(tmp_path: Path) -> None:
    config = small()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"holds thesis\.tex, which is no part of an earlier artifact"):
        package_dlrm(config, random_weights(config), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failed_packaging_leaves_the_earlier_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, config = tmp_path / "model", small()
    package_dlrm(config, random_weights(config), out, onnx=False)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("narsil.artifacts.artifact.write_manifest", full)
    with pytest.raises(ArtifactError, match="No space left"):
        package_dlrm(config, random_weights(config), out, onnx=False)
    assert open_artifact(out).schema == config.schema
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_command_line_packages_and_inspects(tmp_path: Path) -> None:
    out = str(tmp_path / "model")
    sizes = ["--rows", "10,20,30", "--dim", "8", "--dense-arch", "16,8", "--over-arch", "16,1", "--dense-features", "3"]
    done = CliRunner().invoke(cli, ["package", "dlrm", "--out", out, *sizes, "--name", "ads", "--version", "7"])
    assert done.exit_code == 0, done.output
    assert f"Next: narsil serve --model {out}" in done.output
    done = CliRunner().invoke(cli, ["inspect", out, "--json"])
    described = json.loads(done.output)
    assert (described["name"], described["version"], described["device"]) == ("ads", "7", "cpu")
    assert [feature["rows"] for feature in described["schema"]["features"]] == [10, 20, 30]
    assert {file["checksum"] for file in described["files"]} == {"ok"}


def test_the_command_line_packages_a_checkpoint(tmp_path: Path) -> None:
    config, out = small(), str(tmp_path / "model")
    state = {name: torch.from_numpy(array) for name, array in random_weights(config).items()}
    torch.save(state, tmp_path / "trained.pt")
    arguments = ["package", "dlrm", "--out", out, "--checkpoint", str(tmp_path / "trained.pt")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    artifact = open_artifact(out)
    assert artifact.schema == config.schema
    assert artifact.manifest is not None
    assert artifact.manifest["architecture"]["origin"] == "trained.pt"
    refused = CliRunner().invoke(cli, [*arguments, "--dim", "8"])
    assert "--dim contradicts --checkpoint" in str(refused.exception)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_a_torch_checkpoint_gives_architecture_and_weights(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    config = small()
    model = Dlrm(config)
    load_weights(model, random_weights(config))
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "trained.pt")
    found, weights = load_checkpoint(tmp_path / "trained.pt")
    assert found.schema == config.schema
    assert found.linears == config.linears
    assert all(np.array_equal(weights[name], array) for name, array in random_weights(config).items())


KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_checkpoints_of_half_precision_are_read_as_fp32(tmp_path: Path, kind: Any, suffix: str) -> None:
    state = {name: torch.from_numpy(array).to(kind) for name, array in random_weights(small()).items()}
    found, weights = load_checkpoint(saved(state, tmp_path / f"trained.{suffix}"))
    assert found.schema == small().schema
    for name, tensor in state.items():
        assert weights[name].dtype == np.float32
        assert np.array_equal(weights[name], tensor.float().numpy())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool], ids=str)
def test_checkpoints_of_other_kinds_are_refused(tmp_path: Path, kind: Any, suffix: str) -> None:
    state = {name: torch.from_numpy(array) for name, array in random_weights(small()).items()}
    state[table_key("t_cat_1")] = state[table_key("t_cat_1")].to(kind)
    said = f"t_cat_1.weight is {str(kind)[6:]}; weights are read from float32, bfloat16, float16, float64: convert it"
    with pytest.raises(ArtifactError, match=said):
        load_checkpoint(saved(state, tmp_path / f"trained.{suffix}"))


def saved(state: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, str(path))
    else:
        torch.save(state, path)
    return path


def test_fp64_weights_beyond_fp32_are_refused(tmp_path: Path) -> None:
    state = {name: torch.from_numpy(array).double() for name, array in random_weights(small()).items()}
    state["over_arch.model.1.bias"][0] = 1e300
    with pytest.raises(ArtifactError, match=r"row 0 of over_arch\.model\.1\.bias is NaN or infinite"):
        load_checkpoint(saved(state, tmp_path / "trained.pt"))


def test_a_safetensors_checkpoint_keeps_numbered_tables_in_order(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    config = DlrmConfig(tables=12, rows=tuple(range(5, 17)), dim=8, dense_features=3, dense_arch=(8,), over_arch=(8, 1))
    save_file(random_weights(config), str(tmp_path / "trained.safetensors"))
    found, _ = load_checkpoint(tmp_path / "trained.safetensors")
    assert [feature.rows for feature in found.schema.features] == list(range(5, 17))


def test_a_safetensors_checkpoint_of_unnumbered_tables_needs_their_order(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    config = replace(small(), feature_names=("user", "ad", "shop", "hour"))
    save_file(random_weights(config), str(tmp_path / "trained.safetensors"))
    with pytest.raises(ArtifactError, match="does not keep its tables' order"):
        load_checkpoint(tmp_path / "trained.safetensors")
    found, _ = load_checkpoint(tmp_path / "trained.safetensors", features=("user", "ad", "shop", "hour"))
    assert found.schema == config.schema
    with pytest.raises(ArtifactError, match="names day, which is not among them"):
        load_checkpoint(tmp_path / "trained.safetensors", features=("user", "ad", "shop", "day"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("over_arch.model.1.bias"), r"lacks over_arch\.model\.1\.bias"),
        (lambda w: w.pop("over_arch.model.1.weight"), r"lacks the matrix over_arch\.model\.1\.weight"),
        (lambda w: w.pop("dense_arch.model._mlp.0._linear.weight"), "it is not a DLRM's checkpoint"),
        (lambda w: w.update({"inter_arch.crossnet.0": torch.zeros(2)}), "a DLRM with dot interaction has no place for"),
        (lambda w: w.update({table_key("t_cat_1"): torch.zeros(7, 12)}), r"has shape \(7, 12\)"),
        (
            lambda w: w.update({table_key("t_cat_1"): torch.zeros(7, 16, dtype=torch.int64)}),
            "is int64; weights are read",
        ),
        (
            lambda w: w["over_arch.model.1.bias"].fill_(float("nan")),
            r"row 0 of over_arch\.model\.1\.bias is NaN or infinite",
        ),
        (lambda w: w.update({"module.over_arch.model.1.bias": torch.zeros(1)}), "twice, under two prefixes"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path: Path, change: Any, message: str) -> None:
    config = small()
    state = {name: torch.from_numpy(array) for name, array in random_weights(config).items()}
    change(state)
    torch.save(state, tmp_path / "trained.pt")
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path / "trained.pt")


def test_a_checkpoint_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "trained.pt")
    with pytest.raises(ArtifactError, match="is not a torch file of plain tensors"):
        load_checkpoint(tmp_path / "trained.pt")
    (tmp_path / "trained.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        load_checkpoint(tmp_path / "trained.safetensors")
