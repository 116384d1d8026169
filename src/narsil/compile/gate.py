"""Holds one model's scores against another's, task by task: the check that every compile must pass.

Receives two artifacts of one schema and, where there are such, a calibration file's rows and the first artifact's
scores in float64; produces a Deviation for each task, and a verdict. The rows are those of artifacts/rows.py, drawn
with a fixed seed, and the calibration's. Rows that the artifact itself scores as NaN or infinity are left out.

What is measured, over usual rows and the calibration's:

    score      of a probability: found - expected. Of any other number: that, by the larger of 1 and its size
    log-odds   of probabilities: the distance between what either score may stand for, one float32 number below it to
               one above it. What is rarer than RAREST counts as that rare, and so does what is as near to 1
    bias       of probabilities: mean of the found by mean of the expected, less 1

and over extreme rows the mean deviation of the score: there, rounding alone moves single scores by any amount. A task's
scores are probabilities where all that the artifact gives lie between 0 and 1.

The limits. A limit L on the score, 2e-3 if nothing is said, allows

    10 L   in log-odds: 2 % of a rare event's probability, at 5e-5 as at 1e-2. Near 0.5, where a score moves by a
           quarter of what its log-odds do, the score's own limit is the sharper one. 4 L would make both alike there;
           single rows of int16 layers whose scores stay within L reach 6 L where scores are far from 0.5
    4 L    of bias: 0.8 %
    L      on average over extreme rows

fp32 has limits of its own if nothing is said, which follow from the artifact: twice what its own scores lie from those
in float64, and FLOOR for the luck of rounding. So a model whose scores are easily moved is not refused for it, and one
whose scores are not is held to the last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import Deviation
from narsil.artifacts.rows import Vocabularies, extreme, rows_of, usual
from narsil.artifacts.schema import ModelSchema
from narsil.backends.registry import load_backend
from narsil.compile.calibration import Calibration
from narsil.dataflow import Batch, Floats, Scores
from narsil.errors import ArtifactError

if TYPE_CHECKING:
    from narsil.artifacts.torchrec import ModuleReading

__all__ = [
    "DEFAULT_LIMIT",
    "Exact",
    "Limits",
    "Measure",
    "Scorer",
    "auc",
    "compare",
    "deviation_of",
    "difference",
    "is_share",
    "judged",
    "limits_for",
    "limits_of",
    "log_odds_deviation",
    "measure_of",
    "problem_of",
    "rank_correlation",
    "replay",
    "require",
    "usual_batches",
]

DEFAULT_LIMIT = 2e-3  # of a score
RAREST = 1e-6
FLOOR = 2e-6  # of a score: some roundings of float32
_LOG_ODDS = 10  # the limit of log-odds by that of the score
_BIAS = 4
_FP32_LIMIT = 1e-5  # where there is no float64 to go by
_CLASSES = ("usual", "extreme", "given")  # given: the calibration's
_LEAST_KEPT = 0.5  # of the usual rows
_OWN = 2  # times what the artifact itself deviates from float64
_EXTREME_SEED = 1 << 16  # beside that of the usual rows

Reals = NDArray[np.float64]
Scorer = Callable[[Batch], Scores]
Exact = Callable[[Batch], Mapping[str, Reals]]  # task -> scores in float64, of the same shapes
_Joined = dict[str, dict[str, Reals]]  # class of rows -> task -> scores of all its rows, flattened


@dataclass(frozen=True)
class Limits:
    """The most that a Deviation may show."""

    score: float
    log_odds: float
    bias: float
    extreme: float  # on average


class Measure:
    """A model's scores, and their own distance from float64. Rows are drawn anew for each who is held against them, and
    not kept."""

    def __init__(
        self,
        schema: ModelSchema,
        reference: Scorer,
        calibration: Calibration | None = None,
        exact: Exact | None = None,
        known: Vocabularies | None = None,
    ) -> None:
        """Scores all rows. Raises ArtifactError where the reference is no measure: it scores most usual rows as NaN or
        infinity, or lies farther from ``exact`` than rounding explains."""
        self.schema = schema
        self._calibration = calibration
        self._known = known
        self._kept: dict[str, list[NDArray[np.bool_]]] = {kind: [] for kind in _CLASSES}
        own = self._own_scores(reference)
        self._expected = own if exact is None else self._scores(exact)
        self._is_probability = {task: all(is_share(own[kind][task]) for kind in _CLASSES) for task in schema.tasks}
        self._own = None if exact is None else self._deviations(own)
        self._check_own()

    def deviations(self, subject: Scorer) -> dict[str, Deviation]:
        """Task -> deviation of a subject's scores."""
        found = self._deviations(self._scores(subject))
        if self._own is None:
            return found
        return {
            task: replace(
                found[task], own_max_abs=own.max_abs, own_log_odds=own.log_odds, own_extreme=own.extreme_mean_abs
            )
            for task, own in self._own.items()
        }

    def _batches(self, kind: str) -> Iterator[Batch]:
        """The rows of a class."""
        if kind == "usual":
            return usual_batches(self.schema, self._calibration, known=self._known)
        if kind == "extreme":
            dense = None if self._calibration is None else self._calibration.dense
            return extreme(self.schema, np.random.default_rng(_EXTREME_SEED), dense, self._known)
        return iter(()) if self._calibration is None else self._calibration.batches()

    def _own_scores(self, reference: Scorer) -> _Joined:
        """The reference's scores, of those rows that it scores as numbers: they are kept."""
        found: _Joined = {}
        for kind in _CLASSES:
            parts = _Parts(self.schema)
            for batch in self._batches(kind):
                scores = reference(batch)
                keep = np.logical_and.reduce(
                    [np.isfinite(np.reshape(scores[task], (batch.rows, -1))).all(axis=1) for task in self.schema.tasks]
                )
                self._kept[kind].append(keep)
                parts.add({task: np.asarray(scores[task])[keep] for task in self.schema.tasks})
            found[kind] = parts.joined()
        kept = np.concatenate(self._kept["usual"])
        if not kept.mean() >= _LEAST_KEPT:
            raise ArtifactError(
                f"the artifact scores {len(kept) - kept.sum()} of {len(kept)} usual rows as NaN or infinity: it is no "
                "measure, and nothing to serve; mend its weights and package it again, or give rows that it takes with "
                "--calibration"
            )
        return found

    def _scores(self, scorer: Callable[[Batch], Mapping[str, NDArray[Any]]]) -> _Joined:
        """Its scores of the rows that are kept."""
        found: _Joined = {}
        for kind in _CLASSES:
            parts = _Parts(self.schema)
            for batch, keep in zip(self._batches(kind), self._kept[kind], strict=True):
                if keep.any():
                    parts.add(scorer(batch if keep.all() else rows_of(batch, keep)))
            found[kind] = parts.joined()
        return found

    def _deviations(self, found: _Joined) -> dict[str, Deviation]:
        kept = {kind: np.concatenate([*self._kept[kind], np.empty(0, np.bool_)]) for kind in _CLASSES}
        given = None if self._calibration is None else self._calibration.labels
        deviations = {}
        for number, task in enumerate(self.schema.tasks):
            is_probability = self._is_probability[task]
            expected, scores = (
                np.concatenate([of["usual"][task], of["given"][task]]) for of in (self._expected, found)
            )
            labels = None if given is None else given[kept["given"], number]
            if labels is not None and len(labels) != len(found["given"][task]):
                labels = None  # a row has several scores
            first = len(found["usual"][task])
            told = deviation_of(expected, scores, first, labels, is_probability=is_probability)
            rare = difference(self._expected["extreme"][task], found["extreme"][task], is_probability=is_probability)
            deviations[task] = replace(
                told,
                rows=int(kept["usual"].sum() + kept["given"].sum()),
                extreme_rows=int(kept["extreme"].sum()),
                extreme_max_abs=float(rare.max(initial=0.0)),
                extreme_mean_abs=float(rare.mean()) if len(rare) else 0.0,
                left_out=sum(int((~mask).sum()) for mask in kept.values()),
            )
        return deviations

    def _check_own(self) -> None:
        """Raises ArtifactError where the artifact's scores are not those that its operations give in float64."""
        for task, own in (self._own or {}).items():
            problem = problem_of(own, limits_of(DEFAULT_LIMIT))
            if problem is not None:
                raise ArtifactError(
                    f"the artifact itself lies farther from float64 than rounding explains: of {task}, {problem}. "
                    "Either it is read wrongly, which is to be reported, or its scores have too few digits to be "
                    "compared; serve it with the torch backend"
                )


