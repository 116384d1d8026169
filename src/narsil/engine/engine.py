"""The engine: admits requests, hands them to lanes, and ends each exactly once.

Receives Requests for any model from any transport's thread, delivers Results from lane threads. Owns the queues, the
lanes and the counts. It acts on what the scheduler decides and decides nothing itself.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace

from narsil.clock import Clock, MonotonicClock
from narsil.dataflow import Features, Request, Result, StageTimes
from narsil.engine.backlog import Backlog, Backlogs
from narsil.engine.independence import WORKER
from narsil.engine.lane import Job, Lane, Work
from narsil.engine.queue import QueueLimits
from narsil.engine.scheduler import BatchPolicy, Decision, schedule
from narsil.engine.served_model import ServedModel
from narsil.engine.source import Source
from narsil.errors import Cancelled, ConfigError, DeadlineExceeded, Draining, QueueFull, RequestError
from narsil.telemetry.observer import Careful, Observer

log = logging.getLogger(__name__)

DRAINING = "the server is shutting down; retry on another one"
GONE = "the client cancelled the request; it was not run"


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


@dataclass(slots=True)
class _Batch:
    """What a lane runs."""

    backlog: Backlog
    requests: int
    left: int  # of the requests: those that have not ended
    rows: int
    began: float
    predicted: float  # seconds that were charged for it


@dataclass(slots=True)
class _Seat:
    """One lane, as the engine sees it. All under the engine's lock but ``batch``, which is its lane's own."""

    woken: threading.Condition  # on which it sleeps
    jobs: deque[Job] = field(default_factory=deque)  # that this lane alone can do
    batch: _Batch | None = None
    served: bool = False  # its last work was requests, so that a job has its turn
    parked: bool = False  # counted in _polling
    ended: bool = False  # told to end, since the engine drains
    error: BaseException | None = None  # that it has ended by


class Engine:
    """Continuous batching over the lanes of this process, for any number of models.

    Thread-safe. Every request that ``submit`` admits gets exactly one ``reply.deliver``; one that ``submit`` raises for
    or that ``cancel`` takes back gets none. ``limits`` bound what waits for each model.
    """

    def __init__(
        self,
        lanes: int,
        policy: BatchPolicy | None = None,
        limits: QueueLimits | None = None,
        clock: Clock | None = None,
        observer: Observer | None = None,
        thread_setup: Callable[[int], None] | None = None,
    ) -> None:
        """``thread_setup`` is called with its number in each lane's thread, before anything else."""
        if lanes < 1:
            raise ConfigError("an engine needs at least one lane")
        self._policy = policy or BatchPolicy()
        self._clock = clock or MonotonicClock()
        self._observer = Careful(observer or Observer())
        self._observer.watch("engine", lambda: asdict(self.statistics()))
        self._backlogs = Backlogs(limits or QueueLimits())
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)  # drain waits here for the last request to end
        # Lanes that wait for work, each on its own condition. The one that ran last is woken first: its core's caches
        # still hold the weights, and under light load the others sleep on.
        self._sleeping: list[threading.Condition] = []
        self._source: Source | None = None
        self._polling = 0  # lanes that wait in the source, rather than on a condition
        self._draining = False
        self._stats = EngineStatistics()
        setup = thread_setup or (lambda number: None)
        self._seats = [_Seat(threading.Condition(self._lock)) for _ in range(lanes)]
        self._lanes = [Lane(number, self._policy.max_rows, self, self._clock.now, setup) for number in range(lanes)]

    def start(self) -> None:
        """Starts the lanes."""
        for lane in self._lanes:
            lane.start()

    def add(self, model: ServedModel, warmup: Sequence[Features] = ()) -> None:
        """Takes requests for this model from now on; returns once every lane has run every warmup payload on it.

        Requests for other models go on meanwhile, between two payloads. Raises ConfigError where the model has another
        number of backends than there are lanes, and what a warmup forward or a lane raised; the model is then not
        added.
        """
        if len(model.backends) != len(self._lanes):
            raise ConfigError(f"model {model.name} has {len(model.backends)} backends for {len(self._lanes)} lanes")
        if model.whole and self._policy.max_requests > 1:
            raise ConfigError(
                f"model {model.name} scores a row by its company, and this engine fuses requests. {WORKER}"
            )
        ready: list[Future[None]] = []
        with self._lock:
            if self._draining:
                raise Draining(DRAINING)
            broken = next((seat.error for seat in self._seats if seat.error is not None), None)
            if broken is not None:
                raise broken
            for seat, lane in zip(self._seats, self._lanes, strict=True):
                jobs = [lane.opening(model), *(lane.warming(model, features) for features in warmup)]
                seat.jobs.extend(jobs)
                ready += [job.done for job in jobs]
            self._wake_all()
        try:
            for done in ready:
                done.result()
        except BaseException:
            for done in ready:
                done.cancel()
            raise
        with self._lock:
            self._backlogs.keep(model)

    def remove(self, model: ServedModel) -> None:
        """Lets go of this model once the requests that it has have ended. What was decoded for it and comes after this
        is answered all the same."""
        with self._lock:
            self._backlogs.let_go(model)

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
                self._wake()
        except RequestError as error:
            self._observer.ended([(request, Result(error=error))])
            raise
        finally:
            if ended:
                self._deliver(ended)

    def attach(self, source: Source | None) -> None:
        """Has idle lanes poll this source from now on, or none; there is one at most. Requests come by ``submit`` too.

        What the source gives but the queue refuses is delivered as a Result with the error that ``submit`` would
        raise.
        """
        with self._lock:
            self._wake_all()  # they come back to the new one
            self._source = source

    def cancel(self, request: Request) -> bool:
        """Takes a request back: it frees its place at once and never runs. False when it runs already or has ended."""
        with self._lock:
            if not self._backlogs.leave(request):
                return False
            self._stats.cancelled += 1
            self._signal_if_idle()
        self._observer.ended([(request, Result(error=Cancelled(GONE)))])
        return True

    def drain(self, timeout: float | None = None) -> bool:
        """Admits nothing more, waits for all admitted requests to end, stops the lanes.

        Returns False when work was still running after ``timeout`` seconds of real time.
        """
        with self._lock:
            self._draining = True
            if self._source is not None:
                self._source.close(DRAINING)
            self._wake_all()
            done = self._idle.wait_for(self._is_idle, timeout)
        if done:
            for lane in self._lanes:
                if lane.ident is not None:
                    lane.join(timeout)
        return done

    def statistics(self) -> EngineStatistics:
        """A consistent snapshot of the counts, over all models."""
        with self._lock:
            return replace(self._stats, queued=self._backlogs.queued)

    def waiting(self) -> dict[tuple[str, str], dict[str, int]]:
        """(model's name, version) -> how much waits for it; see RequestQueue.load."""
        with self._lock:
            return {(each.model.name, each.model.version): each.queue.load for each in self._backlogs.all}

    def take(self, lane: int) -> Work | None:
        """What a lane does next; waits for it. None ends the lane. Called by lanes."""
        seat = self._seats[lane]
        wait: float | None = 0.0  # first a look at what has arrived while it ran
        while not seat.ended:
            work, wait = self._look(seat, wait)
            if work is not None:
                return work
        return None

    def lost(self, lane: int, error: BaseException) -> None:
        """A lane has ended by an error, which its jobs end with too. Called by that lane, last of all."""
        seat = self._seats[lane]
        with self._lock:
            seat.error = error
            jobs = [*seat.jobs]
            seat.jobs.clear()
            self._wake()  # what woke this one was meant for somebody
        for job in jobs:
            job.done.set_exception(error)

    def settle(self, lane: int, results: Sequence[tuple[Request, Result]]) -> None:
        """Ends requests that a lane has taken. Called by lanes, once for each request."""
        seat = self._seats[lane]
        batch = seat.batch
        assert batch is not None  # noqa: S101 - a lane settles what it has taken
        batch.left -= len(results)
        with self._lock:
            self._count(results)
            batch.backlog.running -= len(results)
            if not batch.left:
                seat.batch = None
                seconds = self._clock.now() - batch.began
                batch.backlog.finish(batch.rows, batch.predicted, seconds)
                self._backlogs.forget_if_idle(batch.backlog)
            self._signal_if_idle()
        self._deliver(results)
        if not batch.left:
            self._observer.ran(batch.backlog.model, batch.requests, batch.rows, seconds)

    def _count(self, results: Sequence[tuple[Request, Result]]) -> None:
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

    def _look(self, seat: _Seat, wait: float | None) -> tuple[Work | None, float | None]:
        """One look at the source and the queues: what the lane does now, or how long it may wait before the next look.

        A function of its own, so that a lane that waits holds on to no request, and through it to no model.
        """
        source = self._source
        arrived = () if source is None else source.poll(wait)
        with self._lock:
            if seat.parked:
                self._polling -= 1
                seat.parked = False
            ended = self._admit_all(arrived)
            now = self._clock.now()
            decision = self._decide(now)
            ended += self._end_unrun(now, decision.expired, decision.cancelled)
            work, wait = self._choose(seat, decision, now, bool(ended))
            self._signal_if_idle()
        if ended:
            self._deliver(ended)
        return work, wait

    def _choose(self, seat: _Seat, decision: Decision, now: float, again: bool) -> tuple[Work | None, float | None]:
        """Jobs and requests by turns; without either the lane waits, unless it is to look ``again``."""
        if seat.jobs and (seat.served or not decision.take):
            seat.served = False
            if decision.take:
                self._wake()  # a lane that idles can have them
            return seat.jobs.popleft(), 0.0
        if decision.take:
            seat.served = True
            self._begin(seat, decision.take, now)
            return decision.take, 0.0
        if again:
            return None, 0.0
        if self._draining and not self._backlogs.queued:
            self._wake()  # another lane ends too
            seat.ended = True
            return None, 0.0
        if self._source is None:
            self._sleep(seat.woken, decision.wake_at)
            return None, 0.0
        if any(other.parked and other.jobs for other in self._seats):
            self._source.wake()  # one lane alone can do a job, and a wake may have reached another: it is passed on
        self._polling += 1
        seat.parked = True
        return None, None if decision.wake_at is None else max(0.0, decision.wake_at - now)

    def _decide(self, now: float) -> Decision:
        # While draining no company can come: nobody waits for it.
        policy = replace(self._policy, timeout=0.0) if self._draining else self._policy
        return schedule(self._backlogs.all, policy, now)

    def _begin(self, seat: _Seat, batch: Sequence[Request], now: float) -> None:
        backlog, stats, count = self._backlogs.begin(batch), self._stats, len(batch)
        rows = 0
        for request in batch:
            rows += request.features.rows
        seat.batch = _Batch(backlog, count, count, rows, now, backlog.begin(rows))
        stats.batches += 1
        stats.rows += rows
        stats.running += count
        if self._backlogs.queued:  # what is left is another lane's share, or its time has come too
            self._wake()

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
                self._backlogs.add(request)
            except QueueFull:
                ended += self._sweep(self._backlogs.of(request))
                self._backlogs.add(request)
        except RequestError:
            self._stats.rejected += 1
            raise

    def _sweep(self, backlog: Backlog) -> list[tuple[Request, Result]]:
        now = self._clock.now()
        cancelled = [request for request in backlog.queue if request.reply.cancelled]
        expired = [request for request in backlog.queue if request.expired(now) and not request.reply.cancelled]
        return self._end_unrun(now, expired, cancelled)

    def _end_unrun(
        self, now: float, expired: Iterable[Request], cancelled: Iterable[Request]
    ) -> list[tuple[Request, Result]]:
        """Takes requests that will never run from their queues; the caller delivers their results without the lock."""
        ended = []
        for request in expired:
            self._backlogs.leave(request)
            self._stats.expired += 1
            waited = now - request.arrived
            error = DeadlineExceeded(f"the deadline passed after {waited * 1e3:.1f} ms in the queue; it was not run")
            ended.append((request, Result(error=error, times=StageTimes(queue=waited))))
        for request in cancelled:
            self._backlogs.leave(request)
            self._stats.cancelled += 1
            ended.append((request, Result(error=Cancelled(GONE))))
        return ended

    def _wake(self, lanes: int = 1) -> None:
        """Wakes so many idle lanes, the last to sleep first."""
        for _ in range(min(lanes, len(self._sleeping))):
            self._sleeping.pop().notify()
        if self._source is not None:
            for _ in range(min(lanes, self._polling)):
                self._source.wake()

    def _wake_all(self) -> None:
        self._wake(len(self._lanes))

    def _is_idle(self) -> bool:
        return not self._backlogs.queued and not self._stats.running

    def _signal_if_idle(self) -> None:
        if self._draining and self._is_idle():
            self._idle.notify_all()

    def _deliver(self, ends: Sequence[tuple[Request, Result]]) -> None:
        """Hands results over, then wakes their transports. A transport that raises loses its own results and no
        others."""
        wakes = set()
        for request, result in ends:
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
        self._observer.ended(ends)
