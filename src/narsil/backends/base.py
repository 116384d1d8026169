"""The interface between the engine and a model: a Batch in, Scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Batch, Floats, Scores

Columns = Mapping[str, tuple[int, int]]  # task -> the first of its columns among all of a model's, and how many


class Backend(ABC):
    """A loaded model that one lane runs.

    ``run`` is called by one thread at a time per instance. Lanes get instances of their own from ``share``, over
    the same weights. An implementation releases the GIL for the forward, and must not keep or change the
    batch's arrays after ``run`` returns.
    """

    name: str
    schema: ModelSchema  # of the tasks that ``run`` gives: the model's, or some of them where others set it so
    device: str
    branch: str = ""  # where the forward may do other things for other rows, which no trial of some rows shows

    @abstractmethod
    def run(self, batch: Batch) -> Scores:
        """One forward. Returns (B,) float32 for each task of ``schema``, (B, k) where its width is k, in the
        batch's row order. Raises whatever the model raises."""

    @abstractmethod
    def share(self) -> Backend:
        """Another instance over the same weights, for another lane. Cheap in memory."""

    def bucket(self, rows: int) -> int:
        """The number of rows, at least ``rows``, that a batch of so many is padded to. For backends that compile or
        capture something for each size."""
        return rows

    def thread_setup(self) -> None:  # noqa: B027 - optional hook
        """Called once in the lane's thread before its first run: thread-local state such as thread counts."""

    def close(self) -> None:  # noqa: B027 - optional hook
        """Frees what this instance owns."""


def columns_of(schema: ModelSchema) -> Columns:
    """Where each task's scores stand, of a model that gives all of them beside each other."""
    starts = np.cumsum([0, *schema.widths]).tolist()
    return {task: (start, width) for (task, width), start in zip(schema.outputs.items(), starts, strict=False)}


def by_task(scores: Floats, columns: Columns, tasks: Sequence[str]) -> Scores:
    """(B, all columns) taken apart: (B,) of a task of one number, else (B, width), contiguous."""

    def part(first: int, width: int) -> Floats:
        return scores[:, first] if width == 1 else scores[:, first : first + width]

    return {task: np.ascontiguousarray(part(*columns[task])) for task in tasks}
