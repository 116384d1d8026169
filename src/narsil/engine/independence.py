"""Whether a model scores each row by itself, or its company too.

Batching, padding and cutting a large request into pieces all rest on rows being independent. A softmax over the
request, a mean over its rows or statistics of the batch break that without a word: each such model is found by scoring
the same rows alone, together, in another order and with padding behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.dataflow import Features, Jagged, OneHot, Scores
from narsil.engine.collate import Collator
from narsil.errors import first_line

__all__ = ["WORKER", "dependence", "probe_rows"]

WORKER = "Serve it with --execution-mode worker, which scores each request by itself"

ROWS = 24
ALONE = 10  # rows that are scored alone as well
PADDING = 5  # rows beside what the backend itself asks for
# Of the larger of 1 and the score: other sizes have other kernels, whose sums round otherwise. What depends on its
# company moves by far more. Scores of 16 bits round to a step of 2^-11.
TOLERANCE, TOLERANCE_16_BITS = 5e-5, 2e-3


def dependence(backend: Backend) -> str | None:
    """How a row's score depends on others, in words; None where nothing shows that it does.

    Raises whatever the forward raises on rows that it ought to take: bags of 0 to 3 ids, and of one.
    """
    for features in probe_rows(backend.schema):
        plain, company = _Scorer(backend), _Scorer(backend, PADDING)
        together = plain.scores(features)
        try:
            others = {
                "in another order": plain.scores(_reversed(features)),
                "with padding behind it": company.scores(features),
                "in a batch of the size that the backend asks for": _Scorer(backend, None).scores(features),
            }
            alone = [plain.scores(features.slice(row, row + 1)) for row in range(ALONE)]
        except Exception as error:  # whatever a model raises
            return f"it does not score its rows in other batches ({first_line(error)})"
        others["in another order"] = {task: scores[::-1] for task, scores in others["in another order"].items()}
        others["alone"] = {task: np.concatenate([one[task] for one in alone]) for task in together}
        for how, scores in others.items():
            if told := _difference(together, scores, how):
                return told
    return None


def probe_rows(schema: ModelSchema, rows: int = ROWS) -> Sequence[Features]:
    """Rows as they come: one id a bag, and bags of 0 to 3; the first id, the last one and repeats among them."""
    random = np.random.default_rng(rows)
    dense = random.standard_normal((rows, schema.dense_dim)).astype(np.float32)
    dense[::7] *= 10
    most = np.minimum(schema.rows, 2**31 - 1)
    ids = random.integers(0, most[:, None], (schema.num_features, rows))
    ids[:, 1::5], ids[:, 2::5] = 0, most[:, None] - 1
    lengths = random.integers(0, 4, (schema.num_features, rows)).astype(np.int32)
    values = random.integers(0, np.repeat(most, lengths.sum(axis=1))).astype(schema.id_dtype)
    return (
        Features(rows, dense, OneHot(ids.astype(schema.id_dtype))),
        Features(rows, dense, Jagged.laid_out(values, lengths)),
    )


class _Scorer:
    """Scores rows with so many rows of padding, or with as many as the backend asks for."""

    def __init__(self, backend: Backend, padding: int | None = 0) -> None:
        self._backend = backend
        bucket = backend.bucket if padding is None else (lambda rows: rows + padding)
        self._collator = Collator(backend.schema, bucket)

    def scores(self, features: Features) -> dict[str, NDArray[np.float32]]:
        """Task -> those of the rows, without the padding's."""
        scores: Scores = self._backend.run(self._collator.collate([features]))
        return {task: np.array(scores[task][: features.rows]) for task in self._backend.schema.tasks}


def _reversed(features: Features) -> Features:
    sparse = features.sparse
    if isinstance(sparse, OneHot):
        return Features(features.rows, features.dense[::-1], OneHot(sparse.ids[:, ::-1]))
    turned = Jagged(sparse.values, sparse.starts[:, ::-1], sparse.lengths[:, ::-1], sparse.weights)
    return Features(features.rows, features.dense[::-1], turned)


def _difference(
    together: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]], how: str
) -> str | None:
    for task, expected in together.items():
        found = other[task]
        wanted = expected[: len(found)].astype(np.float64)
        half = np.array_equal(expected, expected.astype(np.float16).astype(np.float32), equal_nan=True)
        allowed = (TOLERANCE_16_BITS if half else TOLERANCE) * np.maximum(1, np.abs(wanted))
        with np.errstate(invalid="ignore"):
            same = (np.abs(found - wanted) <= allowed) | (wanted == found) | (np.isnan(wanted) & np.isnan(found))
        if not same.all():
            at = tuple(int(index) for index in np.argwhere(~same)[0])
            return f"it scores {task} of a row {wanted[at]:.6g} among others and {found[at]:.6g} {how}"
    return None
