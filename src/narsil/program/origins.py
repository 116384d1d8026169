"""Where each number of a value comes from: followed through every step that only moves numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.program.steps import Concat, Permute, Program, Reshape, Step, Take

__all__ = ["Origins", "Trace"]


@dataclass(frozen=True)
class Origins:
    """For each number of a value: the value that some step computed, and the place in its flattened row."""

    values: NDArray[np.int64]
    places: NDArray[np.int64]  # of the same shape

    def lone(self) -> int | None:
        """The value that all numbers are, in its own order from its first on; None where there is no such one."""
        if not self.values.size:
            return None
        first = int(self.values.flat[0])
        same = (self.values == first).all() and np.array_equal(self.places.ravel(), np.arange(self.places.size))
        return first if same else None

    def broadcast(self, shape: tuple[int, ...]) -> Origins:
        """As numpy broadcasts the value."""
        return Origins(np.broadcast_to(self.values, shape), np.broadcast_to(self.places, shape))

    def transposed(self, axes: tuple[int, ...]) -> Origins:
        """The value's axes in another order."""
        return Origins(np.transpose(self.values, axes), np.transpose(self.places, axes))


class Trace:
    """The origins of a program's values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made_by: dict[int, Step] = {step.out: step for step in program.steps}
        self._origins: dict[int, Origins] = {}

    def of(self, number: int) -> Origins:
        """The origins of a value."""
        if number not in self._origins:
            self._origins[number] = self._found(number)
        return self._origins[number]

    def _found(self, number: int) -> Origins:
        step = self.made_by.get(number)
        if isinstance(step, Concat):
            parts = [self.of(source) for source in step.sources]
            return Origins(
                np.concatenate([part.values for part in parts], step.axis),
                np.concatenate([part.places for part in parts], step.axis),
            )
        if isinstance(step, Take | Reshape | Permute):
            source = self.of(step.source)
            return Origins(_rearranged(step, source.values), _rearranged(step, source.places))
        shape = self.program.shapes[number]
        places = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        return Origins(np.full(shape, number), places)


def _rearranged(step: Take | Reshape | Permute, array: NDArray[Any]) -> NDArray[Any]:
    if isinstance(step, Take):
        return array.ravel()[step.places]
    if isinstance(step, Reshape):
        return array.reshape(step.shape)
    return np.transpose(array, step.axes)
