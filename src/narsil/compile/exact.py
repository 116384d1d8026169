"""An artifact's scores in float64: its program's reference, run over batches.

Receives an Artifact; produces a function from a Batch to float64 scores, or None where not every operation is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.torchrec import ModuleReading, read_module
from narsil.artifacts.torchscript import load_torchscript
from narsil.dataflow import Batch
from narsil.program.steps import Bags, Program

__all__ = ["exact_scorer", "scores_in_float64"]


def exact_scorer(
    source: Artifact, reading: ModuleReading | None = None
) -> Callable[[Batch], Mapping[str, NDArray[np.float64]]] | None:
    """Task -> scores in float64 for a Batch. ``reading``: of the artifact's module, where it has been read already.
    Raises ArtifactError where the artifact's module cannot be read."""
    if source.torchscript is None or source.arguments is not None:
        return None
    if reading is None:
        module = load_torchscript(source.torchscript, "cpu")
        reading = read_module(module, source.torchscript.name, source.schema.dense_dim)
    readings = reading.readings
    program = None if readings is None else readings.program
    if program is None or len(program.groups) > 1 or not set(source.schema.tasks) <= set(program.outputs):
        return None
    return lambda batch: scores_in_float64(program, batch)


def scores_in_float64(program: Program, batch: Batch) -> dict[str, Any]:
    """Task -> (B, *shape) float64; the program has one group of bags at most."""
    bags = Bags(batch.lengths.reshape(-1, batch.rows), batch.values, batch.weights)
    return program.reference(dict.fromkeys(program.dense, batch.dense), dict.fromkeys(program.groups, bags))
