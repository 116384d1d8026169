"""Columns in which NaN is a value: with NaN in any of those that are named, scores are numbers, and none that a model
passes on is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

from narsil.program.missing import caught_columns
from tests.integration.test_program_readers import WIDTH, readings_of

pytestmark = pytest.mark.filterwarnings("ignore")

W = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(7))
WIDE = torch.randn(4, 2 * WIDTH, generator=torch.Generator().manual_seed(7))
MEANS = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
EVERY = tuple(range(WIDTH))


def filled(x: Any) -> Any:
    x = x * 1
    x[torch.isnan(x)] = 0.5
    return F.linear(x, W)


def halves(x: Any) -> Any:
    return F.linear(torch.cat([x[:, :2].nan_to_num(0.5), x[:, 2:]], dim=1), W)


def one_for_another(x: Any) -> Any:
    """Column 1 stands in for column 0, which may then be missing."""
    return torch.where(x[:, :1].isnan(), x[:, 1:2], x[:, :1])


def three(x: Any) -> Any:
    a, b, c = x[:, :1], x[:, 1:2], x[:, 2:3]
    return torch.where(a.isnan(), torch.where(c.isnan(), torch.zeros_like(a), b), a)


CAUGHT: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "nan_to_num": (lambda x: F.linear(x.nan_to_num(0.25), W), EVERY),
    "nan_to_num behind a layer": (lambda x: F.linear(x, W).nan_to_num(), EVERY),
    "nan_to_num of NaN": (lambda x: x.nan_to_num(float("nan")), ()),
    "where isnan": (lambda x: F.linear(torch.where(x.isnan(), torch.zeros_like(x), x), W), EVERY),
    "where isnan, a function of it": (lambda x: torch.where(x.isnan(), MEANS, torch.log1p(x.abs())), EVERY),
    "where not isnan": (lambda x: torch.where(~torch.isnan(x), torch.sqrt(x.abs()), MEANS), EVERY),
    "where it equals itself": (lambda x: torch.where(x == x, x, 0.0), EVERY),  # noqa: PLR0124
    "where it is not itself": (lambda x: torch.where(x != x, MEANS, x), EVERY),  # noqa: PLR0124
    "where it is above": (lambda x: torch.where(x > 0, x, 0.0), EVERY),
    "where it is not above": (lambda x: torch.where(x <= 0, 0.0, x), ()),
    "where either is none": (
        lambda x: torch.where(x.isnan() | x.flip(1).isnan(), torch.zeros_like(x), x * x.flip(1)),
        EVERY,
    ),
    "where both are none": (lambda x: torch.where(x.isnan() & x.flip(1).isnan(), torch.zeros_like(x), x), ()),
    "the wrong side": (lambda x: torch.where(x.isnan(), x, torch.zeros_like(x)), ()),
    "another's": (lambda x: torch.where(x.flip(1).isnan(), torch.zeros_like(x), x), ()),
    "with an indicator": (lambda x: F.linear(torch.cat([x.nan_to_num(), x.isnan().float()], dim=1), WIDE), EVERY),
    "masked_fill": (lambda x: F.linear(x.masked_fill(x.isnan(), -1.0), W), EVERY),
    "put": (filled, EVERY),
    "some": (halves, (0, 1)),
    "one for another": (one_for_another, (0, 2, 3, 4, 5)),
    "three": (three, (0, 2, 3, 4, 5)),
    "compared alone": (lambda x: F.linear((x > 0.1).float(), W), EVERY),
    "none": (lambda x: F.linear(x, W), ()),
    "relu": (torch.relu, ()),
    "clamp": (lambda x: x.clamp(0, 1), ()),
    "maximum": (lambda x: torch.maximum(x, MEANS), ()),
    "times zero": (lambda x: x * 0.0, ()),
    "mean over columns": (lambda x: x.mean(1), ()),
    "softmax": (lambda x: torch.softmax(x, 1), ()),
    "largest": (lambda x: x.amax(1), ()),
    "into whole numbers": (lambda x: x.int().float(), ()),
    "products": (lambda x: torch.bmm(x.view(-1, 2, 3), x.view(-1, 3, 2)).flatten(1), ()),
    "layer norm of what was filled": (lambda x: F.layer_norm(x.nan_to_num(), (WIDTH,)), EVERY),
    "layer norm": (lambda x: F.layer_norm(x, (WIDTH,)), ()),
    "columns that no output takes": (lambda x: F.linear(x[:, :3], W[:, :3]), (3, 4, 5)),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_what_is_named_takes_nan_beside_any_other_that_is_named(name: str) -> None:
    forward, expected = CAUGHT[name]
    program = readings_of(forward).program
    assert program is not None, readings_of(forward).problem
    assert caught_columns(program, ("x",)) == expected
    rows = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    for columns in chain.from_iterable(combinations(expected, count) for count in range(len(expected) + 1)):
        missing = rows.clone()
        missing[:, list(columns)] = float("nan")
        with torch.no_grad():
            assert bool(torch.isfinite(forward(missing.clone())).all()), columns


def test_columns_are_followed_beyond_64() -> None:
    weight = torch.randn(3, 200, generator=torch.Generator().manual_seed(2))

    def forward(x: Any) -> Any:
        return F.linear(torch.cat([x[:, :70], x[:, 70:131].nan_to_num(), x[:, 131:]], dim=1), weight)

    program = readings_of(forward, 200).program
    assert program is not None
    assert caught_columns(program, ("x",)) == tuple(range(70, 131))


def test_columns_of_several_matrices_are_numbered_in_their_order() -> None:
    from dataclasses import replace

    program = readings_of(lambda x: F.linear(x.nan_to_num(), W)).program
    assert program is not None
    number = program.dense["x"]
    two = replace(program, dense={"other": 1000, "x": number}, shapes={**program.shapes, 1000: (3,)})
    assert caught_columns(two, ("other", "x")) == tuple(range(3 + WIDTH))
    outputs = {**two.outputs, "other": 1000}
    assert caught_columns(replace(two, outputs=outputs), ("other", "x")) == tuple(np.arange(3, 3 + WIDTH))
    assert caught_columns(replace(two, outputs=outputs), ("x", "other")) == EVERY
