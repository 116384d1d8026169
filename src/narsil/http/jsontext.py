"""JSON from strangers. What it costs is bounded whatever it says, and no number is read as another one.

Python's own parser turns a body of millions of numbers into millions of objects in one call that keeps the GIL, so that
every lane waits for it. Here an array of numbers stays text until somebody knows its datatype, and is then read in
slices, between which other threads run. What stands around the arrays is parsed as usual, within bounds.

Receives a body, produces dicts, lists, strings, numbers and ``Numbers``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from narsil.errors import InvalidRequest

__all__ = ["Numbers", "as_list", "parse"]

MOST_DEPTH = 16
MOST_VALUES = 20_000  # outside of arrays of numbers
_SLICE = 1 << 16  # characters of numbers that are read at a time: some hundred microseconds
_PIECE = 1 << 18  # that are looked at at a time
_MOST_DIMENSIONS = 8

_SPACE = re.compile(r"[ \t\r\n]*")
_FLAT = re.compile(r"[-+.0-9eE, \t\r\nnul]*")  # with null, which is a number that is missing
_NESTED = re.compile(r"[-+.0-9eE, \t\r\nnul\[\]]*")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


@dataclass(frozen=True, slots=True)
class Numbers:
    """An array of numbers, or of such arrays, not yet read."""

    text: str  # of the whole body
    start: int  # of its bracket
    stop: int

    def array(self, kind: type[np.int64 | np.float64], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The numbers, flat; a null is NaN. Raises InvalidRequest where one is none of the kind, or the arrays are
        nested otherwise than the shape says; whether they are as many as it says is not looked at."""
        inner = self.text[self.start + 1 : self.stop - 1]
        if "[" in inner:
            _check_nesting(self.text[self.start : self.stop], name, shape)
            inner = inner.replace("[", " ").replace("]", " ")
            if not inner.strip(" \t\r\n,"):  # [[], []]; _check_nesting has counted the commas
                return np.empty(0, kind)
        if not inner.strip(" \t\r\n"):
            return np.empty(0, kind)
        parts, at = [], 0
        while True:
            stop = len(inner) if at + _SLICE >= len(inner) else inner.rfind(",", at, at + _SLICE)
            if stop < at:
                raise InvalidRequest(f"{name}: a number of its data has more than {_SLICE} characters")
            parts.append(_read(inner[at:stop], kind, name))
            if stop == len(inner):
                return np.concatenate(parts) if len(parts) > 1 else parts[0]
            at = stop + 1

    def sizes(self, name: str) -> tuple[int, ...]:
        """The numbers of a shape. Raises InvalidRequest."""
        if self.stop - self.start > 32 * _MOST_DIMENSIONS:
            raise InvalidRequest(f"{name} has more than {_MOST_DIMENSIONS} dimensions")
        found = self.array(np.int64, name, (-1,))
        if len(found) > _MOST_DIMENSIONS:
            raise InvalidRequest(f"{name} has more than {_MOST_DIMENSIONS} dimensions")
        return tuple(int(size) for size in found)


def as_list(value: Any) -> Any:
    """A value as it is, but for an empty array, which is no array of numbers to whoever wants a list."""
    if isinstance(value, Numbers) and not value.text[value.start + 1 : value.stop - 1].strip(" \t\r\n"):
        return []
    return value


