"""Operations that no reader knows: kept as they were recorded, once they are found to treat each row by itself.

Receives an Op over columns and constants; produces Replayed steps, or refuses. Whether rows are independent is tried,
not known by heart: the operation runs in float64 over drawn rows, in several numbers of them, and each row must come
out the same among others, in another order, in a pair and alone. A number among its arguments that rows could be cut
or moved by is reached by as many rows. Sizes that follow from the rows must be multiples of their number.

What reads its own numbers' places out of a request, draws by chance, writes in place or takes numbers out of tensors is
refused unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.program.recording import Constant, Op, Ref, Varying
from narsil.program.steps import Bags, Step
from narsil.program.values import Unread

__all__ = ["PerRow", "Replayed", "Source", "check_rows", "plain_arguments", "refuse_unseen", "run_op"]

_COUNTS = (1, 2, 3, 7, 12)  # rows that are tried
_MOST = 2048  # rows that are drawn to reach a number
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
_UNDEFINED = ("empty", "rand", "bernoulli", "dropout", "multinomial", "normal_")  # in names of what gives other numbers
# What takes whole numbers, or truth values, of a row and finds what they stand for in that row or in a constant.
_OF_WHOLE = frozenset(
    f"aten.{name}"
    for name in (
        *("gather", "scatter", "scatter_add", "embedding", "index", "any", "all", "count_nonzero", "sum", "cumsum"),
        *("argmax", "argmin", "amax", "amin", "max", "min", "sort", "topk", "prod"),
    )
)
_IN_PLACE = ("aten.scatter_", "aten.scatter_add_")  # of which the result counts
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Source:
    """A value of the program among an operation's arguments, as the recording has it."""

    number: int
    shape: tuple[int, ...]
    folded: int
    kind: torch.dtype


@dataclass(frozen=True)
class PerRow:
    """A size: so many times the number of rows."""

    times: int


@dataclass(frozen=True, eq=False)
class Replayed(Step):
    """One result of an operation as it was recorded."""

    name: str
    call: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    which: int
    shape: tuple[int, ...]

    def sources(self) -> tuple[Source, ...]:
        """The values among its arguments."""
        return tuple(leaf for leaf in _flat((*self.args, *self.kwargs.values())) if isinstance(leaf, Source))

    def reads(self) -> tuple[int, ...]:
        """See Step.reads."""
        return tuple(source.number for source in self.sources())

    def reference(self, values: Mapping[int, NDArray[Any]], groups: Mapping[str, Bags]) -> NDArray[Any]:
        """See Step.reference; complex where the operation is."""
        rows = len(values[self.reads()[0]])

        def given(source: Source) -> torch.Tensor:
            lead = int(np.prod(source.shape[: source.folded], dtype=np.int64))
            array = np.array(values[source.number]).reshape(rows * lead, *source.shape[source.folded :])
            return torch.from_numpy(array).to(_exact(source.kind))

        made = _result(run_op(self.call, self.args, self.kwargs, given, rows, _exact), self.which)
        made = made if made.is_complex() else made.double()
        array: NDArray[Any] = made.resolve_conj().resolve_neg().numpy().reshape(rows, *self.shape)
        return array


def _exact(kind: torch.dtype) -> torch.dtype:
    """The kind in which the reference computes."""
    if kind.is_complex:
        return torch.complex128
    return torch.float64 if kind.is_floating_point else kind


def run_op(
    call: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Callable[[Source], Any],
    rows: Any,
    kind: Callable[[torch.dtype], torch.dtype] = lambda kind: kind,
) -> Any:
    """The operation's result, its values and its kinds of number replaced; no argument of it is written to."""

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return [filled(item) for item in value]
        if isinstance(value, Source):
            return given(value)
        if isinstance(value, PerRow):
            return value.times * rows
        if isinstance(value, torch.Tensor):
            return value.to(kind(value.dtype))
        return kind(value) if isinstance(value, torch.dtype) else value

    with torch.no_grad():
        return call(*map(filled, args), **{key: filled(value) for key, value in kwargs.items()})


