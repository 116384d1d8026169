"""The check that every compile must pass: how far one model's scores lie from another's, and over which rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.compiled_info import Deviation
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.fake import fake_scores
from narsil.compile import gate
from narsil.compile.calibration import Calibration
from narsil.compile.gate import auc, compare, deviation_of, random_batches, rank_correlation, require
from narsil.errors import ArtifactError
from tests.support import SCHEMA

FOUR = np.array([0.1, 0.2, 0.3, 0.4], np.float32)


def calibration(rows: int, labels: bool = True) -> Calibration:
    """Dense values that no random row has; labels 0, 1, 0, 1, ..."""
    random = np.random.default_rng(5)
    ids = np.column_stack([random.integers(0, feature.rows, rows) for feature in SCHEMA.features])
    dense = 100 + np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return Calibration(dense, ids, (np.arange(rows, dtype=np.float32) % 2)[:, None] if labels else None)


# --- the rows


def test_random_rows_are_many_of_both_kinds_and_cover_every_table():
    batches = list(random_batches(SCHEMA))
    assert sum(batch.rows for batch in batches) >= gate.RANDOM_ROWS >= 10_000
    assert [batch.rows for batch in batches[:6]] == [1, 2, 7, 1, 2, 7]
    for one_hot in (True, False):
        kind = [batch for batch in batches if batch.one_hot is one_hot]
        assert {batch.rows for batch in kind} == {1, 2, 7, 500}  # odd sizes of both kinds
        assert sum(batch.rows for batch in kind) >= gate.RANDOM_ROWS / 2
        lengths = np.concatenate([batch.lengths for batch in kind])
        assert set(lengths.tolist()) == ({1} if one_hot else {0, 1, 2, 3, 4})
    for number, rows in enumerate(SCHEMA.rows):
        ids = np.concatenate([ids_of(batch, number) for batch in batches])
        assert set(ids.tolist()) == set(range(rows))  # the first and the last id among them
    dense = np.concatenate([batch.dense for batch in batches])
    assert dense.shape == (sum(batch.rows for batch in batches), SCHEMA.dense_dim)
    assert 0 <= dense.min() < 0.01
    assert 0.99 < dense.max() < 1
    assert dense.dtype == np.float32


def ids_of(batch, feature: int) -> np.ndarray:
    ends = np.cumsum(batch.lengths)
    first, last = feature * batch.rows, (feature + 1) * batch.rows
    return batch.values[(ends[first - 1] if first else 0) : ends[last - 1]]


def test_the_same_seed_draws_the_same_rows_and_another_draws_others():
    first, again = next(random_batches(SCHEMA)), next(random_batches(SCHEMA))
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.dense, again.dense)
    assert not np.array_equal(first.dense, next(random_batches(SCHEMA, seed=1)).dense)


def test_ids_are_as_wide_as_the_model_s():
    wide = ModelSchema(1, (Feature("a", "t_a", rows=2**40, dim=8),))
    assert next(random_batches(wide)).values.dtype == np.int64
    assert next(random_batches(SCHEMA)).values.dtype == np.int32


def test_dense_rows_are_the_calibration_s_where_there_is_one():
    given_rows = calibration(40)
    drawn = np.concatenate([batch.dense for batch in random_batches(SCHEMA, given_rows)])
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in given_rows.dense.tolist()}


def test_the_calibration_s_own_rows_come_whole_in_order_and_key_major():
    given_rows = calibration(1203)
    batches = list(gate.calibration_batches(given_rows))
    assert [batch.rows for batch in batches] == [500, 500, 203]
    np.testing.assert_array_equal(np.concatenate([batch.dense for batch in batches]), given_rows.dense)
    ids = np.concatenate([batch.values.reshape(SCHEMA.num_features, -1) for batch in batches], axis=1)
    np.testing.assert_array_equal(ids.T, given_rows.ids)
    assert all(batch.one_hot and batch.lengths.tolist() == [1] * len(batch.values) for batch in batches)
    assert list(gate.calibration_batches(None)) == []


# --- the comparison

TWO_TASKS = ModelSchema(SCHEMA.dense_dim, SCHEMA.features, ("click", "buy"))


def both(batch):
    return {"click": fake_scores(batch), "buy": -fake_scores(batch)}


def test_each_task_is_judged_by_its_own_scores():
    def subject(batch):
        return {"click": both(batch)["click"], "buy": both(batch)["buy"] + np.float32(0.5)}

    found = compare(TWO_TASKS, both, subject)
    rows = sum(batch.rows for batch in random_batches(SCHEMA))
    assert found["click"] == Deviation(rows=rows, max_abs=0.0, mean_abs=0.0, rank_correlation=1.0)
    assert found["buy"].max_abs == pytest.approx(0.5, rel=1e-3)
    assert found["buy"].mean_abs == pytest.approx(0.5, rel=1e-3)


def test_one_row_that_deviates_is_found_wherever_it_is():
    def subject(batch):
        scores = np.array(fake_scores(batch))
        scores[-1] += 3 * (batch.rows == 7 and not batch.one_hot)
        return {"default": scores}

    found = compare(SCHEMA, lambda batch: {"default": fake_scores(batch)}, subject)
    assert found["default"].max_abs == pytest.approx(3, rel=1e-3)
    assert 0 < found["default"].mean_abs < 1e-3


def test_labels_belong_to_the_calibration_s_rows_and_to_their_task():
    given_rows = calibration(600)
    flipped = np.column_stack([given_rows.labels, 1 - given_rows.labels])
    given_rows = Calibration(given_rows.dense, given_rows.ids, flipped)

    def knowing(batch):
        """Scores the calibration's odd rows high, by their dense values."""
        odd = (batch.dense[:, 0] - 100) // 3 % 2
        return {"click": odd.astype(np.float32), "buy": odd.astype(np.float32)}

    def ignorant(batch):
        return dict.fromkeys(("click", "buy"), np.zeros(batch.rows, np.float32))

    found = compare(TWO_TASKS, knowing, ignorant, given_rows)
    assert (found["click"].auc, found["click"].auc_change) == (1.0, -0.5)
    assert (found["buy"].auc, found["buy"].auc_change) == (0.0, 0.5)
    assert found["click"].labelled_rows == 600
    unlabelled = compare(TWO_TASKS, knowing, ignorant, Calibration(given_rows.dense, given_rows.ids))
    assert (unlabelled["click"].auc, unlabelled["click"].labelled_rows) == (None, 0)
    assert unlabelled["click"].rows == found["click"].rows


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_scores_no_number_is_no_measure(value):
    def broken(batch):
        return {"default": np.where(batch.rows == 7, np.float32(value), fake_scores(batch))}

    with pytest.raises(ArtifactError, match="the artifact scores default as NaN or infinity"):
        compare(SCHEMA, broken, lambda batch: {"default": fake_scores(batch)})


