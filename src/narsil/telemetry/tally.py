"""What became of requests and batches, summed by the thread that saw it: no lock, and nothing that a request waits for.

Receives what an Observer is told; gives sums and histograms to whoever asks, from any thread. A thread writes to a cell
of its own. It notes what happened in a list, and folds a full list into arrays that are made anew, so that list and
arrays are replaced together, by one assignment: a reader sees either what was or what is, and no count ever falls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from narsil.dataflow import Features, OneHot, Payload, Request, Result, Scores, StageTimes

__all__ = ["BATCH_SIZES", "FEATURE_COUNTS", "SCORES", "SECONDS", "STAGES", "Distribution", "Tally"]

STAGES = ("queue", "collate", "execute", "split")
# Upper bounds of the buckets; what is above the last has one more.
SECONDS = tuple(round(step * 10.0**power, 6) for power in range(-5, 1) for step in (1.0, 2.0, 5.0))
BATCH_SIZES = tuple(float(1 << power) for power in range(17))
# Finer where probabilities are; the outer ones are for logits.
SCORES = (
    *(-10.0, -5.0, -2.0, -1.0, -0.5, 0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    *(0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0, 2.0, 5.0, 10.0),
)
FEATURE_COUNTS = ("bags", "ids", "empty_bags", "zero_ids")

_FOLD_AT = 512  # entries of a list
_SCORES_EVERY, _FEATURES_EVERY = 32, 512  # requests of a thread, one of which is looked into
_MOST_SCORES, _MOST_BAGS, _MOST_IDS = 1024, 4096, 8192  # that are looked at of it

Model: TypeAlias = tuple[str, str]  # name, version
End: TypeAlias = tuple[str, str, str]  # name, version, "answered" or the error's class


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram: how many values fell under each bound and above the one before it, and their sum."""

    counts: NDArray[np.int64]  # (bounds + 1,)
    total: float

    @classmethod
    def of(cls, values: NDArray[Any], bounds: Sequence[float]) -> Distribution:
        """The values' distribution. A value at a bound is under it."""
        places = np.searchsorted(np.asarray(bounds), values)
        return cls(np.bincount(places, minlength=len(bounds) + 1), float(values.sum(dtype=np.float64)))

    def __add__(self, other: Distribution) -> Distribution:
        return Distribution(self.counts + other.counts, self.total + other.total)

    @property
    def count(self) -> int:
        """How many values."""
        return int(self.counts.sum())


Stages: TypeAlias = dict[str, Distribution]  # of STAGES, and "total"
Batches: TypeAlias = tuple[Distribution, Distribution, float]  # requests and rows of batches, lane seconds

_Note: TypeAlias = tuple[str, str, str, StageTimes]
_Ran: TypeAlias = tuple[str, str, int, int, float]


class _Cell:
    """One thread's. It alone assigns; others read."""

    def __init__(self, thread: str) -> None:
        self.thread = thread
        self.ends: tuple[dict[End, Stages], list[_Note]] = ({}, [])
        self.batches: tuple[dict[Model, Batches], list[_Ran]] = ({}, [])
        self.last: dict[Model, float] = {}
        self.scores: dict[tuple[str, str, str], Distribution] = {}
        self.features: dict[Model, NDArray[np.int64]] = {}
        self.seen = 0
        self.next_scores = self.next_features = 1


