"""An artifact's scores in float64: its program's reference, run over batches.

Receives an Artifact; produces a function from a Batch to float64 scores, or None where not every operation is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.pt2 import is_package
from narsil.artifacts.signatures import reading_of
from narsil.artifacts.torchrec import ModuleReading, read_module
from narsil.artifacts.torchscript import load_torchscript
from narsil.dataflow import Batch
from narsil.program.steps import Bags, IdArray, IdExpression, Lookup, Program, of_feature

__all__ = ["ExactScorer", "exact_scorer", "scores_in_float64"]


def exact_scorer(source: Artifact, reading: ModuleReading | None = None) -> ExactScorer | None:
    """Task -> scores in float64 for a Batch. ``reading``: of the artifact's module, where it has been read already.
    Raises ArtifactError where the artifact's module cannot be read."""
    if source.torchscript is None:
        return None
    if reading is None and source.arguments is not None:
        if is_package(source.torchscript):
            return None
        reading = reading_of(source.torchscript, source.arguments)
    elif reading is None:
        module = load_torchscript(source.torchscript, "cpu")
        reading = read_module(module, source.torchscript.name, source.schema.given_widths, ids=source.schema.ids)
    readings = reading.readings
    program = None if readings is None else readings.program
    if program is None or not set(source.schema.tasks) <= set(program.outputs):
        return None
    return ExactScorer(program)


@dataclass(frozen=True)
class ExactScorer:
    """A program's scores in float64, and the ids that it knows."""

    program: Program

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Task -> (B, *shape) float64."""
        return scores_in_float64(self.program, batch)

    def known_ids(self) -> dict[int, NDArray[np.int64]]:
        """Position of a feature in the request -> the numbers that its ids are searched in, where they are."""
        found: dict[int, list[NDArray[np.int64]]] = {}
        first, counts = {}, 0
        for group, features in self.program.groups.items():
            first[group] = counts
            counts += features
        for step in self.program.steps:
            if not isinstance(step, Lookup):
                continue
            for feature in step.features:
                arrays = _searched(of_feature(step.ids, feature))
                found.setdefault(first[step.group] + feature, []).extend(arrays)
        return {feature: np.unique(np.concatenate(arrays)) for feature, arrays in found.items() if arrays}


def _searched(expression: Any) -> list[NDArray[np.int64]]:
    """The numbers in which an expression searches."""
    if isinstance(expression, IdArray) or not isinstance(expression, IdExpression):
        return []
    own = [expression.arguments[0].values] if expression.function in ("search", "search_right") else []
    return [*own, *(array for argument in expression.arguments for array in _searched(argument))]


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
