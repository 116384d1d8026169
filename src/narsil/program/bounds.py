"""Which ids a request may hold, negative ones too, so that whatever the model does to them leads inside its tables.

What an expression can be is followed as a range, from what the ids can be. Whole numbers wrap around: what leaves its
kind's range can be anything in it. Floats round: what they do not hold exactly is not known. Of ``where``, each side is
looked at under its condition. What is taken out of an array is one of the numbers that can be reached in it; a place
beyond it is not known, since a model fails there.

Every range grows with the ids' range, which the search for the limit relies on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from narsil.program.steps import IdArray, IdExpression

__all__ = ["id_least", "id_limit"]

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
    if not _fits(expression, (0, 0), rows):
        return 0
    return _farthest(1, most, lambda limit: _fits(expression, (0, limit - 1), rows))


def id_least(expression: IdExpression, rows: int, limit: int, least: int) -> int:
    """The most negative L, of at least ``least``, so that ids L .. limit - 1 become 0 .. rows - 1. ``limit`` is at most
    what id_limit gives, and at least 1; ``least`` is -2^31 where ids are int32, and -2^63 where they are int64."""
    if expression.function == "ids":
        return 0
    return -_farthest(0, -least, lambda below: _fits(expression, (-below, limit - 1), rows))


def _farthest(near: int, far: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to which all fit; ``near`` does."""
    while near < far:
        middle = (near + far + 1) // 2
        near, far = (middle, far) if fits(middle) else (near, middle - 1)
    return near


def _fits(expression: IdExpression, ids: Range, rows: int) -> bool:
    """Whether all of these ids become 0 .. rows - 1."""
    found = _Ranges(ids).of(expression)
    return found is not None and found[0] >= 0 and found[1] <= rows - 1


class _Ranges:
    def __init__(self, ids: Range, told: Mapping[IdExpression, Range] | None = None) -> None:
        """``told``: what conditions say of expressions."""
        self.ids = ids
        self.told = told or {}

    def of(self, expression: Any) -> Range | None:
        """What an expression can be; None where that is not known."""
        found = self._of(expression)
        if found is None or not isinstance(expression, IdExpression) or expression not in self.told:
            return found
        low, high = self.told[expression]
        return max(found[0], low), min(found[1], high)

    def _of(self, expression: Any) -> Range | None:  # noqa: PLR0911 - one return for each kind
        if isinstance(expression, int | float) and abs(expression) < math.inf:
            return expression, expression
        if not isinstance(expression, IdExpression) or expression.function == "ids":
            return self.ids if isinstance(expression, IdExpression) else None
        if expression.function == "clamp":
            return self._clamped(*expression.arguments)
        if expression.function in ("take", "search", "search_right"):
            return self._in_array(expression.function, *expression.arguments)
        if expression.function == "where":
            return self._chosen(*expression.arguments)
        if expression.function == "mul" and (masked := _masked(*expression.arguments)):
            return self._chosen(*masked)
        arguments = [self.of(argument) for argument in expression.arguments]
        function = _FUNCTIONS.get(expression.function)
        if function is None or any(argument is None for argument in arguments):
            return None
        found: Range | None = function(*arguments)
        if found is None or not all(isinstance(end, int) for end in found):
            return found
        return found if _lies_in(found, _WHOLE) else _WHOLE

    def _in_array(self, function: str, array: IdArray, expression: Any) -> Range | None:
        found = self.of(expression)
        if found is None or not all(isinstance(end, int) for end in found):
            return None
        low, high = int(found[0]), int(found[1])
        if function != "take":
            side: Any = "right" if function == "search_right" else "left"
            return tuple(int(place) for place in np.searchsorted(array.values, [low, high], side=side))  # type: ignore[return-value]
        return array.range(low, high) if 0 <= low <= high < len(array.values) else None

    def _chosen(self, condition: Any, yes: Any, no: Any) -> Range | None:
        """Either side, where its condition can be true at all."""
        if self.of(condition) is None:
            return None
        found = []
        for side, truth in ((yes, True), (no, False)):
            told, said = dict(self.told), _told(condition, truth)
            for expression, (low, high) in said:
                before = told.get(expression, _WHOLE)
                told[expression] = max(low, before[0]), min(high, before[1])
            under = _Ranges(self.ids, told)
            ranges = [under.of(expression) for expression, _ in said]
            if any(each is not None and each[0] > each[1] for each in ranges):
                continue
            found.append(under.of(side))
        if any(each is None for each in found):
            return None
        ends = [each for each in found if each is not None]
        return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None

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


