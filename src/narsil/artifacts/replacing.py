"""Writes an artifact's folder: OUT is either what it was or the whole new artifact."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from narsil.artifacts import artifact as artifacts
from narsil.errors import ArtifactError

__all__ = ["Progress", "replacing"]

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, which takes its place at the end of the block and is gone if that fails.

    ``out`` may be absent, empty or an earlier artifact: nothing that Narsil did not write is ever deleted. Raises
    ArtifactError where it holds other files or cannot be written; ``out`` is then what it was.
    """
    _check_out(out)
    # Not by the process id: two containers that share a volume may have the same one.
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        staging.mkdir(parents=True)
        yield staging
        _check_out(out)  # the block takes minutes: something may lie there by now
        _replace(staging, out)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_out(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out} is a file; give the folder to write the artifact to")
    present = {entry.name for entry in out.iterdir()}
    if not present:
        return
    try:
        manifest: Mapping[str, Any] = artifacts.read_manifest(out)
        ours = {entry["file"] for entry in manifest["files"].values()} | {artifacts.MANIFEST}
    except ArtifactError:
        ours = set()
    foreign = sorted(present - ours)
    if foreign:
        raise ArtifactError(f"{out} holds {foreign[0]}, which is no part of an earlier artifact; give an empty folder")


def _replace(staging: Path, out: Path) -> None:
    """Puts the new folder in the place of the old one by renames alone."""
    retired = staging.with_suffix(".retired")
    if out.exists():
        out.rename(retired)
    try:
        staging.rename(out)
    except OSError:
        if retired.exists() and not out.exists():
            retired.rename(out)
        raise
    finally:
        if out.exists():  # the new folder, the old one, or another process's
            shutil.rmtree(retired, ignore_errors=True)
