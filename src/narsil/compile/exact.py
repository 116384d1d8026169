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
        reading = read_module(module, source.torchscript.name, source.schema.given_widths)
    readings = reading.readings
    program = None if readings is None else readings.program
    if program is None or not set(source.schema.tasks) <= set(program.outputs):
        return None
    return lambda batch: scores_in_float64(program, batch)


def scores_in_float64(program: Program, batch: Batch) -> dict[str, Any]:
    """Task -> (B, *shape) float64."""
    dense, groups, column, bag, first = {}, {}, 0, 0, 0
    for key, number in program.dense.items():
        width = program.shapes[number][0]
        dense[key] = batch.dense[:, column : column + width]
        column += width
    for group, features in program.groups.items():
        lengths = batch.lengths[bag : bag + features * batch.rows].reshape(features, batch.rows)
        last = first + int(lengths.sum(dtype=np.int64))
        weights = None if batch.weights is None else batch.weights[first:last]
        groups[group] = Bags(lengths, batch.values[first:last], weights)
        bag, first = bag + features * batch.rows, last
    return program.reference(dense, groups)