def plain_arguments(op: Op, source: Callable[[Any], Any], rows: tuple[int, int]) -> Any:
    """(args, kwargs) with Source, PerRow and tensors in the place of what was recorded. Raises Unread."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(plain(item) for item in value)
        if isinstance(value, Ref | Constant):
            return source(value)
        if isinstance(value, Varying):
            first, second = value.first, value.second
            whole = type(first) is int and type(second) is int and first > 0 and first % rows[0] == 0
            if not whole or first // rows[0] * rows[1] != second:
                raise Unread("a number that it takes follows from how many rows there are")
            return PerRow(first // rows[0])
        if not isinstance(value, _PLAIN):
            raise Unread(f"it takes a {type(value).__name__}")
        return value

    return plain(op.args), {key: plain(value) for key, value in op.kwargs.items()}


def refuse_unseen(op: Op) -> None:
    """Raises Unread on what no trial can speak for."""
    if not op.name.startswith(("aten.", "prims.")):
        raise Unread("no step for it")
    if "view" in op.name and any(isinstance(value, torch.dtype) for value in (*op.args, *op.kwargs.values())):
        raise Unread("it reads the bits of numbers as others")
    tags = _TAGS if op.name != "aten.index" else _TAGS[:1]  # by places: see check_rows
    if any(map(op.tells, tags)) or any(part in op.name for part in _UNDEFINED):
        raise Unread("no step for it")
    if op.writes() and op.name not in _IN_PLACE:
        raise Unread("no step for it")


def check_rows(op: Op, args: Any, kwargs: Any, recorded: Mapping[int, torch.Tensor], rows: int, per_row: int) -> None:
    """Raises Unread unless each row's result is its own. ``recorded``: number -> the tensor of so many ``rows``;
    ``per_row``: how many entries of the result's first axis belong to a row."""
    sources = {leaf.number: leaf for leaf in _flat((*args, *kwargs.values())) if isinstance(leaf, Source)}
    pointwise = op.tells(torch.Tag.pointwise)
    if (
        not pointwise
        and op.name.removesuffix("_") not in _OF_WHOLE
        and any(not (s.kind.is_floating_point or s.kind.is_complex) for s in sources.values())
    ):
        raise Unread("no step for it, and it takes whole numbers that follow from a request")
    if op.name == "aten.index" and any(source.kind == torch.bool for source in sources.values()):
        raise Unread("no step for it, and how many it takes follows from a request")
    numbers = [abs(leaf) for leaf in _flat((*args, *kwargs.values())) if type(leaf) is int]
    reach = 0 if pointwise else max(numbers, default=0)
    if reach > _MOST:
        raise Unread(f"no step for it, and it takes the number {reach}, which no row that was recorded reaches")
    for count in (*_COUNTS, reach + 3):
        for draw in range(3):
            _try(op, args, kwargs, recorded, rows, per_row, count, draw)


def _try(
    op: Op, args: Any, kwargs: Any, recorded: Mapping[int, torch.Tensor], rows: int, per_row: int, count: int, draw: int
) -> None:
    random = torch.Generator().manual_seed(7 * count + draw)
    drawn = {number: _drawn(tensor, rows, count, draw, random) for number, tensor in recorded.items()}

    def made(order: torch.Tensor) -> list[Any]:
        def given(source: Source) -> torch.Tensor:
            rows_of = drawn[source.number][order]
            return rows_of.reshape(-1, *rows_of.shape[2:]).clone()

        try:
            result = run_op(op.call, args, kwargs, given, len(order), _exact)
        except Exception:  # of whatever an operation says of sizes
            raise Unread(f"no step for it, and it does not run on {len(order)} rows") from None
        found = [_result(result, place) for place, number in enumerate(op.outputs) if number is not None]
        if any(part.dim() < 1 or part.shape[0] != per_row * len(order) for part in found):
            raise Unread("no step for it, and it does not give a result for each row")
        return [part.reshape(len(order), per_row, *part.shape[1:]) for part in found]

    everything = torch.arange(count)
    whole = made(everything)
    pair = torch.randint(0, count, (2,), generator=random)
    for order in (torch.randperm(count, generator=random), pair, pair[:1], torch.tensor([count - 1])):
        for one, other in zip(whole, made(order), strict=True):
            if not torch.allclose(one[order].to(other.dtype), other, rtol=1e-9, atol=1e-12, equal_nan=True):
                raise Unread("no step for it, and what it makes of a row follows from the other rows")


def _drawn(tensor: torch.Tensor, rows: int, count: int, draw: int, random: torch.Generator) -> torch.Tensor:
    """(count, entries of a row, ..) rows like the recorded ones: some of them again, or others of their size."""
    by_row = tensor.detach().reshape(rows, -1, *tensor.shape[1:]).to(_exact(tensor.dtype))
    again = by_row[torch.randint(0, rows, (count,), generator=random)]
    if not again.dtype.is_floating_point or draw == 0:
        return again
    scale = again.nan_to_num(0, 0, 0).abs().mean() + 0.1
    if draw == 1:
        return torch.randn(again.shape, generator=random, dtype=again.dtype) * scale
    return torch.rand(again.shape, generator=random, dtype=again.dtype) * scale


def _result(result: Any, which: int) -> torch.Tensor:
    made: torch.Tensor = result[which] if isinstance(result, tuple | list) else result
    return made


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]
