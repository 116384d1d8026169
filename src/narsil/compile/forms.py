"""What the fused engine is given to run: a DLRM by its own loops, or any program's plan.

Receives a model's parts or its lowered program, and the library; produces, for a choice of each linear layer's kind of
number, the packed layers and a backend that runs them. The planner chooses; a form does not know how good a choice is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.packed import Packed
from narsil.artifacts.plan import Plan
from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.backends.fused import ForwardLibrary, FusedBackend, Geometry, Network
from narsil.backends.plans import PlanBackend, PlanNetwork
from narsil.compile.core import DlrmParts
from narsil.compile.lowering import Lowered
from narsil.compile.packing import HasWeights, pack, pack_logit

__all__ = ["DlrmForm", "Form", "PlanForm", "plan_of"]

Kinds = tuple[str, ...]


class Form(Protocol):
    """A model whose linear layers may be in any kinds of number."""

    @property
    def linears(self) -> Sequence[HasWeights]:
        """The layers whose kind is to be chosen."""

    def layers(self, kinds: Kinds) -> tuple[Packed, ...]:
        """All layers, those in these kinds, each packed once."""

    def backend(self, kinds: Kinds) -> Backend:
        """The model in these kinds."""

    def told(self, kinds: Kinds) -> str:
        """A choice, for people."""


@dataclass
class DlrmForm:
    """A DLRM with dot interaction."""

    library: ForwardLibrary
    geometry: Geometry
    schema: ModelSchema
    parts: DlrmParts
    tables: Any  # (bytes,) uint8
    _packed: dict[tuple[int, str], Packed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.linears = (*self.parts.dense, *self.parts.over[:-1])
        self._logit = pack_logit(self.parts.over[-1])

    def layers(self, kinds: Kinds) -> tuple[Packed, ...]:
        """See Form.layers."""
        for number, kind in enumerate(kinds):
            if (number, kind) not in self._packed:
                first = number in (0, len(self.parts.dense))
                self._packed[number, kind] = pack(self.linears[number], kind, signed=first)
        return (*(self._packed[number, kind] for number, kind in enumerate(kinds)), self._logit)

    def backend(self, kinds: Kinds) -> FusedBackend:
        """See Form.backend."""
        network = Network(self.library, self.geometry, self.layers(kinds), len(self.parts.dense), self.tables)
        return FusedBackend(network, self.schema)

    def told(self, kinds: Kinds) -> str:
        """See Form.told."""
        dense = len(self.parts.dense)
        return f"dense arch {' '.join(kinds[:dense])}, over arch {' '.join((*kinds[dense:], 'fp32'))}"


@dataclass
class PlanForm:
    """A program's plan."""

    library: ForwardLibrary
    schema: ModelSchema
    lowered: Lowered
    tables: NDArray[np.uint8]  # (bytes,)
    _packed: dict[tuple[int, str], Packed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.linears = self.lowered.layers

    def layers(self, kinds: Kinds) -> tuple[Packed, ...]:
        """See Form.layers."""
        for number, kind in enumerate(kinds):
            if (number, kind) not in self._packed:
                layer = self.linears[number]
                self._packed[number, kind] = pack(layer, kind, signed=layer.signed)
        return tuple(self._packed[number, kind] for number, kind in enumerate(kinds))

    def backend(self, kinds: Kinds) -> PlanBackend:
        """See Form.backend."""
        layers = self.layers(kinds)
        plan = plan_of(self.lowered, self.schema, layers)
        return PlanBackend(PlanNetwork(self.library, plan, layers, self.lowered.data, self.tables), self.schema)

    def told(self, kinds: Kinds) -> str:
        """See Form.told."""
        return f"layers {' '.join(kinds) or 'none'}, in a plan of {len(self.lowered.steps)} steps"


def plan_of(lowered: Lowered, schema: ModelSchema, layers: Sequence[Packed]) -> Plan:
    """The plan with these layers."""
    return Plan(
        *(schema.dense_dim, schema.num_features, lowered.arena, lowered.transient, lowered.outputs, lowered.tables),
        *(lowered.streams, lowered.steps, tuple(layer.shape for layer in layers), lowered.arrays),
    )
