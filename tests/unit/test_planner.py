"""Which plans are tried, and in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from narsil.compile.planner import Errors, Workbench, climb, plans

ALL = ("fp32", "bf16", "int16", "int8")
ROUNDING = {"fp32": 0.0, "int16": 1e-4, "bf16": 8e-4, "int8": 1e-3}  # of a score, for each layer of the kind
SPEED = {"fp32": 1.0, "int16": 2.0, "bf16": 2.1, "int8": 4.0}


class Bench:
    """Three layers, each of which adds the rounding of its kind."""

    def __init__(self, log_odds: float = 4.0) -> None:
        self.linears = [SimpleNamespace(weight=SimpleNamespace(shape=(8, 64)))] * 3
        self.form = self
        self.log_odds = log_odds

    def errors(self, kinds):
        largest = sum(ROUNDING[kind] for kind in kinds)
        return Errors(largest, self.log_odds * largest, largest**2)

    def layers(self, kinds):
        return tuple(SimpleNamespace(shape=SimpleNamespace(kind=kind)) for kind in (*kinds, "fp32"))

    def told(self, kinds):
        return " ".join(kinds)

    def speed(self, kinds):
        return sum(SPEED[kind] for kind in kinds)


def bench(log_odds: float = 4.0) -> Workbench:
    return cast(Workbench, Bench(log_odds))


def tried(precision: str, limit: float, available=ALL, **options):
    return [
        (plan.precision, " ".join(layer.shape.kind for layer in plan.layers[:-1]))
        for plan in plans(bench(**options), precision, available, limit)
    ]


def test_auto_goes_on_to_what_is_more_precise_and_ends_with_fp32():
    assert tried("auto", 2e-3) == [
        ("int8", "int16 int16 int8"),
        ("int8", "int16 int16 int16"),
        ("bf16", "int16 int16 bf16"),  # and not int16 throughout again
        ("fp32", "fp32 fp32 fp32"),
    ]


@pytest.mark.parametrize("available", [("fp32",), ("fp32", "bf16"), ALL])
@pytest.mark.parametrize("limit", [0.0, 1e-5, 2e-3, 1.0])
def test_auto_s_last_is_what_fp32_gives(available, limit):
    assert tried("auto", limit, available)[-1] == tried("fp32", limit, available)[-1] == ("fp32", "fp32 fp32 fp32")


def test_a_precision_that_is_asked_for_has_a_second_try_with_layers_that_climb_farther():
    first, second = tried("int8", 2e-3)
    assert first[0] == second[0] == "int8"
    assert first[1] != second[1]
    assert tried("fp32", 2e-3) == [("fp32", "fp32 fp32 fp32")]


def test_layers_climb_for_log_odds_too():
    assert climb(bench(4.0), "int8", ALL, 4e-3)[0] == ("int8",) * 3
    assert climb(bench(40.0), "int8", ALL, 4e-3)[0] != ("int8",) * 3
