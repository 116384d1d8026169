"""Time, as the engine sees it. Seconds on a clock that never goes back; the zero point means nothing."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time, and waits on a condition until it is notified or a time has come."""

    def now(self) -> float:
        """Seconds."""

    def wait(self, condition: threading.Condition, until: float | None) -> None:
        """Waits on the held condition until it is notified or ``now() >= until``. May return early."""


class MonotonicClock:
    """The machine's monotonic clock."""

    now = staticmethod(time.monotonic)

    def wait(self, condition: threading.Condition, until: float | None) -> None:
        """See Clock.wait."""
        condition.wait(None if until is None else max(0.0, until - time.monotonic()))


class FakeClock:
    """A clock that stands still until a test advances it; whoever waits on it wakes then."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._waiting: dict[threading.Condition, int] = {}
        self._lock = threading.Lock()

    def now(self) -> float:
        """See Clock.now."""
        return self._now

    def wait(self, condition: threading.Condition, until: float | None) -> None:
        """See Clock.wait."""
        with self._lock:
            if until is not None and until <= self._now:
                return
            self._waiting[condition] = self._waiting.get(condition, 0) + 1
        try:
            condition.wait()
        finally:
            with self._lock:
                self._waiting[condition] -= 1

    def advance(self, seconds: float) -> None:
        """Moves time forward and wakes every waiter."""
        with self._lock:
            self._now += seconds
            conditions = [condition for condition, count in self._waiting.items() if count]
        for condition in conditions:
            with condition:
                condition.notify_all()
