"""Notices when the files of a model that is being served are written to, and keeps private copies of them.

Backends map tables and code: what another process writes into such a file is what the next request is scored by, and
where it cuts the file short the next access ends the process (SIGBUS). Whoever replaces a model therefore replaces its
folder, by a rename: what is mapped stays whole. A ``Watch`` tells the two apart; a sealed copy is out of reach of both.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from narsil.artifacts.artifact import Artifact, FileState, sha256
from narsil.artifacts.files import check_readable
from narsil.errors import ArtifactError, ConfigError

__all__ = ["MAPPED", "Finding", "Watch", "copied", "sealed_copy"]

# The roles whose files stay mapped for as long as the backend lives. All others are read once, when it is loaded.
MAPPED = {"compiled": ("compiled", "tables", "weights"), "onnx": ("onnx_data",), "torch": ()}


@dataclass(frozen=True)
class Finding:
    """What has become of a file."""

    text: str  # one sentence, with the next step
    harmful: bool  # whether scores may be wrong from now on; else what is served is whole, but a restart serves another


class Watch:
    """What an artifact's files were when it was opened, held against what they are. For one thread at a time."""

    def __init__(self, artifact: Artifact, backend: str, *, copied: bool = False) -> None:
        """``backend`` is the one that serves; ``copied``, whether it maps sealed copies instead of the files."""
        self._seen = dict(artifact.seen)
        entries = (artifact.manifest or {}).get("files", {})
        self._sums = {artifact.path / str(entry["file"]): str(entry["sha256"]).lower() for entry in entries.values()}
        roles = () if copied else MAPPED.get(backend, ())
        self._mapped = {getattr(artifact, role) for role in roles}

    def look(self) -> Finding | None:
        """The worst that has happened to a file since the artifact was opened; None where each is what it was.

        A few microseconds, unless a file's times have changed: then it is read once to see whether its content has.
        Called once after the backend was loaded, it also tells of what changed in between.
        """
        findings = [finding for path in self._seen if (finding := self._look_at(path)) is not None]
        return next((finding for finding in findings if finding.harmful), findings[0] if findings else None)

    def _look_at(self, path: Path) -> Finding | None:
        before = self._seen[path]
        try:
            now = FileState.of(path)
        except OSError as error:
            return Finding(
                f"{path} cannot be looked at any more ({error.strerror}): a restart would not find it", False
            )
        if now == before:
            return None
        if (now.device, now.inode) != (before.device, before.inode):
            return Finding(f"{path} has been replaced: restart to serve what lies there now", False)
        if now.size == before.size and self._same_content(path):
            self._seen[path] = now
            return None
        if path not in self._mapped:
            return Finding(f"{path} has been overwritten: restart to serve what it holds now", False)
        return Finding(
            f"{path} has been overwritten in place while it is served, so scores may be wrong and the process may be "
            "killed: restart it, and replace whole folders from now on, never the files in them",
            True,
        )

    def _same_content(self, path: Path) -> bool:
        try:
            return path in self._sums and sha256(path) == self._sums[path]
        except OSError:
            return False


@contextmanager
def copied(artifact: Artifact, backend: str) -> Iterator[Artifact]:
    """The artifact with sealed copies in the place of the files that the backend maps. Raises as sealed_copy."""
    with ExitStack() as copies:
        sealed: dict[str, Any] = {}
        for role in MAPPED[backend]:
            path = getattr(artifact, role)
            if path is not None:
                sealed[role] = copies.enter_context(sealed_copy(path))
        yield replace(artifact, **sealed)


@contextmanager
def sealed_copy(path: Path) -> Iterator[Path]:
    """A path under which the file's content can be opened and mapped, and that nobody can change, within the block.

    The copy lies in anonymous memory that is sealed against writing and resizing. What was mapped from it or loaded as
    code lives on after the block, and is freed with the last mapping. Raises ConfigError where the system has no
    such memory, ArtifactError where the file cannot be read or does not fit.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("copying tables needs Linux's sealed memory, which this system does not have")
    try:
        copy = os.memfd_create(path.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise ConfigError(f"copying tables needs sealed memory, which is refused here: {error.strerror}") from None
    try:
        check_readable(path)
        _fill(copy, path)
        fcntl.fcntl(
            copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
        yield Path(f"/proc/self/fd/{copy}")
    finally:
        os.close(copy)


def _fill(copy: int, path: Path) -> None:
    try:
        with path.open("rb") as file:
            size, done = os.fstat(file.fileno()).st_size, 0
            while done < size:
                sent = os.sendfile(copy, file.fileno(), done, size - done)
                if not sent:
                    raise ArtifactError(f"{path} was cut short while it was copied; copy the folder again")
                done += sent
    except OSError as error:
        raise ArtifactError(f"{path} cannot be copied to memory: {error.strerror}") from None
