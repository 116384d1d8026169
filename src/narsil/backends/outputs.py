"""What a forward of torch's returned, as Scores.

Receives tensors of whatever type and shape a model gives its scores; produces float32 arrays of the shapes that the
schema says, or refuses in a sentence. Nothing is copied that is so already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from narsil.dataflow import Batch, Floats, Scores
from narsil.errors import ArtifactError
from narsil.program.recording import named_outputs

__all__ = ["scores_of"]


def scores_of(result: Any, outputs: Mapping[str, int], batch: Batch) -> Scores:
    """A forward's result as scores of ``outputs``: task -> width. Raises ArtifactError where a task is missing, or is
    not laid out by rows."""
    named: Mapping[str, Any] = result if isinstance(result, dict) else named_outputs(result)
    if not outputs.keys() <= named.keys():
        named = named_outputs(result)  # names that are no texts
    scores = {}
    for task, width in outputs.items():
        values = _array(task, named.get(task), width, batch.rows)
        # What is an input handed on lies in the batch's memory, which the next batch is written to.
        lent = any(given is not None and np.may_share_memory(values, given) for given in (batch.dense, batch.weights))
        scores[task] = values.copy() if lent else values
    return scores


def _array(task: str, scores: Any, width: int, rows: int) -> Floats:
    """(B,) float32, (B, k) where ``width`` is k; contiguous."""
    if not isinstance(scores, torch.Tensor):
        raise ArtifactError(f"the model returned no scores named {task}")
    shape = tuple(scores.shape)
    # A model that squeezes its scores leaves out the rows too where there is one.
    by_rows = shape[:1] == (rows,) or (rows == 1 and shape in ((), (width,)))
    if not by_rows or scores.numel() != rows * width:
        numbers = "one number" if width == 1 else f"{width} numbers"
        raise ArtifactError(
            f"the model returned {task} in the shape {shape} for {rows} rows; it must have {numbers} for each row, "
            "rows first"
        )
    if scores.is_complex() or scores.is_quantized or scores.layout != torch.strided:
        raise ArtifactError(
            f"the model returned {task} as {scores.dtype}, {scores.layout}, which no wire can carry; return plain "
            "numbers"
        )
    plain = scores.detach().to("cpu", torch.float32).contiguous()
    result: Floats = plain.numpy().reshape(rows) if width == 1 else plain.numpy().reshape(rows, width)
    return result
