"""Lanes on processors of their own (``--pin-lanes``).

A lane that stays where it is keeps its weights in that core's caches. Processors are taken from the process's own
affinity, which a container's cpuset has already cut down; hyperthreads of one core are taken last.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["pin", "places", "processors"]

log = logging.getLogger(__name__)

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def places(lanes: int, threads: int, available: Sequence[int] | None = None) -> list[frozenset[int]]:
    """For each lane ``threads`` processors that no other has.

    Where there are not enough of them (``available``, None: this process's) there are no places, and a warning says so:
    two lanes on one processor would wait for each other.
    """
    usable = processors() if available is None else list(available)
    if len(usable) < threads * lanes:
        log.warning(
            "lanes are not pinned: %d lanes of %d threads need more than the %d processors that this process may use",
            lanes,
            threads,
            len(usable),
        )
        return []
    return [frozenset(usable[number * threads : (number + 1) * threads]) for number in range(lanes)]


def pin(lanes: int, threads: int) -> Callable[[int], None]:
    """What each lane's thread calls first, with the lane's number: binds that thread. Threads that it starts from then
    on are bound alike."""
    bound = places(lanes, threads)

    def bind(lane: int) -> None:
        if not bound:
            return
        try:
            os.sched_setaffinity(0, bound[lane])
        except OSError as error:
            log.warning("lane %d cannot be bound to processors %s: %s", lane, sorted(bound[lane]), error)

    return bind


def processors() -> list[int]:
    """The processors this process may use, one of each core first; none where the system does not bind threads."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    first: list[int] = []
    later: list[int] = []
    seen: set[str] = set()
    for number in sorted(os.sched_getaffinity(0)):
        try:
            core = Path(_SIBLINGS.format(number)).read_text(encoding="ascii").strip()
        except OSError:
            core = str(number)
        (later if core in seen else first).append(number)
        seen.add(core)
    return first + later
