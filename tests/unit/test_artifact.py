"""Artifacts as hostile or damaged input: each fault has its own message, and none needs torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narsil.artifacts.artifact import BACKEND_ROLES, MANIFEST, open_artifact, write_manifest
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.errors import ArtifactError

SCHEMA = ModelSchema(3, (Feature("user", "t_user", 10, 8), Feature("item", "t_item", 20, 8)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact with an ONNX graph alone; its files' contents do not matter here."""
    out = tmp_path / "model"
    out.mkdir()
    files = {"onnx": out / "graph.onnx", "onnx_data": out / "graph.onnx.data"}
    files["onnx"].write_bytes(b"graph")
    files["onnx_data"].write_bytes(b"tables")
    write_manifest(
        out, name="small", version="3", schema=SCHEMA, device="cpu", files=files, architecture={"kind": "dlrm"}
    )
    return out


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_folder_opens_with_its_schema_and_files(folder: Path) -> None:
    artifact = open_artifact(folder)
    assert (artifact.name, artifact.version, artifact.device) == ("small", "3", "cpu")
    assert artifact.schema == SCHEMA
    assert artifact.onnx == folder / "graph.onnx"
    assert artifact.torchscript is None


@pytest.mark.parametrize("name", ["graph.onnx", MANIFEST])
def test_a_file_of_the_folder_opens_the_folder(folder: Path, name: str) -> None:
    assert open_artifact(folder / name).schema == SCHEMA


