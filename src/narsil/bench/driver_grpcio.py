"""The load's driver on grpcio's callback interface, the cheapest of those it has: it runs wherever grpcio does."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from narsil.bench.load import Load, LoadError, OnProgress, Part
from narsil.bench.workload import method, score_reader

# A channel of its own connection each, for replies of any size.
_CHANNEL = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]

_MultiCallable = Any  # grpcio's: one method of one channel


class GrpcioDriver:
    """See load.Driver. Raises LoadError where no server answers."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._bodies = load.workload.serialized(load.protocol)
        self._readers = [score_reader(load.protocol, task) for task in load.workload.schema.tasks]
        self._channels = ExitStack()
        with ExitStack() as opened:  # closed again if one cannot be
            self._calls = [self._open(opened) for _ in range(load.connections)]
            self._channels = opened.pop_all()

    def _open(self, opened: ExitStack) -> _MultiCallable:
        channel = opened.enter_context(grpc.insecure_channel(self._load.target, _CHANNEL))
        try:
            grpc.channel_ready_future(channel).result(self._load.timeout_s)
        except grpc.FutureTimeoutError:
            raise LoadError(f"no server answers at {self._load.target}") from None
        return channel.unary_unary(method(self._load.protocol))

    def closed_loop(self, requests: int, concurrency: int, on_progress: OnProgress) -> Part:
        """See load.Driver."""
        loop = _Loop(requests, self._bodies, self._load, self._readers)
        for call in itertools.islice(itertools.cycle(self._calls), min(concurrency, requests)):
            loop.send_next(call)
        return loop.wait(on_progress)

    def open_loop(self, due: NDArray[np.float64], on_progress: OnProgress) -> Part:
        """See load.Driver."""
        loop = _Loop(len(due), self._bodies, self._load, self._readers)
        loop.send_at(due.tolist(), itertools.cycle(self._calls))
        return loop.wait(on_progress)

    def close(self) -> None:
        """See load.Driver."""
        self._channels.close()


class _Loop:
    """The requests of one loop under way, and what has become of them. Replies come on grpcio's own thread."""

    def __init__(
        self, requests: int, bodies: list[bytes], load: Load, readers: Sequence[Callable[[bytes], NDArray[np.float32]]]
    ) -> None:
        self._bodies, self._load, self._readers = bodies, load, readers
        self._requests = self._left = requests
        self._numbers = iter(range(requests))
        self._latencies: list[float] = []
        self._errors: dict[str, int] = {}
        self._replies: dict[int, bytes] = {}
        self._late = 0.0
        self._lock = threading.Lock()
        self._all_done = threading.Event()
        if not requests:
            self._all_done.set()

    def send_next(self, call: _MultiCallable) -> None:
        """One request now, and the next one when it has ended."""
        with self._lock:
            number = next(self._numbers, None)
        if number is not None:
            self._send(call, number, time.perf_counter(), lambda: self.send_next(call))

    def send_at(self, due: list[float], calls: itertools.cycle[_MultiCallable]) -> None:
        """Every request when it is due."""
        began = time.perf_counter()
        for number, (offset, call) in enumerate(zip(due, calls, strict=False)):
            while (ahead := began + offset - time.perf_counter()) > 0:
                time.sleep(ahead)
            self._late = max(self._late, -ahead)
            self._send(call, number, began + offset, lambda: None)

    def wait(self, on_progress: OnProgress) -> Part:
        """Until the last reply; reports progress at most ten times a second."""
        while not self._all_done.wait(0.1):
            on_progress(self._requests - self._left)
        return Part(np.array(self._latencies), self._errors, self._replies, self._late)

    def _send(self, call: _MultiCallable, number: int, since: float, then: Callable[[], None]) -> None:
        body = number % len(self._bodies)
        future = call.future(self._bodies[body], timeout=self._load.timeout_s)
        future.add_done_callback(lambda ended: self._ended(ended, body, since, then))

    def _ended(self, future: Any, body: int, since: float, then: Callable[[], None]) -> None:
        now = time.perf_counter()
        code = future.code()
        problem = None if code is grpc.StatusCode.OK else code.name
        if problem is None:
            problem = self._check(future.result(), body)
        with self._lock:
            if problem is None:
                self._latencies.append(now - since)
            else:
                self._errors[problem] = self._errors.get(problem, 0) + 1
            self._left -= 1
            left = self._left
        if left:
            then()
        else:
            self._all_done.set()

    def _check(self, reply: bytes, body: int) -> str | None:
        """What is wrong with a reply; keeps it if it is asked for."""
        try:
            counts = [len(read(reply)) for read in self._readers]
        except Exception:  # whatever a hostile or broken server sends must not stall the loop
            return "unreadable reply"
        rows = self._load.workload.rows
        for count, width in zip(counts, self._load.workload.schema.widths, strict=True):
            if count != rows * width:
                return f"{count} scores for {rows} rows" + (f" of {width}" if width > 1 else "")
        if body < self._load.keep:
            self._replies[body] = reply
        return None
