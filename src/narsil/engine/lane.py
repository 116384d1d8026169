"""A lane: one thread with one backend instance that runs what the engine hands it.

Receives lists of requests from ``take``, gives one Result for each of them to ``settle``. Owns its
collation buffers and its backend instance.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import perf_counter

from narsil.backends.base import Backend
from narsil.dataflow import Features, Payload, Request, Result, Scores, StageTimes
from narsil.engine.collate import Collator
from narsil.engine.split import join, split
from narsil.errors import Cancelled, DeadlineExceeded, ForwardFailed, RequestError

log = logging.getLogger(__name__)


class Lane(threading.Thread):
    """Takes, collates, runs and splits until ``take`` returns None.

    A failed forward never ends the lane: the requests of the failed batch are each tried alone once, so that only
    the guilty one fails.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        max_batch_rows: int,
        take: Callable[[], Sequence[Request] | None],
        settle: Callable[[Sequence[tuple[Request, Result]]], None],
        now: Callable[[], float],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._backend = backend
        self._max_batch_rows = max_batch_rows
        self._take = take
        self._settle = settle
        self._now = now
        self._collator = Collator(backend.schema, backend.bucket)
        self._warm: Future[None] = Future()
        self.warmup: Sequence[Features] = ()  # payloads to run before the first request

    def wait_until_warm(self) -> None:
        """Blocks until the lane takes requests. Raises what its warmup raised."""
        self._warm.result()

    def run(self) -> None:
        """The lane's whole life."""
        try:
            self._backend.thread_setup()
            for features in self.warmup:
                self._run([features])
        except Exception as error:
            self._warm.set_exception(error)
            return
        self._warm.set_result(None)
        while (requests := self._take()) is not None:
            self._serve(requests)

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
        if len(parts) == 1 and rows[0] > self._max_batch_rows:
            scores, collate, execute = self._run_in_pieces(requests[0])
        else:
            scores, collate, execute = self._run(parts)
        total = sum(rows)
        self._settle(
            [
                (
                    request,
                    Result(part, times=StageTimes(started - request.arrived, collate, execute, len(rows), total)),
                )
                for request, part in zip(requests, split(scores, rows), strict=True)
            ]
        )

    def _run(self, parts: Sequence[Payload]) -> tuple[Scores, float, float]:
        """One forward: (the parts' scores, collate seconds, execute seconds); what padding scored is cut off here.

        Raises ForwardFailed on scores of a wrong shape.
        """
        rows = sum(part.rows for part in parts)
        begin = perf_counter()
        batch = self._collator.collate(parts)
        collated = perf_counter()
        scores = self._backend.run(batch)
        for task in self._backend.schema.tasks:
            if task not in scores or scores[task].shape != (batch.rows,):
                found = scores[task].shape if task in scores else "nothing"
                raise ForwardFailed(f"task {task}: the model gave {found} for {batch.rows} rows")
        wanted = {task: values[:rows] for task, values in scores.items()}
        return wanted, collated - begin, perf_counter() - collated

    def _run_in_pieces(self, request: Request) -> tuple[Scores, float, float]:
        """Several forwards for one request, given up between two of them when nobody waits for it any more."""
        features, step = request.features, self._max_batch_rows
        pieces = []
        for start in range(0, features.rows, step):
            self._check_wanted(request)
            pieces.append(self._run([features.slice(start, min(start + step, features.rows))]))
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
        self._settle([(request, Result(error=error))])