class Tally:
    """Sums over all threads."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._adding = threading.Lock()
        self._cells: tuple[_Cell, ...] = ()

    def ended(self, ends: Sequence[tuple[Request, Result]]) -> None:
        """Requests have ended."""
        cell = self._cell()
        sums, notes = cell.ends
        for request, result in ends:
            model, error = request.model, result.error
            outcome = "answered" if error is None else type(error).__name__
            notes.append((model.name, model.version, outcome, result.times))
        cell.last[model.name, model.version] = time.time()  # requests that end together are mostly of one model
        cell.seen += len(ends)
        if len(notes) >= _FOLD_AT:
            cell.ends = (_with_ends(sums, notes), [])
        if cell.seen >= cell.next_scores:
            self._sample(cell, *ends[cell.seen % len(ends)])

    def ran(self, name: str, version: str, requests: int, rows: int, seconds: float) -> None:
        """A batch has run."""
        cell = self._cell()
        sums, notes = cell.batches
        notes.append((name, version, requests, rows, seconds))
        if len(notes) >= _FOLD_AT:
            cell.batches = (_with_batches(sums, notes), [])

    def ends(self) -> dict[End, Stages]:
        """(name, version, outcome) -> seconds of each stage, over requests."""
        found: dict[End, Stages] = {}
        for cell in self._cells:
            sums, notes = cell.ends
            _merge_stages(found, _with_ends(sums, list(notes)))
        return found

    def batches(self) -> dict[tuple[str, str, str], Batches]:
        """(name, version, thread) -> what it ran."""
        found: dict[tuple[str, str, str], Batches] = {}
        for cell in self._cells:
            sums, notes = cell.batches
            for (name, version), these in _with_batches(sums, list(notes)).items():
                key = (name, version, cell.thread)
                found[key] = _sum_of(found[key], these) if key in found else these
        return found

    def last(self) -> dict[Model, float]:
        """(name, version) -> seconds since the epoch when its last request ended."""
        found: dict[Model, float] = {}
        for cell in self._cells:
            for key, when in dict(cell.last).items():
                found[key] = max(when, found.get(key, 0.0))
        return found

    def scores(self) -> dict[tuple[str, str, str], Distribution]:
        """(name, version, task) -> scores, of a sample."""
        found: dict[tuple[str, str, str], Distribution] = {}
        for cell in self._cells:
            for key, these in dict(cell.scores).items():
                found[key] = found[key] + these if key in found else these
        return found

    def features(self) -> dict[Model, NDArray[np.int64]]:
        """(name, version) -> FEATURE_COUNTS of each feature, of a sample: (4, T)."""
        found: dict[Model, NDArray[np.int64]] = {}
        for cell in self._cells:
            for key, these in dict(cell.features).items():
                found[key] = found[key] + these if key in found else these
        return found

    def _cell(self) -> _Cell:
        try:
            cell: _Cell = self._mine.cell
        except AttributeError:
            cell = self._mine.cell = _Cell(threading.current_thread().name)
            with self._adding:
                self._cells = (*self._cells, cell)
        return cell

    def _sample(self, cell: _Cell, request: Request, result: Result) -> None:
        """Looks into one request: at one of its tasks, and less often at its ids."""
        if not result.scores:
            return
        cell.next_scores = cell.seen + _SCORES_EVERY
        name, version = request.model.name, request.model.version
        task, found = _some_scores(result.scores, cell.seen // _SCORES_EVERY)
        known = cell.scores.get((name, version, task))
        cell.scores[name, version, task] = found if known is None else known + found
        if cell.seen >= cell.next_features:
            cell.next_features = cell.seen + _FEATURES_EVERY
            counts = _feature_counts(request.features, cell.seen)
            if counts is not None:
                before = cell.features.get((name, version))
                same = before is not None and before.shape == counts.shape  # another model may have come by this name
                cell.features[name, version] = before + counts if before is not None and same else counts


def _with_ends(sums: Mapping[End, Stages], notes: Sequence[_Note]) -> dict[End, Stages]:
    """New sums: those and these."""
    groups: dict[End, list[StageTimes]] = {}
    for name, version, outcome, times in notes:
        groups.setdefault((name, version, outcome), []).append(times)
    found = dict(sums)
    _merge_stages(found, {key: _stages(times) for key, times in groups.items()})
    return found


def _stages(times: Sequence[StageTimes]) -> Stages:
    columns = {
        "queue": np.array([each.queue for each in times]),
        "collate": np.array([each.collate for each in times]),
        "execute": np.array([each.execute for each in times]),
        "split": np.array([each.split for each in times]),
    }
    columns["total"] = sum(columns.values(), np.zeros(len(times)))
    return {stage: Distribution.of(values, SECONDS) for stage, values in columns.items()}


def _merge_stages(found: dict[End, Stages], more: Mapping[End, Stages]) -> None:
    for key, stages in more.items():
        known = found.get(key)
        found[key] = stages if known is None else {stage: known[stage] + stages[stage] for stage in stages}


def _with_batches(sums: Mapping[Model, Batches], notes: Sequence[_Ran]) -> dict[Model, Batches]:
    groups: dict[Model, list[tuple[int, int, float]]] = {}
    for name, version, requests, rows, seconds in notes:
        groups.setdefault((name, version), []).append((requests, rows, seconds))
    found = dict(sums)
    for key, ran in groups.items():
        requests_, rows_, seconds_ = zip(*ran, strict=True)
        these = (_sizes(requests_), _sizes(rows_), float(sum(seconds_)))
        found[key] = _sum_of(found[key], these) if key in found else these
    return found


def _sizes(values: Iterable[int]) -> Distribution:
    return Distribution.of(np.array([*values]), BATCH_SIZES)


def _sum_of(one: Batches, other: Batches) -> Batches:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _some_scores(scores: Scores, turn: int) -> tuple[str, Distribution]:
    """One task's, by turns."""
    task = [*scores][turn % len(scores)]
    return task, Distribution.of(scores[task].reshape(-1)[:_MOST_SCORES], SCORES)


def _feature_counts(payload: Payload, turn: int) -> NDArray[np.int64] | None:
    """FEATURE_COUNTS of some of its rows, (4, T); None where these hold too many ids, or the model takes none."""
    features = payload.portable()
    count = (features.sparse.ids if isinstance(features.sparse, OneHot) else features.sparse.lengths).shape[0]
    rows = min(features.rows, max(1, _MOST_BAGS // max(count, 1)))
    start = turn % (features.rows - rows + 1)
    while rows and count:
        part = features.slice(start, start + rows)
        if part.ids <= _MOST_IDS:
            return _counts_of(part)
        rows //= 2
    return None


def _counts_of(part: Features) -> NDArray[np.int64]:
    sparse = part.sparse
    if isinstance(sparse, OneHot):
        ids = np.full(len(sparse.ids), part.rows)
        return np.stack([ids, ids, np.zeros_like(ids), (sparse.ids == 0).sum(axis=1)])
    lengths = sparse.lengths.astype(np.int64)
    each = lengths.sum(axis=1)
    flat = lengths.ravel()
    places = np.repeat(sparse.starts.ravel() - (np.cumsum(flat) - flat), flat) + np.arange(int(flat.sum()))
    zeros = np.bincount(np.repeat(np.arange(len(each)), each), sparse.values[places] == 0, len(each))
    return np.stack([np.full(len(each), part.rows), each, (lengths == 0).sum(axis=1), zeros.astype(np.int64)])
