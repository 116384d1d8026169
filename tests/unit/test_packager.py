"""Putting a new folder in the place of an earlier one: whole, and nobody else's files touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from narsil.artifacts.artifact import FORMAT, MANIFEST
from narsil.artifacts.replacing import replacing
from narsil.errors import ArtifactError


def write(folder: Path, name: str) -> None:
    """An artifact without files, of that name."""
    folder.mkdir(exist_ok=True)
    files = {"onnx": {"file": "graph.onnx", "bytes": 0, "sha256": ""}}
    plain = {"format": FORMAT, "name": name, "version": "1", "device": "cpu", "schema": {}, "files": files}
    (folder / MANIFEST).write_text(json.dumps(plain))


def name_in(folder: Path) -> str:
    found: str = json.loads((folder / MANIFEST).read_text())["name"]
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "model"


def test_the_new_folder_takes_the_place_of_the_old_one(out):
    for name in ("first", "second"):
        with replacing(out) as staging:
            write(staging, name)
            assert staging.parent == out.parent
        assert name_in(out) == name
        assert list(out.parent.iterdir()) == [out]


def test_a_failed_block_leaves_the_old_folder(out):
    with replacing(out) as staging:
        write(staging, "old")
    with pytest.raises(ZeroDivisionError), replacing(out):
        raise ZeroDivisionError
    assert name_in(out) == "old"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("meanwhile", [True, False], ids=["meanwhile", "before"])
def test_other_peoples_files_are_kept(out, meanwhile):
    def put() -> None:
        out.mkdir(parents=True)
        (out / "thesis.tex").write_text("years of work")

    if not meanwhile:
        put()
    with pytest.raises(ArtifactError, match=r"holds thesis\.tex"), replacing(out):
        put()
    assert list(out.parent.rglob("*")) == [out, out / "thesis.tex"]


def test_two_at_a_time_write_to_folders_of_their_own_and_the_last_one_stays(out):
    with replacing(out) as late:
        write(late, "late")
        with replacing(out) as early:
            assert early != late
            write(early, "early")
        assert name_in(out) == "early"
    assert name_in(out) == "late"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("left", ["old", "theirs"])
def test_a_failed_rename_leaves_one_whole_folder(out, monkeypatch, left):
    with replacing(out) as staging:
        write(staging, "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if not path.name.endswith(".partial"):
            return rename(path, target)
        if left == "theirs":  # another process was faster
            write(out, "theirs")
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*Directory not empty"), replacing(out) as staging:
        write(staging, "new")
    assert name_in(out) == left
    assert list(out.parent.iterdir()) == [out]
