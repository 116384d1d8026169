"""Chooses the kind of number of each layer (see packing.py): the fastest choice whose scores stay within the limit.

Receives a form of a model (forms.py); produces LayerPlans, to be judged in turn until one passes. Each
layer's own error is measured alone first. Then layers climb, the one with the most error for what climbing costs first,
until no usual row's score or log-odds deviate by more than the limit allows. Rows are drawn as for the gate but with
another seed, so that the gate judges on rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.packed import Packed, fits
from narsil.artifacts.schema import ModelSchema
from narsil.compile.calibration import Calibration
from narsil.compile.forms import Form
from narsil.compile.gate import Scorer, difference, is_share, limits_of, log_odds_deviation, usual_batches
from narsil.dataflow import Batch, Scores

__all__ = ["Errors", "LayerPlan", "Workbench", "choose", "climb", "plans"]

LADDERS = {"fp32": ("fp32",), "bf16": ("bf16", "int16", "fp32"), "int8": ("int8", "int16", "fp32")}
COSTS = {
    "fp32": 4.0,
    "int16": 2.1,
    "bf16": 2.0,
    "int8": 1.0,
}  # of a multiplication; int16 has to find each row's largest

_MARGINS = (0.85, 0.5)  # of the limits that a plan may use up on its own rows, by turns: then layers climb farther
_PRECISIONS = ("int8", "bf16", "fp32")
_SEED = 1
_MOST_GIVEN = 100  # batches of the calibration file's rows; the gate judges by all of them
_TIMED_ROWS = 400
_TIMED_RUNS = 15
_EVEN = 1.03  # speeds within this factor count as equal

Kinds = tuple[str, ...]


@dataclass(frozen=True)
class LayerPlan:
    """What was chosen, and why."""

    precision: str
    layers: tuple[Packed, ...]
    note: str
    deviation: float  # largest, on the plan's own rows


@dataclass(frozen=True)
class Errors:
    """How far scores deviate."""

    largest: float
    log_odds: float  # largest, see gate.log_odds_deviation
    mean_square: float

    def within(self, limit: float, margin: float) -> bool:
        """Whether they use up no more than a share of what a limit allows."""
        allowed = limits_of(limit)
        return self.largest <= margin * allowed.score and self.log_odds <= margin * allowed.log_odds


@dataclass
class Workbench:
    """A form of a model, its layers in any kinds, run over rows whose true scores are known."""

    form: Form
    schema: ModelSchema
    reference: Scorer
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        given = () if self.calibration is None else islice(self.calibration.batches(), _MOST_GIVEN)
        self._batches = [*usual_batches(self.schema, self.calibration, _SEED), *given]
        self._expected = [self._numbers(self.reference(batch)) for batch in self._batches]
        self._is_probability = {
            task: all(is_share(expected[task]) for expected in self._expected) for task in self.schema.tasks
        }

    def errors(self, kinds: Kinds) -> Errors:
        """Of the scores of all tasks, over all rows that the artifact scores as numbers."""
        backend = self.form.backend(kinds)
        largest, log_odds, squares, count = 0.0, 0.0, 0.0, 0
        for batch, expected in zip(self._batches, self._expected, strict=True):
            found = self._numbers(backend.run(batch))
            for task, is_probability in self._is_probability.items():
                is_number = np.isfinite(expected[task])
                ours, theirs = expected[task][is_number], found[task][is_number]
                apart = difference(ours, theirs, is_probability=is_probability)
                largest = max(largest, _largest(apart))
                if is_probability:
                    log_odds = max(log_odds, _largest(log_odds_deviation(ours, theirs)))
                squares += float((apart * apart).sum())
                count += apart.size
        return Errors(largest, log_odds, squares / max(count, 1))

    def _numbers(self, scores: Scores) -> dict[str, NDArray[np.float64]]:
        return {task: np.array(scores[task], np.float64).ravel() for task in self.schema.tasks}

    def speed(self, kinds: Kinds) -> float:
        """Rows a second of one lane, forwards of 400 rows, every one with ids of its own."""
        random, backend = np.random.default_rng(_SEED), self.form.backend(kinds)
        shape = (self.schema.num_features, _TIMED_ROWS)
        dense = random.random((_TIMED_ROWS, self.schema.dense_dim), dtype=np.float32)
        times = []
        for _ in range(_TIMED_RUNS):
            values = random.integers(0, self.schema.rows[:, None], shape).astype(self.schema.id_dtype).ravel()
            batch = Batch(_TIMED_ROWS, dense, np.ones(values.size, np.int32), values, one_hot=True)
            began = perf_counter()
            backend.run(batch)
            times.append(perf_counter() - began)
        return _TIMED_ROWS / float(np.median(times))


def plans(bench: Workbench, precision: str, available: Sequence[str], limit: float) -> Iterator[LayerPlan]:
    """Plans for a precision, the fastest first: what rows of its own let through may fail on the gate's. Then layers
    climb farther; of ``auto``, what follows is the next higher precision, fp32 last."""
    tried = set()
    for plan in _by_turns(bench, precision, available, limit):
        made = (plan.precision == "fp32", *(layer.shape.kind for layer in plan.layers))
        if made not in tried:
            tried.add(made)
            yield plan


def _by_turns(bench: Workbench, precision: str, available: Sequence[str], limit: float) -> Iterator[LayerPlan]:
    if precision != "auto":
        for margin in _MARGINS:
            kinds, largest = climb(bench, precision, available, limit, margin)
            yield LayerPlan(precision, bench.form.layers(kinds), bench.form.told(kinds), largest)
        return
    best = choose(bench, available, limit)
    yield best
    for name in _PRECISIONS[_PRECISIONS.index(best.precision) :]:
        if name in available:
            yield from _by_turns(bench, name, available, limit)


def choose(bench: Workbench, available: Sequence[str], limit: float) -> LayerPlan:
    """Of all precisions that the processor has, the one that measures fastest."""
    found = []
    for name in _PRECISIONS:
        if name in available:
            kinds, largest = climb(bench, name, available, limit)
            found.append((name, kinds, largest, bench.speed(kinds)))
    # Of those that are about as fast as the fastest, the one that deviates least.
    fastest = max(speed for *_, speed in found)
    name, kinds, largest, _ = min(
        (plan for plan in found if plan[3] * _EVEN >= fastest), key=lambda plan: (plan[2], -plan[3])
    )
    speeds = ", ".join(f"{plan[0]} {plan[3]:,.0f}" for plan in found)
    note = f"{name} pays here: rows a second of one lane within the limit are {speeds}; {bench.form.told(kinds)}"
    return LayerPlan(name, bench.form.layers(kinds), note, largest)


def climb(
    bench: Workbench, precision: str, available: Sequence[str], limit: float, margin: float = _MARGINS[0]
) -> tuple[Kinds, float]:
    """(kinds, largest deviation): from the precision's cheapest kinds up, until ``margin`` of the limits holds."""
    ladder = tuple(kind for kind in LADDERS[precision] if kind in available)
    ladders = [tuple(kind for kind in ladder if fits(kind, linear.weight.shape[1])) for linear in bench.form.linears]
    steps = [0] * len(ladders)

    def kinds() -> Kinds:
        return tuple(rungs[step] for rungs, step in zip(ladders, steps, strict=True))

    errors = bench.errors(kinds())
    if errors.within(limit, margin) or all(len(rungs) == 1 for rungs in ladders):
        return kinds(), errors.largest
    alone = _errors_alone(bench, ladders)
    while not errors.within(limit, margin):
        open_layers = [number for number, rungs in enumerate(ladders) if steps[number] + 1 < len(rungs)]
        if not open_layers:
            break

        def worth(number: int) -> float:
            here, above = ladders[number][steps[number]], ladders[number][steps[number] + 1]
            size = float(np.prod(bench.form.linears[number].weight.shape))
            return (alone[number, here] - alone[number, above]) / (size * (COSTS[above] - COSTS[here]))

        steps[max(open_layers, key=worth)] += 1
        errors = bench.errors(kinds())
    return kinds(), errors.largest


def _largest(deviations: NDArray[Any]) -> float:
    """Infinite where one is no number."""
    return float(np.nan_to_num(deviations, nan=np.inf).max(initial=0.0))


def _errors_alone(bench: Workbench, ladders: Sequence[Kinds]) -> Mapping[tuple[int, str], float]:
    """(layer, kind) -> mean square deviation with all other layers in fp32."""
    exact = ["fp32"] * len(ladders)
    errors = {}
    for number, rungs in enumerate(ladders):
        for kind in rungs:
            kinds = (*exact[:number], kind, *exact[number + 1 :])
            errors[number, kind] = bench.errors(kinds).mean_square if kind != "fp32" else 0.0
    return errors
