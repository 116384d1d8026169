"""A model's account of lane time."""

from __future__ import annotations

import pytest

from narsil.engine.backlog import Backlog, Backlogs
from narsil.engine.queue import QueueLimits
from narsil.errors import InvalidRequest
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


def test_the_pace_follows_what_is_measured_a_fifth_at_a_time():
    account = backlog()
    account.finish(10, account.begin(10), 1.0)  # 0.1 s a row
    account.finish(10, account.begin(10), 2.0)
    assert account.begin(100) == pytest.approx(100 * (0.1 + 0.2 * 0.1))


def test_a_forward_of_no_rows_is_charged_as_it_was():
    account = backlog()
    account.finish(0, account.begin(0), 0.5)
    assert account.used == 0.5


# --- those of all models


def backlogs(**limits: int) -> Backlogs:
    return Backlogs(QueueLimits(**limits))


def test_a_model_that_is_not_kept_has_an_account_for_as_long_as_it_has_requests():
    everyone, stranger = backlogs(), fake_model()
    first, second = request(model=stranger), request(model=stranger)
    everyone.add(first)
    everyone.add(second)
    assert [(one.model, len(one.queue)) for one in everyone.all] == [(stranger, 2)]
    assert everyone.leave(first)
    assert not everyone.leave(first)
    running = everyone.begin([second])
    assert (everyone.queued, running.running) == (0, 1)
    everyone.forget_if_idle(running)
    assert everyone.all == (running,)  # it runs
    running.running -= 1
    everyone.forget_if_idle(running)
    assert len(everyone.all) == 0
    assert not everyone.leave(second)


def test_the_last_request_to_leave_takes_a_model_that_is_not_kept_with_it():
    everyone, stranger = backlogs(), request(model=fake_model())
    everyone.add(stranger)
    assert everyone.leave(stranger)
    assert (everyone.all, everyone.queued) == ((), 0)


def test_a_refused_request_leaves_no_account_behind():
    everyone = backlogs(max_rows=5)
    with pytest.raises(InvalidRequest):
        everyone.add(request(6, model=fake_model()))
    assert (everyone.all, everyone.queued) == ((), 0)


def test_a_model_that_is_kept_keeps_its_account_until_it_is_let_go():
    everyone, model = backlogs(), fake_model()
    kept = request(model=model)
    everyone.keep(model)
    everyone.add(kept)
    everyone.of(kept).used = 3.0
    assert everyone.leave(kept)
    assert [one.used for one in everyone.all] == [3.0]
    everyone.let_go(model)
    everyone.let_go(fake_model())  # of which nothing is known
    assert len(everyone.all) == 0


def test_a_model_that_is_let_go_is_forgotten_with_its_last_request():
    everyone, model = backlogs(), fake_model()
    kept = request(model=model)
    everyone.keep(model)
    everyone.add(kept)
    everyone.let_go(model)
    assert len(everyone.all) == 1
    assert everyone.leave(kept)
    assert len(everyone.all) == 0


def test_work_that_comes_to_an_idle_model_is_no_claim_on_time_that_has_passed():
    everyone = backlogs()
    busy, back = request(model=fake_model()), request(model=fake_model())
    everyone.add(busy)
    everyone.of(busy).used = 7.0
    everyone.add(back)
    assert everyone.of(back).used == 7.0
    everyone.of(busy).used = 9.0
    everyone.add(request(model=back.model))  # it is not idle: what it has earned by waiting stays
    assert everyone.of(back).used == 7.0
