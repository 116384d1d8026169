"""A model as one lane runs it: collate, forward, check.

Receives the payloads of a batch, produces their scores. Owns a collator's buffers; used by one lane's thread alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from narsil.backends.base import Backend
from narsil.dataflow import Batch, Payload, Scores
from narsil.engine.collate import Collator
from narsil.errors import ForwardFailed

__all__ = ["Runner"]

log = logging.getLogger(__name__)


class Runner:
    """Belongs to a model, and refers to its backend and not to it: else neither would be freed without a collection."""

    def __init__(self, name: str, backend: Backend, *, whole: bool = False) -> None:
        """``whole``: rows depend on each other, and on padding too."""
        self.name = name
        self.backend = backend
        self.whole = whole
        self.collator = Collator(backend.schema) if whole else Collator(backend.schema, backend.bucket)

    def run(self, parts: Sequence[Payload]) -> tuple[Scores, float, float]:
        """One forward: (the parts' scores, collate seconds, execute seconds); what padding scored is cut off here.

        Raises ForwardFailed on scores of a wrong shape, and on scores that are no finite number.
        """
        rows = sum(part.rows for part in parts)
        begin = perf_counter()
        batch = self.collator.collate(parts)
        collated = perf_counter()
        scores = self.backend.run(batch)
        executed = perf_counter()
        return self._checked(scores, batch, rows), collated - begin, executed - collated

    def _checked(self, scores: Scores, batch: Batch, rows: int) -> Scores:
        wanted = {}
        for task, width in self.backend.schema.outputs.items():
            values = scores.get(task)
            shape = (batch.rows,) if width == 1 else (batch.rows, width)
            if values is None or values.shape != shape:
                found = "nothing" if values is None else values.shape
                raise ForwardFailed(f"task {task}: the model gave {found} for {batch.rows} rows, and not {shape}")
            wanted[task] = values = values[:rows]
            if np.count_nonzero(np.isfinite(values)) != rows * width:
                row, *place = (int(index) for index in np.argwhere(~np.isfinite(values))[0])
                number, which = values[row, *place], "".join(f", number {column}" for column in place)
                # Which row of the batch it was says nothing to a client; in a batch of its own it does.
                log.error("model %s, task %s: row %d%s of %d scored %s", self.name, task, row, which, rows, number)
                raise ForwardFailed(
                    f"task {task}: the model scored row {row}{which} as {number}, which is no answer; look at this "
                    "row's values and at the model's weights"
                )
        return wanted
