"""Models whose rows depend on each other are found, never batched, and served whole where they are asked for so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from narsil.backends.fake import FakeBackend, fake_scores
from narsil.engine.engine import Engine
from narsil.engine.independence import dependence
from narsil.engine.runner import Runner
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.errors import ConfigError
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


@pytest.mark.parametrize("padding", [0, 3])
def test_rows_that_stand_for_themselves_pass(padding):
    assert dependence(Scored(lambda scores, batch: scores, padding)) is None


def test_rounding_that_follows_from_the_batch_s_size_is_no_dependence():
    assert dependence(Scored(lambda scores, batch: scores * (1 + 1e-6 * (batch.rows % 3)))) is None


def test_scores_of_sixteen_bits_may_differ_by_their_step():
    def rounded(scores, batch):
        shares = np.float16(1 / (1 + np.exp(-scores / 1e4)))
        return shares if batch.rows % 2 else np.nextafter(shares, np.float16(2))

    assert dependence(Scored(rounded)) is None


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
