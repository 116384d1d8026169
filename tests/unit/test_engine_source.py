"""A source: requests that idle lanes fetch by themselves."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import pytest

from narsil.backends.fake import FakeBackend, FakeBehaviour
from narsil.clock import FakeClock
from narsil.dataflow import Request
from narsil.engine.queue import QueueLimits
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.errors import Cancelled, Draining, QueueFull, RequestError
from tests.support import PATIENCE_S, SCHEMA, ARequest, engine_with, request, wait_until


class FakeSource:
    """Requests as a test puts them; None is a wake."""

    def __init__(self) -> None:
        self.arrivals: queue.Queue[Sequence[Request] | None] = queue.Queue()
        self.polling = 0  # polls that wait now
        self.timeouts: list[float | None] = []  # of all polls
        self.wakes = 0
        self.closed = ""
        self._lock = threading.Lock()

    def poll(self, timeout: float | None) -> Sequence[Request]:
        with self._lock:
            self.timeouts.append(timeout)
            self.polling += timeout != 0
        try:
            found = self.arrivals.get(timeout != 0, timeout or 2 * PATIENCE_S)
        except queue.Empty:
            found = None
        finally:
            with self._lock:
                self.polling -= timeout != 0
        return found or ()

    def wake(self) -> None:
        self.wakes += 1  # under the engine's lock
        self.arrivals.put(None)

    def close(self, why: str) -> None:
        self.closed = why


def test_an_idle_lane_runs_what_its_source_gives():
    source = FakeSource()
    with engine_with() as engine:
        engine.attach(source)
        made = [request(rows, model=engine.model) for rows in (1, 2, 3)]
        source.arrivals.put(made)
        results = [one.reply.wait() for one in made]
        assert [len(result.scores["default"]) for result in results] == [1, 2, 3]
        assert engine.statistics().submitted == engine.statistics().answered == 3


def test_requests_still_come_by_submit_and_wake_a_lane_that_polls():
    source = FakeSource()
    with engine_with() as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 1)
        made = request(model=engine.model)
        engine.submit(made)
        assert made.reply.wait().error is None


def test_what_the_source_gives_and_the_queue_refuses_is_delivered_as_that_error():
    source, behaviour = FakeSource(), FakeBehaviour(hold=threading.Event())
    policy, limits = BatchPolicy(max_requests=1), QueueLimits(max_requests=2)
    with engine_with(behaviour, policy=policy, limits=limits) as engine:
        engine.attach(source)
        made = [request(model=engine.model) for _ in range(4)]
        source.arrivals.put(made)
        refused = [one.reply.wait() for one in made[2:]]
        assert all(isinstance(result.error, QueueFull) for result in refused)
        behaviour.hold.set()
        assert all(one.reply.wait().error is None for one in made[:2])
        assert engine.statistics().rejected == 2


def test_a_lane_that_is_full_leaves_the_rest_to_one_that_polls():
    source, behaviour = FakeSource(), FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour, lanes=2, policy=BatchPolicy(max_requests=1)) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 2)
        source.arrivals.put([request(1, model=engine.model), request(2, model=engine.model)])
        wait_until(lambda: sorted(behaviour.forwards) == [1, 2])


def test_lanes_that_have_nothing_to_do_leave_each_other_alone():
    source = FakeSource()
    with engine_with(lanes=3) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 3)
        assert source.wakes == 0


def test_one_request_wakes_one_of_the_lanes_that_poll():
    source = FakeSource()
    with engine_with(lanes=3) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 3)
        made = request(model=engine.model)
        engine.submit(made)
        assert made.reply.wait().error is None
        assert source.wakes == 1


def test_the_source_is_not_woken_while_every_lane_works():
    source, behaviour = FakeSource(), FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 1)
        source.arrivals.put([request(model=engine.model)])
        wait_until(lambda: behaviour.forwards == [1])
        engine.submit(request(model=engine.model))
        assert source.wakes == 0


def test_a_lane_polls_no_longer_than_a_batch_may_wait_for_company():
    source, clock = FakeSource(), FakeClock()
    with engine_with(policy=BatchPolicy(timeout=0.01), clock=clock) as engine:
        engine.attach(source)
        made = request(model=engine.model, arrived=0.0)
        source.arrivals.put([made])
        wait_until(lambda: 0.01 in source.timeouts)
        clock.advance(0.01)
        assert made.reply.wait().error is None
        assert set(source.timeouts) <= {0.0, 0.01, None}


def test_requests_that_a_lane_has_fetched_and_leaves_for_a_job_reach_one_that_polls():
    class Direct(FakeSource):
        """Has requests that only a lane gets which does not wait."""

        at_once: Sequence[Request] = ()

        def poll(self, timeout: float | None) -> Sequence[Request]:
            found = super().poll(timeout)
            if timeout == 0 and self.at_once:
                found, self.at_once = self.at_once, ()
            return found

    class Opening(FakeBackend):
        """Takes until ``late`` has been answered by the other lane to open."""

        def thread_setup(self) -> None:
            opened.append(self)
            answered.extend(one.reply.wait().error for one in late)

    source, behaviour = Direct(), FakeBehaviour(hold=threading.Event())
    opened: list[Opening] = []
    late: list[ARequest] = []
    answered: list[RequestError | None] = []
    with engine_with(behaviour, lanes=2) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 2)
        source.arrivals.put([request(model=engine.model)])
        wait_until(lambda: behaviour.forwards == [1])
        new = ServedModel("new", "1", [Opening(SCHEMA), Opening(SCHEMA)])
        adding = threading.Thread(target=engine.add, args=(new,))
        adding.start()
        wait_until(lambda: len(opened) == 1 and source.polling == 1)  # the lane that does not work is through with it
        late.append(request(model=engine.model))
        source.at_once = [*late]
        behaviour.hold.set()
        adding.join(PATIENCE_S)
    assert answered == [None]


def test_a_lane_that_has_ended_what_was_dead_looks_again_before_it_waits():
    source = FakeSource()
    with engine_with() as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 1)
        gone = request(model=engine.model)
        gone.reply.cancelled = True
        source.arrivals.put([gone])
        assert isinstance(gone.reply.wait().error, Cancelled)
        wait_until(lambda: len(source.timeouts) == 4)
        assert source.timeouts == [0.0, None, 0.0, None]


def test_requests_are_taken_while_a_lane_has_not_come_back_from_a_source_that_is_detached():
    class Deaf(FakeSource):
        def wake(self) -> None:
            pass

    source = Deaf()
    with engine_with() as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 1)
        engine.attach(None)
        made = request(model=engine.model)
        engine.submit(made)
        source.arrivals.put(None)
        assert made.reply.wait().error is None


def test_once_detached_lanes_wait_for_submit_again():
    source = FakeSource()
    with engine_with(lanes=3) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 3)
        engine.attach(None)
        wait_until(lambda: source.polling == 0)
        made = request(model=engine.model)
        engine.submit(made)
        assert made.reply.wait().error is None


@pytest.mark.parametrize("lanes", [1, 3])
def test_draining_closes_the_source_and_ends_lanes_that_poll(lanes):
    source = FakeSource()
    with engine_with(lanes=lanes) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == lanes)
        assert engine.drain(PATIENCE_S)
        assert "shutting down" in source.closed
        assert source.polling == 0


def test_a_lane_that_ends_wakes_the_next_which_may_have_missed_its_own_wake():
    class Late(FakeSource):
        """Its wakes are for the next poll while ``late``, as a source's may be: a running one sleeps on."""

        late = False

        def wake(self) -> None:
            if not self.late:
                super().wake()

    source, behaviour = Late(), FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour, lanes=2) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 2)
        source.arrivals.put([request(model=engine.model)])
        wait_until(lambda: behaviour.forwards == [1])
        source.late = True
        drained = threading.Thread(target=engine.drain, args=(PATIENCE_S,))
        drained.start()
        wait_until(lambda: bool(source.closed))
        assert not engine.drain(timeout=0)  # once it has this lock, the other drain has woken whom it could
        source.late = False
        behaviour.hold.set()
        wait_until(lambda: not drained.is_alive())


