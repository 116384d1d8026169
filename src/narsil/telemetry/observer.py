"""Who watches: the one seam through which engine, lanes, data plane and transports tell what happened.

They call an Observer at each stage's edge, outside of their locks; metrics, traces and captures are Observers. A call
costs the path it is made on, so it may count and must not wait. It may come from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from narsil.dataflow import Request, Result, Served
from narsil.telemetry.tally import Tally

__all__ = ["Careful", "CountingObserver", "ModelCounts", "Observer"]

log = logging.getLogger(__name__)

Counts = Mapping[str, int]

_FAILED = "the observer failed"


class Observer:
    """Sees everything, remembers nothing: the base of those who do, and the default."""

    def refused(self, method: str, error: Exception) -> None:
        """A transport has answered a scoring call with an error before the engine saw it: it could not be decoded, or
        names a model that is not served. What is no RequestError should not have happened."""

    def passed_over(self, model: Served, groups: Sequence[str]) -> None:
        """A request for this model held these groups of features, which the model does not take, and was decoded
        without them."""

    def undelivered(self, method: str, error: Exception) -> None:
        """Scores that the engine has told as answered could not be written as an answer: the client was told
        INTERNAL."""

    def serving(self, models: Sequence[Served]) -> None:
        """These models can be named from now on, and no others."""

    def ended(self, ends: Sequence[tuple[Request, Result]]) -> None:
        """The engine has ended these requests, in whichever way: ``Result.error`` says how, ``Result.times`` how long
        each stage took. What ``submit`` refuses or ``cancel`` takes back is told as a Result too."""

    def ran(self, model: Served, requests: int, rows: int, seconds: float) -> None:
        """A lane has been busy with a batch for so long, from taking it to its last result; failed ones count."""

    def watch(self, name: str, counts: Callable[[], Counts]) -> None:
        """Counts that their owner keeps by itself, such as the data plane's: read when somebody asks."""


class Careful(Observer):
    """Another observer whose faults are logged and harm nobody: what engine and transports talk to."""

    def __init__(self, inner: Observer) -> None:
        self._inner = inner

    def refused(self, method: str, error: Exception) -> None:
        """See Observer.refused."""
        try:
            self._inner.refused(method, error)
        except Exception:
            log.exception(_FAILED)

    def passed_over(self, model: Served, groups: Sequence[str]) -> None:
        """See Observer.passed_over."""
        try:
            self._inner.passed_over(model, groups)
        except Exception:
            log.exception(_FAILED)

    def undelivered(self, method: str, error: Exception) -> None:
        """See Observer.undelivered."""
        try:
            self._inner.undelivered(method, error)
        except Exception:
            log.exception(_FAILED)

    def serving(self, models: Sequence[Served]) -> None:
        """See Observer.serving."""
        try:
            self._inner.serving(models)
        except Exception:
            log.exception(_FAILED)

    def ended(self, ends: Sequence[tuple[Request, Result]]) -> None:
        """See Observer.ended."""
        try:
            self._inner.ended(ends)
        except Exception:
            log.exception(_FAILED)

    def ran(self, model: Served, requests: int, rows: int, seconds: float) -> None:
        """See Observer.ran."""
        try:
            self._inner.ran(model, requests, rows, seconds)
        except Exception:
            log.exception(_FAILED)

    def watch(self, name: str, counts: Callable[[], Counts]) -> None:
        """See Observer.watch."""
        try:
            self._inner.watch(name, counts)
        except Exception:
            log.exception(_FAILED)


@dataclass
class ModelCounts:
    """What a CountingObserver knows of one version of a model. Seconds are sums over requests, ``busy`` over lanes."""

    ends: Counter[str] = field(default_factory=Counter)  # "answered", or the error's class
    passed_over: Counter[str] = field(default_factory=Counter)  # group of features -> requests with it
    batches: int = 0
    requests: int = 0  # in batches
    rows: int = 0  # in batches
    queue: float = 0.0
    collate: float = 0.0
    execute: float = 0.0
    split: float = 0.0
    busy: float = 0.0
    answered: float = 0.0  # all stages of requests that were answered
    failed: float = 0.0  # and of others
    last: float = 0.0  # seconds since the epoch when the last request ended