class _Parts:
    """Scores of one batch after the other."""

    def __init__(self, schema: ModelSchema) -> None:
        self._found: dict[str, list[Reals]] = {task: [np.empty(0)] for task in schema.tasks}

    def add(self, scores: Mapping[str, NDArray[Any]]) -> None:
        """Those of the next batch."""
        for task, found in self._found.items():
            found.append(np.array(scores[task], np.float64).ravel())

    def joined(self) -> dict[str, Reals]:
        """Task -> all of them."""
        return {task: np.concatenate(found) for task, found in self._found.items()}


def measure_of(
    source: Artifact, calibration: Calibration | None = None, reading: ModuleReading | None = None
) -> Measure:
    """What a model made of an artifact is held against: the artifact in float64, where that can be read, else its own
    scores. ``reading``: of its module, where that has been read. Raises whatever loading or running it raises."""
    from narsil.compile.exact import exact_scorer  # torch, which verifying an ONNX graph does without

    reference = load_backend(source, "torch", tune_kernels=False)
    try:
        exact = exact_scorer(source, reading)
        return Measure(source.schema, reference.run, calibration, exact, exact.known_ids() if exact else None)
    finally:
        reference.close()


def replay(source: Artifact, compiled: Artifact, calibration: Calibration | None = None) -> dict[str, Deviation]:
    """Task -> deviation of the compiled artifact from the other one. Raises whatever loading or running them raises."""
    return judged(measure_of(source, calibration), compiled)


