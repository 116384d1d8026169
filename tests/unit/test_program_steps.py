"""Programs and their steps by hand: what the references give, without torch."""

from __future__ import annotations

import numpy as np
import pytest

from narsil.program.steps import (
    Bags,
    Concat,
    Elementwise,
    IdExpression,
    Linear,
    Lookup,
    Program,
    Table,
    Take,
    evaluate_ids,
)

IDS, WEIGHTS = IdExpression("ids"), IdExpression("weights")


def table(vectors: list[list[float]]) -> Table:
    data = np.array(vectors, np.float32)
    return Table("t", data.view(np.uint8).reshape(-1), 0, len(data), data.shape[1], 0, data.shape[1] * 4, 0)


def coded(codes: list[int], kind: int, dim: int, scale: float = 0.5, bias: float = -1.0) -> Table:
    """One row of integers behind a scale and a bias of FP16, in a table that begins at byte 3."""
    head = np.array([scale, bias], np.float16).view(np.uint8)
    row = np.concatenate([head, np.array(codes, np.uint8)])
    return Table("t", np.concatenate([np.zeros(3, np.uint8), row]), 3, 1, dim, kind, len(row))


BAGS = Bags(np.array([[2, 0, 1], [0, 3, 0]]), np.array([0, 1, 2, 1, 1, 0]), np.array([1.0, 2, 3, 4, 5, 6]))
VECTORS = [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]


@pytest.mark.parametrize(
    ("pooling", "weights", "expected"),
    [
        ("sum", None, [[3, 30], [0, 0], [3, 30]]),
        ("mean", None, [[1.5, 15], [0, 0], [3, 30]]),
        ("sum", WEIGHTS, [[5, 50], [0, 0], [9, 90]]),
        ("mean", WEIGHTS, [[2.5, 25], [0, 0], [9, 90]]),
    ],
)
def test_bags_are_pooled_and_an_empty_one_is_zero(pooling: str, weights: IdExpression | None, expected: object) -> None:
    step = Lookup(0, "g", (0,), (table(VECTORS),), pooling, IDS, weights)  # type: ignore[arg-type]
    assert step.reference({}, {"g": BAGS}).tolist() == expected


def test_features_stand_beside_each_other_in_the_lookups_order() -> None:
    step = Lookup(0, "g", (1, 0), (table(VECTORS), table([[7.0], [8.0], [9.0]])), "sum", IDS)
    assert step.reference({}, {"g": BAGS}).tolist() == [[0, 0, 15], [5, 50, 0], [0, 0, 9]]


def test_what_is_done_to_ids_is_done_before_the_lookup() -> None:
    step = Lookup(0, "g", (0,), (table(VECTORS),), "sum", IdExpression("remainder", (IDS, 2)))
    assert step.reference({}, {"g": BAGS}).tolist() == [[3, 30], [0, 0], [1, 10]]


@pytest.mark.parametrize(
    ("kind", "codes", "expected"),
    [
        (2, [0, 1, 255, 4], [-1, -0.5, 126.5, 1]),
        (3, [0x21, 0xF0], [-0.5, 0, -1, 6.5]),  # the lower four bits come first
        (4, [0b11100100], [-1, -0.5, 0, 0.5]),
    ],
)
def test_codes_are_unpacked_from_their_lowest_bits(kind: int, codes: list[int], expected: list[float]) -> None:
    assert coded(codes, kind, 4).vectors(np.array([0])).tolist() == [expected]


def test_rows_that_are_padded_are_as_wide_as_their_dim() -> None:
    assert coded([0, 2, 99, 99], 2, 2).vectors(np.array([0])).tolist() == [[-1, 0]]


def test_an_id_outside_of_its_table_is_an_error() -> None:
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match="outside of the table t of 3 rows"):
            table(VECTORS).vectors(np.array([wrong]))


def test_a_program_runs_its_steps_in_order_and_gives_its_outputs() -> None:
    steps = (
        Linear(1, 0, np.array([[1, 1], [1, -1]], np.float32), np.array([0, 0.5], np.float32)),
        Elementwise(2, "relu", (1,)),
        Concat(3, (2, 0), 0),
        Take(4, 3, np.array(3)),
    )
    program = Program({"x": 0}, {}, steps, {"all": 3, "last": 4})
    found = program.reference({"x": np.array([[1.0, 2], [-3, -4]])}, {})
    assert found["all"].tolist() == [[3, 0, 1, 2], [0, 1.5, -3, -4]]
    assert found["last"].tolist() == [2, -4]
    assert [step.out for step in program.consumers()[0]] == [1, 3]


def test_a_rows_result_does_not_depend_on_its_company() -> None:
    program = Program({"x": 0}, {}, (Elementwise(1, "sigmoid", (0,)),), {"y": 1})
    rows = np.linspace(-900, 900, 7)[:, None]
    alone = [program.reference({"x": row[None]}, {})["y"][0, 0] for row in rows]
    assert program.reference({"x": rows}, {})["y"][:, 0].tolist() == alone


def test_weights_that_a_request_has_not_are_one() -> None:
    assert evaluate_ids(WEIGHTS, np.array([4, 5]), None).tolist() == [1, 1]
