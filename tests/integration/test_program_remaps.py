"""Ids that are remapped before they are looked up: read id by id, bounded, and scored as the model scores them."""

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

from narsil.compile.exact import ExactScorer
from narsil.program.bounds import id_least, id_limit
from narsil.program.steps import Bags, of_feature
from tests.integration.test_program_bags import (
    FEATURES,
    TABLE_ROWS,
    all_features,
    bags_of,
    called,
    feature,
    inputs_of,
    looked_up,
    offsets_of,
    readings_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")

ANY = 2**63 - 1
KNOWN = torch.tensor([3, 17, 40, 2**31 + 5, 2**40 + 1, 2**62])
PLACES = torch.tensor([7, 0, 49, 3, 12, 31])
LIST = torch.arange(TABLE_ROWS).flip(0)
# Of CHANGES that let through what is below 0; of others it is 0 where the limit is the table's own, else any int64.
LEAST = {"fmod": 0, "masked": 0, "times whether": 0}
IDS = np.array([0, 3, 16, 17, 18, 39, 40, 49, 50, 2**31 + 5, 2**31 + 6, 2**40 + 1, 2**62, 2**62 + 1, ANY - 1])


def managed(ids: Any, known: Any = KNOWN, places: Any = PLACES, other: int = TABLE_ROWS - 1) -> Any:
    """As managed collision does it: ids that it knows have a place, the others share one."""
    made = torch.empty_like(ids)
    at = torch.searchsorted(known[:-1], ids)
    found = known[at] == ids
    made[found] = places[at[found]]
    made[~found] = other
    return made


def searched(ids: Any) -> Any:
    at = torch.searchsorted(KNOWN, ids).clamp(max=len(KNOWN) - 1)
    return torch.where(KNOWN[at] == ids, at + 1, torch.zeros_like(at))


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "managed collision": (managed, ANY),
    "a sorted vocabulary": (searched, ANY),
    "buckets": (lambda ids: torch.bucketize(ids, KNOWN), ANY),
    "buckets from the right": (lambda ids: torch.bucketize(ids, KNOWN, right=True), ANY),
    "a list": (lambda ids: LIST[ids], TABLE_ROWS),
    "a list, after a remainder": (lambda ids: torch.index_select(LIST, 0, ids % 20), ANY),
    "fmod": (lambda ids: torch.fmod(ids, TABLE_ROWS), ANY),
    "divided": (lambda ids: ids // 7 % TABLE_ROWS, ANY),
    "divided and cut": (lambda ids: torch.div(ids, 7, rounding_mode="trunc") % TABLE_ROWS, ANY),
    "shifted": (lambda ids: (ids ^ (ids >> 16)) * 73244475 % TABLE_ROWS, ANY),
    "shifted up": (lambda ids: ((ids << 5) + ids) % TABLE_ROWS, ANY),
    "bits": (lambda ids: ids & 31, ANY),
    "other bits": (lambda ids: (ids | 1) % TABLE_ROWS, ANY),
    "turned bits": (lambda ids: (~ids).abs() % TABLE_ROWS, ANY),
    "masked": (lambda ids: ids.masked_fill(ids >= TABLE_ROWS, 0), ANY),
    "times whether": (lambda ids: ids * (ids < TABLE_ROWS), ANY),
    "relu of wide ids": (lambda ids: torch.relu(ids) % TABLE_ROWS, ANY),
    "zeros": (lambda ids: torch.zeros_like(ids) + torch.full_like(ids, 3), ANY),
}


def compare(forward: Any, limits: tuple[int, ...], least: tuple[int, ...], kind: Any = torch.int64) -> None:
    """Read, bounded as it should be, and scored as the model does for ids of all sizes."""
    readings = readings_of(forward, kind)
    assert readings.program is not None, readings.problem
    found, lows = [ANY] * FEATURES, [-(2**63)] * FEATURES
    for lookup in readings.lookups:
        for position, table in zip(lookup.features, lookup.tables, strict=True):
            limit = id_limit(of_feature(lookup.ids, position), table.rows, ANY)
            found[position] = min(found[position], limit)
            low = id_least(of_feature(lookup.ids, position), table.rows, limit, -(2**63))
            lows[position] = max(lows[position], low)
    assert (tuple(found), tuple(lows)) == (limits, least)
    lengths, _, weights = bags_of(40, 9, seed=3)
    random = np.random.default_rng(4)
    bounds = np.repeat(np.array(limits), lengths.sum(axis=1))
    ids = np.where(random.random(len(bounds)) < 0.7, random.choice(IDS, len(bounds)), random.integers(0, bounds))
    ids = np.minimum(ids, bounds - 1)
    ids = np.maximum(np.where(random.random(len(ids)) < 0.4, -1 - ids, ids), np.repeat(least, lengths.sum(axis=1)))
    expected = called(forward)(inputs_of(lengths, ids, weights, kind))
    made = readings.program.reference({}, {"g": Bags(lengths, ids, weights)})["default"]
    np.testing.assert_allclose(made, expected.double().numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_remapped_ids_are_read_and_bounded(name: str) -> None:
    change, limit = CHANGES[name]
    least = LEAST.get(name, 0 if limit == TABLE_ROWS else -(2**63))
    compare(all_features(change), (limit,) * FEATURES, (least,) * FEATURES)


def test_each_feature_may_be_remapped_otherwise() -> None:
    """As a collection of managed collision modules does: ids are cut by feature, remapped and put together again."""
    changes = (managed, lambda ids: ids, lambda ids: ids % 9 + 1)

    def forward(lengths: Any, values: Any, weights: Any) -> Any:
        rows = lengths.numel() // FEATURES
        ends = [int(offsets_of(lengths)[at * rows]) for at in range(FEATURES + 1)]
        parts = [change(values[ends[n] : ends[n + 1]]) for n, change in enumerate(changes)]
        ids = torch.cat(parts)
        return torch.cat([feature(lengths, ids, weights, number) for number in range(FEATURES)], 1)

    compare(forward, (ANY, TABLE_ROWS, ANY), (-(2**63), 0, -(2**63)))


def outside(ids: Any) -> Any:
    return PLACES[torch.searchsorted(KNOWN, ids)]


NOT: dict[str, Callable[[Any], Any]] = {
    "a place beyond the table": lambda ids: managed(ids, torch.tensor([0, 9, 40, 50, 60, 70]), other=TABLE_ROWS),
    "a list that leads beyond the table": lambda ids: managed(ids, places=PLACES + 1),
    "bits that reach beyond the table": lambda ids: ids & 63,
    "some are not set": lambda ids: torch.empty_like(ids).index_put_((ids < 5,), torch.tensor(1)),
}


@pytest.mark.parametrize("name", NOT)
def test_what_leads_outside_is_never_let_in(name: str) -> None:
    readings = readings_of(all_features(NOT[name]), torch.int64)
    limits = [id_limit(lookup.ids, TABLE_ROWS, ANY) for lookup in readings.lookups]
    assert readings.unknown_ids or max(limits) <= TABLE_ROWS
    for limit in limits:
        ids = torch.arange(limit)
        assert not len(ids) or int(NOT[name](ids).max()) < TABLE_ROWS


UNREAD: dict[str, Callable[[Any], Any]] = {
    "numbers that do not rise": lambda ids: torch.searchsorted(KNOWN.flip(0), ids) % TABLE_ROWS,
    "what was put for other ids": lambda ids: torch.zeros_like(ids).index_put_((ids < 5,), ids[ids < 6]),
    "a number of 33 bits beside ids of 32": lambda ids: torch.where(ids.int() < 2**32 + 50, ids.int() * 0, ids.int()),
    "a remainder by 0 or less": lambda ids: torch.fmod(ids, -5),
    "shifted by all bits": lambda ids: (ids >> 64) % TABLE_ROWS,
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_followed_is_not_known(name: str) -> None:
    try:
        readings = readings_of(all_features(UNREAD[name]), torch.int64)
    except (RuntimeError, IndexError):  # torch itself refuses some of these
        return
    assert readings.unknown_ids


def test_ids_of_one_feature_to_which_different_things_were_done_are_not_known() -> None:
    def forward(lengths: Any, values: Any, weights: Any) -> Any:
        ids = torch.cat([values[:1] % TABLE_ROWS, values[1:]])
        return looked_up(ids, offsets_of(lengths))

    assert "of one feature" in readings_of(forward, torch.int64).unknown_ids


def test_zero_collision_hashing_is_bounded_by_its_list_and_stays_on_torch() -> None:
    def change(identities: Any) -> Callable[[Any], Any]:
        return lambda ids: torch.ops.fbgemm.zero_collision_hash(ids, identities, 8, True, -1, True)[0]

    for size, limit in ((TABLE_ROWS, ANY), (TABLE_ROWS + 1, 0)):
        identities, _ = torch.ops.fbgemm.create_zch_buffer(size, long_type=True)
        readings = readings_of(all_features(change(identities)), torch.int64)
        assert not readings.unknown_ids
        assert {id_limit(lookup.ids, TABLE_ROWS, ANY) for lookup in readings.lookups} == {limit}
        assert readings.program is None
        assert "fbgemm.zero_collision_hash" in readings.problem


def hashed(identities: Any, sizes: list[int], starts: list[int]) -> Callable[[Any], Any]:
    """As managed collision hashes into parts of a table, one for each rank that it was trained on."""

    def change(ids: Any) -> Any:
        part = ids % len(sizes)
        parts = [torch.tensor(numbers).index_select(0, part) for numbers in (sizes, starts)]
        return torch.ops.fbgemm.zero_collision_hash(ids, identities, 8, True, -1, True, *parts)[0]

    return change


@pytest.mark.parametrize(
    ("sizes", "starts", "inside"),
    [([30, 20], [0, 30], True), ([20, 30], [30, 0], True), ([30, 21], [0, 30], False), ([30, 20], [0, -1], False)],
)
def test_parts_of_a_table_must_lie_inside_of_it(sizes: list[int], starts: list[int], inside: bool) -> None:
    identities, _ = torch.ops.fbgemm.create_zch_buffer(TABLE_ROWS, long_type=True)
    model = all_features(hashed(identities, sizes, starts))
    if starts[1] < 0 or sizes[1] + starts[1] > TABLE_ROWS:
        model = all_features(lambda ids: hashed(identities, sizes, starts)(ids * 2) * 0)  # the bad part is not met
    readings = readings_of(model, torch.int64)
    assert bool(readings.unknown_ids) is not inside
    if inside:
        assert {id_limit(lookup.ids, TABLE_ROWS, ANY) for lookup in readings.lookups} == {ANY}


def test_the_ids_that_a_model_knows_are_found_for_those_who_draw_ids() -> None:
    program = readings_of(all_features(managed), torch.int64).program
    assert program is not None
    known = ExactScorer(program).known_ids()
    assert {feature: ids.tolist() for feature, ids in known.items()} == dict.fromkeys(
        range(FEATURES), KNOWN[:-1].tolist()
    )
