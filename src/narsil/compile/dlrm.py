"""Recognises a DLRM in a program: every step is accounted for, or the model is none.

Receives a Program; produces its linear layers, its lookups and the over arch's first weight with columns in the order
in which the fused engine computes them: the dense vector, then the dot products of all pairs i < j of the dense vector
and the features' in the schema's order. A model may have its columns in any order, leave some out or have some twice: a
weight says what each counts for.

Which number comes from where is followed through every step that only moves numbers (``origins``), so that it does not
matter by which of them a model was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from narsil.errors import ArtifactError
from narsil.program.origins import Origins, Trace
from narsil.program.steps import Elementwise, Linear, Lookup, MatMul, Program, Step

__all__ = ["Dlrm", "NoDlrm", "recognised"]


@dataclass(frozen=True)
class Dlrm:
    """A DLRM with dot interaction."""

    dense: tuple[Linear, ...]
    over: tuple[Linear, ...]  # in the order in which they run; the first's weight is as the fused engine takes it
    tables: Mapping[int, tuple[Lookup, int]]  # feature -> its lookup, and its place there


class NoDlrm(ArtifactError):
    """The model is none that the DLRM's own loops run."""


class _Unlike(Exception):
    """Why a program is no DLRM."""


def recognised(program: Program, task: str, name: str) -> Dlrm:
    """The DLRM that a program is. Raises NoDlrm, naming the first step that a DLRM has not."""
    try:
        return _Matcher(program).dlrm(program.outputs[task])
    except _Unlike as problem:
        raise NoDlrm(f"{name} is no DLRM with dot interaction: {problem}") from None


