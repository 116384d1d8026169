"""The load generator: closed loop (a fixed number of requests in flight) or open loop (arrivals by the clock).

It runs in a process of its own, so that neither its interpreter nor its memory is the server's or the reporter's,
and drives grpcio's callback interface, the cheapest of those it has. Latency in the open loop counts from the
intended send time, so a client that falls behind shows it instead of hiding it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray

from narsil.bench.workload import Protocol, Workload, method, score_reader
from narsil.errors import NarsilError

Arrivals = Literal["poisson", "uniform"]


class LoadError(NarsilError):
    """The load could not be run at all."""


@dataclass(frozen=True)
class Load:
    """One load: what, where to, how much and how fast."""

    target: str
    workload: Workload
    protocol: Protocol = "predictor"
    requests: int = 1000
    warmup: int = 50
    concurrency: int = 16  # closed loop: requests in flight
    rate: float | None = None  # requests per second: makes it an open loop
    arrivals: Arrivals = "poisson"
    timeout_s: float = 30.0
    keep: int = 0  # replies to bodies 0 .. keep - 1 come back for comparison


@dataclass
class Outcome:
    """What came of a load. Latencies in seconds, in order of completion; failed requests have none."""

    latencies: NDArray[np.float64]
    errors: dict[str, int]
    wall_s: float
    client_cpu_s: float
    scores: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # body number -> (B,)
    late_s: float = 0.0  # open loop: the furthest that sending fell behind its schedule

    @property
    def requests(self) -> int:
        """Requests that ended, well or badly."""
        return len(self.latencies) + sum(self.errors.values())


def run_load(
    load: Load,
    on_measure: Callable[[], None] = lambda: None,
    on_progress: Callable[[int], None] = lambda done: None,
    on_measured: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs a load in a child process.

    ``on_measure`` is called when the warmup has ended and the measured part begins, ``on_measured`` when it has
    ended: the moments to read the server's CPU clock. Raises LoadError when the child fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, load), daemon=True)
    child.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "measure":
                on_measure()
                ours.send("go")
            elif kind == "progress":
                on_progress(value)
            elif kind == "measured":
                on_measured()
            elif kind == "failed":
                raise LoadError(value)
            else:
                outcome: Outcome = value
                return outcome
    except EOFError:
        raise LoadError("the load generator died; see its message above") from None
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
        ours.close()


def _child(pipe: Connection, load: Load) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; this process ends with it
    try:
        pipe.send(("outcome", _Generator(load, pipe).run()))
    except Exception as error:  # the parent reports it: this process has no console of its own
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


class _Generator:
    """Sends the load and takes the replies. Replies come on grpcio's own thread."""

    def __init__(self, load: Load, pipe: Connection) -> None:
        self._load = load
        self._pipe = pipe
        self._bodies = load.workload.serialized(load.protocol)
        self._read = score_reader(load.protocol, load.workload.schema.tasks[0])
        self._latencies: list[float] = []
        self._errors: dict[str, int] = {}
        self._scores: dict[int, NDArray[np.float32]] = {}
        self._lock = threading.Lock()
        self._all_done = threading.Event()

    def run(self) -> Outcome:
        load = self._load
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(load.target, options) as channel:
            try:
                grpc.channel_ready_future(channel).result(load.timeout_s)
            except grpc.FutureTimeoutError:
                raise LoadError(f"no server answers at {load.target}") from None
            self._call: Any = channel.unary_unary(method(load.protocol))
            self._closed_loop(load.warmup, max(load.concurrency, 1))
            warm_errors = dict(self._errors)
            if load.warmup and sum(warm_errors.values()) == load.warmup:
                raise LoadError(f"every warmup request failed: {warm_errors}")
            self._latencies.clear()
            self._errors.clear()
            self._pipe.send(("measure", None))
            self._pipe.recv()
            cpu, began = _cpu_s(), time.perf_counter()
            late = self._open_loop(load.rate) if load.rate else self._closed_loop(load.requests, load.concurrency)
            wall, cpu = time.perf_counter() - began, _cpu_s() - cpu
            self._pipe.send(("measured", None))
        return Outcome(np.array(self._latencies), self._errors, wall, cpu, self._scores, late)

    def _closed_loop(self, requests: int, concurrency: int) -> float:
        if not requests:
            return 0.0
        numbers = iter(range(requests))
        self._expect(requests)

        def send_next() -> None:
            with self._lock:
                number = next(numbers, None)
            if number is not None:
                self._send(number, time.perf_counter(), send_next)

        for _ in range(min(concurrency, requests)):
            send_next()
        self._wait()
        return 0.0

    def _open_loop(self, rate: float) -> float:
        self._expect(self._load.requests)
        began = time.perf_counter()
        late = 0.0
        for number, offset in enumerate(_schedule(self._load, rate)):
            due = began + offset
            while (ahead := due - time.perf_counter()) > 0:
                time.sleep(ahead)
            late = max(late, -ahead)
            self._send(number, due, lambda: None)
        self._wait()
        return late

    def _send(self, number: int, since: float, then: Callable[[], None]) -> None:
        body = number % len(self._bodies)
        future = self._call.future(self._bodies[body], timeout=self._load.timeout_s)
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
        """What is wrong with a reply; keeps its scores if they are asked for."""
        try:
            scores = self._read(reply)
        except Exception as error:  # whatever a hostile or broken server sends must not stall the loop
            return f"unreadable reply: {type(error).__name__}"
        if len(scores) != self._load.workload.rows:
            return f"{len(scores)} scores for {self._load.workload.rows} rows"
        if body < self._load.keep:
            self._scores[body] = scores
        return None

    def _expect(self, requests: int) -> None:
        self._left = requests
        self._all_done.clear()

    def _wait(self) -> None:
        """Until the last reply; reports progress at most ten times a second."""
        total = self._left
        while not self._all_done.wait(0.1):
            self._pipe.send(("progress", total - self._left))


def _schedule(load: Load, rate: float) -> Iterator[float]:
    """Seconds from the start at which each request is due."""
    if load.arrivals == "uniform":
        yield from (number / rate for number in range(load.requests))
        return
    gaps = np.random.default_rng((load.workload.seed, 1 << 32)).exponential(1 / rate, load.requests)
    yield from np.cumsum(gaps).tolist()


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system
