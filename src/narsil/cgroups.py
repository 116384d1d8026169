"""What this process may use of the machine: processors and memory, by its affinity and its cgroups.

Receives the kernel's own tables (/proc/self/cgroup, mountinfo, meminfo) and the limits of every cgroup that this
process is in, from its own up to the topmost that can be seen, in cgroups of either version: the least of them holds.
All paths are taken below ``root``, which only tests change. Owns nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["cpu_quota", "memory_limit", "usable_cores"]

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # bytes; a limit that nobody set is the largest number of whole pages in version 1


def usable_cores(root: Path = _ROOT) -> int:
    """Cores this process may use: its CPU affinity, less what the quotas of its cgroups leave of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota + 0.5)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The least CPU quota of this process's cgroups, in cores; None where none has one."""
    quotas = []
    for folder in _folders("cpu", root):
        limit_and_period = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(limit_and_period) == 2 and all(number > 0 for number in limit_and_period):
            limit, period = limit_and_period
            quotas.append(limit / period)
    return min(quotas, default=None)


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes of memory that this process may have: the machine's, or the least limit of its cgroups. None where nothing
    says so. ``memory.high`` counts as a limit: beyond it the kernel slows a process down until it stands."""
    limits = [1024 * number for number in _numbers(root / "proc/meminfo", "MemTotal:")]
    for folder in _folders("memory", root):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += [number for number in _numbers(folder / name) if 0 < number < _UNLIMITED]
    return min(limits, default=None)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Where the limits of this process's cgroups stand: its own cgroup first, then those above it as far as they are
    mounted here."""
    paths = dict(_memberships(controller, root))
    for version, top, mounted in _mounts(controller, root):
        # Where a container sees only its own part of the hierarchy, that part's top is in both.
        if version not in paths or not paths[version].is_relative_to(top):
            continue
        below = paths[version].relative_to(top)
        if ".." not in below.parts:  # else it lies outside of the namespace of cgroups that this process sees
            folder = mounted / below
            yield from (folder, *(above for above in folder.parents if above.is_relative_to(mounted)))


def _memberships(controller: str, root: Path) -> Iterator[tuple[int, PurePosixPath]]:
    """(version, path in its hierarchy) of the cgroups of this process that a controller may be in."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, PurePosixPath(path)
        elif controller in controllers.split(","):
            yield 1, PurePosixPath(path)


def _mounts(controller: str, root: Path) -> Iterator[tuple[int, PurePosixPath, Path]]:
    """(version, path in its hierarchy, folder) of every place where one with a controller is mounted; see proc(5)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        place, filesystem = before.split(" "), after.split(" ")
        if len(place) < 5 or len(filesystem) < 3:
            continue
        top, mounted = PurePosixPath(_unescaped(place[3])), root / _unescaped(place[4]).lstrip("/")
        if filesystem[0] == "cgroup2":
            yield 2, top, mounted
        elif filesystem[0] == "cgroup" and controller in filesystem[2].split(","):
            yield 1, top, mounted


def _unescaped(text: str) -> str:
    """A path as mountinfo writes it, with blanks in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _numbers(path: Path, key: str = "") -> list[int]:
    """The numbers in a file, or in its line that begins with a key; words such as max are none."""
    lines = [line.removeprefix(key) for line in _lines(path) if line.startswith(key)]
    return [int(word) for line in lines for word in line.split() if re.fullmatch(r"-?\d+", word)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