def judged(measure: Measure, compiled: Artifact) -> dict[str, Deviation]:
    """Task -> deviation of a compiled artifact. Raises whatever loading or running it raises."""
    subject = load_backend(compiled, "compiled")
    try:
        return measure.deviations(subject.run)
    finally:
        subject.close()


def compare(
    schema: ModelSchema,
    reference: Scorer,
    subject: Scorer,
    calibration: Calibration | None = None,
    exact: Exact | None = None,
    known: Vocabularies | None = None,
) -> dict[str, Deviation]:
    """Task -> deviation of ``subject`` from ``reference``, or from ``exact``, over drawn rows and the calibration's.
    ``known``: see artifacts/rows.py."""
    return Measure(schema, reference, calibration, exact, known).deviations(subject)


def limits_of(limit: float) -> Limits:
    """What a limit on the score allows."""
    return Limits(limit, _LOG_ODDS * limit, _BIAS * limit, limit)


def limits_for(precision: str, limit: float | None, deviation: Deviation) -> Limits:
    """The limits that a task's deviation is held to; ``limit`` None: the precision's own."""
    if limit is not None or precision != "fp32":
        return limits_of(DEFAULT_LIMIT if limit is None else limit)
    if deviation.own_max_abs is None or deviation.own_extreme is None:
        return limits_of(_FP32_LIMIT)
    luck = limits_of(FLOOR)
    return Limits(
        luck.score + _OWN * deviation.own_max_abs,
        luck.log_odds + _OWN * (deviation.own_log_odds or 0.0),
        luck.bias,
        luck.extreme + _OWN * deviation.own_extreme,
    )


def problem_of(found: Deviation, limits: Limits) -> str | None:
    """How a deviation exceeds the limits; None where it does not."""
    # Written so that NaN is refused too.
    if not found.max_abs <= limits.score:
        return (
            f"scores deviate by up to {found.max_abs:.2e} (mean {found.mean_abs:.1e}) over {found.rows} rows, where at "
            f"most {limits.score:.1e} is allowed"
        )
    if found.log_odds is not None and not found.log_odds <= limits.log_odds:
        return (
            f"the log-odds of scores deviate by up to {found.log_odds:.2e} over {found.rows} rows, where at most "
            f"{limits.log_odds:.1e} is allowed: rare events' scores are off by that share"
        )
    if found.bias is not None and not abs(found.bias) <= limits.bias:
        return (
            f"scores are {found.bias:+.1e} off on average over {found.rows} rows, as a share of their mean, where at "
            f"most {limits.bias:.1e} is allowed"
        )
    if not found.extreme_mean_abs <= limits.extreme:
        return (
            f"scores deviate by {found.extreme_mean_abs:.2e} on average over {found.extreme_rows} rows of long bags, "
            f"repeated ids or large values, where at most {limits.extreme:.1e} is allowed"
        )
    return None


