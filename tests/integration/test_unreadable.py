"""What is no file, or may not be read, is told in one sentence that names it, by every reader."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

from narsil.artifacts.artifact import MANIFEST, Artifact, open_artifact
from narsil.artifacts.watching import sealed_copy
from narsil.compile.calibration import load_calibration
from narsil.errors import ArtifactError
from narsil.packaging.checkpoint import load_checkpoint
from tests.fixtures_models import small

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that anybody may enter, which pytest's own is not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def as_nobody(folder: Path) -> Iterator[None]:
    """Without the superuser's right to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def read_artifact(path: Path) -> None:
    open_artifact(path)


def read_checkpoint(path: Path) -> None:
    load_checkpoint(path)


def read_calibration(path: Path) -> None:
    load_calibration(path, small().schema)


def read_sealed(path: Path) -> None:
    with sealed_copy(path):
        pass


READERS = [
    (read_artifact, "model_default.pt"),
    (read_artifact, MANIFEST),
    (read_checkpoint, "trained.pt"),
    (read_checkpoint, "trained.safetensors"),
    (read_calibration, "rows.npz"),
    (read_sealed, "tables.bin"),
]
readers = pytest.mark.parametrize(("read", "name"), READERS, ids=lambda value: getattr(value, "__name__", value))


@contextmanager
def by_the_owner(folder: Path) -> Iterator[None]:
    me = os.geteuid()
    os.seteuid(folder.stat().st_uid)
    yield
    os.seteuid(me)


@readers
def test_a_file_that_may_not_be_read(folder: Path, read: Callable[[Path], None], name: str, as_nobody: None) -> None:
    with by_the_owner(folder):
        (folder / name).touch(mode=0)
    with pytest.raises(ArtifactError, match=f"{name} cannot be read: Permission denied; check its owner and mode"):
        read(folder / name)


@readers
def test_a_folder_on_the_way_that_may_not_be_entered(
    folder: Path, read: Callable[[Path], None], name: str, as_nobody: None
) -> None:
    with by_the_owner(folder):
        (folder / "closed").mkdir(mode=0)
    with pytest.raises(ArtifactError, match=f"{name} cannot be read: Permission denied; check its owner and mode"):
        read(folder / "closed" / name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@readers
@pytest.mark.parametrize("make", [Path.mkdir, pipe, loop], ids=["folder", "pipe", "loop"])
def test_what_is_no_file(tmp_path: Path, read: Callable[[Path], None], name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"is no file|cannot be|does not exist|has neither"):
        read(tmp_path / name)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(ArtifactError, match="cannot be read: File name too long"):
        open_artifact("x" * 5000)


def test_a_file_of_an_artifact_that_may_not_be_read_stops_who_needs_it(
    small_artifact: Artifact, folder: Path, as_nobody: None
) -> None:
    with by_the_owner(folder):
        shutil.copytree(small_artifact.path, folder / "model")
        (folder / "model" / "model_default.pt").chmod(0)
    artifact = open_artifact(folder / "model")
    assert artifact.problem("onnx") is None
    with pytest.raises(ArtifactError, match=r"cannot be read: Permission denied; check its owner and mode"):
        artifact.files_for("torch")


def test_what_is_no_file_of_arrays_is_no_calibration(tmp_path: Path) -> None:
    rows = tmp_path / "rows.npz"
    rows.write_text("a text\n")
    with pytest.raises(ArtifactError, match=r"is no \.npz file, .*; write it with numpy\.savez$"):
        load_calibration(rows, small().schema)
    with zipfile.ZipFile(rows, "w") as file:
        file.writestr("dense", "a text")
    with pytest.raises(ArtifactError, match=r"dense is no array in numpy's format; write it with numpy\.savez$"):
        load_calibration(rows, small().schema)


def test_numbers_that_no_calibration_has(tmp_path: Path) -> None:
    for dense in (np.array([["x"] * 5]), np.zeros((1, 5), np.complex64), np.zeros((1, 5), "M8[s]")):
        np.savez(tmp_path / "rows.npz", dense=dense, ids=np.zeros((1, 4), int))
        with pytest.raises(ArtifactError, match=r"dense holds .*, which are no numbers"):
            load_calibration(tmp_path / "rows.npz", small().schema)
