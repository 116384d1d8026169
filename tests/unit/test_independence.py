"""Models whose rows depend on each other are found, never batched, and served whole where they are asked for so."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from narsil.backends.fake import FakeBackend, FakeBehaviour, fake_scores
from narsil.engine.collate import Collator
from narsil.engine.engine import Engine
from narsil.engine.independence import ROWS, dependence, probe_rows
from narsil.engine.runner import Runner
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.errors import ArtifactError, ConfigError
from tests.support import SCHEMA, engine_with, one_hot, request


class Scored(FakeBackend):
    """A backend whose scores are made of those of independent rows."""

    def __init__(self, change: Callable[[Any, Any], Any], padding: int = 0) -> None:
        super().__init__(SCHEMA)
        self.change = change
        self.padding = padding

    def run(self, batch):
        return {"default": np.asarray(self.change(fake_scores(batch).astype(np.float64), batch), np.float32)}

    def bucket(self, rows):
        return rows + self.padding

    def share(self):
        return Scored(self.change, self.padding)


def softmax(scores, batch):
    powers = np.exp((scores - scores.max()) / 1000)
    return powers / powers.sum()


DEPENDENT = {
    "a softmax over the request": softmax,
    "scores less their mean": lambda scores, batch: scores - scores.mean(),
    "statistics of the batch": lambda scores, batch: (scores - scores.mean()) / (scores.std() + 1),
    "the row before": lambda scores, batch: scores + np.roll(scores, 1),
    "the number of rows": lambda scores, batch: scores / batch.rows,
    "the place in the batch": lambda scores, batch: scores + np.arange(batch.rows),
    "ids that lie by rows": lambda scores, batch: scores + batch.values.reshape(-1)[: batch.rows],
}


@pytest.mark.parametrize("change", DEPENDENT.values(), ids=DEPENDENT)
def test_rows_that_depend_on_others_are_found(change):
    assert dependence(Scored(change)) is not None


def rare(scores):
    """Scores about a base rate of 5e-5."""
    return 5e-5 * (1 + 0.5 * np.tanh(scores / 1000))


def coarse(values):
    """Rounded to 8 bits, with one step for the whole batch."""
    step = np.abs(values).max() / 127
    return np.round(values / step) * step


SLIGHT = {
    "a millionth of the mean of a rare event": lambda scores, batch: rare(scores) + 1e-4 * rare(scores).mean(),
    "the number of rows of a rare event": lambda scores, batch: rare(scores) / batch.rows,
    "the padding of a rare event": lambda scores, batch: rare(scores) * (1 + 0.1 * (batch.lengths == 0).mean()),
    "the place of a rare event": lambda scores, batch: rare(scores) * (1 + 0.01 * np.arange(batch.rows)),
    "a step that the batch's largest number sets": lambda scores, batch: coarse(scores),
    "the largest row alone": lambda scores, batch: np.where(scores == scores.max(), scores * 1.01, scores),
    "the first row alone": lambda scores, batch: rare(scores) + 1e-4 * rare(scores)[0],
    "the second row alone": lambda scores, batch: rare(scores) + 1e-4 * rare(scores)[1 % batch.rows],
    "a place far from the first": lambda scores, batch: scores * (1 + 0.01 * (np.arange(batch.rows) >= 17)),
    "one output of several": lambda scores, batch: np.stack([scores, scores + 1e-3 * scores.mean()], axis=1),
}


@pytest.mark.parametrize("change", SLIGHT.values(), ids=SLIGHT)
def test_a_score_that_moves_little_against_one_and_not_against_itself_is_found(change):
    assert dependence(Scored(change)) is not None


def test_what_is_told_names_the_row_and_both_scores():
    told = dependence(Scored(lambda scores, batch: scores - scores.mean()))
    assert re.fullmatch(
        r"it scores default of row \d+ (-?\d+(\.\d+)?) among 24 rows and (?!\1 )-?\d+(\.\d+)? beside others", told
    ), told


def test_scores_of_any_shape_that_stand_for_themselves_pass():
    assert dependence(Scored(lambda scores, batch: np.stack([scores, rare(scores), 0 * scores], axis=1))) is None


def test_every_task_is_held_to_its_own_scores():
    class Two(Scored):
        def __init__(self, change):
            super().__init__(change)
            self.schema = replace(SCHEMA, tasks=("coarse", "fine"), widths=())

        def run(self, batch):
            found = super().run(batch)["default"]
            return {"coarse": (found > 2000).astype(np.float32), "fine": found}

    assert dependence(Two(lambda scores, batch: scores)) is None
    told = dependence(Two(lambda scores, batch: scores * (1 + 0.005 * (batch.rows == 1))))
    assert told is not None
    assert "it scores fine of row" in told
    assert told.endswith(" alone")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_that_spoils_its_company_is_found(bad):
    def spoiled(scores, batch):
        return scores + (bad if (scores > 4000).any() else 0)

    assert dependence(Scored(lambda scores, batch: np.where(scores > 4000, bad, scores))) is None
    assert dependence(Scored(spoiled)) is not None


def test_a_model_that_scores_by_chance_is_refused_and_not_told_as_a_dependence():
    random = np.random.default_rng(0)
    with pytest.raises(
        ArtifactError, match=r"the same batch otherwise each time \(task default, row \d+: .*\.eval\(\)"
    ):
        dependence(Scored(lambda scores, batch: scores * (random.random(batch.rows) < 0.5)))


@pytest.mark.parametrize("group", [5, 16, 60])
def test_a_model_that_takes_rows_by_groups_depends_on_company(group):
    def grouped(scores, batch):
        return scores.reshape(-1, group).ravel()

    assert re.match(rf"it takes {group} rows and fails on 24 \(cannot reshape", str(dependence(Scored(grouped))))


def test_a_size_that_fails_is_named():
    def few(scores, batch):
        if batch.rows > 100:
            raise ValueError("no more than a hundred")
        return scores

    told = dependence(Scored(few))
    assert told == "it takes 24 rows and fails on 300 among 300 rows (no more than a hundred)"


@pytest.mark.parametrize("features", probe_rows(SCHEMA), ids=["one-hot", "jagged"])
def test_the_rows_that_change_places_have_as_many_ids_and_the_last_is_padding(features):
    batch = Collator(SCHEMA).collate([features])
    lengths = batch.lengths.reshape(4, -1)
    assert batch.rows == 2 * ROWS + 1
    np.testing.assert_array_equal(lengths[:, :ROWS], lengths[:, ROWS:-1])
    assert not batch.dense[-1].any()
    assert np.abs(batch.dense).max() > 5
    ids = np.split(batch.values, np.cumsum(lengths.sum(axis=1))[:-1])
    assert [int(each.min()) for each in ids] == [0, 0, 0, 0]
    if batch.one_hot:
        assert [int(each.max()) for each in ids] == (SCHEMA.rows - 1).tolist()
        assert not batch.values.reshape(4, -1)[:, -1].any()
    else:
        assert not lengths[:, -1].any()
        assert set(lengths.ravel()) == {0, 1, 2, 3}


def test_a_model_of_one_id_a_feature_is_told_as_such():
    def flat(scores, batch):
        return scores + 0 * batch.values.reshape(-1, batch.rows)[0]

    told = dependence(Scored(flat))
    assert told is not None
    assert re.match(r"it takes one id of each feature and fails on bags of 0 to 3 \(.*cannot reshape", told)


def test_what_a_model_of_no_rows_at_all_raises_is_its_own():
    def fails(scores, batch):
        raise ArtifactError("no such luck")

    with pytest.raises(ArtifactError, match=r"^no such luck$"):
        dependence(Scored(fails))


def test_a_branch_on_rows_that_no_trial_shows_is_a_dependence():
    backend = Scored(lambda scores, batch: scores * 2 if batch.rows > 400 else scores)
    assert dependence(backend) is None
    backend.branch = "forward branches on a number that follows from the rows"
    assert dependence(backend) == f"{backend.branch}, so that no trial tells what it does to others"


def test_what_it_costs_is_some_dozens_of_small_forwards():
    behaviour = FakeBehaviour()
    assert dependence(FakeBackend(SCHEMA, behaviour)) is None
    assert len(behaviour.forwards) <= 65
    assert sorted(behaviour.forwards)[-3:] == [29, 300, 300]


@pytest.mark.parametrize("padding", [0, 3])
def test_rows_that_stand_for_themselves_pass(padding):
    assert dependence(Scored(lambda scores, batch: scores, padding)) is None


def test_rounding_that_follows_from_the_batch_s_size_is_no_dependence():
    assert dependence(Scored(lambda scores, batch: scores * (1 + 1e-6 * (batch.rows % 3)))) is None


def brain(scores):
    """As bfloat16 has them."""
    return (np.asarray(scores, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize(("kind", "step"), [(np.float16, 2**-10), (brain, 2**-7)], ids=["half", "bfloat16"])
def test_scores_of_sixteen_bits_may_differ_by_their_step(kind, step):
    def shares(scores):
        return 1 / (1 + np.exp(-scores / 1e4))

    def moved(scores, batch, steps):
        return kind(kind(shares(scores)) * np.float32(1 + steps * step * (batch.rows % 2)))

    assert dependence(Scored(partial(moved, steps=2))) is None
    assert dependence(Scored(partial(moved, steps=12))) is not None
    assert dependence(Scored(lambda scores, batch: kind(shares(scores - scores.mean())))) is not None


def test_padding_that_changes_a_score_is_found():
    told = dependence(Scored(lambda scores, batch: scores + 100 * (batch.rows == 27), padding=3))
    assert told is not None
    assert "of the size that the backend asks for" in told


def test_a_model_that_takes_no_row_alone_depends_on_company():
    def two_at_least(scores, batch):
        if batch.rows < 2:
            raise ValueError("expected more than 1 value per channel")
        return scores

    assert "expected more than 1 value" in str(dependence(Scored(two_at_least)))


def test_a_row_that_is_no_number_everywhere_is_no_dependence():
    assert dependence(Scored(lambda scores, batch: np.where(scores > 2000, np.nan, scores))) is None


def test_what_fails_on_all_rows_is_raised_and_not_told_as_a_dependence():
    def never(scores, batch):
        raise ValueError("never")

    with pytest.raises(ValueError, match="never"):
        dependence(Scored(never))


def test_an_engine_that_fuses_takes_no_model_that_is_served_whole():
    model = ServedModel("m", "1", [Scored(softmax)], whole=True)
    with pytest.raises(ConfigError, match=r"scores a row by its company.*--execution-mode worker"):
        Engine(1, BatchPolicy(max_requests=2)).add(model)


def test_a_request_of_such_a_model_is_one_forward_whatever_a_batch_may_hold():
    backend = Scored(softmax, padding=5)
    model = ServedModel("m", "1", [backend], whole=True)
    with engine_with(model=model, policy=BatchPolicy(max_requests=1, max_rows=4)) as engine:
        made = request(11, model=model)
        engine.submit(made)
        scores = made.reply.wait().scores["default"]
    np.testing.assert_allclose(scores, Runner("m", backend, whole=True).run([one_hot(11)])[0]["default"])
    assert scores.sum() == pytest.approx(1, abs=1e-6)
