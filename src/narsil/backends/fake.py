"""A backend with programmable latency and failure, for tests and for measuring the server without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.dataflow import Batch, Floats, Scores


@dataclass
class FakeBehaviour:
    """What a FakeBackend does; shared by all its instances and changeable while they run."""

    seconds_per_forward: float = 0.0
    seconds_per_row: float = 0.0
    fail_if: Callable[[Batch], bool] | None = None  # a forward it is true for raises
    hold: threading.Event | None = None  # a forward waits until this is set
    forwards: list[int] = field(default_factory=list)  # rows of each forward that began, in order


class FakeBackend(Backend):
    """Scores a row by a hash-like sum over its dense values and its ids by feature, so that mixed-up rows show.

    The numbers that a wider task gives for a row are that one, one more, two more ...
    """

    name = "fake"

    def __init__(self, schema: ModelSchema, behaviour: FakeBehaviour | None = None, device: str = "cpu") -> None:
        self.schema = schema
        self.behaviour = behaviour or FakeBehaviour()
        self.device = device

    def run(self, batch: Batch) -> Scores:
        """See Backend.run."""
        behaviour = self.behaviour
        behaviour.forwards.append(batch.rows)
        if behaviour.hold is not None:
            behaviour.hold.wait()
        seconds = behaviour.seconds_per_forward + behaviour.seconds_per_row * batch.rows
        if seconds:
            time.sleep(seconds)
        if behaviour.fail_if is not None and behaviour.fail_if(batch):
            raise RuntimeError("the fake backend was told to fail")
        scores = fake_scores(batch)
        return {
            task: scores if width == 1 else np.add.outer(scores, np.arange(width, dtype=np.float32), dtype=np.float32)
            for task, width in self.schema.outputs.items()
        }

    def share(self) -> FakeBackend:
        """See Backend.share."""
        return FakeBackend(self.schema, self.behaviour, self.device)


def fake_scores(batch: Batch) -> Floats:
    """(B,) float32: sum of the dense row + sum over features t of (t + 1) * ids (* weights) + 0.5 for an empty bag."""
    features = len(batch.lengths) // batch.rows
    bags = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    factor = (bags // batch.rows + 1).astype(np.float64)
    terms = batch.values.astype(np.float64) * factor
    if batch.weights is not None:
        terms *= batch.weights
    per_bag = np.bincount(bags, weights=terms, minlength=len(batch.lengths)).astype(np.float64)
    per_bag += 0.5 * (batch.lengths == 0)
    total = per_bag.reshape(features, batch.rows).sum(axis=0) + batch.dense.astype(np.float64).sum(axis=1)
    return np.asarray(total, dtype=np.float32)
