"""In which dense columns of a loaded model a NaN stands for a missing number.

Receives a backend. The columns that its schema names are proven (see program/missing.py); they are tried all the same.
Of a model whose operations are not all known, every column is tried: some rows are scored with NaN in one column after
the other, then in several at once. A compiled model takes NaN only where it was held against the artifact with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.rows import random_batch
from narsil.backends.base import Backend
from narsil.dataflow import Batch, Floats
from narsil.engine.independence import ROWS, SIZES
from narsil.errors import ArtifactError, last_line

__all__ = ["Missing", "missing_columns", "shown"]

_TRIES = 8  # batches of rows with NaN in several columns


@dataclass(frozen=True)
class Missing:
    """Columns in which NaN is a value."""

    columns: tuple[int, ...]
    tried: tuple[int, ...]  # of them, those of which trial alone tells


def missing_columns(backend: Backend) -> Missing:
    """The columns in which a NaN leaves scores that are numbers.

    Raises ArtifactError where one that is proven to be such is none, and whatever the forward raises where it takes no
    number of rows.
    """
    proven = backend.schema.nan_columns
    trial = _Trial(backend)
    if broken := [column for column in proven if not trial.takes([column])]:
        raise ArtifactError(
            f"the model was read to take NaN in dense column {broken[0]}, and scores it as no number; serve it without "
            "--allow-nan, and report it"
        )
    if backend.name == "compiled":
        return Missing(proven, ())
    others = [column for column in range(backend.schema.dense_dim) if column not in proven and trial.takes([column])]
    every = sorted({*proven, *others})
    if others and trial.takes(every) and trial.takes_any_of(every):
        return Missing(tuple(every), tuple(others))
    return Missing(proven, ())


def shown(columns: Sequence[int]) -> str:
    """Columns as ranges: 0 to 12, 15."""
    parts: list[list[int]] = []
    for column in columns:
        if parts and parts[-1][-1] == column - 1:
            parts[-1][1:] = [column]
        else:
            parts.append([column])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


class _Trial:
    """Rows that are scored again and again."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._random = np.random.default_rng(1)
        self._rows, self._scored = self._first()

    def takes(self, columns: Sequence[int]) -> bool:
        """Whether rows that have scores keep some with NaN in all of these columns."""
        missing = np.zeros(self._rows.dense.shape, np.bool_)
        missing[:, list(columns)] = True
        return self._keeps(missing)

    def takes_any_of(self, columns: Sequence[int]) -> bool:
        """The same of NaN in some of them, by chance."""
        shape = (self._rows.rows, len(columns))
        for _ in range(_TRIES):
            missing = np.zeros(self._rows.dense.shape, np.bool_)
            missing[:, list(columns)] = self._random.random(shape) < self._random.random((shape[0], 1))
            if not self._keeps(missing):
                return False
        return True

    def _keeps(self, missing: NDArray[np.bool_]) -> bool:
        dense = np.where(missing, np.float32(np.nan), self._rows.dense)
        return bool(self._scored.any()) and bool(self._finite(dense)[self._scored].all())

    def _first(self) -> tuple[Batch, NDArray[np.bool_]]:
        """Rows in a number that the model takes, and which of them it scores as numbers."""
        for count in (ROWS, *SIZES):
            self._rows = random_batch(self._backend.schema, count, 3, self._random)
            try:
                return self._rows, self._finite(self._rows.dense)
            except Exception as error:  # a model's forward raises what it likes
                problem = error
        raise ArtifactError(f"the model takes no number of rows that was tried: {last_line(problem)}")

    def _finite(self, dense: Floats) -> NDArray[np.bool_]:
        """(B,) whether all scores of a row are numbers."""
        scores = self._backend.run(replace(self._rows, dense=np.ascontiguousarray(dense)))
        rows = self._rows.rows
        beside = np.concatenate([np.isfinite(part).reshape(rows, -1) for part in scores.values()], axis=1)
        return np.asarray(beside.all(axis=1))