def test_a_deviation_is_measured_in_more_digits_than_scores_have():
    found = deviation_of(
        np.array([1.0, 1.0], np.float32), np.array([np.nextafter(np.float32(1), np.float32(2)), 1.0], np.float32)
    )
    assert found.max_abs == 2.0**-23
    assert found.mean_abs == 2.0**-24
    assert (found.rows, found.labelled_rows, found.auc, found.auc_change) == (2, 0, None, None)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_labels_of_one_kind_give_no_auc(labels):
    found = deviation_of(FOUR, FOUR, 2, np.array(labels, np.float32))
    assert (found.auc, found.auc_change, found.labelled_rows) == (None, None, 0)


def test_the_auc_is_of_the_labelled_rows_alone():
    found = deviation_of(FOUR, FOUR[::-1].copy(), 2, np.array([0, 1], np.float32))
    assert (found.auc, found.auc_change, found.labelled_rows) == (1.0, -1.0, 2)


# --- the verdict


def test_a_deviation_at_the_limit_passes_and_one_beyond_it_or_none_at_all_does_not():
    at = Deviation(rows=10, max_abs=0.01, mean_abs=0.001, rank_correlation=1.0)
    require(at, 0.01, "bf16")
    with pytest.raises(ArtifactError, match=r"bf16 scores deviate .* up to 1.00e-02 .* 10 rows, .* 9e-03 is allowed"):
        require(at, 0.009, "bf16")
    with pytest.raises(ArtifactError, match="nothing was written"):
        require(Deviation(rows=10, max_abs=float("nan"), mean_abs=0.0, rank_correlation=1.0), 1e9, "fp32")


# --- the statistics

values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=12)


@given(values, st.randoms(use_true_random=False))
def test_auc_is_the_share_of_pairs_in_the_right_order(scores, dice):
    labels = [dice.random() < 0.5 for _ in scores]
    labels[:2] = [True, False]
    pairs = [(p, n) for p, y in zip(scores, labels, strict=True) if y for n in negatives(scores, labels)]
    share = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert auc(np.array(labels, np.float32), np.array(scores, np.float32)) == pytest.approx(share, abs=1e-12)


def negatives(scores: list[float], labels: list[bool]) -> list[float]:
    return [score for score, label in zip(scores, labels, strict=True) if not label]


@given(values, st.randoms(use_true_random=False))
def test_rank_correlation_is_pearson_s_of_ranks_that_ties_share(first, dice):
    second = [dice.choice([0.0, 0.5, 1.0]) for _ in first]

    def ranks(numbers):
        return [1 + sum(o < n for o in numbers) + (sum(o == n for o in numbers) - 1) / 2 for n in numbers]

    found = rank_correlation(np.array(first, np.float32), np.array(second, np.float32))
    if len(set(first)) == len(set(second)) == 1:
        assert found == 1.0
    elif 1 in (len(set(first)), len(set(second))):
        assert found == 0.0
    else:
        assert found == pytest.approx(np.corrcoef(ranks(first), ranks(second))[0, 1], abs=1e-12)
