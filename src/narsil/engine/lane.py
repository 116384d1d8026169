"""A lane: one thread that runs what the engine hands it, for any model that it has opened.

Receives lists of requests, each of one model, or jobs from a Dispatcher, and gives it one Result for each request. Runs
a model by the runner that it has left with it when it opened it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import Protocol, TypeAlias, cast

from narsil.dataflow import Features, Request, Result, Scores, Served, StageTimes
from narsil.engine.runner import Runner
from narsil.engine.served_model import ServedModel
from narsil.engine.split import join, split
from narsil.errors import Cancelled, DeadlineExceeded, ForwardFailed, RequestError

log = logging.getLogger(__name__)


class Job:
    """Something that one lane alone can do, in its own thread. ``done`` tells when, or what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.done: Future[None] = Future()

    def run(self) -> None:
        """Does it, unless it has been cancelled."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self._work()
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


Work: TypeAlias = Sequence[Request] | Job


class Dispatcher(Protocol):
    """The engine, as lanes see it."""

    def take(self, lane: int) -> Work | None:
        """What this lane does next; waits for it. None ends the lane."""

    def settle(self, lane: int, results: Sequence[tuple[Request, Result]]) -> None:
        """Ends requests that this lane has taken: exactly once for each."""

    def lost(self, lane: int, error: BaseException) -> None:
        """The lane takes nothing any more."""


class Lane(threading.Thread):
    """Takes, collates, runs and splits until ``take`` returns None.

    A failed forward never ends the lane: the requests of the failed batch are each tried alone once, so that only
    the guilty one fails.
    """

    def __init__(
        self,
        number: int,
        max_batch_rows: int,
        dispatcher: Dispatcher,
        now: Callable[[], float],
        thread_setup: Callable[[int], None],
    ) -> None:
        super().__init__(name=f"lane-{number}", daemon=True)
        self._number = number
        self._max_batch_rows = max_batch_rows
        self._dispatcher = dispatcher
        self._now = now
        self._thread_setup = thread_setup

    def run(self) -> None:
        """The lane's whole life."""
        try:
            self._thread_setup(self._number)
            self._work()
        except BaseException as error:
            log.exception("%s has ended by an error", self.name)
            self._dispatcher.lost(self._number, error)

    def _work(self) -> None:
        while (work := self._dispatcher.take(self._number)) is not None:
            if isinstance(work, Job):
                work.run()
            else:
                self._serve(work)
            del work  # while the lane waits it keeps no request alive, nor the request's model

    def opening(self, model: ServedModel) -> Job:
        """The job after which this lane can run the model."""
        backend = model.backends[self._number]

        def open_here() -> None:
            backend.thread_setup()
            model.runners[self._number] = Runner(model.name, backend, whole=model.whole)

        return Job(open_here)

    def warming(self, model: ServedModel, features: Features) -> Job:
        """The job that runs one payload, in pieces where it is larger than a batch."""

        def warm() -> None:
            for start in range(0, features.rows, self._max_batch_rows):
                stop = min(start + self._max_batch_rows, features.rows)
                self._runner(model).run([features.slice(start, stop)])

        return Job(warm)

    def _runner(self, model: Served) -> Runner:
        runner = cast(ServedModel, model).runners[self._number]
        if runner is None:
            raise ForwardFailed(f"model {model.name} was never added to this server's engine")
        return runner

    def _serve(self, requests: Sequence[Request]) -> None:
        try:
            self._forward(requests)
        except Exception as error:
            if len(requests) == 1:
                self._fail(requests[0], error)
                return
            log.warning("a forward of %d requests failed; trying each alone", len(requests), exc_info=error)
            for request in requests:
                self._serve_alone(request)

    def _serve_alone(self, request: Request) -> None:
        try:
            self._check_wanted(request)
            self._forward([request])
        except Exception as error:
            self._fail(request, error)

    def _forward(self, requests: Sequence[Request]) -> None:
        """Runs the requests as one forward and settles all of them, or raises before it has settled any."""
        started = self._now()
        parts = [request.features for request in requests]
        rows = [part.rows for part in parts]
        runner = self._runner(requests[0].model)
        if len(parts) == 1 and rows[0] > self._max_batch_rows and not runner.whole:
            scores, collate, execute = self._run_in_pieces(requests[0])
        else:
            scores, collate, execute = runner.run(parts)
        total, begin = sum(rows), perf_counter()
        own = [*split(scores, rows)]
        apart = perf_counter() - begin
        self._dispatcher.settle(
            self._number,
            [
                (
                    request,
                    Result(
                        part, times=StageTimes(started - request.arrived, collate, execute, len(rows), total, apart)
                    ),
                )
                for request, part in zip(requests, own, strict=True)
            ],
        )

    def _run_in_pieces(self, request: Request) -> tuple[Scores, float, float]:
        """Several forwards for one request, given up between two of them when nobody waits for it any more."""
        features, step = request.features, self._max_batch_rows
        runner, pieces = self._runner(request.model), []
        for start in range(0, features.rows, step):
            self._check_wanted(request)
            pieces.append(runner.run([features.slice(start, min(start + step, features.rows))]))
        return join([piece[0] for piece in pieces]), sum(p[1] for p in pieces), sum(p[2] for p in pieces)

    def _check_wanted(self, request: Request) -> None:
        """Raises Cancelled or DeadlineExceeded for a request whose client is gone or has given up."""
        if request.reply.cancelled:
            raise Cancelled("the client cancelled the request; its forwards were given up")
        if request.expired(self._now()):
            raise DeadlineExceeded("the deadline passed between the request's forwards; the others were given up")

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, RequestError):
            log.error("the forward of one request of %d rows failed", request.rows, exc_info=error)
            kind = type(error).__name__
            # The text may hold paths and other things of this machine; it stays in the log.
            error = ForwardFailed(f"the model's forward failed on this request ({kind}); the server's log says why")
        # Without its traceback, which would keep the batch alive for as long as the client holds the answer.
        self._dispatcher.settle(self._number, [(request, Result(error=error.with_traceback(None)))])