class _Matcher:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.trace = Trace(program)
        self.made_by = self.trace.made_by

    def dlrm(self, output: int) -> Dlrm:
        """See recognised."""
        if len(self.program.groups) > 1 or len(self.program.dense) > 1:
            raise _Unlike("it takes several groups of id lists, or several matrices of numbers")
        activation = self._computed(output, "the scores")
        if not isinstance(activation, Elementwise) or activation.function != "sigmoid":
            raise _Unlike(f"its scores come from {_told(activation)}, not from a sigmoid")
        last = self._computed(self._operand(activation), "the logit")
        if not isinstance(last, Linear) or last.weight.shape[0] != 1:
            raise _Unlike(f"its logit comes from {_told(last)}, not from a linear layer of one output")
        layers = [last]
        while (before := self._layer_before(layers[0])) is not None:
            layers.insert(0, before)
        self._check_layers(layers)
        joined = self._origins_of(layers[0].source)
        products = {
            int(value) for value in np.unique(joined.values) if isinstance(self.made_by.get(int(value)), MatMul)
        }
        others = {int(value) for value in np.unique(joined.values)} - products
        if len(products) != 1 or len(others) > 1:
            raise _Unlike(
                f"its over arch takes {', '.join(sorted(self._tell(value) for value in (others | products)))}"
            )
        matmul = cast(MatMul, self.made_by[products.pop()])
        hidden, features, tables = self._vectors(matmul)
        if others - {hidden}:
            raise _Unlike(f"its over arch takes {self._tell(others.pop())} beside the dot products")
        first = Linear(
            layers[0].out, layers[0].source, self._moved(layers[0], joined, hidden, features), layers[0].bias
        )
        return Dlrm(self._dense_layers(hidden), (first, *layers[1:]), tables)

    def _dense_layers(self, hidden: int) -> tuple[Linear, ...]:
        activation = self.made_by.get(hidden)
        if not isinstance(activation, Elementwise) or activation.function != "relu":
            raise _Unlike(f"its dense vector comes from {self._tell(hidden)}, not from a relu")
        layer = self._computed(self._operand(activation), "the dense vector")
        if not isinstance(layer, Linear):
            raise _Unlike(f"its dense arch has {_told(layer)}")
        layers = [layer]
        while (before := self._layer_before(layers[0])) is not None:
            layers.insert(0, before)
        self._check_layers(layers)
        if self._lone(layers[0].source) not in self.program.dense.values():
            raise _Unlike(f"its dense arch takes {self._tell(int(self._origins_of(layers[0].source).values.flat[0]))}")
        return tuple(layers)

    def _layer_before(self, layer: Linear) -> Linear | None:
        """The layer whose relu a layer takes; None where it takes anything else."""
        activation = self.made_by.get(self._lone(layer.source) or 0)
        if not isinstance(activation, Elementwise) or activation.function != "relu":
            return None
        before = self.made_by.get(self._lone(self._operand(activation)) or 0)
        return before if isinstance(before, Linear) else None

    def _vectors(self, matmul: MatMul) -> tuple[int, list[int], dict[int, tuple[Lookup, int]]]:
        """(the dense vector's value, the feature of each vector and -1 of the dense one, feature -> lookup and
        place)."""
        if not isinstance(matmul.left, int) or not isinstance(matmul.right, int):
            raise _Unlike("it multiplies by a constant matrix")
        left, right = self._origins_of(matmul.left), self._origins_of(matmul.right)
        if not (np.array_equal(left.values.T, right.values) and np.array_equal(left.places.T, right.places)):
            raise _Unlike("it multiplies other vectors than those by themselves")
        hidden, features, tables = None, [], {}
        for values, places in zip(left.values, left.places, strict=True):
            step = self.made_by.get(int(values[0]))
            if not (values == values[0]).all() or not np.array_equal(places, places[0] + np.arange(len(places))):
                raise _Unlike("its dot products mix parts of vectors")
            if isinstance(step, Lookup):
                position, offset = 0, 0
                while offset < places[0]:
                    offset, position = offset + step.tables[position].dim, position + 1
                if offset != places[0] or step.tables[position].dim != len(places):
                    raise _Unlike("its dot products take parts of embedding vectors")
                feature = step.features[position]
                if feature in tables:
                    raise _Unlike("it multiplies one feature's vector twice")
                _check_lookup(step)
                tables[feature] = step, position
                features.append(feature)
            elif hidden is None and places[0] == 0 and (len(places),) == self.program.shapes[int(values[0])]:
                hidden = int(values[0])
                features.append(-1)
            else:
                raise _Unlike(f"its dot products take {self._tell(int(values[0]))}")
        if hidden is None:
            raise _Unlike("its dot products take no dense vector")
        if sorted(tables) != list(range(sum(self.program.groups.values()))):
            raise _Unlike("some feature's vector takes no part in the dot products")
        return hidden, features, tables

    def _moved(self, layer: Linear, joined: Origins, hidden: int, features: list[int]) -> NDArray[np.float32]:
        """A layer's weight for columns in the order in which the fused engine computes them."""
        vectors, width = len(features), int(self.program.shapes[hidden][-1])
        upper, right = np.triu_indices(vectors, k=1)
        column = np.full((vectors, vectors), -1)
        column[upper, right] = column[right, upper] = width + np.arange(len(upper))
        place = np.array([0 if feature < 0 else feature + 1 for feature in features])
        moved = np.zeros((len(layer.weight), width + len(upper)), np.float32)
        for number, (value, at) in enumerate(zip(joined.values.ravel(), joined.places.ravel(), strict=True)):
            if value == hidden:
                to = int(at)
            else:
                one, other = divmod(int(at), vectors)
                to = int(column[place[one], place[other]])
            if to < 0:
                raise _Unlike("its over arch takes a vector's product with itself")
            moved[:, to] += layer.weight[:, number]
        return moved

    def _computed(self, number: int, what: str) -> Step:
        """The step that computes a value, behind those that move it. Raises where it is put together of several."""
        lone = self._lone(number)
        step = None if lone is None else self.made_by.get(lone)
        if step is None:
            raise _Unlike(
                f"{what}: {self._tell(int(self._origins_of(number).values.flat[0]))} is put together with others"
            )
        return step

    def _operand(self, step: Elementwise) -> int:
        (operand,) = step.operands
        if not isinstance(operand, int):
            raise _Unlike(f"it applies {step.function} to a constant")
        return operand

    def _lone(self, number: int) -> int | None:
        """The value that another is, whole and in its own order; None where it is no one's, or a part of one."""
        origins = self._origins_of(number)
        lone = origins.lone()
        return lone if lone is not None and self._size(lone) == origins.values.size else None

    def _size(self, number: int) -> int:
        return int(np.prod(self.program.shapes[number], dtype=np.int64))

    def _check_layers(self, layers: list[Linear]) -> None:
        """Raises where a layer runs over several vectors of a row."""
        for layer in layers:
            if self.program.shapes[layer.source] != (layer.weight.shape[1],):
                raise _Unlike("a linear layer runs over several vectors of a row")

    def _origins_of(self, number: int) -> Origins:
        return self.trace.of(number)

    def _tell(self, number: int) -> str:
        step = self.made_by.get(number)
        return "the dense columns" if step is None else _told(step)


def _check_lookup(lookup: Lookup) -> None:
    if not lookup.ids.is_plain:
        does = lookup.ids
        while does.function.startswith("to_"):
            does = does.arguments[0]
        raise _Unlike(f"it does something to its ids before it looks them up ({does.function})")
    if lookup.weights is not None:
        raise _Unlike("its bags are weighted")


def _told(step: Step) -> str:
    """A step, for an error."""
    if isinstance(step, Elementwise):
        return f"an elementwise {step.function}"
    return {
        "MatMul": "matrix products",
        "LayerNorm": "a layer norm",
        "Linear": "a linear layer",
        "Lookup": "a lookup",
        "Reduce": "a sum or mean",
        "Softmax": "a softmax",
    }.get(type(step).__name__, type(step).__name__)