def test_a_missing_path_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; make an artifact with `narsil package dlrm"):
        open_artifact(tmp_path / "nowhere")


def test_an_empty_folder_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has neither manifest\.json nor model_default\.pt"):
        open_artifact(tmp_path)


def test_onnx_without_its_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json beside it"):
        open_artifact(folder / "graph.onnx")


def test_one_changed_byte_is_found(folder: Path) -> None:
    (folder / "graph.onnx.data").write_bytes(b"tablez")
    with pytest.raises(ArtifactError, match="does not match the SHA-256"):
        open_artifact(folder)
    assert open_artifact(folder, verify=False).schema == SCHEMA


def test_a_truncated_file_is_found_without_reading_it(folder: Path) -> None:
    (folder / "graph.onnx.data").write_bytes(b"tab")
    with pytest.raises(ArtifactError, match=r"has 3 bytes where manifest\.json says 6"):
        open_artifact(folder, verify=False)


def test_a_lost_file_is_named(folder: Path) -> None:
    (folder / "graph.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"graph\.onnx is listed in manifest\.json but is not there"):
        open_artifact(folder)


ROLES = {
    "torchscript": "model_default.pt",
    "onnx": "graph.onnx",
    "onnx_data": "graph.onnx.data",
    "compiled": "forward.so",
    "tables": "tables.bin",
    "weights": "weights.bin",
}


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """An artifact with a file of every role."""
    out = tmp_path / "full"
    out.mkdir()
    files = {role: out / name for role, name in ROLES.items()}
    for role, file in files.items():
        file.write_text(f"whole {role}")
    write_manifest(out, name="full", version="1", schema=SCHEMA, device="cpu", files=files, architecture={})
    return out


def lost(file: Path) -> None:
    file.unlink()


def changed(file: Path) -> None:
    file.write_text(file.read_text().replace("whole", "Whole"))


def truncated(file: Path) -> None:
    file.write_text("who")


def replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def linked_outside(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/hostname")


FAULTS = [lost, changed, truncated, replaced_by_a_folder, linked_outside]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("role", ROLES)
def test_a_fault_of_one_file_stops_the_backend_that_reads_it_and_no_other(
    full: Path, role: str, fault: Callable[[Path], None]
) -> None:
    fault(full / ROLES[role])
    artifact = open_artifact(full)
    assert set(artifact.damage) == {role}
    assert getattr(artifact, role) is None
    for backend, roles in BACKEND_ROLES.items():
        assert artifact.offers(backend)
        if role not in roles:
            assert artifact.files_for(backend) == {role: full / ROLES[role] for role in roles}
            continue
        assert artifact.problem(backend) == artifact.damage[role]
        with pytest.raises(ArtifactError, match=ROLES[role]):
            artifact.files_for(backend)


def test_where_no_backend_has_all_its_files_the_artifact_does_not_open(full: Path) -> None:
    lost(full / "tables.bin")
    truncated(full / "model_default.pt")
    assert open_artifact(full).problem("onnx") is None
    changed(full / "graph.onnx.data")
    with pytest.raises(ArtifactError, match=r"tables\.bin is listed in manifest\.json but is not there"):
        open_artifact(full)
    assert open_artifact(full, verify=False).problem("onnx") is None


def test_of_a_backend_whose_file_is_named_the_other_backends_files_are_not_looked_at(full: Path) -> None:
    lost(full / "model_default.pt")
    artifact = open_artifact(full / "graph.onnx.data")
    assert artifact.damage == {}
    assert [backend for backend in BACKEND_ROLES if artifact.offers(backend)] == ["onnx"]
    changed(full / "graph.onnx")
    with pytest.raises(ArtifactError, match=r"graph\.onnx does not match the SHA-256"):
        open_artifact(full / "graph.onnx.data")


def test_a_backend_that_the_artifact_has_nothing_for_says_so(folder: Path) -> None:
    artifact = open_artifact(folder)
    with pytest.raises(ArtifactError, match="has no TorchScript file; use --backend onnx"):
        artifact.files_for("torch")
    with pytest.raises(ArtifactError, match="holds no compiled model; make one with `narsil compile`"):
        artifact.files_for("compiled")


def test_compiled_code_needs_its_tables(full: Path) -> None:
    edit(full, lambda manifest: manifest["files"].pop("tables"))
    assert "without its tables; compile the model again" in str(open_artifact(full).problem("compiled"))


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "a\nb", "a\x1b[2Jb", "\ud800"])
def test_names_that_no_file_has_or_that_no_terminal_should_print_are_refused(folder: Path, name: str) -> None:
    edit(folder, lambda manifest: manifest["files"]["onnx"].update(file=name))
    with pytest.raises(ArtifactError, match="is no printable name of at most 255 bytes"):
        open_artifact(folder)


@pytest.mark.parametrize("name", ["../graph.onnx", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:x", "a\0b", 5, None])
def test_files_are_plain_names_in_the_folder(folder: Path, name: object) -> None:
    edit(folder, lambda manifest: manifest["files"]["onnx"].update(file=name))
    with pytest.raises(ArtifactError, match="must be a plain name in the same folder"):
        open_artifact(folder)


def test_a_link_out_of_the_folder_is_an_escape(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(b"graph")
    (folder / "graph.onnx").unlink()
    (folder / "graph.onnx").symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out of the artifact's folder"):
        open_artifact(folder)


def test_links_within_the_folder_are_how_volumes_are_mounted(folder: Path) -> None:
    (folder / "..data").mkdir()
    os.rename(folder / "graph.onnx", folder / "..data" / "graph.onnx")
    (folder / "graph.onnx").symlink_to(Path("..data") / "graph.onnx")
    assert open_artifact(folder).schema == SCHEMA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="narsil.artifact/99"), "is of format 'narsil.artifact/99'"),
        (lambda m: m.pop("format"), "is not a manifest of Narsil's"),
        (lambda m: m.pop("schema"), "lacks schema"),
        (lambda m: m.update(name=["x"]), "name is a list, not a str"),
        (lambda m: m.update(files={}), "lists no file"),
        (lambda m: m["files"].update(virus=m["files"]["onnx"]), "unknown role 'virus'"),
        (lambda m: m["files"]["onnx"].pop("sha256"), "must have file, bytes and sha256"),
        (lambda m: m["files"]["onnx"].update(bytes="5"), "must be a number and a string"),
        (lambda m: m["files"].pop("onnx"), "lists no model_default.pt and no ONNX graph"),
        (lambda m: m["schema"].update(dense_dim=-1), "dense_dim must be an integer of at least 0"),
        (lambda m: m["schema"]["features"][0].update(rows=0), "rows must be a positive integer"),
        (lambda m: m["schema"]["features"][0].update(rows=10**30), "rows must be a positive integer"),
        (lambda m: m["schema"]["features"][0].update(weighted="no"), "weighted must be true or false"),
        (lambda m: m["schema"].update(tasks=["click", "click"]), "tasks must be printable texts"),
        (lambda m: m["schema"].update(tasks="default"), "tasks must be printable texts"),
        (lambda m: m.update(name="\x1b[31m"), "name is not made of"),
        (lambda m: m.update(version="\ud800"), "version is not made of"),
        (lambda m: m.update(versions=[1]), "versions is not an object"),
    ],
)
def test_a_damaged_manifest_names_the_fault(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactError, match=r"cannot be read as JSON|is not a manifest of Narsil's"):
        open_artifact(folder)


def test_a_manifest_without_end_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST).open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(ArtifactError, match="a manifest has at most 16777216"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello world", "is not a TorchScript archive"),
        (b"\x80\x02}q\x00.", "is a legacy torch.save pickle"),
        (b"PK\x03\x04 cut off", "is truncated or damaged"),
    ],
)
def test_what_is_no_torchscript_is_told_apart_before_torch_sees_it(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "model_default.pt"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(file)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["package", "--help"], ["package", "dlrm", "--help"], ["inspect", "."]]
)
def test_the_command_line_needs_no_torch(folder: Path, arguments: list[str]) -> None:
    program = (
        "import sys\nfrom narsil.cli import cli\n"
        f"cli({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'fbgemm_gpu'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if arguments[0] == "inspect":
        assert "t_user" in done.stdout
        assert "0 .. 19" in done.stdout
