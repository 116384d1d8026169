"""Whoever watches hears of every end and every batch, and cannot harm what it watches."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from narsil.backends.fake import FakeBackend, FakeBehaviour
from narsil.clock import FakeClock
from narsil.engine.queue import QueueLimits
from narsil.engine.served_model import ServedModel
from narsil.errors import ModelNotFound, QueueFull
from narsil.telemetry.observer import CountingObserver, Observer
from tests.support import SCHEMA, engine_with, fake_model, one_hot, request, wait_until


def test_every_end_is_told_by_its_reason():
    clock, behaviour, observer = FakeClock(), FakeBehaviour(hold=threading.Event()), CountingObserver()
    behaviour.fail_if = lambda batch: batch.rows == 5
    with engine_with(behaviour, clock=clock, limits=QueueLimits(max_requests=3), observer=observer) as engine:
        running, expiring, poisoned, taken = (
            request(rows, model=engine.model, deadline=deadline)
            for rows, deadline in ((1, None), (2, 1.0), (5, None), (3, None))
        )
        engine.submit(running)
        wait_until(lambda: behaviour.forwards == [1])
        for one in (expiring, poisoned, taken):
            engine.submit(one)
        with pytest.raises(QueueFull):
            engine.submit(request(model=engine.model))
        assert engine.cancel(taken)
        clock.advance(2.0)
        behaviour.hold.set()
        poisoned.reply.wait()
        wait_until(lambda: observer.model("fake", "1").batches == 2)
        counts = observer.model("fake", "1")
    assert counts.ends == {
        "answered": 1,
        "DeadlineExceeded": 1,
        "ForwardFailed": 1,
        "QueueFull": 1,
        "Cancelled": 1,
    }
    assert (counts.requests, counts.rows) == (2, 6)


def test_stage_times_add_up_to_what_the_request_spent_here():
    clock, observer = FakeClock(), CountingObserver()

    class Slow(FakeBackend):
        def run(self, batch):
            clock.advance(3.0)
            return super().run(batch)

    with engine_with(clock=clock, observer=observer, model=ServedModel("slow", "2", [Slow(SCHEMA)])) as engine:
        made = request(4, model=engine.model, arrived=-2.0)
        engine.submit(made)
        times = made.reply.wait().times
        wait_until(lambda: observer.model("slow", "2").batches == 1)
        counts = observer.model("slow", "2")
    assert times.queue == pytest.approx(2.0)
    assert counts.queue == pytest.approx(2.0)
    assert counts.busy == pytest.approx(3.0)
    assert counts.collate == times.collate > 0
    assert counts.execute == times.execute > 0


def test_an_observer_that_raises_harms_no_request(caplog):
    class Broken(Observer):
        def ended(self, ends):
            raise OSError("the disk is full")

        def ran(self, model, requests, rows, seconds):
            raise OSError("the disk is full")

    with engine_with(observer=Broken()) as engine:
        for _ in range(3):
            made = request(model=engine.model)
            engine.submit(made)
            assert made.reply.wait().error is None
    assert "the observer failed" in caplog.text


def test_what_others_count_is_read_when_somebody_asks():
    observer, counts = CountingObserver(), {"connections": 0}
    observer.watch("plane", lambda: counts)
    counts["connections"] = 3
    assert observer.watched() == {"plane": {"connections": 3}}


def test_what_the_engine_never_saw_is_counted_by_method_and_reason():
    observer = CountingObserver()
    observer.refused("/a.B/C", ModelNotFound("x"))
    observer.refused("/a.B/C", ModelNotFound("y"))
    assert observer.refusals() == {("/a.B/C", "ModelNotFound"): 2}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_fails_its_own_request_alone_and_the_log_names_model_and_task(value, caplog):
    class Diverging(FakeBackend):
        def run(self, batch):
            scores = np.array(super().run(batch)["default"])
            scores[(batch.dense == 13.0).any(axis=1)] = value
            return {"default": scores}

    behaviour, observer = FakeBehaviour(hold=threading.Event()), CountingObserver()
    model = ServedModel("ranker", "9", [Diverging(SCHEMA, behaviour)])
    with engine_with(behaviour, model=model, observer=observer) as engine:
        first = request(model=model)
        engine.submit(first)
        wait_until(lambda: behaviour.forwards == [1])
        poison = one_hot(3, seed=1)
        poison.dense[1, 0] = 13.0
        guilty, innocent = request(model=model, features=poison), request(2, model=model)
        engine.submit(guilty)
        engine.submit(innocent)
        behaviour.hold.set()
        assert innocent.reply.wait().error is None
        error = guilty.reply.wait().error
    assert f"task default: the model scored row 1 as {value}" in str(error)
    assert "model ranker, task default" in caplog.text
    assert observer.model("ranker", "9").ends["ForwardFailed"] == 1


def test_padding_may_score_what_it_likes():
    class Padding(FakeBackend):
        def bucket(self, rows):
            return rows + 1

        def run(self, batch):
            scores = np.array(super().run(batch)["default"])
            scores[-1] = np.nan
            return {"default": scores}

    with engine_with(model=ServedModel("m", "1", [Padding(SCHEMA)])) as engine:
        made = request(3, model=engine.model)
        engine.submit(made)
        assert made.reply.wait().error is None


def test_models_are_told_apart_by_version():
    observer = CountingObserver()
    with engine_with(observer=observer) as engine:
        other = fake_model(version="2")
        engine.add(other)
        for model in (engine.model, other, other):
            made = request(model=model)
            engine.submit(made)
            made.reply.wait()
        wait_until(lambda: observer.model("fake", "2").batches == 2)
    assert observer.model("fake", "1").ends["answered"] == 1
    assert observer.model("fake", "2").ends["answered"] == 2
