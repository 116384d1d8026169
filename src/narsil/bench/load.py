"""What a load is, what comes of it, and the face of a driver that sends it.

A load is a closed loop (a fixed number of requests in flight) or an open loop (arrivals by the clock).

Latency in the open loop counts from the intended send time, so a client that falls behind shows it instead of hiding
it.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from narsil.bench.workload import Protocol, Workload
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
    scores: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # body number -> task-major, flattened
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


def due_times(load: Load, rate: float) -> NDArray[np.float64]:
    """(requests,) seconds from the start at which each request is due, ascending."""
    if load.arrivals == "uniform":
        return np.arange(load.requests) / rate
    gaps = np.random.default_rng((load.workload.seed, 1 << 32)).exponential(1 / rate, load.requests)
    return np.cumsum(gaps)
