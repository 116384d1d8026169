"""A decoded request's way through the engine, for transports on an event loop: submitted, awaited, taken back.

Receives Decoded calls on the loop's thread, and their results from lane threads. Owns the futures that handlers wait
on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from narsil.dataflow import Request, Result
from narsil.telemetry.observer import Careful, Observer
from narsil.transports.base import EngineLike
from narsil.transports.endpoints import Decoded

__all__ = ["Scoring"]

T = TypeVar("T")


class Scoring:
    """The engine as the handlers of one event loop see it."""

    def __init__(self, engine: EngineLike, observer: Observer, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._observer = Careful(observer)
        self._loop = loop
        self._outbox = _Outbox(loop)

    def decoded(self, method: str, decode: Callable[[], Decoded]) -> Decoded:
        """What ``decode`` gives. Whoever watches is told where it raises, and of what it passed over. Any thread."""
        try:
            decoded = decode()
        except Exception as error:
            self._observer.refused(method, error)
            raise
        if decoded.passed_over:
            self._observer.passed_over(decoded.model, decoded.passed_over)
        return decoded

    async def run(
        self, decoded: Decoded, size: int, remaining: float | None = None, gone: asyncio.Future[None] | None = None
    ) -> Result:
        """The request's result, with scores. ``size`` is its message's in bytes, ``remaining`` the seconds until the
        call's deadline.

        Raises the RequestError that it ended with, and CancelledError where the handler is cancelled or ``gone`` is
        done first: the request is taken back then.
        """
        engine, now = self._engine, self._engine.now()
        reply = _Reply(self._outbox, self._loop)
        features = decoded.features
        deadline = decoded.deadline(now, None if remaining is None else now + remaining)
        size = max(size, features.nbytes)
        request = Request(decoded.model, features, reply, now, deadline, size, decoded.priority)
        engine.submit(request)
        try:
            if gone is not None:
                await asyncio.wait((reply.future, gone), return_when=asyncio.FIRST_COMPLETED)
                if not reply.future.done():
                    raise asyncio.CancelledError
            result = await reply.future
        except asyncio.CancelledError:
            # The client went away, or its deadline passed.
            reply.cancelled = True
            engine.cancel(request)
            raise
        if result.error is not None:
            raise result.error
        return result

    def encoded(self, method: str, encode: Callable[[], T]) -> T:
        """What ``encode`` gives. Whoever watches is told where it raises. Any thread."""
        try:
            return encode()
        except Exception as error:
            self._observer.undelivered(method, error)
            raise


class _Outbox:
    """Carries results from lane threads to the event loop, and wakes the loop once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._results: list[tuple[asyncio.Future[Result], Result]] = []
        self._woken = False

    def post(self, future: asyncio.Future[Result], result: Result) -> None:
        with self._lock:
            self._results.append((future, result))

    def wake(self) -> None:
        with self._lock:
            if self._woken or not self._results:
                return
            self._woken = True
        self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._lock:
            results, self._results = self._results, []
            self._woken = False
        for future, result in results:
            if not future.done():
                future.set_result(result)


class _Reply:
    """Where one handler waits for its result."""

    __slots__ = ("_outbox", "cancelled", "future")

    def __init__(self, outbox: _Outbox, loop: asyncio.AbstractEventLoop) -> None:
        self._outbox = outbox
        self.future: asyncio.Future[Result] = loop.create_future()
        self.cancelled = False

    def deliver(self, result: Result) -> Callable[[], None]:
        self._outbox.post(self.future, result)
        return self._outbox.wake
