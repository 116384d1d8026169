"""Lanes are bound to processors of their own, or not at all."""

from __future__ import annotations

import os
import threading

import pytest

from narsil.engine import pinning
from narsil.engine.pinning import pin, places, processors

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads")


def test_each_lane_gets_processors_that_no_other_has():
    assert [sorted(on) for on in places(3, 2, available=[0, 2, 4, 1, 3, 5])] == [[0, 2], [1, 4], [3, 5]]


def test_too_few_processors_bind_nothing(caplog):
    assert places(3, 1, available=[0, 1]) == []
    assert "lanes are not pinned: 3 lanes" in caplog.text


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@needs_affinity
def test_the_lanes_thread_is_bound_and_no_other():
    before = os.sched_getaffinity(0)
    bind = pin(1, 1)
    bound: list[set[int]] = []

    def lane() -> None:
        bind(0)
        bound.append(os.sched_getaffinity(0))

    in_a_thread(lane)
    assert bound == [{processors()[0]}]
    assert os.sched_getaffinity(0) == before


@needs_affinity
def test_a_processor_that_is_not_there_is_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(pinning, "processors", lambda: [100_000])
    in_a_thread(lambda: pin(1, 1)(0))
    assert "cannot be bound" in caplog.text


@needs_affinity
def test_every_processor_is_named_once():
    assert sorted(processors()) == sorted(os.sched_getaffinity(0))
