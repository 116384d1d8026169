"""One measurement: a load against a server, with the server's CPU and memory and the scores' deviation beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from narsil.backends.base import Backend
from narsil.bench.generator import run_load
from narsil.bench.load import Load, Outcome
from narsil.bench.servers import Watched
from narsil.bench.workload import Workload
from narsil.engine.collate import Collator

# Latency histogram: 20 buckets per factor of ten from 10 us to 100 s.
BUCKET_EDGES_S = np.logspace(-5, 2, 141)

# A client busier than this share of one core, in any run, may be what is being measured.
CLIENT_BOUND = 0.8


@dataclass(frozen=True)
class Measurement:
    """What one load against one server gave. None where it was not measured (a server not started here)."""

    name: str
    concurrency: int
    batch_size: int  # rows a request
    req_per_s: float
    samples_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    errors: Mapping[str, int]
    peak_mib: float | None
    server_cpu_us_per_req: float | None
    client_cpu_us_per_req: float
    client_busy: float  # share of one core
    max_abs_deviation: float | None  # of the scores, from the reference
    late_ms: float = 0.0  # open loop: how far the client fell behind its schedule
    rate: float | None = None  # open loop: requests per second asked for
    client: str = "grpcio"  # what made the load
    connections: int = 1
    histogram: tuple[int, ...] = field(default=(), repr=False)  # counts per BUCKET_EDGES_S

    @property
    def client_bound(self) -> bool:
        """Whether the client rather than the server may have set the pace."""
        return self.client_busy > CLIENT_BOUND


def measure(
    name: str,
    load: Load,
    server: Watched | None = None,
    expected: Sequence[NDArray[np.float32]] = (),
    on_progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Runs the load; ``expected`` holds reference scores of the first bodies, compared with what comes back."""
    cpu: list[float] = []

    def read_cpu() -> None:
        if server is not None:
            cpu.append(server.cpu_s())

    outcome = run_load(load, read_cpu, on_progress, read_cpu)
    latencies_ms = outcome.latencies * 1e3
    p50, p90, p99, p999 = np.percentile(latencies_ms, [50, 90, 99, 99.9]) if len(latencies_ms) else (float("nan"),) * 4
    answered = len(outcome.latencies) / outcome.wall_s
    return Measurement(
        name=name,
        concurrency=0 if load.rate else load.concurrency,
        batch_size=load.workload.rows,
        req_per_s=answered,
        samples_per_s=answered * load.workload.rows,
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        p999_ms=float(p999),
        errors=outcome.errors,
        peak_mib=None if server is None else server.peak_mib(),
        server_cpu_us_per_req=(cpu[1] - cpu[0]) / outcome.requests * 1e6 if len(cpu) == 2 else None,
        client_cpu_us_per_req=outcome.client_cpu_us_per_req,
        client_busy=outcome.client_cpu_s / outcome.wall_s,
        max_abs_deviation=deviation(outcome, expected),
        late_ms=outcome.late_s * 1e3,
        rate=load.rate,
        client=outcome.client,
        connections=load.connections,
        histogram=tuple(int(n) for n in np.histogram(outcome.latencies, BUCKET_EDGES_S)[0]),
    )


def deviation(outcome: Outcome, expected: Sequence[NDArray[np.float32]]) -> float | None:
    """Largest absolute difference between the scores of all tasks that came back and the reference, infinite where one
    of them is no number or missing; None with nothing to compare."""

    def difference(scores: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
        if scores.shape != wanted.shape:
            return math.inf
        return float(np.nan_to_num(np.abs(scores - wanted), nan=np.inf).max())

    found = [difference(scores, expected[body]) for body, scores in outcome.scores.items() if body < len(expected)]
    return max(found, default=None)


def reference_scores(backend: Backend, workload: Workload, count: int) -> list[NDArray[np.float32]]:
    """What a direct call of the model scores for the first ``count`` bodies, one request a forward: flattened,
    task-major."""
    collator, tasks = Collator(backend.schema), backend.schema.tasks
    found = (backend.run(collator.collate([payload])) for payload in workload.payloads(count))
    return [np.concatenate([scores[task].ravel() for task in tasks]) for scores in found]


def summarize(runs: Sequence[Measurement]) -> Measurement:
    """One row for several runs of the same thing: the median of each figure, the worst memory and deviation. A run that
    answered nothing has no latency; it is in the errors and in the throughput."""

    def middle(values: Sequence[float]) -> float:
        return median([value for value in values if not math.isnan(value)] or [math.nan])

    first = runs[0]
    errors: dict[str, int] = {}
    for run in runs:
        for kind, count in run.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    measured_cpu = [run.server_cpu_us_per_req for run in runs if run.server_cpu_us_per_req is not None]
    return Measurement(
        name=first.name,
        concurrency=first.concurrency,
        batch_size=first.batch_size,
        req_per_s=middle([run.req_per_s for run in runs]),
        samples_per_s=middle([run.samples_per_s for run in runs]),
        p50_ms=middle([run.p50_ms for run in runs]),
        p90_ms=middle([run.p90_ms for run in runs]),
        p99_ms=middle([run.p99_ms for run in runs]),
        p999_ms=middle([run.p999_ms for run in runs]),
        errors=errors,
        peak_mib=max((run.peak_mib for run in runs if run.peak_mib is not None), default=None),
        server_cpu_us_per_req=middle(measured_cpu) if measured_cpu else None,
        client_cpu_us_per_req=middle([run.client_cpu_us_per_req for run in runs]),
        client_busy=max(run.client_busy for run in runs),
        max_abs_deviation=max((r.max_abs_deviation for r in runs if r.max_abs_deviation is not None), default=None),
        late_ms=max(run.late_ms for run in runs),
        rate=first.rate,
        client=", ".join(sorted({run.client for run in runs})),
        connections=first.connections,
        histogram=tuple(int(n) for n in np.sum([run.histogram for run in runs], axis=0)),
    )


@dataclass(frozen=True)
class Ratio:
    """How one server compares with another over paired rounds of one run. None where no round can be compared."""

    name: str
    over: str
    concurrency: int
    metric: str  # a Measurement field
    median: float | None
    min: float | None
    max: float | None
    rounds: int  # compared
    left_out: int = 0  # rounds in which one of the two answered nothing


def ratio(ours: Sequence[Measurement], theirs: Sequence[Measurement], metric: str) -> Ratio:
    """Round by round, ours over theirs: median and spread of the rounds in which both have a figure."""
    pairs = [(getattr(a, metric), getattr(b, metric)) for a, b in zip(ours, theirs, strict=True)]
    quotients = [one for one in (a / b for a, b in pairs if a is not None and b) if not math.isnan(one)]
    return Ratio(
        name=ours[0].name,
        over=theirs[0].name,
        concurrency=ours[0].concurrency,
        metric=metric,
        median=median(quotients) if quotients else None,
        min=min(quotients, default=None),
        max=max(quotients, default=None),
        rounds=len(quotients),
        left_out=len(pairs) - len(quotients),
    )
