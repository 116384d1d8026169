"""JSON from strangers is read as Python's parser reads it, or refused; and its numbers in slices."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.errors import InvalidRequest
from narsil.http import jsontext
from narsil.http.jsontext import Numbers, as_list, parse

finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | finite | st.text()
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


def plain(value: Any) -> Any:
    """A parsed value with its arrays of numbers as lists."""
    if isinstance(value, Numbers):
        return json.loads(value.text[value.start : value.stop])
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


@given(documents, st.sampled_from([None, 1]), st.booleans())
def test_whatever_is_json_is_read_as_it_is(document, indent, ascii_only):
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    try:
        body = text.encode()
    except UnicodeEncodeError:  # half a pair, which UTF-8 has not
        return
    try:
        found = parse(body)
    except InvalidRequest as error:
        assert "deep" in str(error)  # noqa: PT017 - the only bound that so little can reach
        return
    assert plain(found) == document


@given(st.text(alphabet='[]{},:"0123456789.eE+- \n\\unltrfaseNI', max_size=60))
def test_whatever_is_none_is_refused_and_nothing_else_is_raised(text):
    try:
        wanted = json.loads(text, parse_constant=lambda name: math.nan)
    except ValueError:
        wanted = ...
    try:
        found = parse(text.encode())
        if isinstance(found, Numbers):
            found.array(np.float64, "x", found_shape(plain_or_none(found)))
            found = plain(found)
    except (InvalidRequest, json.JSONDecodeError):
        return
    if not has_late_numbers(found):
        assert wanted is not ...


def plain_or_none(value: Numbers) -> Any:
    return json.loads(value.text[value.start : value.stop])


def found_shape(value: Any) -> tuple[int, ...]:
    return tuple(np.shape(np.array(value, dtype=object)))


def has_late_numbers(value: Any) -> bool:
    """Whether it holds an array whose text nobody has read yet."""
    if isinstance(value, Numbers):
        return True
    if isinstance(value, list):
        return any(has_late_numbers(each) for each in value)
    return isinstance(value, dict) and any(has_late_numbers(each) for each in value.values())


@pytest.mark.parametrize("sliced", [1 << 16, 8, 3])
@given(values=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=50))
def test_integers_are_exact_however_they_are_sliced(sliced, values):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jsontext, "_SLICE", max(sliced, 22))
        found = parse(json.dumps(values).encode()).array(np.int64, "ids", (len(values),))
    assert found.dtype == np.int64
    assert found.tolist() == values


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_nested_arrays_are_flat_in_the_order_of_their_shape(first, second, third):
    values = np.arange(first * second * third, dtype=np.float64).reshape(first, second, third)
    found = parse(json.dumps(values.tolist()).encode())
    assert found.array(np.float64, "x", values.shape).tolist() == values.reshape(-1).tolist()
    wrong = (second, first, third) if first != second else (first, second, third + 1)
    with pytest.raises(InvalidRequest, match="nested otherwise than the shape"):
        found.array(np.float64, "x", wrong)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("[1, 2,, 3]", np.int64, "no array of numbers"),
        ("[1, 2, ]", np.int64, "no array of numbers"),
        ("[, 1]", np.int64, "no array of numbers"),
        ("[[1][2]]", np.int64, "nested otherwise"),
        ("[[1, 2], [3]]", np.int64, "nested otherwise"),
        ("[[1, 2], 3, [4]]", np.int64, "nested otherwise"),
        ("[[[[[[[[[1]]]]]]]]]", np.int64, "nested more than 8 deep"),
        ("[1 2]", np.int64, "no array of numbers"),
        ("[1e]", np.float64, "no array of numbers"),
        ("[01]", np.float64, "no array of numbers"),
        ("[+1]", np.float64, "no array of numbers"),
        ("[.5]", np.float64, "no array of numbers"),
        ("[1, null]", np.int64, "x: null is no INT64"),
        ("[1, nul]", np.float64, "no array of numbers"),
        ("[1.0]", np.int64, "x: 1.0 is no INT64"),
        ("[1, 1e2]", np.int64, "x: 100.0 is no INT64"),
        ("[18446744073709551615]", np.int64, "x: 18446744073709551615 is no INT64"),
        ("[-9223372036854775809]", np.int64, "x: -9223372036854775809 is no INT64"),
        (f"[{'9' * 400}]", np.float64, "beyond FP64"),
        (f"[{'9' * 5000}]", np.float64, "no array of numbers"),
    ],
)
def test_what_is_no_array_of_such_numbers_is_refused(text, kind, says):
    with pytest.raises(InvalidRequest, match=says):
        parse(text.encode()).array(kind, "x", (2, 2))


@pytest.mark.parametrize("kind", [np.int64, np.float64])
@pytest.mark.parametrize("text", ["[1, 2,, 3]", "[1, 2, 3,]", "[1, 2,  , 3]"])
def test_a_slice_that_ends_at_a_stray_comma_hides_nothing(text, kind, monkeypatch):
    for size in range(2, 8):
        monkeypatch.setattr(jsontext, "_SLICE", size)
        with pytest.raises(InvalidRequest):
            parse(text.encode()).array(kind, "x", (3,))


def test_one_number_that_fills_a_slice_is_refused(monkeypatch):
    monkeypatch.setattr(jsontext, "_SLICE", 8)
    with pytest.raises(InvalidRequest, match="has more than 8 characters"):
        parse(b"[1, 1000000000, 2]").array(np.int64, "x", (3,))


def test_a_null_is_a_number_that_is_missing():
    found = parse(b"[[1.5, null], [null, -2]]").array(np.float64, "x", (2, 2))
    assert found.tolist() == pytest.approx([1.5, math.nan, math.nan, -2], nan_ok=True)


def test_an_empty_array_is_one_of_numbers_and_a_list_to_whoever_wants_one():
    found = parse(b"[ ]")
    assert as_list(found) == []
    assert found.array(np.int64, "x", (0,)).tolist() == []
    assert parse(b"[[], []]").array(np.int64, "x", (2, 0)).tolist() == []


@pytest.mark.parametrize("inner", [b"[[1]],", b"[1],", b"[[[1],[2]]],"])
def test_looking_for_the_ends_of_nested_arrays_is_bounded(inner, monkeypatch):
    looked = 0
    original = jsontext._run

    def counting(pattern, text, at):
        nonlocal looked
        stop = original(pattern, text, at)
        looked += stop - at
        return stop

    monkeypatch.setattr(jsontext, "_run", counting)
    body = b"[" + inner * 3000 + b'"x"]'
    try:
        parse(body)
    except InvalidRequest as error:
        assert "too many arrays of numbers" in str(error)  # noqa: PT017
    assert looked < 10 * len(body)
