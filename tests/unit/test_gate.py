"""The check that every compile must pass: how far one model's scores lie from another's, and over which rows."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.compiled_info import Deviation
from narsil.artifacts.schema import ModelSchema
from narsil.backends.fake import fake_scores
from narsil.compile.calibration import Calibration
from narsil.compile.gate import (
    auc,
    compare,
    deviation_of,
    limits_for,
    limits_of,
    log_odds_deviation,
    problem_of,
    rank_correlation,
    require,
    usual_batches,
)
from narsil.errors import ArtifactError
from tests.support import SCHEMA

FOUR = np.array([0.1, 0.2, 0.3, 0.4], np.float32)


def calibration(rows: int, labels: bool = True) -> Calibration:
    """Bags of 0 to 2; dense values that no drawn row has; labels 0, 1, 0, 1, ..."""
    random = np.random.default_rng(5)
    lengths = random.integers(0, 3, (rows, SCHEMA.num_features), np.int32)
    values = random.integers(0, np.repeat(np.tile(SCHEMA.rows, rows), lengths.ravel()))
    dense = 100 + np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    given = (np.arange(rows, dtype=np.float32) % 2)[:, None] if labels else None
    return Calibration(dense, lengths, values, labels=given)


# --- the comparison

TWO_TASKS = ModelSchema(SCHEMA.dense_dim, SCHEMA.features, ("click", "buy"))


def both(batch):
    return {"click": fake_scores(batch), "buy": -fake_scores(batch)}


def logits(batch) -> np.ndarray:
    """(B,) from the ids and dense values of a row, between -3 and 3."""
    return 3 * np.sin(fake_scores(batch).astype(np.float64))


def clicks(batch, logit: float | np.ndarray = 0.0) -> np.ndarray:
    """(B,) probabilities in float64."""
    return 1 / (1 + np.exp(-logits(batch) - logit))


def click_scores(batch):
    return {"default": clicks(batch).astype(np.float32)}


def test_each_task_is_judged_by_its_own_scores():
    def subject(batch):
        return {"click": both(batch)["click"], "buy": both(batch)["buy"] * np.float32(1.25)}

    found = compare(TWO_TASKS, both, subject)
    assert found["click"].max_abs == found["click"].extreme_max_abs == 0
    assert found["click"].rows == sum(batch.rows for batch in usual_batches(SCHEMA))
    assert found["click"].extreme_rows > 1_000
    # Scores of any size are judged by it.
    assert found["buy"].max_abs == pytest.approx(0.25, rel=1e-3)
    assert found["buy"].extreme_max_abs == pytest.approx(0.25, rel=1e-3)
    assert (found["buy"].log_odds, found["buy"].bias) == (None, None)


def test_one_row_that_deviates_is_found_wherever_it_is():
    def subject(batch):
        scores = np.array(click_scores(batch)["default"])
        scores[-1] = 1 - scores[-1] if batch.rows == 7 and not batch.one_hot else scores[-1]
        return {"default": scores}

    found = compare(SCHEMA, click_scores, subject)
    assert found["default"].max_abs > 0.01
    assert 0 < found["default"].mean_abs < 1e-4


def test_labels_belong_to_the_calibration_s_rows_and_to_their_task():
    given_rows = calibration(600)
    flipped = np.column_stack([given_rows.labels, 1 - given_rows.labels])
    given_rows = replace(given_rows, labels=flipped)

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
    unlabelled = compare(TWO_TASKS, knowing, ignorant, replace(given_rows, labels=None))
    assert (unlabelled["click"].auc, unlabelled["click"].labelled_rows) == (None, 0)
    assert unlabelled["click"].rows == found["click"].rows


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_the_reference_scores_as_no_number_are_left_out_and_counted(value):
    def broken(batch):
        return {"default": np.where(batch.dense[:, 0] < 0, np.float32(value), clicks(batch).astype(np.float32))}

    asked = []

    def subject(batch):
        asked.append(batch)
        return click_scores(batch)

    found = compare(SCHEMA, broken, subject)["default"]
    assert found.max_abs == 0
    assert all((batch.dense[:, 0] >= 0).all() for batch in asked)
    assert found.left_out > 1_000
    assert found.rows + found.extreme_rows == sum(batch.rows for batch in asked)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_scores_no_number_is_no_measure(value):
    def broken(batch):
        return {"default": np.where(batch.dense[:, 0] >= 0, np.float32(value), clicks(batch).astype(np.float32))}

    with pytest.raises(ArtifactError, match=r"scores \d+ of 10020 usual rows as NaN or infinity: it is no measure"):
        compare(SCHEMA, broken, click_scores)


def test_a_task_may_have_several_scores_a_row():
    def wide(batch):
        return {"default": np.column_stack([clicks(batch), clicks(batch, 1)]).astype(np.float32)}

    def subject(batch):
        scores = wide(batch)["default"]
        scores[-1, 1] = 0
        return {"default": scores}

    found = compare(SCHEMA, wide, subject, calibration(600))["default"]
    assert found.max_abs > 0.1
    assert found.rows == 10_020 + 600
    assert found.auc is None


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


# --- against float64


def exact_scores(batch):
    return {"default": clicks(batch)}


def test_float64_is_the_measure_where_there_is_one_and_the_artifact_is_measured_too():
    rounded = compare(SCHEMA, click_scores, click_scores, exact=exact_scores)["default"]
    assert rounded.max_abs == rounded.own_max_abs == pytest.approx(2.0**-25, rel=1e-2)
    assert rounded.own_log_odds == rounded.log_odds
    assert rounded.own_extreme == rounded.extreme_mean_abs
    told = compare(SCHEMA, click_scores, exact_scores)["default"]
    assert (told.own_max_abs, told.own_log_odds, told.own_extreme) == (None, None, None)


def test_an_artifact_that_is_far_from_its_own_operations_is_no_measure():
    def otherwise(batch):
        return {"default": clicks(batch, 0.03).astype(np.float32)}

    with pytest.raises(ArtifactError, match="the artifact itself lies farther from float64 than rounding explains"):
        compare(SCHEMA, otherwise, click_scores, exact=exact_scores)


def lively(batch, error: float):
    """Logits whose last digits are wrong by so much, one way or the other."""
    signs = np.sign(np.sin(1e4 * logits(batch)))
    return {"default": (1 / (1 + np.exp(-logits(batch) - error * signs))).astype(np.float32)}


def test_fp32_may_be_twice_as_far_from_float64_as_the_artifact_is():
    def judged(error):
        found = compare(
            SCHEMA, lambda batch: lively(batch, 1e-4), lambda batch: lively(batch, error), exact=exact_scores
        )
        return problem_of(found["default"], limits_for("fp32", None, found["default"]))

    assert judged(1e-4) is None
    assert judged(-1.9e-4) is None
    assert "scores deviate by up to" in judged(2.2e-4)


def test_fp32_has_room_for_luck_where_the_artifact_has_none():
    def judged(error):
        found = compare(SCHEMA, click_scores, lambda batch: lively(batch, error), exact=exact_scores)["default"]
        return problem_of(found, limits_for("fp32", None, found))

    assert judged(7e-6) is None
    assert judged(1e-5) is not None


# --- the verdict

AT = Deviation(rows=10, max_abs=0.01, mean_abs=0.001, rank_correlation=1.0)


def test_a_deviation_at_the_limit_passes_and_one_beyond_it_or_none_at_all_does_not():
    require(AT, limits_of(0.01), "bf16")
    with pytest.raises(ArtifactError, match=r"in bf16, scores deviate .* up to 1.00e-02 .* 10 rows, .* 9.0e-03 is al"):
        require(AT, limits_of(0.009), "bf16")
    with pytest.raises(ArtifactError, match="nothing was written"):
        require(replace(AT, max_abs=float("nan")), limits_of(1e9), "fp32")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"log_odds": 0.101}, r"the log-odds of scores deviate by up to 1.01e-01 .* at most 1.0e-01 is allowed"),
        ({"bias": 0.041}, r"scores are \+4.1e-02 off on average .* at most 4.0e-02 is allowed"),
        ({"bias": -0.041}, r"scores are -4.1e-02 off"),
        ({"extreme_mean_abs": 0.011, "extreme_rows": 7}, r"1.10e-02 on average over 7 rows of long bags"),
        *(({name: float("nan")}, "allowed") for name in ("log_odds", "bias", "extreme_mean_abs")),
    ],
)
def test_every_figure_has_its_limit(changed, says):
    within: dict[str, Any] = {"log_odds": 0.1, "bias": -0.04, "extreme_mean_abs": 0.01}
    assert problem_of(replace(AT, **within), limits_of(0.01)) is None
    assert re.search(says, problem_of(replace(AT, **{**within, **changed}), limits_of(0.01)))


def test_the_advice_is_one_that_there_is():
    with pytest.raises(ArtifactError, match="choose a higher precision, or auto; or allow more with --max-deviation"):
        require(AT, limits_of(0), "int8")
    with pytest.raises(ArtifactError, match="To serve it so, allow more with --max-deviation"):
        require(AT, limits_of(0), "fp32")


def test_a_limit_that_is_given_is_every_precision_s():
    measured = replace(AT, own_max_abs=1e-5, own_extreme=0.0)
    assert limits_for("fp32", 1e-6, measured) == limits_for("int8", 1e-6, measured) == limits_of(1e-6)
    assert limits_for("bf16", None, measured) == limits_of(2e-3)
    assert limits_for("fp32", None, AT) == limits_of(1e-5)
    assert limits_for("fp32", None, measured).score == pytest.approx(2.2e-5)
    assert limits_for("fp32", None, measured).log_odds == pytest.approx(2e-5)
    assert limits_for("fp32", None, replace(measured, own_log_odds=1.0)).log_odds == pytest.approx(2 + 2e-5)
    assert limits_for("fp32", None, replace(measured, own_extreme=1.0)).extreme == pytest.approx(2 + 2e-6)


# --- faults that the gate has to see


def judge(reference, subject):
    return problem_of(compare(SCHEMA, reference, subject)["default"], limits_of(2e-3))


def rare(batch, moved: float = 0.0):
    """A base rate of 5e-5."""
    return {"default": (1 / (1 + np.exp(10 - logits(batch) / 10 - moved))).astype(np.float32)}


def test_rare_events_whose_scores_are_twenty_times_too_high_are_refused():
    assert np.mean(np.concatenate([rare(batch)["default"] for batch in usual_batches(SCHEMA)])) < 6e-5
    assert judge(rare, rare) is None
    assert "log-odds of scores deviate by up to 2.98e+00" in judge(rare, lambda batch: rare(batch, 3.0))
    assert "log-odds" in judge(rare, lambda batch: rare(batch, 0.03))
    assert judge(rare, lambda batch: rare(batch, 0.005)) is None


def test_a_mean_that_is_off_is_refused_where_no_score_is():
    def rarest(batch, moved=0.0):
        """Below what log-odds tell apart."""
        return {"default": clicks(batch, -25 + moved).astype(np.float32)}

    assert "off on average" in judge(rarest, lambda batch: rarest(batch, 0.02))


def test_a_fault_of_long_bags_alone_is_refused():
    def pooled(batch, divisor=lambda lengths: np.maximum(lengths, 1)):
        lengths = batch.lengths.reshape(-1, batch.rows)
        bags = np.repeat(np.arange(batch.lengths.size), batch.lengths)
        sums = np.bincount(bags, batch.values % 7, batch.lengths.size).reshape(lengths.shape)
        return {"default": (1 / (1 + np.exp(-(sums / divisor(lengths)).mean(axis=0)))).astype(np.float32)}

    faulty = judge(pooled, lambda batch: pooled(batch, lambda lengths: np.clip(lengths, 1, 8)))
    assert "rows of long bags" in faulty


@pytest.mark.parametrize(
    "fault",
    [
        lambda batch: bags_with(batch, 0),  # id 0 as padding
        lambda batch: np.abs(batch.dense).max(axis=1) > 30,  # a clamp that is dropped
        lambda batch: (batch.dense < 0).any(axis=1),
        lambda batch: bags_with(batch, SCHEMA.rows[2] - 1, feature=2),  # the last row of a table of 1000
    ],
)
def test_faults_of_some_rows_are_refused(fault):
    def subject(batch):
        return {"default": clicks(batch, np.where(fault(batch), 0.5, 0)).astype(np.float32)}

    assert judge(click_scores, click_scores) is None
    assert judge(click_scores, subject) is not None


def bags_with(batch, wanted: int, feature: int = 0) -> np.ndarray:
    """(B,) whether a feature's bag holds an id."""
    bags = np.repeat(np.arange(batch.lengths.size), batch.lengths)
    first = feature * batch.rows
    return np.bincount(bags[batch.values == wanted], minlength=batch.lengths.size)[first : first + batch.rows] > 0