def _fmod(x: Range, y: Range) -> Range | None:
    """As C has it: the sign of what is divided."""
    low, high = y
    if low != high or low <= 0:
        return None
    return max(x[0], 1 - low) if x[0] < 0 else 0, min(x[1], low - 1) if x[1] > 0 else 0


def _divided(x: Range, y: Range) -> Range | None:
    low, high = y
    return None if low != high or low <= 0 else (x[0] // low, x[1] // low)


def _truncated(x: Range, y: Range) -> Range | None:
    low, high = y
    if low != high or low <= 0:
        return None
    ends = [abs(int(end)) // int(low) * (-1 if end < 0 else 1) for end in x]
    return ends[0], ends[1]


def _anded(x: Range, y: Range) -> Range:
    never_negative = [side[1] for side in (x, y) if side[0] >= 0]
    return (0, min(never_negative)) if never_negative else _WHOLE


def _ored(x: Range, y: Range) -> Range:
    """Of or, and of exclusive or: no bit beyond the highest of either."""
    return (0, (1 << int(max(x[1], y[1])).bit_length()) - 1) if x[0] >= 0 and y[0] >= 0 else _WHOLE


def _shifted(x: Range, y: Range, left: bool) -> Range | None:
    by, high = y
    if by != high or not 0 <= by < 64:
        return None
    return (int(x[0]) << int(by), int(x[1]) << int(by)) if left else (int(x[0]) >> int(by), int(x[1]) >> int(by))


def _absolute(x: Range) -> Range:
    ends = [abs(x[0]), abs(x[1])]
    return (0 if x[0] < 0 < x[1] else min(ends)), max(ends)


def _masked(x: Any, y: Any) -> tuple[Any, Any, Any] | None:
    """A product with a truth value, as a choice."""
    for condition, other in ((y, x), (x, y)):
        if isinstance(condition, IdExpression) and condition.function in _TRUTHS:
            return condition, other, 0
    return None


def _told(condition: Any, truth: bool) -> list[tuple[IdExpression, Range]]:
    """What is known of expressions where a condition is true, or false."""
    if not isinstance(condition, IdExpression):
        return []
    arguments = condition.arguments
    if condition.function == "not":
        return _told(arguments[0], not truth)
    if condition.function == ("and" if truth else "or"):
        return [told for argument in arguments for told in _told(argument, truth)]
    if condition.function not in _OPPOSITE:
        return []
    (left, right), function = arguments, condition.function
    if not isinstance(left, IdExpression):
        left, right, function = right, left, _TURNED[function]
    if not isinstance(left, IdExpression) or not isinstance(right, int):
        return []
    function = function if truth else _OPPOSITE[function]
    least, most = _WHOLE
    limits = {"lt": (least, right - 1), "le": (least, right), "gt": (right + 1, most), "ge": (right, most)}
    return [(left, limits.get(function, (right, right) if function == "eq" else _WHOLE))]


def _truth(*arguments: Range) -> Range:
    return (0, 1)


_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_TURNED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
_TRUTHS = (*_OPPOSITE, "to_bool", "not", "and", "or")
_FUNCTIONS: dict[str, Callable[..., Range | None]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _multiplied,
    "remainder": _remainder,
    "maximum": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "minimum": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "neg": lambda x: (-x[1], -x[0]),
    "abs": _absolute,
    "fmod": _fmod,
    "floor_divide": _divided,
    "truncated_divide": _truncated,
    "bit_and": _anded,
    "bit_or": _ored,
    "bit_xor": _ored,
    "several": lambda *known: _WHOLE,
    "zero_collision_hash": lambda *known: (known[-2][0], known[-1][0]),
    "bit_not": lambda x: (-1 - x[1], -1 - x[0]),
    "shift_left": lambda x, y: _shifted(x, y, True),
    "shift_right": lambda x, y: _shifted(x, y, False),
    "relu": lambda x: (max(x[0], 0), max(x[1], 0)),
    "to_int32": _in_32_bits,
    "to_integer": lambda x: (math.trunc(x[0]), math.trunc(x[1])),
    **{kind: _rounded(kind) for kind in _EXACT},
    **dict.fromkeys(_TRUTHS, _truth),
}
