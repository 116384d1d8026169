"""Chooses the kind of number of each layer (see packing.py): the fastest choice whose scores stay within the limit.

Receives a DLRM's parts and the library that runs them; produces a LayerPlan. Each layer's own error is measured alone
first. Then layers climb, the one with the most error for what climbing costs first, until no score deviates by more
than the limit allows. Rows are drawn as for the gate but with another seed, so that the gate judges on rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np

from narsil.artifacts.packed import Packed, fits
from narsil.artifacts.schema import ModelSchema
from narsil.backends.fused import ForwardLibrary, FusedBackend, Geometry, Network
from narsil.compile.calibration import Calibration
from narsil.compile.core import DlrmParts
from narsil.compile.gate import calibration_batches, random_batches
from narsil.compile.packing import pack, pack_logit
from narsil.dataflow import Batch, Floats

__all__ = ["LayerPlan", "Workbench", "choose", "climb"]

LADDERS = {"fp32": ("fp32",), "bf16": ("bf16", "int16", "fp32"), "int8": ("int8", "int16", "fp32")}
COSTS = {
    "fp32": 4.0,
    "int16": 2.1,
    "bf16": 2.0,
    "int8": 1.0,
}  # of a multiplication; int16 has to find each row's largest

_MARGIN = 0.75  # of the limit that a plan may use up on its own rows
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


@dataclass
class Workbench:
    """A DLRM's layers, in any kinds, run over rows whose true scores are known."""

    library: ForwardLibrary
    geometry: Geometry
    schema: ModelSchema
    parts: DlrmParts
    tables: Any  # (bytes,) uint8
    reference: Callable[[Batch], Floats]  # (B,) scores of the one task
    calibration: Calibration | None = None
    _packed: dict[tuple[int, str], Packed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = islice(calibration_batches(self.calibration), _MOST_GIVEN)
        self._batches = [*random_batches(self.schema, self.calibration, _SEED), *given]
        self._expected = [np.array(self.reference(batch)) for batch in self._batches]
        self.linears = (*self.parts.dense, *self.parts.over[:-1])
        self._logit = pack_logit(self.parts.over[-1])

    def layers(self, kinds: Kinds) -> tuple[Packed, ...]:
        """The layers in these kinds, each packed once."""
        for number, kind in enumerate(kinds):
            if (number, kind) not in self._packed:
                first = number in (0, len(self.parts.dense))
                self._packed[number, kind] = pack(self.linears[number], kind, signed=first)
        return (*(self._packed[number, kind] for number, kind in enumerate(kinds)), self._logit)

    def backend(self, kinds: Kinds) -> FusedBackend:
        """The model in these kinds."""
        layers = self.layers(kinds)
        return FusedBackend(
            Network(self.library, self.geometry, layers, len(self.parts.dense), self.tables), self.schema
        )

    def errors(self, kinds: Kinds) -> tuple[float, float]:
        """(largest, mean square) deviation of a score."""
        backend = self.backend(kinds)
        largest, squares, count = 0.0, 0.0, 0
        for batch, expected in zip(self._batches, self._expected, strict=True):
            difference = backend.score(batch) - expected
            largest = max(largest, float(np.nan_to_num(np.abs(difference), nan=np.inf).max()))
            squares += float((difference * difference).sum())
            count += batch.rows
        return largest, squares / count

    def speed(self, kinds: Kinds) -> float:
        """Rows a second of one lane, forwards of 400 rows, every one with ids of its own."""
        random, backend = np.random.default_rng(_SEED), self.backend(kinds)
        shape = (self.schema.num_features, _TIMED_ROWS)
        dense = random.random((_TIMED_ROWS, self.schema.dense_dim), dtype=np.float32)
        times = []
        for _ in range(_TIMED_RUNS):
            values = random.integers(0, self.schema.rows[:, None], shape).astype(self.schema.id_dtype).ravel()
            batch = Batch(_TIMED_ROWS, dense, np.ones(values.size, np.int32), values, one_hot=True)
            began = perf_counter()
            backend.score(batch)
            times.append(perf_counter() - began)
        return _TIMED_ROWS / float(np.median(times))


def choose(bench: Workbench, precision: str, available: Sequence[str], limit: float) -> LayerPlan:
    """The plan for a precision; ``auto``: of all precisions that the processor has, the one that measures fastest."""
    if precision != "auto":
        kinds, largest = climb(bench, precision, available, limit)
        return LayerPlan(precision, bench.layers(kinds), _told(bench, kinds), largest)
    found = []
    for name in ("int8", "bf16", "fp32"):
        if name in available:
            kinds, largest = climb(bench, name, available, limit)
            found.append((name, kinds, largest, bench.speed(kinds)))
    # Of those that are about as fast as the fastest, the one that deviates least.
    fastest = max(speed for *_, speed in found)
    name, kinds, largest, _ = min(
        (plan for plan in found if plan[3] * _EVEN >= fastest), key=lambda plan: (plan[2], -plan[3])
    )
    speeds = ", ".join(f"{plan[0]} {plan[3]:,.0f}" for plan in found)
    note = f"{name} pays here: rows a second of one lane within the limit are {speeds}; {_told(bench, kinds)}"
    return LayerPlan(name, bench.layers(kinds), note, largest)


def climb(bench: Workbench, precision: str, available: Sequence[str], limit: float) -> tuple[Kinds, float]:
    """(kinds, largest deviation): from the precision's cheapest kinds up, as far as the limit asks."""
    ladder = tuple(kind for kind in LADDERS[precision] if kind in available)
    ladders = [tuple(kind for kind in ladder if fits(kind, linear.weight.shape[1])) for linear in bench.linears]
    steps = [0] * len(ladders)

    def kinds() -> Kinds:
        return tuple(rungs[step] for rungs, step in zip(ladders, steps, strict=True))

    largest, _ = bench.errors(kinds())
    if largest <= _MARGIN * limit or all(len(rungs) == 1 for rungs in ladders):
        return kinds(), largest
    alone = _errors_alone(bench, ladders)
    while largest > _MARGIN * limit:
        open_layers = [number for number, rungs in enumerate(ladders) if steps[number] + 1 < len(rungs)]
        if not open_layers:
            break

        def worth(number: int) -> float:
            here, above = ladders[number][steps[number]], ladders[number][steps[number] + 1]
            size = float(bench.linears[number].weight.numel())
            return (alone[number, here] - alone[number, above]) / (size * (COSTS[above] - COSTS[here]))

        steps[max(open_layers, key=worth)] += 1
        largest, _ = bench.errors(kinds())
    return kinds(), largest


def _errors_alone(bench: Workbench, ladders: Sequence[Kinds]) -> Mapping[tuple[int, str], float]:
    """(layer, kind) -> mean square deviation with all other layers in fp32."""
    exact = ["fp32"] * len(ladders)
    errors = {}
    for number, rungs in enumerate(ladders):
        for kind in rungs:
            kinds = (*exact[:number], kind, *exact[number + 1 :])
            errors[number, kind] = bench.errors(kinds)[1] if kind != "fp32" else 0.0
    return errors


def _told(bench: Workbench, kinds: Kinds) -> str:
    dense = len(bench.parts.dense)
    return f"dense arch {' '.join(kinds[:dense])}, over arch {' '.join((*kinds[dense:], 'fp32'))}"
