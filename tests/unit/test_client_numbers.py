"""What callers hand over arrives as they gave it, or is refused with its place."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.client import Context, build_request
from narsil.client.numbers import floats, whole
from tests.messages import narsil_pb2

GOOD: dict[str, Any] = {"dense": [[0.5], [2.0]], "ids": [[3, 9], [5, 7]]}

context: Any = Context  # of what no type checker would let through

REFUSED: dict[str, Any] = {
    "a fraction": ({"ids": [[3, 9], [7.9, 7]]}, TypeError, "ids, row 1, column 0: 7.9 is of type float"),
    "a whole float": ({"ids": [[3, 9], [5, 7.0]]}, TypeError, "ids, row 1, column 1: 7.0 is of type float"),
    "an array of floats": ({"ids": np.ones((2, 2))}, TypeError, "ids must be whole numbers, not float64"),
    "a fraction under a name": (
        {"ids": [[3, 9], [5, 7.9]], "feature_names": ["user", "item"]},
        TypeError,
        "ids, row 1, feature item: 7.9 is of type float",
    ),
    "a long length under a name": (
        {"lengths": [[1, 1], [1 << 31, 1]], "feature_names": ["user", "item"]},
        ValueError,
        "lengths, row 1, feature user: 2147483648 is outside",
    ),
    "text": ({"ids": [["7", 9], [5, 7]]}, TypeError, "ids, row 0, column 0: '7' is of type str"),
    "an array of text": ({"ids": np.array([["7", "9"]] * 2)}, TypeError, "ids must be whole numbers, not <U1"),
    "a truth": ({"ids": [[3, True], [5, 7]]}, TypeError, "ids, row 0, column 1: True is of type bool"),
    "numpy's truth": ({"ids": [[3, np.True_], [5, 7]]}, TypeError, "ids, row 0, column 1: .*True.* is of type bool"),
    "an array of truths": ({"ids": np.ones((2, 2), bool)}, TypeError, "ids must be whole numbers, not bool"),
    "an array of truths in a list": ({"ids": [np.ones(2, bool)] * 2}, TypeError, "column 0: True is of type bool"),
    "times": ({"ids": np.ones((2, 2), "m8[s]")}, TypeError, "ids must be whole numbers, not timedelta64"),
    "nothing": ({"ids": [[3, None], [5, 7]]}, TypeError, "ids, row 0, column 1: None is of type NoneType"),
    "rows of their own lengths": ({"ids": [[3], [5, 7]]}, TypeError, r"ids, position 0: \[3\] is of type list"),
    "an id past int64": ({"ids": [[3, 1 << 63], [5, 7]]}, ValueError, "column 1: 9223372036854775808 is beyond"),
    "an id below int64": ({"ids": [[3, -(1 << 63) - 1], [5, 7]]}, ValueError, "is beyond what int64 holds"),
    "an unsigned id past int64": (
        {"ids": np.array([[3, 1], [1 << 63, 7]], np.uint64)},
        ValueError,
        "ids, row 1, column 0: 9223372036854775808 is outside",
    ),
    "flat ids alone": ({"ids": [3, 9]}, ValueError, r"ids without lengths has shape \(2,\); it must be \(B, T\)"),
    "flat lengths": ({"ids": [3], "lengths": [1]}, ValueError, r"lengths has shape \(1,\); it must be \(B, T\)"),
    "a long length": (
        {"lengths": [[1, 1], [(1 << 32) + 1, 1]]},
        ValueError,
        "lengths, row 1, column 0: 4294967297 is outside -2147483648 to 2147483647",
    ),
    "a long length in an array": ({"lengths": np.full((2, 2), 1 << 31)}, ValueError, "2147483648 is outside"),
    "a length with a fraction": ({"lengths": [[1, 1.9], [1, 1]]}, TypeError, "column 1: 1.9 is of type float"),
    "lengths of floats": ({"lengths": np.ones((2, 2))}, TypeError, "lengths must be whole numbers, not float64"),
    "complex": ({"dense": [[1j], [2.0]]}, TypeError, "dense must be numbers, not complex128"),
    "dense text": ({"dense": [["0.5"], ["2"]]}, TypeError, "dense must be numbers, not <U3"),
    "dense objects": ({"dense": [[Decimal(1)], [Decimal(2)]]}, TypeError, "dense must be numbers, not object"),
    "dense nothing": ({"dense": [[None], [2.0]]}, TypeError, "dense must be numbers, not object"),
    "beyond float32": ({"dense": [[0.5], [-1e39]]}, ValueError, r"dense, row 1, column 0: -1e\+39 is beyond"),
    "dense rows of their own lengths": ({"dense": [[1.0], [2.0, 3.0]]}, ValueError, "dense: its rows differ in length"),
    "one row of dense": ({"dense": [0.5]}, ValueError, r"dense has shape \(1,\); it must be \(B, D\)"),
    "weights of text": ({"weights": ["1"] * 4}, TypeError, "weights must be numbers, not <U1"),
    "one name": ({"feature_names": "ab"}, TypeError, "feature_names must be a sequence of str, not the one str 'ab'"),
    "names that are none": ({"feature_names": ["a", 7]}, TypeError, "feature_names must be str, not 7"),
    "a version that is a number": ({"version": 3}, TypeError, "model, version and request_id must be str, not 3"),
    "a context's fraction": ({"context": context({"user": [7.9]})}, TypeError, "context feature user, position 0: 7.9"),
    "a context's text": ({"context": context({"user": "7"})}, TypeError, "context feature user: '7' is of type str"),
    "a context's truth": ({"context": Context({"user": [1, True]})}, TypeError, "position 1: True is of type bool"),
    "a context's float array": (
        {"context": context({"user": np.array([1.0])})},
        TypeError,
        "context feature user must be whole numbers, not float64",
    ),
    "a context's column": ({"context": context({}, [0.5], [1.0])}, TypeError, "context.dense_columns, position 0: 0.5"),
    "a column below 0": ({"context": Context({}, [-1], [1.0])}, ValueError, "position 0: -1 is outside 0"),
    "a context's dense": ({"context": context({}, [0], ["1"])}, TypeError, "context.dense must be numbers, not <U1"),
    "a context's name": ({"context": context({7: [1]})}, TypeError, "context.features must be str, not 7"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_number_that_a_cast_would_change_is_refused_with_its_place(change, kind, why):
    build_request(**GOOD)
    with pytest.raises(kind, match=why):
        build_request(**{**GOOD, **change})


@given(st.lists(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=2, max_size=2), max_size=5))
def test_whole_numbers_stay_what_they_are(ids):
    assert whole(ids, "ids").tolist() == ids
    assert whole(np.array(ids, dtype=np.int64), "ids").tolist() == ids


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8"])
def test_every_integer_type_is_sent_as_itself(kind):
    ids = np.array([[3, 9], [5, 127]], dtype=kind)
    sparse = narsil_pb2.PredictRequest.FromString(build_request(GOOD["dense"], ids)).sparse
    wire = np.dtype("<i4" if kind.endswith("i4") else "<i8")
    assert sparse.id_type == int(wire.itemsize == 8)
    assert np.frombuffer(sparse.values, wire).tolist() == [3, 9, 5, 127]


def test_nothing_is_a_whole_number_and_a_number_of_any_type():
    for empty in ([], np.empty(0), np.empty((3, 0), np.float32)):
        assert whole(empty, "ids").size == floats(empty, "dense").size == 0


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i8", "u1", "?"])
def test_dense_values_may_be_of_any_number_type_that_float32_rounds(kind):
    values = np.array([[1, 0], [1, 1]], dtype=kind)
    assert floats(values, "dense").dtype == np.dtype("<f4")
    assert floats(values, "dense").tolist() == values.astype(float).tolist()


def test_what_is_not_finite_goes_to_the_server_which_names_it():
    found = floats([[np.nan, np.inf, -np.inf, 3.4028235e38]], "dense")
    np.testing.assert_array_equal(found, np.array([[np.nan, np.inf, -np.inf, np.finfo(np.float32).max]], np.float32))
