"""What waits for each model, and how much of the lanes' time each has had. Owned by the engine, which holds its lock
around every call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from narsil.dataflow import Request, Served
from narsil.engine.queue import QueueLimits, RequestQueue
from narsil.engine.served_model import ServedModel
from narsil.errors import RequestError

__all__ = ["Backlog", "Backlogs"]

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


class Backlogs:
    """Those of models that are served, and of models that have gone but still have requests here."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._kept: set[ServedModel] = set()
        self._backlogs: dict[Served, Backlog] = {}
        self.all: tuple[Backlog, ...] = ()
        self.queued = 0  # requests that wait, for all models together

    def of(self, request: Request) -> Backlog:
        """Its model's. A model that is not kept has one for as long as it has requests."""
        return self._backlogs.get(request.model) or self._open(cast(ServedModel, request.model))

    def add(self, request: Request) -> None:
        """Queues a request. Raises as RequestQueue.add; nothing is queued then."""
        backlog = self.of(request)
        if len(self.all) > 1 and backlog.idle:
            backlog.join(self.all)
        try:
            backlog.queue.add(request)
        except RequestError:
            self.forget_if_idle(backlog)
            raise
        self.queued += 1

    def leave(self, request: Request) -> bool:
        """Takes a request that will not run out of its queue; False when it is not (any more) in it."""
        backlog = self._backlogs.get(request.model)
        if backlog is None or not backlog.queue.remove(request):
            return False
        self.queued -= 1
        self.forget_if_idle(backlog)
        return True

    def begin(self, batch: Sequence[Request]) -> Backlog:
        """Takes the requests of one model, which run now, out of its queue."""
        backlog = self.of(batch[0])
        for request in batch:
            backlog.queue.remove(request)
        self.queued -= len(batch)
        backlog.running += len(batch)
        return backlog

    def keep(self, model: ServedModel) -> None:
        """The model's account outlives its requests from now on."""
        self._kept.add(model)

    def let_go(self, model: ServedModel) -> None:
        """It does not any more: the model is forgotten, and may be freed, with its last request."""
        self._kept.discard(model)
        backlog = self._backlogs.get(model)
        if backlog is not None:
            self.forget_if_idle(backlog)

    def forget_if_idle(self, backlog: Backlog) -> None:
        """Drops the backlog of a model that is not kept and has no request left."""
        if backlog.model not in self._kept and backlog.idle and self._backlogs.pop(backlog.model, None) is not None:
            self.all = tuple(self._backlogs.values())

    def _open(self, model: ServedModel) -> Backlog:
        backlog = self._backlogs[model] = Backlog(model, self._limits)
        self.all = tuple(self._backlogs.values())
        return backlog
