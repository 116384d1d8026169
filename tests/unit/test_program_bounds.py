"""The ids that a request may hold follow from what a model does to them, so that none leads outside of its table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from narsil.program.bounds import id_least, id_limit
from narsil.program.steps import IdArray, IdExpression, evaluate_ids

NARROW, WIDE = 2**31, 2**63 - 1
IDS = IdExpression("ids")


def of(function: str, *arguments: Any) -> IdExpression:
    return IdExpression(function, arguments)


LIST, LIST_OF_KNOWN = IdArray(np.array([7, 3, 0, 99, 5])), IdArray(np.array([10, 20, 30, 40, 50]))


def narrow(function: str, *arguments: Any) -> IdExpression:
    """As it is computed in 32 bits."""
    return of("to_int32", of(function, *arguments))


# (what is done, rows of the table, the first id that may not be let in: of int32 ids)
TABLE: dict[str, tuple[IdExpression, int, int]] = {
    "nothing": (IDS, 100, 100),
    "nothing, to a table of more rows than ids": (IDS, 2**40, NARROW),
    "+ 1": (narrow("add", IDS, 1), 100, 99),
    "+ as many as there are rows": (narrow("add", IDS, 100), 100, 0),
    "- 1": (narrow("sub", IDS, 1), 100, 0),
    "c -": (narrow("sub", 99, IDS), 100, 100),
    "* 2": (narrow("mul", IDS, 2), 100, 50),
    "* 3": (narrow("mul", IDS, 3), 100, 34),
    "* -1": (narrow("mul", IDS, -1), 100, 1),
    "% rows": (of("remainder", IDS, 100), 100, NARROW),
    "% more than rows": (of("remainder", IDS, 101), 100, 100),
    "% less than 0": (of("remainder", IDS, -5), 100, 0),
    "hashed in 32 bits": (of("remainder", narrow("mul", IDS, 1_000_003), 100), 100, NARROW),
    "hashed in 64 bits": (of("remainder", of("mul", IDS, 1_000_003), 100), 100, NARROW),
    "clamp": (of("clamp", IDS, 0, 99), 100, NARROW),
    "clamp(max)": (of("clamp", IDS, None, 99), 100, NARROW),
    "clamp(min)": (of("clamp", IDS, 5, None), 100, 100),
    "clamp(min) beyond": (of("clamp", IDS, 100, None), 100, 0),
    "minimum": (of("minimum", IDS, 99), 100, NARROW),
    "maximum": (of("maximum", IDS, 7), 100, 100),
    "where": (of("where", of("lt", IDS, 100), IDS, 0), 100, NARROW),
    "where, one too far": (of("where", of("le", IDS, 100), IDS, 0), 100, 100),
    "where not": (of("where", of("not", of("ge", IDS, 100)), IDS, 0), 100, NARROW),
    "where it is not": (of("where", of("lt", IDS, 100), 0, IDS), 100, 100),
    "where of two conditions": (
        of("where", of("and", of("gt", 90, IDS), of("ge", IDS, 5)), of("sub", IDS, 5), 0),
        85,
        NARROW,
    ),
    "where of either": (of("where", of("or", of("lt", IDS, 90), of("lt", IDS, 200)), IDS, 0), 100, 100),
    "where something else is small": (of("where", of("lt", of("remainder", IDS, 7), 3), IDS, 0), 100, 100),
    "times whether": (of("mul", IDS, of("lt", IDS, 100)), 100, NARROW),
    "fmod": (of("fmod", narrow("sub", IDS, 5), 100), 100, 0),
    "fmod of ids": (of("fmod", IDS, 100), 100, NARROW),
    "divided": (of("floor_divide", IDS, 7), 100, 700),
    "divided and cut": (of("truncated_divide", IDS, 7), 100, 700),
    "masked bits": (of("bit_and", IDS, 63), 64, NARROW),
    "masked bits of more rows": (of("bit_and", IDS, 127), 100, 100),
    "bits": (of("bit_or", IDS, 64), 128, 128),
    "other bits": (of("bit_xor", IDS, 64), 128, 128),
    "turned bits": (of("bit_not", IDS), 100, 0),
    "shifted": (of("shift_right", IDS, 4), 100, 1600),
    "shifted up": (of("shift_left", IDS, 4), 100, 7),
    "a list": (of("take", LIST, IDS), 100, 5),
    "a list of which some lead outside": (of("take", LIST, IDS), 90, 3),
    "a list, after a clamp": (of("take", LIST, of("clamp", IDS, 0, 4)), 100, NARROW),
    "a list, by a place too far": (of("take", LIST, of("clamp", IDS, 0, 5)), 100, 5),
    "a list, by a place before it": (of("take", LIST, of("sub", IDS, 1)), 100, 0),
    "searched": (of("search", LIST_OF_KNOWN, IDS), 4, 41),
    "searched in all": (of("search", LIST_OF_KNOWN, IDS), 6, NARROW),
    "searched, the last too": (of("search", LIST_OF_KNOWN, IDS), 5, 51),
    "searched from the right": (of("search_right", LIST_OF_KNOWN, IDS), 4, 40),
    "unset": (of("unset"), 100, 0),
    "unset on one side": (of("where", of("lt", IDS, 3), 1, of("unset")), 100, 3),
    "where of constants": (of("where", of("gt", IDS, 5), 99, 3), 100, NARROW),
    "whether": (of("ne", IDS, 0), 2, NARROW),
    "whether, of one row": (of("ne", IDS, 0), 1, 0),
    "relu": (of("relu", narrow("sub", IDS, 5)), 100, 105),
    "+ 1, wrapping around, then clamp(max)": (of("clamp", narrow("add", IDS, 1), None, 99), 100, NARROW - 1),
    "+ 1, then clamp": (of("clamp", narrow("add", IDS, 1), 0, 99), 100, NARROW),
    "+ 1 in 64 bits, then clamp(max)": (of("clamp", of("add", IDS, 1), None, 99), 100, NARROW),
    "squared": (narrow("mul", IDS, IDS), 100, 10),
    "nested": (narrow("add", of("remainder", narrow("sub", IDS, 3), 10), 5), 15, NARROW),
    "as floats": (of("to_integer", of("to_float32", IDS)), 2**26, 2**24 + 1),
    "half of them, rounded": (of("to_integer", of("div", IDS, 2)), 100, 0),
    "what nobody knows": (of("exp", IDS), 100, 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_limit_of(name: str) -> None:
    expression, rows, limit = TABLE[name]
    assert id_limit(expression, rows, NARROW) == limit


def test_ids_of_64_bits_that_are_cut_to_32_are_not_known_from_there_on() -> None:
    cut = of("to_int32", of("mul", IDS, 2))
    assert id_limit(of("clamp", cut, None, 99), 100, WIDE) == 2**30  # of which the next becomes less than 0
    assert id_limit(of("clamp", cut, 0, 99), 100, WIDE) == WIDE
    assert id_limit(of("remainder", cut, 100), 100, WIDE) == WIDE


def test_what_is_done_with_weights_bounds_nothing() -> None:
    assert id_limit(of("clamp", of("mul", IDS, IdExpression("weights")), 0, 5), 100, NARROW) == 0
    assert id_limit(IdExpression("weights"), 100, NARROW) == 0


@pytest.mark.parametrize("number", [float("inf"), float("nan"), None])
def test_numbers_that_are_none_bound_nothing(number: float | None) -> None:
    assert id_limit(of("add", IDS, number), 100, NARROW) == 0


LEAST: dict[str, tuple[IdExpression, int, int]] = {
    "ids": (IDS, 100, 0),
    "remainder": (of("remainder", IDS, 100), 100, -NARROW),
    "fmod": (of("fmod", IDS, 100), 100, 0),
    "fmod and what brings it above 0": (of("remainder", of("fmod", IDS, 100), 100), 100, -NARROW),
    "clamp": (of("clamp", IDS, 0, 99), 100, -NARROW),
    "clamp(max) alone": (of("clamp", IDS, None, 99), 100, 0),
    "+ 5": (of("clamp", of("add", IDS, 5), None, 99), 100, -5),
    "magnitude": (of("clamp", of("abs", IDS), None, 99), 100, -NARROW),
    "magnitude of what may wrap around": (of("clamp", narrow("abs", IDS), None, 99), 100, 1 - NARROW),
    "masked bits": (of("bit_and", IDS, 63), 64, -NARROW),
    "shifted": (of("shift_right", IDS, 40), 100, 0),
    "searched": (of("search", LIST_OF_KNOWN, IDS), 6, -NARROW),
    "below 0 is another": (of("where", of("lt", IDS, 0), 7, of("remainder", IDS, 100)), 100, -NARROW),
    "a list": (of("take", LIST, IDS), 100, 0),
}


@pytest.mark.parametrize("name", LEAST)
def test_the_least_id_of(name: str) -> None:
    expression, rows, least = LEAST[name]
    assert id_least(expression, rows, id_limit(expression, rows, NARROW), -NARROW) == least


NUMBERS = st.integers(-200, 200) | st.sampled_from([2**31 - 1, -(2**31), 2**30, 10**6 + 3])


COMPARED = st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])
ARRAYS = st.lists(st.integers(-3, 400), min_size=1, max_size=30).map(lambda numbers: IdArray(np.array(numbers)))
RISING = st.lists(st.integers(-50, 2**31), min_size=1, max_size=30).map(lambda all: IdArray(np.array(sorted(all))))
RISES = IdArray(np.array([2, 40, 41, 300]))


def grown(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    binary = st.sampled_from(["add", "sub", "mul", "maximum", "minimum"])
    number = st.one_of(children, NUMBERS)
    return st.one_of(
        st.builds(narrow, binary, children, number),
        st.builds(narrow, st.sampled_from(["add", "sub", "mul"]), NUMBERS, children),
        st.builds(lambda x, n: of("remainder", x, n), children, st.integers(1, 300)),
        st.builds(lambda x, least, most: of("clamp", x, least, most), children, st.none() | NUMBERS, NUMBERS),
        st.builds(lambda x, y, n: of("where", of("gt", x, n), x, y), children, children, NUMBERS),
        st.builds(lambda x: of("relu", x), children),
        st.builds(
            of,
            st.sampled_from(["fmod", "floor_divide", "truncated_divide", "bit_and", "bit_or", "bit_xor"]),
            children,
            st.integers(1, 300),
        ),
        st.builds(lambda x, n: narrow("shift_left", x, n), children, st.integers(0, 8)),
        st.builds(lambda x, n: of("shift_right", x, n), children, st.integers(0, 31)),
        st.builds(lambda x, y, n: of("where", of("not", of("le", x, n)), y, x), children, children, NUMBERS),
        st.builds(lambda x, function, n: of("mul", x, of(function, x, n)), children, COMPARED, NUMBERS),
        st.builds(lambda array, x: of("take", array, x), ARRAYS, children),
        st.builds(lambda array, x: of("search", array, x), RISING, children),
        st.builds(lambda array, x: of("take", array, of("search", RISES, x)), ARRAYS, children),
    )


EXPRESSIONS = st.recursive(st.just(IDS), grown, max_leaves=5)


@settings(deadline=None, max_examples=600)
@given(EXPRESSIONS, st.integers(1, 400))
@example(of("clamp", narrow("add", IDS, 1), None, 99), 100)
def test_every_id_from_the_least_to_the_limit_leads_inside_of_the_table(expression: IdExpression, rows: int) -> None:
    limit = id_limit(expression, rows, NARROW)
    least = id_least(expression, rows, limit, -NARROW) if limit else 0
    near, far = np.arange(-300, 301), np.array([2**30, NARROW - 1, NARROW // 3])
    ids = np.concatenate([near, limit + near, limit // 2 + near, far, least + near, least // 2 + near, -1 - far])
    ids = ids[(ids >= least) & (ids < limit)]
    found = np.broadcast_to(evaluate_ids(expression, ids.astype(np.int32), None), ids.shape)
    assert ((found >= 0) & (found < rows)).all()


SIMPLE = st.recursive(
    st.just(IDS),
    lambda inner: st.one_of(
        st.builds(narrow, st.sampled_from(["add", "sub"]), inner, st.integers(-50, 50)),
        st.builds(lambda x, n: narrow("mul", x, n), inner, st.integers(1, 5)),
        st.builds(lambda x, least, most: of("clamp", x, least, most), inner, st.integers(0, 50), st.integers(50, 300)),
    ),
    max_leaves=1,
)


@settings(deadline=None, max_examples=300)
@given(SIMPLE, st.integers(1, 400))
def test_the_limit_is_the_largest_where_each_step_is_followed_exactly(expression: IdExpression, rows: int) -> None:
    """Rising functions of one id: ranges are exact, so that the first id beyond the limit leads outside."""
    limit = id_limit(expression, rows, NARROW)
    if limit < NARROW:
        assert not 0 <= int(evaluate_ids(expression, np.array([limit], np.int32), None)[0]) < rows


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1),
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from(["add", "sub", "mul"]),
)
def test_32_bits_wrap_around_as_numpys_do(ids: list[int], number: int, function: str) -> None:
    found = evaluate_ids(narrow(function, IDS, number), np.array(ids, np.int32), None)
    plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[function]
    assert np.array_equal(found, plain(np.array(ids, np.int32), np.int32(number)))


def test_ids_are_computed_in_64_bits_whatever_their_kind() -> None:
    ids = np.array([2**31 - 1], np.int32)
    assert evaluate_ids(of("mul", IDS, 1_000_003), ids, None).tolist() == [(2**31 - 1) * 1_000_003]
    assert evaluate_ids(of("to_float32", IDS), np.array([2**24 + 1]), None).tolist() == [float(2**24)]
    assert evaluate_ids(of("to_integer", of("div", IDS, 2)), np.array([7]), None).tolist() == [3]
