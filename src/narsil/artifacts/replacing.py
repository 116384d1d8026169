"""Writes an artifact's folder: OUT is either what it was or the whole new artifact, however the run ends.

    .narsil.XXXXXXXX.partial/    one per run, beside OUT; gone when the run ends, or swept away by the next one
        lock                     locked for as long as the run lives; holds the name that new/ will get
        new/                     what is being written
        old/                     OUT, between two renames, where the system cannot swap two folders in one step

A folder that is mounted, or lies in one that may not be written to, or that the process stands in, cannot be renamed.
The partial folder then lies in OUT. What it holds becomes OUT/.narsil.new in one step, and from then on that is the
artifact at OUT: ``open_artifact`` looks there first. Its files are then linked over the old ones, and .narsil.new goes.
Whoever is killed in between leaves a whole artifact, and the next run ends what it began.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from narsil.artifacts.artifact import MANIFEST, NEWER, open_artifact, read_manifest
from narsil.errors import ArtifactError, first_line

__all__ = ["Progress", "check_out", "replacing"]

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all

_PARTIAL = re.compile(r"\.narsil\.[0-9a-f]{8}\.partial")
_NOT_OURS_AND_NO_MATTER = frozenset({"lost+found"})  # in a file system's topmost folder
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD: linux/fs.h, fcntl.h


@dataclass(frozen=True)
class _Target:
    """Where the new folder goes."""

    path: Path  # OUT, through all links
    inside: bool  # whether it stays where it is, and only what is in it is replaced

    @property
    def place(self) -> Path:
        """What the new folder is renamed to."""
        return self.path / NEWER if self.inside else self.path


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of ``out`` at the end of the block and is gone if that fails.

    ``out`` may be absent, empty, an earlier artifact, or a link to one of these, which stays a link. Nothing that
    Narsil did not write is ever deleted. Raises ArtifactError where ``out`` holds other files or cannot be written to,
    before the block is run, or where what the block has written does not open as an artifact; ``out`` is then what it
    was.
    """
    try:
        with _staging(out) as (target, staging):
            new = staging / "new"
            new.mkdir()
            yield new
            open_artifact(new, verify=False)
            _check_content(out, target)  # the block takes minutes: something may lie there by now
            if target.inside:
                _replace_content(target, staging)
            else:
                _put(target, staging)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error.strerror or first_line(error)}") from None


def check_out(out: Path) -> None:
    """Raises what ``replacing`` would raise at once, before work that is not needed then. Leaves nothing behind."""
    try:
        with _staging(out):
            pass
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error.strerror or first_line(error)}") from None


@contextmanager
def _staging(out: Path) -> Iterator[tuple[_Target, Path]]:
    """Where ``out`` leads to, and an empty partial folder that is locked and goes at the end."""
    path = _resolved(out)
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{out} is a file; give the folder to write the artifact to")
    target = _Target(path, path.exists() and _is_fixed(path))
    _sweep(target.place.parent)
    _sweep(path)
    _check_content(out, target)
    staging, lock = _new_partial(target)
    try:
        if target.inside:
            with _alone(path):
                _finish(path, staging)
        yield target, staging
    finally:
        try:
            _discard(staging)
        finally:
            os.close(lock)


def _resolved(out: Path) -> Path:
    try:
        return out.resolve()
    except RuntimeError:
        raise ArtifactError(f"{out} is a link that leads back to itself; give a folder") from None


def _is_fixed(path: Path) -> bool:
    """Whether a folder that is there cannot be renamed, or had better not be."""
    parent = path.parent
    if path == parent or os.path.ismount(path) or path in _mount_points():
        return True
    with suppress(OSError):  # a working directory that is gone is none that a rename would move
        if Path.cwd().is_relative_to(path):
            return True
    if not os.access(parent, os.W_OK | os.X_OK):
        return True
    above = parent.stat()
    return bool(above.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, above.st_uid, path.stat().st_uid)


