"""A model's account of lane time."""

from __future__ import annotations

import pytest

from narsil.engine.backlog import Backlog
from narsil.engine.queue import QueueLimits
from tests.support import fake_model, request


def backlog(share: float = 1.0) -> Backlog:
    return Backlog(fake_model(share=share), QueueLimits())


def test_what_a_forward_took_is_charged_over_the_model_s_share():
    one, double = backlog(), backlog(share=2.0)
    for account in (one, double):
        account.finish(10, account.begin(10), 0.5)
    assert one.used == pytest.approx(0.5)
    assert double.used == pytest.approx(0.25)


def test_a_forward_that_still_runs_is_charged_as_predicted():
    account = backlog()
    account.finish(10, account.begin(10), 1.0)
    charged = account.begin(5)
    assert charged == pytest.approx(0.5)
    assert account.used == pytest.approx(1.5)
    account.finish(5, charged, 0.25)
    assert account.used == pytest.approx(1.25)


def test_a_model_that_wanted_nothing_has_no_credit_against_those_that_worked():
    busy, back = backlog(), backlog()
    busy.used = 7.0
    busy.queue.add(request())
    back.join([busy, back])
    assert back.used == 7.0
    back.used = 9.0
    back.join([busy, back])  # and what it had more than they is not forgiven
    assert back.used == 9.0


def test_among_idle_models_nobody_has_to_catch_up():
    idle, back = backlog(), backlog()
    idle.used = 7.0
    back.join([idle, back])
    assert back.used == 0.0
