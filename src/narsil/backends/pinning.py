"""Lanes on processors of their own (``--pin-lanes``).

Receives one backend instance per lane; produces instances that, in their lane's thread, first bind it to a processor
of its own. A lane that stays where it is keeps its weights in that core's caches. Processors are taken from the
process's own affinity, which a container's cpuset has already cut down; hyperthreads of one core are taken last.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from narsil.backends.base import Backend
from narsil.dataflow import Batch, Scores

__all__ = ["Pinned", "pin", "processors"]

log = logging.getLogger(__name__)

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


class Pinned(Backend):
    """Another backend, whose thread is bound to some processors before it begins."""

    def __init__(self, inner: Backend, on: frozenset[int]) -> None:
        self.inner = inner
        self.on = on
        self.name = inner.name
        self.schema = inner.schema
        self.device = inner.device

    def run(self, batch: Batch) -> Scores:
        """As the inner backend's."""
        return self.inner.run(batch)

    def share(self) -> Backend:
        """As the inner backend's; the new instance is not bound."""
        return self.inner.share()

    def bucket(self, rows: int) -> int:
        """As the inner backend's."""
        return self.inner.bucket(rows)

    def thread_setup(self) -> None:
        """Binds this thread, then does as the inner backend. Threads that it starts from here on are bound alike."""
        try:
            os.sched_setaffinity(0, self.on)
        except OSError as error:
            log.warning("a lane cannot be bound to processors %s: %s", sorted(self.on), error)
        self.inner.thread_setup()

    def close(self) -> None:
        """As the inner backend's."""
        self.inner.close()


def pin(backends: Sequence[Backend], threads: int, available: Sequence[int] | None = None) -> list[Backend]:
    """The backends, each bound to ``threads`` processors that no other has.

    Where there are not enough of them (``available``, None: this process's), nothing is bound, and a warning says so:
    two lanes on one processor would wait for each other.
    """
    usable = processors() if available is None else list(available)
    if len(usable) < threads * len(backends):
        log.warning(
            "lanes are not pinned: %d lanes of %d threads need more than the %d processors that this process may use",
            len(backends),
            threads,
            len(usable),
        )
        return list(backends)
    return [
        Pinned(backend, frozenset(usable[number * threads : (number + 1) * threads]))
        for number, backend in enumerate(backends)
    ]


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
