"""Clocks: the fake one stands still until it is advanced, and then wakes whoever waits."""

from __future__ import annotations

import threading

from narsil.clock import FakeClock, MonotonicClock
from tests.support import PATIENCE_S, wait_until


def test_a_fake_clock_moves_only_when_told():
    clock = FakeClock(5.0)
    assert clock.now() == 5.0
    clock.advance(1.5)
    assert clock.now() == 6.5


def test_advancing_wakes_who_waits():
    clock, condition, woken = FakeClock(), threading.Condition(), threading.Event()

    def sleeper() -> None:
        with condition:
            while clock.now() < 3.0:
                clock.wait(condition, 3.0)
        woken.set()

    thread = threading.Thread(target=sleeper)
    thread.start()
    wait_until(lambda: clock.advance(1.0) or woken.is_set())
    thread.join(PATIENCE_S)
    assert clock.now() >= 3.0


def test_a_time_that_has_come_is_not_waited_for():
    for clock in (FakeClock(2.0), MonotonicClock()):
        condition = threading.Condition()
        with condition:
            clock.wait(condition, until=clock.now() - 1.0)