def test_what_woke_a_lane_that_is_lost_wakes_another():
    class Failing(FakeSource):
        """One of its polls fails, once ``fails`` is set."""

        fails = False

        def poll(self, timeout: float | None) -> Sequence[Request]:
            found = super().poll(timeout)
            if self.fails:
                self.fails = False
                raise OSError("the network is gone")
            return found

    source = Failing()
    with engine_with(lanes=2) as engine:
        engine.attach(source)
        wait_until(lambda: source.polling == 2)
        source.fails = True
        made = request(model=engine.model)
        engine.submit(made)
        assert made.reply.wait().error is None
        assert not source.fails


def test_what_arrives_while_the_engine_drains_is_told_so():
    source, behaviour = FakeSource(), FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour) as engine:
        engine.attach(source)
        running = request(model=engine.model)
        source.arrivals.put([running])
        wait_until(lambda: behaviour.forwards == [1])
        late = request(model=engine.model)
        source.arrivals.put([late])
        drained = threading.Thread(target=engine.drain, args=(PATIENCE_S,))
        drained.start()
        wait_until(lambda: bool(source.closed))
        behaviour.hold.set()
        assert running.reply.wait().error is None
        assert isinstance(late.reply.wait().error, Draining)
        drained.join(PATIENCE_S)
