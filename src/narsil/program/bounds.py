"""Which ids a request may hold, so that whatever the model does to them leads inside its tables.

What an expression can be is followed as a range, from what the ids can be. Whole numbers wrap around: what leaves its
kind's range can be anything in it. Floats round: what they do not hold exactly is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from narsil.program.steps import IdExpression

__all__ = ["id_limit"]

Range = tuple[float, float]  # least and most, both included

_WHOLE: Range = (-(2**63), 2**63 - 1)  # in which whole numbers are computed
_EXACT = {"to_float32": 2**24, "to_float64": 2**53, "to_float16": 2**11, "to_bfloat16": 2**8}  # all that they hold


def id_limit(expression: IdExpression, rows: int, most: int) -> int:
    """The largest R of at most ``most`` so that ids 0 .. R - 1 become 0 .. rows - 1.

    ``most`` is 2^31 where ids are int32, and 2^63 - 1 where they are int64. 0 where there is no such R, or where what
    is done to the ids is not known well enough.
    """
    if expression.function == "ids":
        return min(rows, most)

    def fits(limit: int) -> bool:
        found = _Ranges((0, limit - 1)).of(expression)
        return found is not None and found[0] >= 0 and found[1] <= rows - 1

    if not fits(1):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Ranges:
    def __init__(self, ids: Range) -> None:
        self.ids = ids

    def of(self, expression: Any) -> Range | None:
        """What an expression can be; None where that is not known."""
        if isinstance(expression, int | float) and abs(expression) < math.inf:
            return expression, expression
        if not isinstance(expression, IdExpression) or expression.function == "ids":
            return self.ids if isinstance(expression, IdExpression) else None
        if expression.function == "clamp":
            return self._clamped(*expression.arguments)
        arguments = [self.of(argument) for argument in expression.arguments]
        function = _FUNCTIONS.get(expression.function)
        if function is None or any(argument is None for argument in arguments):
            return None
        found: Range | None = function(*arguments)
        if found is None or not all(isinstance(end, int) for end in found):
            return found
        return found if _lies_in(found, _WHOLE) else _WHOLE

    def _clamped(self, expression: Any, least: Any = None, most: Any = None) -> Range | None:
        found = self.of(expression)
        if found is None:
            return None
        low, high = found
        if least is not None:
            low, high = max(low, least), max(high, least)
        return (low, high) if most is None else (min(low, most), min(high, most))


def _lies_in(found: Range, kind: Range) -> bool:
    return kind[0] <= found[0] and found[1] <= kind[1]


def _in_32_bits(x: Range) -> Range | None:
    kind = (-(2**31), 2**31 - 1)
    return x if _lies_in(x, kind) else kind


def _rounded(kind: str) -> Callable[[Range], Range | None]:
    """Of the floats of a kind: whole numbers that it holds exactly, and any others of its own."""

    def rounded(x: Range) -> Range | None:
        return x if max(map(abs, x)) <= _EXACT[kind] else None

    return rounded


def _multiplied(x: Range, y: Range) -> Range:
    products = [a * b for a in x for b in y]
    return min(products), max(products)


def _remainder(x: Range, y: Range) -> Range | None:
    """As torch has it: the sign of the divisor."""
    low, high = y
    if low != high or low <= 0:
        return None
    return x if x[0] >= 0 and x[1] < low else (0, low - 1)


def _truth(*arguments: Range) -> Range:
    return (0, 1)


_FUNCTIONS: dict[str, Callable[..., Range | None]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _multiplied,
    "remainder": _remainder,
    "maximum": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "minimum": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "where": lambda condition, x, y: (min(x[0], y[0]), max(x[1], y[1])),
    "relu": lambda x: (max(x[0], 0), max(x[1], 0)),
    "to_int32": _in_32_bits,
    "to_integer": lambda x: (math.trunc(x[0]), math.trunc(x[1])),
    **{kind: _rounded(kind) for kind in _EXACT},
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne", "to_bool", "not", "and", "or"), _truth),
}
