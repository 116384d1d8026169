"""The engine: admits requests, hands them to lanes, and ends each exactly once.

Receives Requests from any transport's thread, delivers Results from lane threads. Owns the queue, the lanes and
the counts. It acts on what the scheduler decides and decides nothing itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from narsil.backends.base import Backend
from narsil.clock import Clock, MonotonicClock
from narsil.dataflow import Features, Request, Result, StageTimes
from narsil.engine.lane import Lane
from narsil.engine.queue import QueueLimits, RequestQueue
from narsil.engine.scheduler import BatchPolicy, Decision, schedule
from narsil.errors import Cancelled, ConfigError, DeadlineExceeded, Draining, QueueFull, RequestError

log = logging.getLogger(__name__)

DRAINING = "the server is shutting down; retry on another one"


@dataclass(slots=True)
class EngineStatistics:
    """Counts since the start. ``submitted`` is the sum of all ends plus ``queued`` plus ``running``."""

    submitted: int = 0
    answered: int = 0
    rejected: int = 0  # never admitted: queue full or draining
    expired: int = 0
    cancelled: int = 0  # while it waited, or between two forwards of its own
    failed: int = 0
    batches: int = 0
    rows: int = 0  # of all batches
    queued: int = 0
    running: int = 0


class Source(Protocol):
    """Requests that idle lanes fetch by themselves: a transport that has no thread of its own.

    Every method may be called from any thread, and ``poll`` by several lanes at once.
    """

    def poll(self, timeout: float | None) -> Sequence[Request]:
        """Requests that have arrived. Waits for some until ``timeout`` seconds have passed or ``wake`` was called."""

    def wake(self) -> None:
        """Has one running poll, or the next, return."""

    def close(self, why: str) -> None:
        """No lane will poll any more: what comes from now on is refused with this text, as Draining is."""


class Engine:
    """Continuous batching over the lanes of one model.

    ``backends`` holds one instance per lane. Thread-safe. Every request that ``submit`` admits gets exactly
    one ``reply.deliver``; one that ``submit`` raises for or that ``cancel`` takes back gets none.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        policy: BatchPolicy | None = None,
        limits: QueueLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not backends:
            raise ConfigError("an engine needs at least one lane")
        self.schema = backends[0].schema
        self._policy = policy or BatchPolicy()
        self._clock = clock or MonotonicClock()
        self._queue = RequestQueue(limits or QueueLimits())
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)  # drain waits here for the last request to end
        # Lanes that wait for work, each on its own condition. The one that ran last is woken first: its core's caches
        # still hold the weights, and under light load the others sleep on.
        self._sleeping: list[threading.Condition] = []
        self._source: Source | None = None
        self._polling = 0  # lanes that wait in the source, rather than on a condition
        self._draining = False
        self._stats = EngineStatistics()
        self._lanes = [
            Lane(f"lane-{i}", backend, self._policy.max_rows, self._take_of_one_lane(), self._settle, self._clock.now)
            for i, backend in enumerate(backends)
        ]

    def start(self, warmup: Sequence[Features] = ()) -> None:
        """Starts the lanes and returns once each has run every warmup payload. Raises what a warmup forward raised."""
        for lane in self._lanes:
            lane.warmup = warmup
            lane.start()
        for lane in self._lanes:
            lane.wait_until_warm()

    def now(self) -> float:
        """The engine's clock, on which requests state their arrival and deadline."""
        return self._clock.now()

    def submit(self, request: Request) -> None:
        """Admits a request; its Result comes through ``request.reply``.

        Raises Draining after ``drain`` began, QueueFull at the queue's limits, InvalidRequest for one that no
        queue could hold. What waits but is past its deadline or cancelled gives way before QueueFull is raised.
        """
        ended: list[tuple[Request, Result]] = []
        try:
            with self._lock:
                self._admit(request, ended)
                self._wake(1)
        finally:
            _deliver(ended)

    def attach(self, source: Source | None) -> None:
        """Has idle lanes poll this source from now on, or none; there is one at most. Requests come by ``submit`` too.

        What the source gives but the queue refuses is delivered as a Result with the error that ``submit`` would
        raise.
        """
        with self._lock:
            self._wake(len(self._lanes))  # they come back to the new one
            self._source = source

    def cancel(self, request: Request) -> bool:
        """Takes a request back: it frees its place at once and never runs. False when it runs already or has ended."""
        with self._lock:
            if not self._queue.remove(request):
                return False
            self._stats.cancelled += 1
            self._signal_if_idle()
            return True

    def drain(self, timeout: float | None = None) -> bool:
        """Admits nothing more, waits for all admitted requests to end, stops the lanes.

        Returns False when work was still running after ``timeout`` seconds of real time.
        """
        with self._lock:
            self._draining = True
            if self._source is not None:
                self._source.close(DRAINING)
            self._wake(len(self._lanes))
            done = self._idle.wait_for(self._is_idle, timeout)
        if done:
            for lane in self._lanes:
                if lane.ident is not None:
                    lane.join(timeout)
        return done

    def statistics(self) -> EngineStatistics:
        """A consistent snapshot of the counts."""
        with self._lock:
            return replace(self._stats, queued=len(self._queue))

    def _take_of_one_lane(self) -> Callable[[], Sequence[Request] | None]:
        """A ``take`` for one lane, with the condition on which it sleeps."""
        return partial(self._take, threading.Condition(self._lock))

    def _take(self, woken: threading.Condition) -> Sequence[Request] | None:
        """What the calling lane runs next; waits for it in the source, or on ``woken``. None ends the lane."""
        wait: float | None = 0.0  # first a look at what has arrived while it ran
        parked = False
        while True:
            source = self._source
            arrived = () if source is None else source.poll(wait)
            with self._lock:
                if parked:
                    self._polling -= 1
                ended = self._admit_all(arrived)
                now = self._clock.now()
                decision = self._decide(now)
                ended += self._end_unrun(decision.expired, decision.cancelled)
                parked, wait = False, 0.0
                if decision.take:
                    self._begin(decision.take)
                elif not ended:
                    if self._draining and not len(self._queue):
                        self._wake(1)  # another lane ends too
                        return None
                    if self._source is None:
                        self._sleep(woken, decision.wake_at)
                        continue
                    self._polling += 1
                    parked = True
                    wait = None if decision.wake_at is None else max(0.0, decision.wake_at - now)
                self._signal_if_idle()
            _deliver(ended)
            if decision.take:
                return decision.take

    def _decide(self, now: float) -> Decision:
        # While draining no company can come: nobody waits for it.
        policy = replace(self._policy, timeout=0.0) if self._draining else self._policy
        return schedule(self._queue, policy, now)

    def _begin(self, batch: Sequence[Request]) -> None:
        for request in batch:
            self._queue.remove(request)
        self._stats.batches += 1
        self._stats.rows += sum(request.rows for request in batch)
        self._stats.running += len(batch)
        if len(self._queue):  # what is left is another lane's share, or its time has come too
            self._wake(1)

    def _sleep(self, woken: threading.Condition, until: float | None) -> None:
        self._sleeping.append(woken)
        self._clock.wait(woken, until)
        if woken in self._sleeping:  # its time came, rather than work
            self._sleeping.remove(woken)

    def _admit_all(self, requests: Iterable[Request]) -> list[tuple[Request, Result]]:
        """Queues what it can; returns those that ended by it: refused, or displaced."""
        ended: list[tuple[Request, Result]] = []
        for request in requests:
            try:
                self._admit(request, ended)
            except RequestError as error:
                ended.append((request, Result(error=error)))
        return ended

    def _admit(self, request: Request, ended: list[tuple[Request, Result]]) -> None:
        """Queues the request or raises. Whom it displaces, dead requests alone, is appended to ``ended``."""
        self._stats.submitted += 1
        try:
            if self._draining:
                raise Draining(DRAINING)
            try:
                self._queue.add(request)
            except QueueFull:
                swept = self._sweep()
                if not swept:
                    raise
                ended += swept
                self._queue.add(request)
        except RequestError:
            self._stats.rejected += 1
            raise

    def _settle(self, results: Sequence[tuple[Request, Result]]) -> None:
        with self._lock:
            stats = self._stats
            stats.running -= len(results)
            for _, result in results:
                if result.error is None:
                    stats.answered += 1
                elif isinstance(result.error, Cancelled):
                    stats.cancelled += 1
                elif isinstance(result.error, DeadlineExceeded):
                    stats.expired += 1
                else:
                    stats.failed += 1
            self._signal_if_idle()
        _deliver(results)

    def _sweep(self) -> list[tuple[Request, Result]]:
        now = self._clock.now()
        cancelled = [request for request in self._queue if request.reply.cancelled]
        expired = [request for request in self._queue if request.expired(now) and not request.reply.cancelled]
        return self._end_unrun(expired, cancelled)

    def _end_unrun(self, expired: Iterable[Request], cancelled: Iterable[Request]) -> list[tuple[Request, Result]]:
        """Takes requests that will never run out of the queue; the caller delivers their results without the lock."""
        now = self._clock.now()
        ended = []
        for request in expired:
            self._queue.remove(request)
            waited = now - request.arrived
            error = DeadlineExceeded(f"the deadline passed after {waited * 1e3:.1f} ms in the queue; it was not run")
            ended.append((request, Result(error=error, times=StageTimes(queue=waited))))
        self._stats.expired += len(ended)
        for request in cancelled:
            self._queue.remove(request)
            self._stats.cancelled += 1
            ended.append((request, Result(error=Cancelled("the client cancelled the request; it was not run"))))
        return ended

    def _wake(self, lanes: int) -> None:
        """Wakes so many idle lanes, the last to sleep first."""
        for _ in range(min(lanes, len(self._sleeping))):
            self._sleeping.pop().notify()
        if self._source is not None:
            for _ in range(min(lanes, self._polling)):
                self._source.wake()

    def _is_idle(self) -> bool:
        return not len(self._queue) and not self._stats.running

    def _signal_if_idle(self) -> None:
        if self._draining and self._is_idle():
            self._idle.notify_all()
            self._wake(len(self._lanes))


def _deliver(results: Iterable[tuple[Request, Result]]) -> None:
    """Hands results over, then wakes their transports. A transport that raises loses its own results and no others."""
    wakes = set()
    for request, result in results:
        try:
            wakes.add(request.reply.deliver(result))
        except Exception:
            log.exception("a transport failed to take a result")
    for wake in wakes:
        try:
            if wake is not None:
                wake()
        except Exception:
            log.exception("a transport could not be woken")
