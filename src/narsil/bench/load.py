"""A load against a server: closed loop (a fixed number of requests in flight) or open loop (arrivals by the clock).

It runs in a process of its own, so that neither its interpreter nor its memory is the server's or the reporter's.
Latency in the open loop counts from the intended send time, so a client that falls behind shows it instead of hiding
it. What sends the requests is a driver: `load_native` or `load_grpc`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from narsil.bench.workload import Protocol, Workload, score_reader
from narsil.errors import NarsilError

Arrivals = Literal["poisson", "uniform"]
ClientName = Literal["native", "grpcio"]
ClientChoice = Literal["auto", "native", "grpcio"]
CLIENT_CHOICES: tuple[str, ...] = get_args(ClientChoice)


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
    connections: int = 1  # over which the requests are spread
    client: ClientChoice = "auto"


@dataclass(frozen=True)
class Outcome:
    """What came of a load. Latencies in seconds, in order of completion; failed requests have none."""

    latencies: NDArray[np.float64]
    errors: dict[str, int]
    wall_s: float
    client_cpu_s: float
    scores: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # body number -> (B,)
    late_s: float = 0.0  # open loop: the furthest that sending fell behind its schedule
    client: ClientName = "grpcio"  # what made the load

    @property
    def requests(self) -> int:
        """Requests that ended, well or badly."""
        return len(self.latencies) + sum(self.errors.values())

    @property
    def client_cpu_us_per_req(self) -> float:
        """What a request cost the client, microseconds of processor time."""
        return self.client_cpu_s / self.requests * 1e6


@dataclass(frozen=True)
class Part:
    """What a driver brings back from one loop, warmup or measured."""

    latencies: NDArray[np.float64]
    errors: dict[str, int]
    replies: dict[int, bytes]  # body number -> serialized reply, of the bodies to keep
    late_s: float = 0.0


OnProgress = Callable[[int], None]


class Driver(typing.Protocol):
    """Sends requests over connections that it owns, and checks every reply. Made connected."""

    def closed_loop(self, requests: int, concurrency: int, on_progress: OnProgress) -> Part:
        """``concurrency`` requests in flight until ``requests`` have ended."""

    def open_loop(self, due: NDArray[np.float64], on_progress: OnProgress) -> Part:
        """Request n is sent ``due[n]`` seconds from now; latencies count from then."""

    def close(self) -> None:
        """Lets go of the connections."""


def choose_client(choice: ClientChoice, targets: Sequence[str] = ()) -> ClientName:
    """The client for all loads of a comparison: the native one where it is built and takes every target.

    Raises LoadError where the native one is asked for and cannot be had.
    """
    if choice == "grpcio":
        return choice
    problem = _native_problem(targets)
    if problem and choice == "native":
        raise LoadError(problem)
    return "grpcio" if problem else "native"


def _native_problem(targets: Sequence[str]) -> str:
    try:
        native = importlib.import_module("narsil._load")
    except ImportError as error:
        return (
            "the native client is not there; it needs a C++ compiler and libnghttp2-dev when Narsil is built, or take "
            f"--client grpcio ({error})"
        )
    for target in targets:
        if not native.is_target(target):
            return (
                f"{target} is none of HOST:PORT, [IPV6]:PORT and unix:PATH, which the native client takes; "
                "take --client grpcio"
            )
    return ""


def run_load(
    load: Load,
    on_measure: Callable[[], None] = lambda: None,
    on_progress: OnProgress = lambda done: None,
    on_measured: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs a load in a child process.

    ``on_measure`` is called when the warmup has ended and the measured part begins, ``on_measured`` when it has
    ended: the moments to read the server's CPU clock. Raises LoadError when the child fails.
    """
    client = choose_client(load.client, [load.target])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, load, client), daemon=True)
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


def _child(pipe: Connection, load: Load, client: ClientName) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; this process ends with it
    try:
        pipe.send(("outcome", _warm_up_and_measure(pipe, load, client)))
    except NarsilError as error:
        pipe.send(("failed", str(error)))
    except Exception as error:  # the parent reports it: this process has no console of its own
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _warm_up_and_measure(pipe: Connection, load: Load, client: ClientName) -> Outcome:
    def on_progress(done: int) -> None:
        pipe.send(("progress", done))

    driver = connect(load, client)
    try:
        warm = driver.closed_loop(load.warmup, load.concurrency, lambda done: None)
        if load.warmup and sum(warm.errors.values()) == load.warmup:
            raise LoadError(f"every warmup request failed: {warm.errors}")
        due = None if load.rate is None else schedule(load, load.rate)
        pipe.send(("measure", None))
        pipe.recv()
        cpu, began = time.process_time(), time.perf_counter()
        if due is None:
            part = driver.closed_loop(load.requests, load.concurrency, on_progress)
        else:
            part = driver.open_loop(due, on_progress)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        pipe.send(("measured", None))
    finally:
        driver.close()
    read = score_reader(load.protocol, load.workload.schema.tasks[0])
    scores = {body: read(reply) for body, reply in {**warm.replies, **part.replies}.items()}
    return Outcome(part.latencies, part.errors, wall, cpu, scores, part.late_s, client)


def connect(load: Load, client: ClientName) -> Driver:
    """A driver for a load, connected to its server. Raises LoadError where none answers."""
    if client == "native":
        from narsil.bench.load_native import NativeDriver

        return NativeDriver(load)
    from narsil.bench.load_grpc import GrpcioDriver

    return GrpcioDriver(load)


def schedule(load: Load, rate: float) -> NDArray[np.float64]:
    """(requests,) seconds from the start at which each request is due, ascending."""
    if load.arrivals == "uniform":
        return np.arange(load.requests) / rate
    gaps = np.random.default_rng((load.workload.seed, 1 << 32)).exponential(1 / rate, load.requests)
    return np.cumsum(gaps)
