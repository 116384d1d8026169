"""Rows drawn to hold one form of a model against another: usual ones, and extreme ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narsil.artifacts.rows import USUAL_ROWS, extreme, of_bags, random_batch, rows_of, usual
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.dataflow import Batch
from tests.support import SCHEMA

GIVEN = 1000 + np.arange(120, dtype=np.float32).reshape(40, 3)
WEIGHTED = replace(SCHEMA, features=(replace(SCHEMA.features[0], weighted=True), *SCHEMA.features[1:]))


def drawn(draw, schema=SCHEMA, given=None, seed: int = 0) -> list[Batch]:
    return list(draw(schema, np.random.default_rng(seed), given))


def bags_of(batch: Batch, feature: int) -> list[np.ndarray]:
    bags = np.split(batch.values, np.cumsum(batch.lengths)[:-1])
    return bags[feature * batch.rows : (feature + 1) * batch.rows]


def dense_of(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.dense for batch in batches])


def test_usual_rows_are_many_of_both_kinds_and_cover_every_table():
    batches = drawn(usual)
    assert sum(batch.rows for batch in batches) >= USUAL_ROWS >= 10_000
    assert [batch.rows for batch in batches[:6]] == [1, 2, 7, 1, 2, 7]
    for one_hot in (True, False):
        kind = [batch for batch in batches if batch.one_hot is one_hot and batch.rows > 2]
        assert {batch.rows for batch in kind} == {7, 500}  # odd sizes of both kinds
        assert sum(batch.rows for batch in kind) >= USUAL_ROWS / 2
        lengths = np.concatenate([batch.lengths for batch in kind])
        assert set(lengths.tolist()) == ({1} if one_hot else {0, 1, 2, 3, 4})
    for number, rows in enumerate(SCHEMA.rows):
        ids = np.concatenate([bag for batch in batches for bag in bags_of(batch, number)])
        assert set(ids.tolist()) == set(range(rows))


def test_usual_numbers_are_even_normal_or_all_zeros_and_half_of_the_rows_have_none_below_zero():
    dense = dense_of(drawn(usual))
    assert dense.dtype == np.float32
    assert 3 < np.abs(dense).max() < 7
    zeros = (dense == 0).all(axis=1)
    assert 0.07 < zeros.mean() < 0.13
    assert 0.5 < (dense >= 0).all(axis=1).mean() < 0.9
    assert not (dense[~zeros] == 0).any()


def test_the_first_and_the_last_id_come_often_and_so_do_low_ones():
    ids = np.concatenate([bag for batch in drawn(usual) if batch.one_hot for bag in bags_of(batch, 2)])
    # A lone id is the last in half of the bags of this kind, 0 in half of those of that, and 0 by Zipf's law too.
    assert (ids == 999).mean() == pytest.approx(0.075, abs=0.015)
    assert (ids == 0).mean() == pytest.approx(0.075 + 0.3 * np.log(2) / np.log(1000), abs=0.015)
    assert (ids == 1).mean() == pytest.approx(0.3 * np.log(3 / 2) / np.log(1000), abs=0.01)


def test_extreme_rows_have_long_bags_repeats_and_large_values():
    batches = drawn(extreme)
    lengths = [batch.lengths for batch in batches]
    assert {int(one.max()) for one in lengths} == {1, 4, 12, 100}
    assert all(one.min() == 0 for one in lengths if one.max() > 1)
    long = np.concatenate([one for one in lengths if one.max() == 100])
    assert 0.3 < (long <= 4).mean() < 0.7
    dense = dense_of(batches)
    sizes = np.abs(dense).mean(axis=1)
    for low, high, least in ((0, 1, 0.15), (3, 30, 0.15), (30, 400, 0.1)):  # of N(0, 1), of tens, of hundreds
        assert ((low <= sizes) & (sizes < high)).mean() > least
    assert 0.5 < (dense >= 0).all(axis=1).mean() < 0.7
    assert -dense.min() > 400
    bags = [bag for batch in batches for bag in bags_of(batch, 2) if len(bag) >= 8]
    assert np.mean([len(set(bag.tolist())) == 1 for bag in bags]) > 0.1
    for often in (0, 999):
        assert np.mean([(bag == often).mean() > 0.25 for bag in bags]) > 0.1


@pytest.mark.parametrize("longest", [None, 1, 4])
def test_even_rows_cover_every_table_and_every_length(longest):
    batch = random_batch(SCHEMA, 5_000, longest, np.random.default_rng(0))
    assert batch.one_hot is (longest is None)
    assert set(batch.lengths.tolist()) == ({1} if longest is None else set(range(longest + 1)))
    for feature, rows in enumerate(SCHEMA.rows):
        ids = np.concatenate(bags_of(batch, feature))
        assert (ids.min(), ids.max()) == (0, rows - 1)
    assert batch.dense.shape == (5_000, 3)
    assert batch.dense.dtype == np.float32
    assert 0 <= batch.dense.min() < 0.01
    assert 0.99 < batch.dense.max() < 1


def test_long_bags_are_fewer_where_there_are_many_features():
    many = ModelSchema(1, tuple(Feature(f"f{number}", f"t{number}", rows=10, dim=4) for number in range(400)))
    long = [batch for batch in drawn(extreme, many) if batch.lengths.max() == 100]
    assert [batch.rows for batch in long] == [25] * 4
    assert sum(batch.rows for batch in drawn(extreme, many)) == 6 * 500 + 4 * 25
    assert all(len(batch.values) < 500_000 for batch in long)


def test_a_file_s_numbers_are_what_is_usual_and_what_lies_between_them_is_extreme():
    assert set(map(tuple, dense_of(drawn(usual, given=GIVEN)))) == set(map(tuple, GIVEN))
    dense = dense_of(drawn(extreme, given=GIVEN))
    within = (dense >= GIVEN.min(axis=0)).all(axis=1) & (dense <= GIVEN.max(axis=0)).all(axis=1)
    assert 0.4 < within.mean() < 0.6
    assert len(np.unique(dense[within], axis=0)) > 1_000


@pytest.mark.parametrize("draw", [usual, extreme])
def test_the_same_seed_draws_the_same_rows_and_another_draws_others(draw):
    for one, again, other in zip(drawn(draw), drawn(draw), drawn(draw, seed=1), strict=True):
        np.testing.assert_array_equal(one.values, again.values)
        np.testing.assert_array_equal(one.dense, again.dense)
        assert not np.array_equal(one.dense, other.dense)


def test_ids_are_as_wide_as_the_model_s():
    wide = ModelSchema(1, (Feature("a", "t_a", rows=2**40, dim=8),))
    ids = np.concatenate([batch.values for batch in drawn(usual, wide)])
    assert ids.dtype == np.int64
    assert (ids.min(), ids.max()) == (0, 2**40 - 1)
    assert drawn(usual)[0].values.dtype == np.int32


def test_weights_are_drawn_for_the_features_that_take_them():
    assert drawn(usual)[0].weights is None
    for draw, values in ((usual, {1.0}), (extreme, {0.0, 1.0})):
        for batch in drawn(draw, WEIGHTED):
            first = int(batch.lengths[: batch.rows].sum())
            assert batch.weights.dtype == np.float32
            assert len(batch.weights) == len(batch.values)
            assert (batch.weights[first:] == 1).all()
        weights = np.concatenate([b.weights[: b.lengths[: b.rows].sum()] for b in drawn(draw, WEIGHTED)])
        assert values < set(weights.tolist())
        assert (weights.min() < 0) is np.bool_(draw is extreme)


def test_rows_are_taken_with_their_bags():
    batch = next(b for b in drawn(extreme, WEIGHTED) if b.lengths.max() == 12)
    keep = np.arange(batch.rows) % 3 == 1
    found = rows_of(batch, keep)
    assert found.rows == keep.sum()
    np.testing.assert_array_equal(found.dense, batch.dense[keep])
    for feature in range(SCHEMA.num_features):
        wanted = [bag.tolist() for bag, kept in zip(bags_of(batch, feature), keep, strict=True) if kept]
        assert [bag.tolist() for bag in bags_of(found, feature)] == wanted
    assert len(found.weights) == len(found.values)


def test_bags_are_found_in_another_order():
    lengths = np.array([2, 0, 1, 3], np.int32)
    assert of_bags(lengths, np.array([3, 0, 1, 2])).tolist() == [3, 4, 5, 0, 1, 2]
    assert of_bags(lengths, np.array([3])).tolist() == of_bags(lengths, np.array([3, 1])).tolist() == [3, 4, 5]


@pytest.mark.parametrize("draw", [usual, extreme])
def test_half_of_the_ids_of_a_feature_are_those_that_its_model_knows(draw):
    """Among 2^63 ids, those drawn evenly are none that a vocabulary holds."""
    wide = replace(
        SCHEMA, features=(SCHEMA.features[0], replace(SCHEMA.features[1], rows=2**63 - 1), SCHEMA.features[2])
    )
    known = np.array([-5, 7, 2**40, 2**63 - 1])
    batches = list(draw(wide, np.random.default_rng(0), None, {1: known}))
    for feature, share in ((0, 0.0), (1, 0.5)):
        ids = np.concatenate([bag for batch in batches for bag in bags_of(batch, feature)])
        assert np.isin(ids, [2**40]).mean() == pytest.approx(share / 2, abs=0.02)
        assert (ids >= 0).all()
        assert (ids < wide.features[feature].rows).all()