def _mount_points() -> set[Path]:
    """Those of a folder of the same file system too, which os.path.ismount does not see. Source: proc(5), mountinfo."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    points = (line.split(b" ")[4] for line in lines)
    return {
        Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), point))) for point in points
    }


def _check_content(out: Path, target: _Target) -> None:
    """Raises ArtifactError where there is a file that no artifact of Narsil's has put there."""
    if not target.path.exists():
        return
    ours = _files_of(target.path) | _files_of(target.path / NEWER)
    for name in sorted(entry.name for entry in target.path.iterdir()):
        passed_over = target.inside and (
            name == NEWER or name in _NOT_OURS_AND_NO_MATTER or _PARTIAL.fullmatch(name) is not None
        )
        if name not in ours and not passed_over:
            raise ArtifactError(f"{out} holds {name}, which is no part of an earlier artifact; give an empty folder")


def _files_of(folder: Path) -> set[str]:
    """The names that an artifact's manifest lists, and its own; none where there is no manifest that can be read."""
    try:
        return {entry["file"] for entry in read_manifest(folder)["files"].values()} | {MANIFEST}
    except ArtifactError:
        return set()


def _new_partial(target: _Target) -> tuple[Path, int]:
    """A partial folder and its lock. Not named by the process id: containers that share a volume may have the same."""
    while True:
        folder = target.place.parent / f".narsil.{secrets.token_hex(4)}.partial"
        folder.mkdir(parents=True)
        with suppress(FileNotFoundError):  # swept away in the moment before it was locked
            lock = os.open(folder / "lock", os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC)
            os.write(lock, os.fsencode(target.place.name))
            if _locked(lock) is not False and os.fstat(lock).st_nlink:
                return folder, lock
            os.close(lock)


def _locked(lock: int) -> bool | None:
    """Locks a file if nobody else has; None where the file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(room: Path) -> None:
    """Removes the partial folders of runs that are dead: those whose lock nobody holds."""
    with suppress(OSError):
        for folder in [entry for entry in room.iterdir() if _PARTIAL.fullmatch(entry.name)]:
            seen = folder.lstat()
            if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
                continue
            try:
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                with suppress(OSError):
                    folder.rmdir()  # dead in the moment before it was locked, or as young as that, and then made again
                continue
            try:
                if _locked(lock):
                    _restore(folder, room / os.fsdecode(os.read(lock, 4096)))
                    _discard(folder)
            finally:
                os.close(lock)


def _discard(partial: Path) -> None:
    """Removes a partial folder whose lock one holds: the lock last, since without it nobody would dare to."""
    with suppress(OSError):
        for entry in partial.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != "lock":
                entry.unlink(missing_ok=True)
        (partial / "lock").unlink()
        partial.rmdir()


def _restore(partial: Path, out: Path) -> None:
    """Puts back what a run had moved away when it was killed before it had moved the new folder there."""
    if out.parent == partial.parent and not os.path.lexists(out):
        with suppress(OSError):
            (partial / "old").rename(out)


def _put(target: _Target, staging: Path) -> None:
    """Puts the new folder in its place; what was there goes with the partial folder."""
    new, old, place = staging / "new", staging / "old", target.place
    if not os.path.lexists(place):
        new.rename(place)
    elif not _exchange(new, place):
        place.rename(old)
        try:
            new.rename(place)
        except OSError:
            if not os.path.lexists(place):
                old.rename(place)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot. Source: renameat2(2)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _replace_content(target: _Target, staging: Path) -> None:
    """Replaces what is in a folder that stays: one rename decides, then the files are put where they are looked for."""
    with _alone(target.path):
        _finish(target.path, staging)
        _put(target, staging)
        _finish(target.path, staging)


def _finish(path: Path, staging: Path) -> None:
    """Links the files of PATH/.narsil.new over those in PATH, removes what is left of the earlier artifact, and then
    .narsil.new, which is the artifact until that moment. It stays so where the file system has no links."""
    newer, link = path / NEWER, staging / "link"
    if not newer.is_dir():
        return
    with suppress(OSError):
        names = sorted(entry.name for entry in newer.iterdir())
        for name in _files_of(path).difference(names):
            (path / name).unlink(missing_ok=True)
        for name in names:
            os.link(newer / name, link)
            link.replace(path / name)
            link.unlink(missing_ok=True)  # still there where both were one file already, from a run that was killed
        newer.rename(staging / f"done.{secrets.token_hex(4)}")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other run is here, as far as the file system has locks."""
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
