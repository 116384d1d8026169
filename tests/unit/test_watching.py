"""Files of a live artifact: writing to one is noticed, replacing the folder is told from it, sealed copies are safe."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from narsil.artifacts.artifact import Artifact, open_artifact, sha256, write_manifest
from narsil.artifacts.replacing import replacing
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.artifacts.watching import MAPPED, Watch, sealed_copy
from narsil.errors import ArtifactError, ConfigError

ROLES = ("compiled", "tables", "weights", "torchscript", "onnx", "onnx_data")


def write(folder: Path, content: str = "whole") -> None:
    files = {role: folder / role for role in ROLES}
    for role, file in files.items():
        file.write_text(f"{content} {role}")
        os.utime(file, ns=(0, 0))  # so that the times of a file that is written to differ, however coarse they are
    schema = ModelSchema(1, (Feature("user", "t_user", 3, 4),))
    write_manifest(folder, name="m", version="1", schema=schema, device="cpu", files=files, architecture={})


@pytest.fixture
def live(tmp_path: Path) -> Artifact:
    (tmp_path / "live").mkdir()
    write(tmp_path / "live")
    return open_artifact(tmp_path / "live")


def overwritten(file: Path) -> None:
    with file.open("r+") as opened:
        opened.write("WHOLE")


def cut_short(file: Path) -> None:
    os.truncate(file, 1)


def copied_over(file: Path) -> None:
    """As cp does."""
    file.write_text("WHOLE" + file.read_text()[5:])
    os.utime(file, ns=(0, 0))  # cp -p


WRITTEN_TO = [overwritten, cut_short, copied_over]


@pytest.mark.parametrize("backend", MAPPED)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("change", WRITTEN_TO)
def test_a_file_that_is_written_to_is_told_and_is_harmful_where_it_is_mapped(
    live: Artifact, role: str, backend: str, change: Callable[[Path], None]
) -> None:
    watch, copied = Watch(live, backend), Watch(live, backend, copied=True)
    assert watch.look() is None
    change(live.path / role)
    finding = watch.look()
    assert finding is not None
    assert finding.harmful == (role in MAPPED[backend])
    assert f"{role} has been overwritten" in finding.text
    assert watch.look() == finding
    finding = copied.look()
    assert finding is not None
    assert not finding.harmful


@pytest.mark.parametrize("backend", ["compiled", "onnx"])  # whose files come first and last
def test_what_is_harmful_comes_before_what_is_not(live: Artifact, backend: str) -> None:
    watch = Watch(live, backend)
    for role in ROLES:
        overwritten(live.path / role)
    finding = watch.look()
    assert finding is not None
    assert finding.harmful
    assert f"{MAPPED[backend][0]} has been overwritten in place" in finding.text


def test_a_folder_that_is_replaced_leaves_what_is_served_whole(live: Artifact) -> None:
    watch = Watch(live, "compiled")
    with replacing(live.path) as staging:
        write(staging, "newer")
    finding = watch.look()
    assert finding is not None
    assert not finding.harmful
    assert "has been replaced: restart to serve what lies there now" in finding.text


def test_a_folder_that_is_gone_is_told(live: Artifact) -> None:
    watch = Watch(live, "compiled")
    live.path.rename(live.path.with_name("elsewhere"))
    finding = watch.look()
    assert finding is not None
    assert not finding.harmful
    assert "cannot be looked at any more" in finding.text


def test_times_alone_are_no_change(live: Artifact) -> None:
    watch = Watch(live, "compiled")
    for role in ROLES:
        os.utime(live.path / role)
        (live.path / role).chmod(0o400)
    assert watch.look() is None


def test_what_changed_before_the_checksum_was_taken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "live").mkdir()
    write(tmp_path / "live")
    whole = sha256

    def late(path: Path) -> str:
        digest = whole(path)
        if path.name == "tables":
            overwritten(path)
        return digest

    monkeypatch.setattr("narsil.artifacts.artifact.sha256", late)
    finding = Watch(open_artifact(tmp_path / "live"), "compiled").look()
    assert finding is not None
    assert "tables has been overwritten in place" in finding.text


def test_a_sealed_copy_is_out_of_everyones_reach(live: Artifact) -> None:
    file = live.path / "tables"
    with sealed_copy(file) as path:
        cut_short(file)
        assert path.read_text() == "whole tables"
        mapped = np.memmap(path, np.uint8, mode="r")
        private = np.memmap(path, np.uint8, mode="c")
        descriptor = int(path.name)
        for harm in (
            lambda: os.ftruncate(descriptor, 1),
            lambda: os.ftruncate(descriptor, 1 << 20),
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: mmap.mmap(descriptor, 0),  # writable and shared
        ):
            with pytest.raises(PermissionError):
                harm()
    assert bytes(mapped) == bytes(private) == b"whole tables"
    assert not path.exists()


def test_a_sealed_copy_of_what_cannot_be_copied_is_refused(live: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ArtifactError, match="nowhere cannot be read: No such file"),
        sealed_copy(live.path / "nowhere"),
    ):
        pass
    monkeypatch.setattr(os, "sendfile", lambda *_: 0)
    with pytest.raises(ArtifactError, match="was cut short while it was copied"), sealed_copy(live.path / "tables"):
        pass
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match="needs Linux's sealed memory"), sealed_copy(live.path / "tables"):
        pass
