"""What waits for one model, and how much of the lanes' time the model has had. Owned by the engine, which holds its
lock around every call."""

from __future__ import annotations

from collections.abc import Iterable

from narsil.engine.queue import QueueLimits, RequestQueue
from narsil.engine.served_model import ServedModel

__all__ = ["Backlog"]

_NEWEST = 0.2  # weight of the newest forward in the measured pace


class Backlog:
    """One model's queue and its account of lane time."""

    def __init__(self, model: ServedModel, limits: QueueLimits) -> None:
        self.model = model
        self.queue = RequestQueue(limits)
        self.running = 0  # requests that lanes have taken and not yet ended
        self.used = 0.0  # seconds of lane time over the model's share, forwards that still run as predicted
        self._pace = 0.0  # seconds a row, measured

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.running and not len(self.queue)

    def join(self, others: Iterable[Backlog]) -> None:
        """Called as work comes to an idle model: time in which it wanted nothing is no credit against the others."""
        self.used = max(self.used, min((other.used for other in others if not other.idle), default=self.used))

    def begin(self, rows: int) -> float:
        """A lane takes so many rows. Returns what was charged, for ``finish``."""
        predicted = self._pace * rows
        self.used += predicted / self.model.share
        return predicted

    def finish(self, rows: int, predicted: float, seconds: float) -> None:
        """The lane has ended them after ``seconds``."""
        self.used += (seconds - predicted) / self.model.share
        pace = seconds / max(rows, 1)
        self._pace = pace if not self._pace else self._pace + _NEWEST * (pace - self._pace)
