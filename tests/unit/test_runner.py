"""A model as one lane runs it: what each stage took, and scores that are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narsil.backends.fake import FakeBackend
from narsil.engine import runner
from narsil.engine.runner import Runner
from narsil.errors import ForwardFailed
from tests.support import SCHEMA, one_hot, scores_alone


def test_collating_and_executing_are_timed_apart(monkeypatch):
    ticks = iter([10.0, 11.5, 15.5])
    monkeypatch.setattr(runner, "perf_counter", lambda: next(ticks))
    scores, collate, execute = Runner("fake", FakeBackend(SCHEMA)).run([one_hot(2), one_hot(3, seed=1)])
    assert (collate, execute) == (1.5, 4.0)
    expected = np.concatenate([scores_alone(one_hot(2)), scores_alone(one_hot(3, seed=1))])
    np.testing.assert_array_equal(scores["default"], expected)


@pytest.mark.parametrize("whole", [False, True])
def test_rows_are_padded_as_the_backend_asks_unless_they_depend_on_their_company(whole):
    class Padding(FakeBackend):
        def bucket(self, rows):
            return rows + 3

    backend = Padding(SCHEMA)
    scores, _, _ = (Runner("fake", backend, whole=True) if whole else Runner("fake", backend)).run([one_hot(4)])
    assert backend.behaviour.forwards == [4 if whole else 7]
    np.testing.assert_array_equal(scores["default"], scores_alone(one_hot(4)))


@pytest.mark.parametrize("made", [{}, {"default": np.zeros(2, np.float32)}, {"default": np.zeros((3, 1), np.float32)}])
def test_scores_of_another_shape_are_a_failed_forward(made):
    class Wrong(FakeBackend):
        def run(self, batch):
            return made

    found = r"\(2,\)" if made and made["default"].ndim == 1 else r"\(3, 1\)" if made else "nothing"
    with pytest.raises(ForwardFailed, match=rf"task default: the model gave {found} for 3 rows, and not \(3,\)"):
        Runner("fake", Wrong(SCHEMA)).run([one_hot(3)])


WIDE = replace(SCHEMA, tasks=("click", "which"), widths=(1, 4))


@pytest.mark.parametrize("shape", [(3,), (12,), (3, 3), (4, 3), (3, 4, 1)])
def test_a_wide_task_has_its_own_shape(shape):
    class Wrong(FakeBackend):
        def run(self, batch):
            return {**super().run(batch), "which": np.zeros(shape, np.float32)}

    with pytest.raises(ForwardFailed, match=r"task which: the model gave .* for 3 rows, and not \(3, 4\)"):
        Runner("fake", Wrong(WIDE)).run([one_hot(3)])


def test_of_a_wide_task_every_number_has_to_be_one_and_padding_may_be_anything():
    class Broken(FakeBackend):
        at = (5, 0)

        def bucket(self, rows):
            return rows + 1

        def run(self, batch):
            scores = dict(super().run(batch))
            scores["which"][self.at] = np.inf
            return scores

    backend = Broken(WIDE)
    scores, *_ = Runner("fake", backend).run([one_hot(5)])
    expected = scores_alone(one_hot(5))[:, None] + np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(scores["which"], expected)
    assert scores["which"].flags.c_contiguous
    backend.at = (3, 2)
    with pytest.raises(ForwardFailed, match="task which: the model scored row 3, number 2 as inf"):
        Runner("fake", backend).run([one_hot(5)])
