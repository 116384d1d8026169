"""Holds one model's scores against another's, task by task: the check that every compile must pass.

Receives two artifacts of one schema and, where there is one, a calibration file's rows; produces a Deviation for each
task. Rows are drawn with a fixed seed: ids uniform over each table, one a bag or up to four with empty bags among them;
dense features from the calibration rows, else uniform in [0, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import Deviation
from narsil.artifacts.rows import random_batch
from narsil.artifacts.schema import ModelSchema
from narsil.backends.registry import load_backend
from narsil.compile.calibration import Calibration
from narsil.dataflow import Batch, Floats, Scores
from narsil.errors import ArtifactError

__all__ = [
    "RANDOM_ROWS",
    "Scorer",
    "auc",
    "compare",
    "deviation_of",
    "random_batches",
    "rank_correlation",
    "replay",
    "require",
]

RANDOM_ROWS = 10_000  # at least; half of them one-hot
_BATCH_ROWS = 500
_ODD_BATCHES = (1, 2, 7)  # rows of the batches that come first, where code for whole vectors may slip
_LONGEST_BAG = 4

Scorer = Callable[[Batch], Scores]


def replay(source: Artifact, compiled: Artifact, calibration: Calibration | None = None) -> dict[str, Deviation]:
    """Task -> deviation of the compiled artifact, both run over the same rows. Raises whatever loading or running them
    raises."""
    reference = load_backend(source, "torch", tune_kernels=False)
    subject = load_backend(compiled, "compiled")
    try:
        return compare(source.schema, reference.run, subject.run, calibration)
    finally:
        subject.close()


def require(deviation: Deviation, limit: float, precision: str) -> None:
    """Raises ArtifactError where a score deviates by more than the limit."""
    # Written so that NaN is refused too.
    if not deviation.max_abs <= limit:
        raise ArtifactError(
            f"{precision} scores deviate from the artifact's by up to {deviation.max_abs:.2e} (mean "
            f"{deviation.mean_abs:.1e}) over {deviation.rows} rows, where at most {limit:.0e} is allowed; nothing was "
            "written. Choose a higher precision, or allow more with --max-deviation"
        )


def compare(
    schema: ModelSchema, reference: Scorer, subject: Scorer, calibration: Calibration | None = None
) -> dict[str, Deviation]:
    """Task -> deviation of ``subject`` from ``reference`` over random rows and then the calibration's.

    Raises ArtifactError where the reference itself scores a row as NaN or infinity: it is then no measure.
    """
    expected: dict[str, list[Floats]] = {task: [] for task in schema.tasks}
    found: dict[str, list[Floats]] = {task: [] for task in schema.tasks}
    for batch in chain(random_batches(schema, calibration), calibration_batches(calibration)):
        ours, theirs = reference(batch), subject(batch)
        for task in schema.tasks:
            expected[task].append(np.array(ours[task]))
            found[task].append(np.array(theirs[task]))
            if not np.isfinite(expected[task][-1]).all():
                raise ArtifactError(
                    f"the artifact scores {task} as NaN or infinity for some rows: it is no measure, and nothing to "
                    "serve; mend its weights and package it again"
                )
    given = 0 if calibration is None else len(calibration)
    deviations = {}
    for number, task in enumerate(schema.tasks):
        wanted = np.concatenate(expected[task])
        labels = None if calibration is None or calibration.labels is None else calibration.labels[:, number]
        deviations[task] = deviation_of(wanted, np.concatenate(found[task]), len(wanted) - given, labels)
    return deviations


def deviation_of(expected: Floats, found: Floats, labelled_from: int = 0, labels: Floats | None = None) -> Deviation:
    """The deviation of (N,) scores; ``labels`` belong to the rows from ``labelled_from`` on."""
    difference = np.abs(found.astype(np.float64) - expected)
    before = after = None
    if labels is not None and 0 < labels.sum() < len(labels):
        before = auc(labels, expected[labelled_from:])
        after = auc(labels, found[labelled_from:])
    return Deviation(
        rows=len(expected),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        rank_correlation=rank_correlation(expected, found),
        labelled_rows=0 if before is None or labels is None else len(labels),
        auc=before,
        auc_change=None if before is None or after is None else after - before,
    )


def random_batches(schema: ModelSchema, calibration: Calibration | None = None, seed: int = 0) -> Iterator[Batch]:
    """At least RANDOM_ROWS rows, in batches of one-hot and of jagged bags by turns."""
    random = np.random.default_rng(seed)
    sizes = [*_ODD_BATCHES, *_ODD_BATCHES] + [_BATCH_ROWS] * (RANDOM_ROWS // _BATCH_ROWS)
    for number, rows in enumerate(sizes):
        dense = None if calibration is None else calibration.dense[random.integers(0, len(calibration), rows)]
        yield random_batch(schema, rows, None if number % 2 == 0 else _LONGEST_BAG, random, dense)


def calibration_batches(calibration: Calibration | None) -> Iterator[Batch]:
    """The file's own rows, in order."""
    if calibration is None:
        return
    for start in range(0, len(calibration), _BATCH_ROWS):
        ids = np.ascontiguousarray(calibration.ids[start : start + _BATCH_ROWS].T)
        dense = calibration.dense[start : start + _BATCH_ROWS]
        yield Batch(len(dense), dense, np.ones(ids.size, np.int32), ids.ravel(), one_hot=True)


def rank_correlation(first: Floats, second: Floats) -> float:
    """Spearman's; 1 where both are constant."""
    if first.min() == first.max() and second.min() == second.max():
        return 1.0
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0


def auc(labels: Floats, scores: Floats) -> float:
    """Area under the ROC curve, by Mann and Whitney's statistic; ties count half."""
    positive = labels > 0
    count = int(positive.sum())
    wins = float(_ranks(scores)[positive].sum()) - count * (count + 1) / 2
    return wins / (count * (len(labels) - count))


def _ranks(values: Floats) -> NDArray[np.float64]:
    """(N,) ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return mean
