"""What observing costs: the processor time of a request's bookkeeping behind the Observer seam, with and without.

    .venv/bin/python benchmarks/observing.py [--requests 200000]

Tells what the engine tells, batch by batch, to an observer that does nothing and to the one that the server has, by
turns, and prints the median difference in microseconds a request, with the engine's own time for the same requests
beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.fake import FakeBackend
from narsil.dataflow import Features, OneHot, Request, Result, StageTimes
from narsil.engine.engine import Engine
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.telemetry.observer import CountingObserver, Observer

ROWS, ROUNDS = 20, 7
SCHEMA = ModelSchema(13, tuple(Feature(f"f{n}", f"t{n}", rows=1000, dim=16) for n in range(26)), tasks=("click", "buy"))


class Ignored:
    cancelled = False

    def __init__(self, done: Callable[[], None] | None = None) -> None:
        self._done = done

    def deliver(self, result: Result) -> Callable[[], None] | None:
        return self._done


def requests(model: ServedModel, count: int) -> list[Request]:
    random = np.random.default_rng(0)
    dense = random.random((ROWS, 13), dtype=np.float32)
    ids = random.integers(0, 1000, (26, ROWS)).astype(np.int32)
    features = Features(ROWS, dense, OneHot(ids))
    return [Request(model, features, Ignored(), 0.0) for _ in range(count)]


def told(observer: Observer, model: ServedModel, batches: list[list[tuple[Request, Result]]]) -> float:
    """Processor seconds of telling it of all batches."""
    begin = time.thread_time()
    for ends in batches:
        observer.ended(ends)
        observer.ran(model, len(ends), ROWS * len(ends), 1e-3)
    return time.thread_time() - begin


def engine_us(model: ServedModel, observer: Observer, count: int, size: int) -> float:
    """Process's processor time of whole requests through an engine with a fake model, in microseconds each."""
    engine = Engine(1, BatchPolicy(size, 1 << 20), observer=observer)
    engine.start()
    engine.add(model)
    made = requests(model, min(count, 1000))
    begin = time.process_time()
    for _ in range(count // len(made)):
        for request in made:
            engine.submit(Request(model, request.features, request.reply, engine.now()))
        while engine.statistics().answered % len(made) or engine.statistics().queued:
            time.sleep(1e-4)
    spent = time.process_time() - begin
    engine.drain()
    return spent / (count // len(made) * len(made)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200_000)
    count = parser.parse_args().requests
    model = ServedModel("m", "1", [FakeBackend(SCHEMA)])
    scores = {task: np.random.default_rng(1).random(ROWS, dtype=np.float32) for task in ("click", "buy")}
    for size in (1, 4, 16):
        made = requests(model, count)
        ends = [(each, Result(scores, times=StageTimes(1e-4, 1e-5, 1e-3, size, size * ROWS, 1e-6))) for each in made]
        batches = [ends[at : at + size] for at in range(0, count, size)]
        rounds = [(told(Observer(), model, batches), told(CountingObserver(), model, batches)) for _ in range(ROUNDS)]
        cost = [(counted - nothing) / count * 1e6 for nothing, counted in rounds]
        whole = [engine_us(model, kind(), min(count, 20_000), size) for kind in (Observer, CountingObserver)]
        print(
            json.dumps(
                {
                    "requests_a_batch": size,
                    "observing_us_a_request": round(statistics.median(cost), 3),
                    "spread": [round(min(cost), 3), round(max(cost), 3)],
                    "engine_us_a_request_without": round(whole[0], 1),
                    "engine_us_a_request_with": round(whole[1], 1),
                }
            )
        )


if __name__ == "__main__":
    main()
