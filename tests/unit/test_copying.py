"""Files of an artifact are copies: no second names, whatever the file system can do."""

from __future__ import annotations

import fcntl

import pytest

from narsil.artifacts import copying
from narsil.artifacts.copying import copy_file


def test_a_copy_is_a_file_of_its_own(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"yesterday" * 10_000)
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_ino != source.stat().st_ino
    with source.open("r+b") as file:
        file.write(b"tonight")
    assert target.read_bytes() == b"yesterday" * 10_000


def test_what_lay_there_is_gone(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old and longer")
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"


@pytest.mark.parametrize("can", [True, False], ids=["clones", "cannot"])
def test_a_file_system_that_clones_is_asked_to(tmp_path, monkeypatch, can):
    asked = []

    def ioctl(target: int, request: int, source: int) -> int:
        asked.append((request, fcntl.fcntl(target, fcntl.F_GETFL) & 3, fcntl.fcntl(source, fcntl.F_GETFL) & 3))
        if not can:
            raise OSError(95, "Operation not supported")
        return 0

    monkeypatch.setattr(copying, "ioctl", ioctl)
    (tmp_path / "a").write_bytes(b"content")
    copy_file(tmp_path / "a", tmp_path / "b")
    assert asked == [(0x40049409, 1, 0)]  # written to the new file, from one that is only read
    assert (tmp_path / "b").read_bytes() == (
        b"" if can else b"content"
    )  # a clone's bytes are the file system's to give
