"""Random rows that a model takes, to hold one form of it against another."""

from __future__ import annotations

import numpy as np

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Batch, Floats

__all__ = ["random_batch"]


def random_batch(
    schema: ModelSchema, rows: int, longest: int | None, random: np.random.Generator, dense: Floats | None = None
) -> Batch:
    """Rows with ids uniform over each table: one a bag, or 0 to ``longest``. ``dense``: (rows, D), else uniform in
    [0, 1)."""
    if dense is None:
        dense = random.random((rows, schema.dense_dim), dtype=np.float32)
    shape = (schema.num_features, rows)
    lengths = np.ones(shape, np.int32) if longest is None else random.integers(0, longest + 1, shape, np.int32)
    limits = np.repeat(schema.rows, lengths.sum(axis=1))
    values = random.integers(0, limits).astype(schema.id_dtype)
    return Batch(rows, dense, lengths.ravel(), values, one_hot=longest is None)
