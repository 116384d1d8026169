"""Takes a batch's Scores apart again: the exact inverse of collation's row order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from narsil.dataflow import Scores


def split(scores: Scores, rows: Sequence[int]) -> Iterator[Scores]:
    """Yields each request's scores, as views, for requests of these many rows in batch order."""
    if len(rows) == 1:
        yield scores
        return
    start = 0
    for count in rows:
        yield {task: values[start : start + count] for task, values in scores.items()}
        start += count


def join(pieces: Sequence[Scores]) -> Scores:
    """Puts the scores of one request that ran in several forwards back together."""
    return {task: np.concatenate([piece[task] for piece in pieces]) for task in pieces[0]}
