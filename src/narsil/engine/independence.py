"""Whether a model scores each row by itself, or its company too.

Batching, padding and cutting a large request into pieces all rest on rows being independent. A softmax over the
request, a mean over its rows or statistics of the batch break that without a word. Receives a loaded backend; scores
some rows again and again and compares, which tells two things apart:

    the same size, the same places, as many ids     the same instructions run over every row: where it stands for
                                                    itself, its score has the same bits whatever the others hold
    another size, place or padding                  other kernels round otherwise, by some 1e-6 of a score; what
                                                    depends on the size, the place or the padding moves by far more
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.rows import with_missing
from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.dataflow import Features, Jagged, OneHot
from narsil.engine.collate import Collator
from narsil.errors import ArtifactError, last_line

__all__ = ["WORKER", "dependence", "probe_rows"]

WORKER = "Serve it with --execution-mode worker, which scores each request by itself"

ROWS = 24  # that are compared
SIZES = (1, 2, 3, 4, 5, 7, 16, 32, 60)  # to look for one that runs, where ROWS do not
LARGE = 300  # rows of one forward

# Of the larger of a score and its task's median: a base rate of 5e-5 counts as much as one of 0.5. Over four dozen
# artifacts, on Zen 4 and with FBGEMM, oneDNN and the fused engine, company moved no bit (SAME), and the size or the
# place moved scores by up to 5e-6 (ROUNDING) over rows with numbers of up to 100.
SAME, ROUNDING = 1e-6, 1e-3
STEPS = 4  # of a score of 16 bits (bfloat16, half), by which it may be rounded otherwise

Values = NDArray[np.floating[Any]]
Scored = Mapping[str, Values]
Order = NDArray[np.intp]


@dataclass(frozen=True)
class _Trial:
    """Rows that are scored once more."""

    how: str  # in which company, for the sentence
    rows: Order  # of the pool, as they stand in this batch
    own: Order  # the places in it that are compared, each with the same row among the first ROWS
    alike: bool = False  # the size, the places and the counts of ids are those of the first ROWS
    padded: bool = False  # to the size that the backend asks for


def dependence(backend: Backend) -> str | None:
    """How a row's score depends on others, in words; None where nothing shows that it does, and the forward does
    nothing that other rows could turn.

    Raises ArtifactError where the same batch is scored otherwise each time, and whatever the forward raises where it
    takes no number of rows.
    """
    single, bags = (_Probe(backend, pool) for pool in probe_rows(backend.schema))
    if told := single.told():
        return told
    if problem := bags.failure(ROWS):  # where as many rows of one id each have run
        return f"it takes one id of each feature and fails on bags of 0 to 3 ({problem})"
    if told := bags.told():
        return told
    return f"{backend.branch}, so that no trial tells what it does to others" if backend.branch else None


def probe_rows(schema: ModelSchema) -> Sequence[Features]:
    """Two pools of 2 * ROWS + 1 rows: one id a bag, and bags of 0 to 3; the first id, the last one and repeats among
    them, and numbers with heavy tails, or none where NaN is a value.

    Row ROWS + i of a pool has as many ids in each bag as row i; the last row is padding.
    """
    random = np.random.default_rng(ROWS)
    count, features = 2 * ROWS, schema.num_features
    dense = np.zeros((count + 1, schema.dense_dim), np.float32)
    dense[:count] = np.clip(random.standard_t(3, (count, schema.dense_dim)), -100, 100)
    dense = with_missing(dense, schema, random)
    ids = np.zeros((features, count + 1), schema.id_dtype)
    ids[:, :count] = random.integers(0, schema.rows[:, None], (features, count))
    ids[:, 1:count:5], ids[:, 2:count:5] = 0, schema.rows[:, None] - 1
    half = random.integers(0, 4, (features, ROWS)).astype(np.int32)
    lengths = schema.bags(np.concatenate([half, half, np.zeros((features, 1), np.int32)], axis=1))
    values = random.integers(0, np.repeat(schema.rows, lengths.sum(axis=1))).astype(schema.id_dtype)
    values[::4] = 0
    return (
        Features(count + 1, dense, OneHot(ids)),
        Features(count + 1, dense, Jagged.laid_out(values, lengths)),
    )


def _trials() -> Iterator[_Trial]:
    own, others, padding = np.arange(ROWS), np.arange(ROWS, 2 * ROWS), np.full(LARGE, 2 * ROWS)
    for kept in (own[::2], own[1::2]):
        rows = others.copy()
        rows[kept] = kept
        yield _Trial("beside others", rows, kept, alike=True)
    yield _Trial("with padding behind it", np.concatenate([own[: ROWS // 2], padding[: ROWS // 2]]), own[: ROWS // 2])
    yield _Trial("with padding behind it", np.concatenate([own, padding[:5]]), own)
    yield _Trial("in another order", own[::-1], own[::-1])
    for row in own[:10]:
        yield _Trial("alone", own[row : row + 1], own[:1])
    for count in (2, 3, 7, 9, 17, ROWS):
        yield _Trial(f"among {count} rows", own[:count], own[:count])
        yield _Trial("in a batch of the size that the backend asks for", own[:count], own[:count], padded=True)
    yield _Trial(f"among {LARGE} rows", np.concatenate([own, np.resize(others, LARGE - ROWS)]), own)


class _Probe:
    """Rows of one kind, scored in every company."""

    def __init__(self, backend: Backend, pool: Features) -> None:
        self._backend = backend
        self._pool = pool
        self._plain = Collator(backend.schema)
        self._padding = Collator(backend.schema, backend.bucket)

    def told(self) -> str | None:
        """See dependence."""
        first = _Trial("", np.arange(ROWS), np.arange(ROWS))
        try:
            together = self._scores(first)
        except Exception as error:  # a model's forward raises what it likes
            found = next((count for count in SIZES if not self.failure(count)), None)
            if found is None:
                raise
            return f"it takes {found} rows and fails on {ROWS} ({last_line(error)})"
        self._scores(first)  # an executor that profiles its first runs has settled after it
        again = self._scores(first)
        if told := _difference(together, again, first):
            raise ArtifactError(
                f"the model scores the same batch otherwise each time (task {told[0]}, row {told[1]}: {told[2]}, then "
                f"{told[3]}), so that none of its scores can be relied on; package it in evaluation mode (.eval()), "
                "without dropout"
            )
        for trial in _trials():
            try:
                scores = self._scores(trial)
            except Exception as error:
                return f"it takes {ROWS} rows and fails on {len(trial.rows)} {trial.how} ({last_line(error)})"
            if told := _difference(again, scores, trial):
                task, row, among, now = told
                return f"it scores {task} of row {row} {among} among {ROWS} rows and {now} {trial.how}"
        return None

    def failure(self, count: int) -> str:
        """What a forward of so many rows raises; empty where it ends well."""
        try:
            self._scores(_Trial("", np.arange(count) % (2 * ROWS), np.arange(count)))
        except Exception as error:
            return last_line(error) or type(error).__name__
        return ""

    def _scores(self, trial: _Trial) -> Scored:
        """Task -> (rows, ..) of a batch."""
        collator = self._padding if trial.padded else self._plain
        scores = self._backend.run(collator.collate([_taken(self._pool, trial.rows)]))
        return {task: np.array(scores[task][: len(trial.rows)]) for task in self._backend.schema.tasks}


def _taken(pool: Features, rows: Order) -> Features:
    """These rows of the pool, in this order."""
    sparse = pool.sparse
    if isinstance(sparse, OneHot):
        return Features(len(rows), pool.dense[rows], OneHot(sparse.ids[:, rows]))
    bags = Jagged(sparse.values, sparse.starts[:, rows], sparse.lengths[:, rows], sparse.weights)
    return Features(len(rows), pool.dense[rows], bags)


def _difference(together: Scored, other: Scored, trial: _Trial) -> tuple[str, int, str, str] | None:
    """The score that has moved most, where one has beyond the tolerance: its task, its row, what it was and what it
    is."""
    rows = trial.rows[trial.own]
    for task, scores in together.items():
        wanted, found = scores[rows].astype(np.float64), other[task][trial.own].astype(np.float64)
        size = np.maximum(_size(wanted), np.median(_size(scores), axis=0))
        allowed = SAME if trial.alike else max(ROUNDING, STEPS * _step(scores))
        with np.errstate(invalid="ignore"):
            moved = np.abs(found - wanted)
        same = (moved <= allowed * size) | (wanted == found) | (np.isnan(wanted) & np.isnan(found))
        if not same.all():
            at = np.unravel_index(np.argmax(np.where(same, -1, np.nan_to_num(moved, nan=np.inf))), moved.shape)
            return task, int(rows[at[0]]), f"{wanted[at]:.9g}", f"{found[at]:.9g}"
    return None


def _size(scores: Values) -> Values:
    """0 for what is no number."""
    return np.where(np.isfinite(scores), np.abs(scores), 0)


def _step(scores: Values) -> float:
    """Between two neighbouring numbers of the coarsest kind that holds all of the scores, relative to either."""
    fractions, _ = np.frexp(scores[np.isfinite(scores)].astype(np.float64))
    return next((0.5**bits for bits in (7, 10) if (np.ldexp(fractions, bits + 1) % 1 == 0).all()), 0.0)