# --- log-odds


@given(st.floats(1e-4, 0.999), st.floats(-2, 2))
def test_log_odds_are_told_apart_wherever_the_score_is(score, moved):
    odds = score / (1 - score) * np.exp(moved)
    found = log_odds_deviation(np.array([score]), np.array([odds / (1 + odds)]))
    assert float(found[0]) == pytest.approx(abs(moved), rel=0.1, abs=3e-4)


def test_log_odds_end_at_a_millionth():
    def apart(one, other):
        return float(log_odds_deviation(np.array([one]), np.array([other]))[0])

    assert apart(1e-6, 1e-9) == pytest.approx(np.log(2), rel=0.01)
    assert apart(0.0, 1e-3) == pytest.approx(np.log(1e-3 / 1e-6), rel=0.01)
    assert apart(1.0, 1 - 1e-3) == pytest.approx(np.log(1e-3 / 1e-6), rel=0.05)


def test_none_and_all_are_probabilities_and_what_is_beyond_is_none():
    ends = np.array([0.0, 1.0])
    assert deviation_of(ends, ends).log_odds == 0
    assert deviation_of(np.array([-1e-9, 1.0]), ends).log_odds is None
    assert deviation_of(np.array([0.0, 1 + 1e-9]), ends).log_odds is None
    assert deviation_of(np.array([0.0, 2.0]), np.array([0.0, 3.0])).max_abs == 0.5


def test_what_float32_cannot_tell_apart_is_no_deviation():
    one = np.float32(1)
    below = np.nextafter(one, np.float32(0))
    exact = np.array([1 - 1e-9, 1 - 3e-8, 1e-45, 1e-30, 0.5 + 2.0**-26])
    found = np.array([one, below, 0, 0, 0.5], np.float32)
    assert log_odds_deviation(exact, found).tolist() == [0, 0, 0, 0, 0]
    assert log_odds_deviation(np.array([one]), np.array([0.99]))[0] > 5
    assert log_odds_deviation(np.array([0.0]), np.array([0.01]))[0] > 5
    assert np.isnan(log_odds_deviation(np.array([0.5]), np.array([np.nan])))[0]


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
