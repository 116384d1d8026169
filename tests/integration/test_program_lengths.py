"""How many ids a bag holds, as a number that each row has: features, means by hand, masks; and what is no row's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")

from tests.integration.test_program_bags import DIM, FEATURES, check, feature, readings_of

pytestmark = pytest.mark.filterwarnings("ignore")

PLACES = torch.arange(6)


def pooled(lengths: Any, values: Any) -> Any:
    """(B, FEATURES, DIM)."""
    return torch.stack([feature(lengths, values, None, number) for number in range(FEATURES)], 1)


def by_row(lengths: Any) -> Any:
    return lengths.view(FEATURES, -1).t()


COUNTED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "features": lambda n, v, w: torch.cat([pooled(n, v).flatten(1), by_row(n).float()], 1),
    "a logarithm": lambda n, v, w: pooled(n, v).sum(1) * torch.log1p(n.view(FEATURES, -1).float())[1][:, None],
    "means by hand": lambda n, v, w: pooled(n, v) / by_row(n).clamp(min=1).float().unsqueeze(2),
    "roots": lambda n, v, w: pooled(n, v) / by_row(n).float().clamp(min=1.0).sqrt().unsqueeze(-1),
    "others where there are none": lambda n, v, w: torch.where(by_row(n)[..., None] > 0, pooled(n, v), 0.25),
    "features turned over": lambda n, v, w: pooled(n, v).sum(2) + by_row(n.view(FEATURES, -1).flip(0).reshape(-1)),
    "one feature's": lambda n, v, w: pooled(n, v)[:, 2] * n.split(n.numel() // FEATURES)[2].unsqueeze(1),
    "a mask": lambda n, v, w: pooled(n, v).sum(1) * (n.view(FEATURES, -1)[0][:, None] > PLACES).sum(1)[:, None],
    "before the rows": lambda n, v, w: (pooled(n, v).permute(1, 2, 0) * n.view(FEATURES, 1, -1)).permute(2, 0, 1),
    "of two features": lambda n, v, w: pooled(n, v)[:, 0] * (by_row(n)[:, :1] / (by_row(n)[:, 1:2] + 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_lengths_are_numbers_of_rows(name: str, kind: Any) -> None:
    check(COUNTED[name], kind=kind)


OF_OTHERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "shares of all": lambda n, v, w: pooled(n, v) * (by_row(n) / n.sum()).unsqueeze(2),
    "moved by a row": lambda n, v, w: pooled(n, v) * by_row(n.roll(1))[..., None],
    "rows as features": lambda n, v, w: pooled(n, v) * n.view(-1, FEATURES)[..., None],
    "the first bags'": lambda n, v, w: pooled(n, v) * n[:DIM].float(),
    "offsets": lambda n, v, w: pooled(n, v).sum(1) * n.cumsum(0)[: n.numel() // FEATURES, None],
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_lengths_of_other_rows_are_none_of_a_rows(name: str) -> None:
    readings = readings_of(OF_OTHERS[name])
    assert readings.program is None
    assert "output default" in readings.problem


def test_lookups_by_lengths_that_were_changed_are_not_known() -> None:
    readings = readings_of(lambda n, v, w: pooled(n.clamp(max=2), v[: int(n.clamp(max=2).sum())]))
    assert readings.unknown_ids
