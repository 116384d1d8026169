"""The process that serves: what its memory is enough for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from narsil.process import memory_remarks

GIB = 1 << 30


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of 1 GiB together, without a byte on disk."""
    paths = [tmp_path / "tables.bin", tmp_path / "weights.bin"]
    for path in paths:
        path.touch()
        os.truncate(path, GIB // 2)
    return paths


def test_a_model_and_a_queue_that_do_not_fit_into_memory_are_told_with_their_sizes(files):
    (remark,) = memory_remarks(files, queue_bytes=GIB // 4, limit=GIB)
    assert "files (1.00 GiB) and max_queue_bytes (0.25 GiB) are more than the 1.00 GiB" in remark


def test_what_fits_into_memory_is_not_told(files):
    assert memory_remarks(files, queue_bytes=GIB // 4, limit=GIB + GIB // 4) == []


def test_the_limit_is_this_process_s_own(files, monkeypatch):
    monkeypatch.setattr("narsil.process.memory_limit", lambda: GIB)
    assert memory_remarks(files, queue_bytes=1)
    monkeypatch.setattr("narsil.process.memory_limit", lambda: None)
    assert memory_remarks(files, queue_bytes=1) == []
