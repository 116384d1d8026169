"""What a reader knows of a tensor in a recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from narsil.program.steps import IdExpression, Table

__all__ = [
    "Chosen",
    "Column",
    "Counted",
    "Fixed",
    "Known",
    "Opaque",
    "PerId",
    "Structure",
    "Turned",
    "Unread",
    "Vectors",
]


class Unread(Exception):
    """An operation, or a way to use it, that a reader does not know: its message says which and why."""


@dataclass(frozen=True)
class Column:
    """(B, *shape): a value of the program. The first ``folded`` axes of the shape lie within the tensor's first axis,
    as ``view(-1, dim)`` leaves them."""

    number: int
    shape: tuple[int, ...]
    folded: int = 0


@dataclass(frozen=True)
class Turned:
    """A value of the program, (B, *lead, pre, post, *trail), in a tensor (*lead, pre * B * post, *trail): ``at`` is how
    many axes lie before the rows'."""

    number: int
    shape: tuple[int, ...]
    at: int


@dataclass(frozen=True, eq=False)
class Fixed:
    """The same tensor whatever the rows."""

    tensor: Tensor


@dataclass(frozen=True, eq=False)
class PerId:
    """A number for each of some ids. ``positions``: where in the group's ids each stands, in either recording."""

    group: str
    expression: IdExpression
    positions: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Chosen:
    """A number for each of those ids for which a condition is true, in their order."""

    of: PerId  # what it is, would it be of all ids
    condition: IdExpression


@dataclass(frozen=True)
class Structure:
    """Lengths, offsets and sums of them, made of the request's lengths by nothing that looks at their values.
    ``places``: where in the group's lengths each number stands, in either recording; None where they are no lengths."""

    group: str
    places: tuple[Tensor, Tensor] | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Vectors:
    """A table's vector for each of some ids, (N, dim). ``positions``: as PerId's."""

    group: str
    tables: Mapping[int, Table]  # by feature of the request
    ids: IdExpression
    positions: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Counted:
    """0, 1, 2, ..., one for each of some ids."""


@dataclass(frozen=True)
class Opaque:
    """Nothing but why it is not known."""

    reason: str


Known = Column | Turned | Fixed | PerId | Chosen | Vectors | Counted | Structure | Opaque
