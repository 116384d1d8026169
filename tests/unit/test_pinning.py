"""Lanes are bound to processors of their own, or not at all."""

from __future__ import annotations

import os
import threading

import pytest

from narsil.backends.fake import FakeBackend
from narsil.backends.pinning import Pinned, pin, processors
from tests.support import SCHEMA

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads")


def test_each_lane_gets_processors_that_no_other_has():
    lanes = pin([FakeBackend(SCHEMA) for _ in range(3)], 2, available=[0, 2, 4, 1, 3, 5])
    assert [sorted(lane.on) for lane in lanes] == [[0, 2], [1, 4], [3, 5]]


def test_too_few_processors_bind_nothing(caplog):
    backends = [FakeBackend(SCHEMA) for _ in range(3)]
    assert pin(backends, 1, available=[0, 1]) == backends
    assert "lanes are not pinned: 3 lanes" in caplog.text


@needs_affinity
def test_the_lanes_thread_is_bound_and_no_other():
    before = os.sched_getaffinity(0)
    target = processors()[-1]
    bound: list[set[int]] = []

    def lane() -> None:
        Pinned(FakeBackend(SCHEMA), frozenset({target})).thread_setup()
        bound.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=lane)
    thread.start()
    thread.join()
    assert bound == [{target}]
    assert os.sched_getaffinity(0) == before


@needs_affinity
def test_a_processor_that_is_not_there_is_a_warning(caplog):
    thread = threading.Thread(target=Pinned(FakeBackend(SCHEMA), frozenset({100_000})).thread_setup)
    thread.start()
    thread.join()
    assert "cannot be bound" in caplog.text


@needs_affinity
def test_every_processor_is_named_once():
    assert sorted(processors()) == sorted(os.sched_getaffinity(0))


def test_it_is_the_backend_that_it_binds():
    inner = FakeBackend(SCHEMA)
    bound = Pinned(inner, frozenset({0}))
    assert (bound.name, bound.schema, bound.device, bound.bucket(7)) == (inner.name, SCHEMA, inner.device, 7)
