"""schedule(queue, policy, now): what a free lane takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from narsil.engine.scheduler import BatchPolicy, schedule
from tests.support import request

AT_ONCE = BatchPolicy(max_requests=4, max_rows=100)
PATIENT = BatchPolicy(max_requests=4, max_rows=100, timeout=0.010)
WORKER = BatchPolicy(max_requests=1, max_rows=100)


def test_an_empty_queue_gives_nothing_and_no_time_to_wake_at():
    decision = schedule([], PATIENT, now=1.0)
    assert decision.take == ()
    assert decision.wake_at is None


def test_a_free_lane_takes_everything_that_waits():
    queue = [request(10), request(20), request(30)]
    assert schedule(queue, AT_ONCE, now=0.0).take == tuple(queue)


def test_a_free_lane_takes_its_share_where_several_lanes_serve_the_queue():
    queue = [request() for _ in range(7)]
    assert schedule(queue, BatchPolicy(lanes=2), now=0.0).take == tuple(queue[:4])
    assert schedule(queue[:1], BatchPolicy(lanes=2), now=0.0).take == (queue[0],)


def test_what_would_fill_one_batch_is_shared_out_too():
    queue = [request() for _ in range(4)]
    assert schedule(queue, BatchPolicy(max_requests=4, lanes=2), now=0.0).take == tuple(queue[:2])


def test_where_every_lane_s_share_is_a_full_batch_a_full_batch_is_taken():
    queue = [request() for _ in range(9)]
    assert schedule(queue, BatchPolicy(max_requests=4, lanes=2), now=0.0).take == tuple(queue[:4])


def test_the_dead_count_for_nobody_s_share():
    dead, alive = [request(deadline=1.0) for _ in range(4)], [request() for _ in range(4)]
    assert schedule(dead + alive, BatchPolicy(lanes=2), now=5.0).take == tuple(alive[:2])


def test_lanes_that_share_wait_for_company_all_the_same():
    queue = [request(arrived=5.0)]
    shared = BatchPolicy(max_requests=4, timeout=0.010, lanes=2)
    assert schedule(queue, shared, now=5.0).take == ()
    assert schedule(queue, shared, now=5.010).take == tuple(queue)


def test_a_batch_holds_at_most_max_requests():
    queue = [request() for _ in range(9)]
    assert schedule(queue, AT_ONCE, now=0.0).take == tuple(queue[:4])


def test_a_batch_holds_at_most_max_rows_and_nobody_overtakes_the_one_that_did_not_fit():
    queue = [request(60), request(50), request(10)]
    assert schedule(queue, AT_ONCE, now=0.0).take == (queue[0],)


def test_a_request_larger_than_a_batch_is_taken_alone():
    queue = [request(1000), request(1)]
    assert schedule(queue, AT_ONCE, now=0.0).take == (queue[0],)


def test_a_request_larger_than_a_batch_waits_for_its_turn():
    queue = [request(1), request(1000)]
    assert schedule(queue, AT_ONCE, now=0.0).take == (queue[0],)


def test_worker_mode_takes_one_at_a_time():
    queue = [request(), request()]
    assert schedule(queue, WORKER, now=0.0).take == (queue[0],)


def test_a_timeout_holds_an_open_batch_until_the_oldest_has_waited_that_long():
    queue = [request(arrived=5.0), request(arrived=5.004)]
    waiting = schedule(queue, PATIENT, now=5.005)
    assert waiting.take == ()
    assert waiting.wake_at == 5.010
    assert schedule(queue, PATIENT, now=5.010).take == tuple(queue)


def test_a_full_batch_does_not_wait_for_the_timeout():
    by_requests = [request(arrived=5.0) for _ in range(4)]
    by_rows = [request(60, arrived=5.0), request(60, arrived=5.0)]
    exactly = [request(100, arrived=5.0)]
    assert schedule(by_requests, PATIENT, now=5.0).take == tuple(by_requests)
    assert schedule(by_rows, PATIENT, now=5.0).take == (by_rows[0],)
    assert schedule(exactly, PATIENT, now=5.0).take == tuple(exactly)


def test_a_deadline_before_the_timeout_is_when_to_look_again():
    queue = [request(arrived=5.0, deadline=5.003)]
    assert schedule(queue, PATIENT, now=5.0).wake_at == 5.003


def test_an_expired_request_is_sorted_out_and_the_rest_is_taken():
    late, good = request(deadline=4.0), request(deadline=6.0)
    decision = schedule([late, good], AT_ONCE, now=5.0)
    assert decision.expired == (late,)
    assert decision.take == (good,)


def test_a_deadline_that_is_now_has_passed():
    late = request(deadline=5.0)
    assert schedule([late], AT_ONCE, now=5.0).expired == (late,)


def test_a_cancelled_request_is_sorted_out_and_counts_as_cancelled_even_past_its_deadline():
    gone = request(deadline=4.0)
    gone.reply.cancelled = True  # type: ignore[misc]
    decision = schedule([gone], AT_ONCE, now=5.0)
    assert decision.cancelled == (gone,)
    assert decision.expired == ()


requests = st.builds(
    lambda rows, arrived, deadline: request(rows, arrived=arrived, deadline=deadline),
    st.integers(1, 150),
    st.floats(0, 10),
    st.none() | st.floats(0, 20),
)


@given(
    st.lists(requests, max_size=20),
    st.builds(BatchPolicy, st.integers(1, 6), st.integers(1, 200), st.floats(0, 5), st.integers(1, 4)),
    st.floats(0, 20),
)
def test_any_decision_keeps_the_limits_and_the_order(queue, policy, now):
    decision = schedule(queue, policy, now)
    everyone = decision.take + decision.expired + decision.cancelled
    assert len({id(one) for one in everyone}) == len(everyone)
    assert len(decision.take) <= policy.max_requests
    assert sum(one.rows for one in decision.take) <= policy.max_rows or len(decision.take) == 1
    assert all(one.deadline is None or one.deadline > now for one in decision.take)
    positions = [next(i for i, queued in enumerate(queue) if queued is one) for one in decision.take]
    assert positions == sorted(positions)
    if positions:  # nobody who could have run was overtaken
        skipped = [one for one in queue[: positions[-1]] if one not in decision.take]
        assert all(one in decision.expired for one in skipped)


@given(st.lists(requests, min_size=1, max_size=20), st.builds(BatchPolicy, st.integers(1, 6), st.integers(1, 200)))
def test_without_a_timeout_a_lane_never_idles_while_somebody_can_run(queue, policy):
    decision = schedule(queue, policy, now=10.0)
    alive = [one for one in queue if one.deadline is None or one.deadline > 10.0]
    assert bool(decision.take) == bool(alive)
