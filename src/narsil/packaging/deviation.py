"""What INT8 tables do to a model's scores, found by running both over the same rows.

Receives the FP32 weights and the module that was made of them; produces a Deviation, which `narsil package` prints
and the manifest keeps. Every table's first and last row are among the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from narsil.artifacts.rows import random_batch
from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Batch
from narsil.errors import ArtifactError
from narsil.packaging.dlrm import DlrmConfig, DlrmWeights
from narsil.packaging.modules import fp32_model, fp32_scores

__all__ = ["Int8Deviation", "deviation_of_int8"]

_BAGS = (None, 1, 4, 32)  # the longest one of a batch; None: one id in each
_ROWS = 500  # of a batch


@dataclass(frozen=True)
class Int8Deviation:
    """How far the scores of INT8 tables lie from those of the FP32 weights."""

    rows: int
    max_abs: float
    mean_abs: float
    max_abs_one_id: float  # of the rows with one id in each bag: sums of more deviate more


def deviation_of_int8(config: DlrmConfig, weights: DlrmWeights, module: Any) -> Int8Deviation:
    """The deviation of a PredictModule from its weights, in the score of a row. Raises ArtifactError where either gives
    a score that is no number."""
    (task,) = config.schema.tasks
    model = fp32_model(config, weights)
    differences, one_id = [], []
    for batch in _batches(config.schema):
        expected = fp32_scores(model, batch.dense, batch.lengths, batch.values)
        with torch.inference_mode():
            found = module(
                {
                    "float_features": torch.from_numpy(batch.dense),
                    "id_list_features.lengths": torch.from_numpy(batch.lengths),
                    "id_list_features.values": torch.from_numpy(batch.values),
                }
            )
        scores = found[task].numpy()
        for what, values in (("the FP32 weights", expected), ("INT8 tables", scores)):
            if not np.isfinite(values).all():
                raise ArtifactError(
                    f"{what} score row {int(np.argmin(np.isfinite(values)))} of {batch.rows} random rows as NaN: the "
                    "layers' weights are too large to multiply; train the model again or mend it"
                )
        differences.append(np.abs(scores.astype(np.float64) - expected))
        if batch.one_hot:
            one_id.append(differences[-1].max())
    together = np.concatenate(differences)
    return Int8Deviation(len(together), float(together.max()), float(together.mean()), float(max(one_id)))


def _batches(schema: ModelSchema) -> Iterator[Batch]:
    random = np.random.default_rng(0)
    for longest in _BAGS:
        yield random_batch(schema, _ROWS, longest, random)
    edges = np.stack([np.zeros_like(schema.rows), schema.rows - 1], axis=1)  # (T, 2)
    dense = random.random((2, schema.dense_dim), dtype=np.float32)
    yield Batch(2, dense, np.ones(edges.size, np.int32), edges.ravel().astype(schema.id_dtype), one_hot=True)