def require(deviation: Deviation, limits: Limits, precision: str) -> None:
    """Raises ArtifactError where a deviation exceeds the limits."""
    problem = problem_of(deviation, limits)
    if problem is not None:
        better = "" if precision == "fp32" else "choose a higher precision, or auto; or "
        raise ArtifactError(
            f"compiled in {precision}, {problem}; nothing was written. To serve it so, {better}allow more with "
            "--max-deviation"
        )


def deviation_of(
    expected: NDArray[Any],
    found: NDArray[Any],
    labelled_from: int = 0,
    labels: Floats | None = None,
    *,
    is_probability: bool | None = None,
) -> Deviation:
    """The deviation of (N,) scores; ``labels`` belong to the rows from ``labelled_from`` on."""
    if is_probability is None:
        is_probability = is_share(expected)
    apart = difference(expected, found, is_probability=is_probability)
    before = after = None
    if labels is not None and 0 < labels.sum() < len(labels):
        before = auc(labels, expected[labelled_from:])
        after = auc(labels, found[labelled_from:])
    return Deviation(
        rows=len(expected),
        max_abs=float(apart.max()),
        mean_abs=float(apart.mean()),
        rank_correlation=rank_correlation(expected, found),
        labelled_rows=0 if before is None or labels is None else len(labels),
        auc=before,
        auc_change=None if before is None or after is None else after - before,
        log_odds=float(log_odds_deviation(expected, found).max()) if is_probability else None,
        bias=_bias(expected, found) if is_probability else None,
    )


def difference(expected: NDArray[Any], found: NDArray[Any], *, is_probability: bool) -> Reals:
    """(N,) how far scores deviate: see the module's docstring."""
    apart: Reals = np.abs(found.astype(np.float64) - expected)
    return apart if is_probability else apart / np.maximum(1, np.abs(expected))


def log_odds_deviation(expected: NDArray[Any], found: NDArray[Any]) -> Reals:
    """(N,) distances of the log-odds of probabilities, less what float32 cannot tell apart."""
    (low, high), (least, most) = _log_odds(expected), _log_odds(found)
    # A maximum that keeps NaN.
    return np.maximum(0, np.maximum(least - high, low - most))


def _log_odds(scores: NDArray[Any]) -> tuple[Reals, Reals]:
    """The least and the largest log-odds that a score may stand for."""
    rounded = np.clip(scores, 0, 1).astype(np.float32)
    neighbours = (np.nextafter(rounded, np.float32(end)).astype(np.float64) for end in (0, 1))
    low, high = (np.log((score + RAREST) / (1 - score + RAREST)) for score in neighbours)
    return low, high


def _bias(expected: NDArray[Any], found: NDArray[Any]) -> float:
    wanted, got = expected.mean(dtype=np.float64), found.mean(dtype=np.float64)
    return float((got - wanted) / max(wanted, np.finfo(np.float32).tiny))


def is_share(scores: NDArray[Any]) -> bool:
    """Whether all of them may be probabilities."""
    return bool(((scores >= 0) & (scores <= 1)).all())


def usual_batches(
    schema: ModelSchema,
    calibration: Calibration | None = None,
    seed: int = 0,
    known: Vocabularies | None = None,
) -> Iterator[Batch]:
    """The usual rows; their dense values are the calibration's, where there is one. ``known``: artifacts/rows.py."""
    return usual(schema, np.random.default_rng(seed), None if calibration is None else calibration.dense, known)


def rank_correlation(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Spearman's; 1 where both are constant."""
    if first.min() == first.max() and second.min() == second.max():
        return 1.0
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0


def auc(labels: Floats, scores: NDArray[Any]) -> float:
    """Area under the ROC curve, by Mann and Whitney's statistic; ties count half."""
    positive = labels > 0
    count = int(positive.sum())
    wins = float(_ranks(scores)[positive].sum()) - count * (count + 1) / 2
    return wins / (count * (len(labels) - count))


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """(N,) ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return mean
