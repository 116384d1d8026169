"""Contenders in interleaved rounds: A B C, A B C, ... so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from narsil.bench.generator import choose_client
from narsil.bench.load import ClientChoice, Load
from narsil.bench.measure import Measurement, Ratio, measure, ratio
from narsil.bench.servers import ServerProcess
from narsil.bench.workload import Protocol, Workload

KEEP = 32  # bodies whose scores are held against the reference


@dataclass(frozen=True)
class Contender:
    """A server to measure. ``start`` makes one that is tuned for a concurrency; loads of equal ``key`` share one."""

    name: str
    start: Callable[[int], ServerProcess]
    key: Callable[[int], object] = lambda concurrency: None
    protocol: Protocol = "predictor"
    layers: tuple[str, ...] = ()  # kind of number of each of the model's linear layers, where it is known


@dataclass(frozen=True)
class Trial:
    """What every contender is put through."""

    workload: Workload
    concurrencies: Sequence[int] = (16, 1)
    requests: Mapping[int, int] | int = 1000
    warmup: int = 50
    rounds: int = 3
    connections: int = 1
    client: ClientChoice = "auto"  # chosen once, so that every contender is loaded by the same

    def requests_at(self, concurrency: int) -> int:
        """Requests of one measurement at this concurrency."""
        return self.requests if isinstance(self.requests, int) else self.requests[concurrency]


Runs = dict[tuple[str, int], list[Measurement]]  # (contender, concurrency) -> one measurement a round


def run_rounds(
    contenders: Sequence[Contender],
    trial: Trial,
    expected: Sequence[NDArray[np.float32]] = (),
    on_event: Callable[[str, int], None] = lambda what, requests: None,
) -> Runs:
    """Measures every contender at every concurrency, ``trial.rounds`` times in turn, one server alive at a time.

    ``on_event`` hears what is being done and how many requests have been sent in it.
    """
    runs: Runs = {}
    client = choose_client(trial.client)
    for number in range(trial.rounds):
        for contender in contenders:
            for group in _groups(contender, trial.concurrencies):
                on_event(f"round {number + 1}/{trial.rounds}: starting {contender.name}", 0)
                with contender.start(group[0]) as server:
                    for concurrency in group:
                        what = f"round {number + 1}/{trial.rounds}: {contender.name}, concurrency {concurrency}"
                        on_event(what, 0)
                        load = Load(
                            server.address,
                            trial.workload,
                            contender.protocol,
                            requests=trial.requests_at(concurrency),
                            warmup=trial.warmup,
                            concurrency=concurrency,
                            keep=KEEP,
                            connections=trial.connections,
                            client=client,
                        )
                        done = _Increments(what, on_event)
                        found = measure(contender.name, load, server, expected, done)
                        done(load.requests)
                        runs.setdefault((contender.name, concurrency), []).append(found)
    return runs


def ratios(runs: Runs, over: str) -> list[Ratio]:
    """Every contender over one, at every concurrency: throughput and median latency."""
    return [
        ratio(found, runs[over, concurrency], metric)
        for (name, concurrency), found in runs.items()
        if name != over and (over, concurrency) in runs
        for metric in ("samples_per_s", "p50_ms")
    ]


def _groups(contender: Contender, concurrencies: Sequence[int]) -> list[list[int]]:
    """Concurrencies that one start of the server serves, in their given order."""
    groups: dict[object, list[int]] = {}
    for concurrency in concurrencies:
        groups.setdefault(contender.key(concurrency), []).append(concurrency)
    return list(groups.values())


class _Increments:
    """Turns counts so far into increments."""

    def __init__(self, what: str, on_event: Callable[[str, int], None]) -> None:
        self._what, self._on_event, self._seen = what, on_event, 0

    def __call__(self, done: int) -> None:
        self._on_event(self._what, done - self._seen)
        self._seen = done