class CountingObserver(Observer):
    """Counts and sums, by model and version. What happens to every request is tallied without a lock; the rest is
    rare."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._lock = threading.Lock()
        self._refused: Counter[tuple[str, str]] = Counter()
        self._undelivered: Counter[str] = Counter()
        self._passed_over: Counter[tuple[str, str, str]] = Counter()
        self._serving: tuple[tuple[str, str], ...] = ()
        self._watched: dict[str, Callable[[], Counts]] = {}

    def refused(self, method: str, error: Exception) -> None:
        """See Observer.refused."""
        with self._lock:
            self._refused[method, type(error).__name__] += 1

    def passed_over(self, model: Served, groups: Sequence[str]) -> None:
        """See Observer.passed_over."""
        with self._lock:
            self._passed_over.update((model.name, model.version, group) for group in groups)

    def undelivered(self, method: str, error: Exception) -> None:
        """See Observer.undelivered."""
        with self._lock:
            self._undelivered[method] += 1

    def serving(self, models: Sequence[Served]) -> None:
        """See Observer.serving. The counts of a model that has gone are kept, and go on when it comes again."""
        with self._lock:
            self._serving = tuple((model.name, model.version) for model in models)

    def ended(self, ends: Sequence[tuple[Request, Result]]) -> None:
        """See Observer.ended."""
        self.tally.ended(ends)

    def ran(self, model: Served, requests: int, rows: int, seconds: float) -> None:
        """See Observer.ran."""
        self.tally.ran(model.name, model.version, requests, rows, seconds)

    def watch(self, name: str, counts: Callable[[], Counts]) -> None:
        """See Observer.watch."""
        with self._lock:
            self._watched[name] = counts

    def model(self, name: str, version: str) -> ModelCounts:
        """The counts of one version of a model; zeros where nothing has happened."""
        counts = ModelCounts(last=self.tally.last().get((name, version), 0.0))
        for (of, its, outcome), stages in self.tally.ends().items():
            if (of, its) == (name, version):
                counts.ends[outcome] = stages["total"].count
                counts.queue += stages["queue"].total
                counts.collate += stages["collate"].total
                counts.execute += stages["execute"].total
                counts.split += stages["split"].total
                if outcome == "answered":
                    counts.answered += stages["total"].total
                else:
                    counts.failed += stages["total"].total
        for (of, its, _), (requests, rows, seconds) in self.tally.batches().items():
            if (of, its) == (name, version):
                counts.batches += requests.count
                counts.requests += int(requests.total)
                counts.rows += int(rows.total)
                counts.busy += seconds
        with self._lock:
            passed = self._passed_over.items()
            counts.passed_over.update({group: n for (of, its, group), n in passed if (of, its) == (name, version)})
        return counts

    def passed_over_counts(self) -> dict[tuple[str, str, str], int]:
        """(name, version, group of features) -> requests with it."""
        with self._lock:
            return dict(self._passed_over)

    def refusals(self) -> dict[tuple[str, str], int]:
        """(method, error class) -> scoring calls that the engine never saw."""
        with self._lock:
            return dict(self._refused)

    def failures(self) -> dict[str, int]:
        """Method -> answers that could not be written."""
        with self._lock:
            return dict(self._undelivered)

    def models(self) -> tuple[tuple[str, str], ...]:
        """(name, version) of every model that can be named now."""
        with self._lock:
            return self._serving

    def watched(self) -> dict[str, dict[str, int]]:
        """What is watched, read now."""
        with self._lock:
            watched = dict(self._watched)
        return {name: dict(counts()) for name, counts in watched.items()}
