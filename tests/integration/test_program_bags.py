"""Ids and bags: what is looked up of a request is followed id by id, or the ids are not known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")

from narsil.program.bounds import id_limit
from narsil.program.ragged import IDS, WEIGHTS
from narsil.program.reading import Readings, merged, read, record
from narsil.program.steps import Bags, of_feature
from narsil.program.values import Known, PerId, Structure

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, FEATURES, TABLE_ROWS, DIM = (5, 7), 3, 50, 4
TABLE = torch.randn(TABLE_ROWS, DIM, generator=torch.Generator().manual_seed(1))


Forward = Callable[[Any, Any, Any], Any]


def bags_of(rows: int, most: int = 4, *, seed: int | None = None) -> tuple[Any, Any, Any]:
    """(T, B) lengths, ids and weights."""
    random = np.random.default_rng(rows if seed is None else seed)
    lengths = random.integers(0, most + 1, (FEATURES, rows))
    lengths[:, rows // 2] += 1
    total = int(lengths.sum())
    return lengths, random.integers(0, TABLE_ROWS, total), random.random(total, np.float32)


def offsets_of(lengths: Any) -> Any:
    """The offsets of every bag, key-major."""
    return torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)


def looked_up(ids: Any, offsets: Any, weights: Any = None, mode: str = "sum") -> Any:
    """(bags, DIM)."""
    number = ["sum", "mean", "max"].index(mode)
    return torch.ops.aten._embedding_bag(TABLE, ids, offsets, False, number, False, weights, True)[0]


def feature(lengths: Any, values: Any, weights: Any, number: int, mode: str = "sum") -> Any:
    """The pooled vectors of one feature, cut out of the ids as TorchRec cuts them."""
    rows = lengths.numel() // FEATURES
    offsets = offsets_of(lengths)
    ends = [int(offsets[at * rows]) for at in range(FEATURES + 1)]
    own = slice(ends[number], ends[number + 1])
    cut = offsets_of(lengths[number * rows : (number + 1) * rows])
    return looked_up(values[own], cut, None if weights is None else weights[own], mode)


def inputs_of(lengths: Any, ids: Any, weights: Any, kind: Any = torch.int32) -> dict[str, Any]:
    return {
        "g.lengths": torch.from_numpy(lengths.ravel()).to(kind),
        "g.values": torch.from_numpy(ids).to(kind),
        "g.weights": torch.from_numpy(weights),
    }


def called(forward: Forward) -> Callable[[Any], Any]:
    return lambda batch: forward(batch["g.lengths"], batch["g.values"], batch["g.weights"])


def readings_of(forward: Forward, kind: Any = torch.int32) -> Readings:
    """As probing reads a model: every id is 0."""
    given = [bags_of(rows) for rows in ROWS]
    inputs = [inputs_of(lengths, ids * 0, weights, kind) for lengths, ids, weights in given]
    recording = merged(*(record(called(forward), each) for each in inputs))
    places = [torch.arange(len(ids)) for _, ids, _ in given]
    known: dict[int, Known] = {
        recording.inputs["g.lengths"]: Structure("g"),
        recording.inputs["g.values"]: PerId("g", IDS, (places[0], places[1])),
        recording.inputs["g.weights"]: PerId("g", WEIGHTS, (places[0], places[1])),
    }
    groups = {"g": (given[0][0], given[1][0])}
    return read(recording, ROWS, groups, lambda weights, position: pytest.fail("FBGEMM"), (), known)


def check(forward: Forward, limit: int = TABLE_ROWS, kind: Any = torch.int32) -> None:
    """The model is read, its ids are bounded as they should be, and other bags of up to 100 ids score alike."""
    readings = readings_of(forward, kind)
    assert readings.program is not None, readings.problem
    assert not readings.unknown_ids
    limits = [id_limit(lookup.ids, lookup.tables[0].rows, 2**31) for lookup in readings.lookups]
    assert min(limits) == limit
    for rows, most in ((11, 4), (3, 100), (1, 2)):
        lengths, ids, weights = bags_of(rows, most, seed=rows)
        ids = np.random.default_rng(2).integers(0, min(limit, 2**31), len(ids))
        expected = called(forward)(inputs_of(lengths, ids, weights, kind))
        found = readings.program.reference({}, {"g": Bags(lengths, ids.astype(np.int32), weights)})["default"]
        np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-5, atol=1e-4)


def all_features(change: Callable[[Any], Any] = lambda ids: ids, mode: str = "sum", weigh: Any = None) -> Forward:
    """Every feature, after something was done to the ids."""

    def forward(lengths: Any, values: Any, weights: Any) -> Any:
        given = None if weigh is None else weigh(values, weights)
        ids = change(values)
        return torch.cat([feature(lengths, ids, given, number, mode) for number in range(FEATURES)], 1)

    return forward


READ: dict[str, tuple[Forward, int]] = {
    "sum": (all_features(), TABLE_ROWS),
    "mean": (all_features(mode="mean"), TABLE_ROWS),
    "weighted": (all_features(weigh=lambda ids, weights: weights), TABLE_ROWS),
    "padding": (all_features(weigh=lambda ids, weights: (ids != 0).float()), TABLE_ROWS),
    "padding times weights": (all_features(weigh=lambda ids, weights: (ids != 0) * weights), TABLE_ROWS),
    "weights made of ids": (all_features(weigh=lambda ids, weights: 1.0 / (ids + 1)), TABLE_ROWS),
    "weights made by a hash that wraps around": (
        all_features(weigh=lambda ids, weights: (ids * 1_000_003_007 % 7).float()),
        TABLE_ROWS,
    ),
    "+ 1": (all_features(lambda ids: ids + 1), TABLE_ROWS - 1),
    "+ 1 in place": (all_features(lambda ids: ids.clone().add_(1)), TABLE_ROWS - 1),
    "% rows": (all_features(lambda ids: ids % TABLE_ROWS), 2**31),
    "hashed, wrapping around": (all_features(lambda ids: ids * 1_000_003 % TABLE_ROWS), 2**31),
    "hashed in 64 bits": (all_features(lambda ids: ids.long() * 1_000_003 % TABLE_ROWS), 2**31),
    "64 bits and back": (all_features(lambda ids: (ids.long() * 1_000_003).int() % TABLE_ROWS), 2**31),
    "clamp": (all_features(lambda ids: ids.clamp(0, TABLE_ROWS - 1)), 2**31),
    "clamp(max) of what wraps around": (all_features(lambda ids: (ids + 1).clamp(max=TABLE_ROWS - 1)), 2**31 - 1),
    "where": (all_features(lambda ids: torch.where(ids < TABLE_ROWS, ids, 0)), 2**31),
    "one feature of all": (lambda lengths, values, weights: feature(lengths, values, None, 1), TABLE_ROWS),
    "another order": (
        lambda lengths, values, weights: torch.cat(
            [feature(lengths, values, weights, number) for number in (2, 0, 2, 1)], 1
        ),
        TABLE_ROWS,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_looked_up_is_read(name: str) -> None:
    check(*READ[name])


def ids_of(change: Callable[[Any, Any], Any], lengths_too: Callable[[Any, Any], Any] | None = None) -> Forward:
    def forward(lengths: Any, values: Any, weights: Any) -> Any:
        rows = lengths.numel() // FEATURES
        ids = change(values, lengths)
        bags = lengths if lengths_too is None else lengths_too(lengths, rows)
        return looked_up(ids, offsets_of(bags)).view(FEATURES, rows, DIM).transpose(0, 1).reshape(rows, -1)

    return forward


UNKNOWN: dict[str, tuple[Forward, str]] = {
    "reversed ids": (all_features(lambda ids: ids.flip(0)), "aten.flip"),
    "sorted ids": (all_features(lambda ids: ids.sort()[0]), "aten.sort"),
    "unique ids": (all_features(lambda ids: torch.unique(ids)[:1] + ids * 0), "aten._unique2"),
    "a number before the ids": (all_features(lambda ids: torch.cat([ids.new_zeros(1), ids[1:]])), ""),
    "a constant before the ids": (
        all_features(lambda ids: torch.cat([torch.zeros(1, dtype=torch.int32), ids[1:]])),
        "it puts other numbers beside ids",
    ),
    "ids of ids": (all_features(lambda ids: ids.index_select(0, ids)), "it takes ids by ids"),
    "the first hundred ids": (all_features(lambda ids: ids[:100]), "it cuts at 100"),
    "the last hundred ids": (all_features(lambda ids: ids[-100:]), "it cuts at -100"),
    "pieces of a hundred ids": (all_features(lambda ids: ids.split(100)[0]), "it cuts at 100"),
    "bits of ids": (all_features(lambda ids: ids.view(torch.float32).view(torch.int32)), "it reads the bits"),
    "ids of 8 bits": (all_features(lambda ids: ids.to(torch.int8).int()), "torch.int8"),
    "bags of at most eight": (
        ids_of(lambda ids, lengths: ids, lambda lengths, rows: lengths.clamp(max=8)),
        "asynchronous_complete_cumsum",
    ),
    "lengths that are computed": (
        ids_of(lambda ids, lengths: ids, lambda lengths, rows: lengths + 0),
        "which wraps around",
    ),
    "lengths as halves": (
        ids_of(lambda ids, lengths: ids, lambda lengths, rows: lengths.half().int()),
        "asynchronous_complete_cumsum",
    ),
    "rows of a feature swapped": (
        ids_of(lambda ids, lengths: ids, lambda lengths, rows: lengths.view(FEATURES, rows).flip(1).reshape(-1)),
        "aten.flip",
    ),
}
# Where any id may come to any row's bag, and to any feature's table.
LAID_ANEW: dict[str, Forward] = {
    "ids moved by one": all_features(lambda ids: torch.cat([ids[1:], ids[:1]])),
    "features and rows swapped": ids_of(
        lambda ids, lengths: ids, lambda lengths, rows: lengths.view(-1, FEATURES).t().reshape(-1)
    ),
    "ids that cross two features": all_features(
        lambda ids: (torch.cat([ids[1:], ids[:1]]).long() * 1_000_003 + ids) % TABLE_ROWS
    ),
    "ids of two features that are added up": all_features(lambda ids: torch.cat([ids[1:], ids[:1]]).long() + ids),
    "a bag of each id": lambda lengths, values, weights: looked_up(
        values.long(), torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones_like(values))
    )[: lengths.numel()],
}


@pytest.mark.parametrize("name", LAID_ANEW)
def test_bags_that_are_laid_anew_are_no_program_s_but_their_ids_are_bounded(name: str) -> None:
    readings = readings_of(LAID_ANEW[name])
    assert readings.program is None
    assert not readings.unknown_ids
    most = 2**31 if "cross" in name else 0 if "added" in name else TABLE_ROWS  # 0: nothing bounds them
    limits: dict[int, int] = {}
    for lookup in readings.lookups:
        for feature, table in zip(lookup.features, lookup.tables, strict=True):
            limit = id_limit(of_feature(lookup.ids, feature), table.rows, 2**31)
            limits[feature] = min(limit, limits.get(feature, limit))
    assert limits == dict.fromkeys(range(FEATURES), most)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_the_requests_is_not_known(name: str) -> None:
    forward, why = UNKNOWN[name]
    readings = readings_of(forward)
    assert readings.program is None
    assert readings.unknown_ids
    assert why in readings.unknown_ids


def test_ids_that_are_laid_out_as_numbers_too_are_bounded_all_the_same() -> None:
    """As a model does that counts the ids of a history that are the candidate's."""

    def forward(lengths: Any, values: Any, weights: Any) -> Any:
        offsets = offsets_of(lengths[: lengths.numel() // FEATURES])
        laid = torch.ops.fbgemm.jagged_to_padded_dense(values.unsqueeze(1), [offsets], [4], 0.0)
        return feature(lengths, values, None, 0) + laid.sum((1, 2))[:, None]

    readings = readings_of(forward)
    assert readings.program is None
    assert not readings.unknown_ids
    assert [lookup.tables[0].rows for lookup in readings.lookups] == [TABLE_ROWS]


OTHER_WEIGHTS: dict[str, tuple[Forward, str]] = {
    "of other ids": (
        all_features(weigh=lambda ids, weights: torch.cat([weights[1:], weights[:1]])),
        "its weights are not the ids' own",
    ),
    "made of lengths": (
        lambda lengths, values, weights: feature(lengths, values, weights * lengths.sum(), 0),
        "it takes ids together with something else",
    ),
}


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_that_are_not_known_leave_the_ids_bounded(name: str) -> None:
    forward, why = OTHER_WEIGHTS[name]
    readings = readings_of(forward)
    assert readings.program is None
    assert why in readings.problem
    assert not readings.unknown_ids
    assert id_limit(readings.lookups[0].ids, TABLE_ROWS, 2**31) == TABLE_ROWS


def test_pooling_by_the_largest_is_not_read() -> None:
    readings = readings_of(all_features(mode="max"))
    assert readings.program is None
    assert not readings.unknown_ids
    assert "pooling by the largest" in readings.problem


def test_ids_of_64_bits_that_become_32_are_the_same_below_the_tables_rows() -> None:
    check(all_features(lambda ids: ids.int()), kind=torch.int64)
    readings = readings_of(all_features(lambda ids: ids.int().clamp(max=TABLE_ROWS - 1)), torch.int64)
    assert [id_limit(lookup.ids, TABLE_ROWS, 2**63 - 1) for lookup in readings.lookups] == [2**31] * FEATURES


def test_bags_that_are_counted_are_columns() -> None:
    def averaged(lengths: Any, values: Any, weights: Any) -> Any:
        rows = lengths.numel() // FEATURES
        return feature(lengths, values, None, 0) / lengths[:rows].float().clamp(min=1).view(-1, 1)

    check(averaged)