def parse(body: bytes, what: str = "the body") -> Any:
    """The one value in a body. Raises InvalidRequest where it is no JSON, doubles a key, or is more than the bounds."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{what} is no JSON: at byte {error.start} it is not UTF-8") from None
    reader = _Reader(text, what)
    value, at = reader.value(reader.space(0), 0)
    if reader.space(at) != len(text):
        reader.fail(at, "something comes after the value")
    return value


class _Reader:
    def __init__(self, text: str, what: str) -> None:
        self._text = text
        self._what = what
        self._left = MOST_VALUES
        self._looks = 4 * len(text) + 1024  # characters that may be looked at for nested arrays' ends

    def fail(self, at: int, why: str) -> NoReturn:
        raise InvalidRequest(f"{self._what} is no JSON that is read here: at character {at}: {why}")

    def space(self, at: int) -> int:
        """Where the next word begins."""
        match = _SPACE.match(self._text, at)
        return at if match is None else match.end()

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        """The value that begins here, and where it ends."""
        self._left -= 1
        if self._left < 0:
            self.fail(at, f"more than {MOST_VALUES} values outside of arrays of numbers")
        if depth > MOST_DEPTH:
            self.fail(at, f"nested more than {MOST_DEPTH} deep")
        first = self._text[at : at + 1]
        if first == "{":
            return self._object(at + 1, depth)
        if first == "[":
            stop = self._end_of_numbers(at)
            return self._array(at + 1, depth) if stop is None else (Numbers(self._text, at, stop), stop)
        try:
            return _DECODER.raw_decode(self._text, at)
        except json.JSONDecodeError as error:
            self.fail(error.pos, error.msg[:80])
        except ValueError as error:  # a constant, or an integer of thousands of digits
            self.fail(at, str(error)[:80])

    def _object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        text, found = self._text, dict[str, Any]()
        at = self.space(at)
        if text[at : at + 1] == "}":
            return found, at + 1
        while True:
            if text[at : at + 1] != '"':
                self.fail(at, "a key in double quotes is expected")
            key, at = self.value(at, depth)
            if key in found:
                self.fail(at, f"the key {key[:80]!r} comes twice")
            at = self.space(at)
            if text[at : at + 1] != ":":
                self.fail(at, "a colon is expected")
            found[key], at = self.value(self.space(at + 1), depth + 1)
            at = self.space(at)
            if text[at : at + 1] == "}":
                return found, at + 1
            if text[at : at + 1] != ",":
                self.fail(at, "a comma or } is expected")
            at = self.space(at + 1)

    def _array(self, at: int, depth: int) -> tuple[list[Any], int]:
        text, found = self._text, []
        while True:
            value, at = self.value(self.space(at), depth + 1)
            found.append(value)
            at = self.space(at)
            if text[at : at + 1] == "]":
                return found, at + 1
            if text[at : at + 1] != ",":
                self.fail(at, "a comma or ] is expected")
            at += 1

    def _end_of_numbers(self, at: int) -> int | None:
        """Where the array that begins here ends, if it holds nothing but numbers and such arrays."""
        text = self._text
        end = _run(_FLAT, text, at + 1)
        following = text[end : end + 1]
        if following == "]":
            return end + 1
        if following != "[":
            return None
        stop = _run(_NESTED, text, at)
        self._looks -= stop - at
        if self._looks < 0:
            self.fail(at, "too many arrays of numbers are nested in arrays of other things")
        depths = _depths(text[at:stop])
        ends = np.flatnonzero(depths == 0)[:1]
        if bool((depths[: int(ends[0]) if len(ends) else None] > _MOST_DIMENSIONS).any()):
            self.fail(at, f"arrays of numbers are nested more than {_MOST_DIMENSIONS} deep")
        return at + int(ends[0]) + 1 if len(ends) else None


def _run(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a run of the pattern's characters that begins here ends. In pieces, between which other threads run."""
    while True:
        match = pattern.match(text, at, at + _PIECE)
        stop = at if match is None else match.end()
        if stop < at + _PIECE:
            return stop
        at = stop


def _depths(text: str) -> NDArray[np.int8]:
    """How many arrays are open after each character. Beyond 127 it wraps: deeper than any shape it has been by then."""
    letters = np.frombuffer(text.encode("ascii"), np.uint8)
    steps = (letters == ord("[")).view(np.int8) - (letters == ord("]")).view(np.int8)
    return np.cumsum(steps, dtype=np.int8)


def _check_nesting(text: str, name: str, shape: tuple[int, ...]) -> None:
    """Raises InvalidRequest unless arrays lie in each other as the shape says."""
    depths = _depths(text)
    letters = np.frombuffer(text.encode("ascii"), np.uint8)
    commas, closes = letters == ord(","), letters == ord("]")
    right = int(depths.max()) == len(shape) <= _MOST_DIMENSIONS and int(depths.min()) == 0
    for level, size in enumerate(shape, 1) if right else ():
        # Up to the end of the k-th array of a level there are k times as many commas as one of its arrays has.
        ends = np.flatnonzero(closes & (depths == level - 1))
        counted = np.searchsorted(np.flatnonzero(commas & (depths == level)), ends)
        right = right and bool((counted == np.arange(1, len(ends) + 1) * max(size - 1, 0)).all())
    if not right:
        raise InvalidRequest(
            f"{name}: its data is nested otherwise than the shape {list(shape)[:8]} says; send it flat"
        )


def _read(text: str, kind: type[np.int64 | np.float64], name: str) -> NDArray[Any]:
    try:
        values = json.loads(f"[{text}]", parse_constant=_no_constant)
        found = np.array(values, np.float64) if kind is np.float64 else np.array(values)
    except OverflowError:
        raise InvalidRequest(f"{name}: a number of its data is beyond FP64") from None
    except ValueError as error:  # a JSONDecodeError is one
        raise InvalidRequest(f"{name}: its data is no array of numbers: {str(error)[:80]}") from None
    if not len(found):
        raise InvalidRequest(f"{name}: its data is no array of numbers: a number is missing before or after a comma")
    if kind is np.int64 and found.dtype != np.int64:
        wrong = next((value for value in values if not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63), "")
        raise InvalidRequest(f"{name}: {'null' if wrong is None else str(wrong)[:40]} is no INT64")
    return found
