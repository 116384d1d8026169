"""What a free lane takes: form(queue, policy, now) of one model's requests, schedule(claims, policy, now) of all."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from narsil.dataflow import Request
from narsil.engine.scheduler import LEAD_S, BatchPolicy, form, schedule
from tests.support import request

AT_ONCE = BatchPolicy(max_requests=4, max_rows=100)
PATIENT = BatchPolicy(max_requests=4, max_rows=100, timeout=0.010)
WORKER = BatchPolicy(max_requests=1, max_rows=100)


def test_an_empty_queue_gives_nothing_and_no_time_to_wake_at():
    decision = form([], PATIENT, now=1.0)
    assert decision.take == ()
    assert decision.wake_at is None


def test_a_free_lane_takes_everything_that_waits():
    queue = [request(10), request(20), request(30)]
    assert form(queue, AT_ONCE, now=0.0).take == tuple(queue)


def test_a_free_lane_takes_its_share_where_several_lanes_serve_the_queue():
    queue = [request() for _ in range(7)]
    assert form(queue, BatchPolicy(lanes=2), now=0.0).take == tuple(queue[:4])
    assert form(queue[:1], BatchPolicy(lanes=2), now=0.0).take == (queue[0],)


def test_what_would_fill_one_batch_is_shared_out_too():
    queue = [request() for _ in range(4)]
    assert form(queue, BatchPolicy(max_requests=4, lanes=2), now=0.0).take == tuple(queue[:2])


def test_where_every_lane_s_share_is_a_full_batch_a_full_batch_is_taken():
    queue = [request() for _ in range(9)]
    assert form(queue, BatchPolicy(max_requests=4, lanes=2), now=0.0).take == tuple(queue[:4])


def test_the_dead_count_for_nobody_s_share():
    dead, alive = [request(deadline=1.0) for _ in range(4)], [request() for _ in range(4)]
    assert form(dead + alive, BatchPolicy(lanes=2), now=5.0).take == tuple(alive[:2])
    for gone in dead:
        gone.reply.cancelled = True
    assert form(dead + alive, BatchPolicy(lanes=2), now=0.0).take == tuple(alive[:2])


def test_lanes_that_share_wait_for_company_all_the_same():
    queue = [request(arrived=5.0)]
    shared = BatchPolicy(max_requests=4, timeout=0.010, lanes=2)
    assert form(queue, shared, now=5.0).take == ()
    assert form(queue, shared, now=5.010).take == tuple(queue)


def test_a_batch_holds_at_most_max_requests():
    queue = [request() for _ in range(9)]
    assert form(queue, AT_ONCE, now=0.0).take == tuple(queue[:4])


def test_a_batch_holds_at_most_max_rows_and_nobody_overtakes_the_one_that_did_not_fit():
    queue = [request(60), request(50), request(10)]
    assert form(queue, AT_ONCE, now=0.0).take == (queue[0],)


def test_what_fills_a_batch_to_the_row_is_taken():
    queue = [request(60), request(40), request(1)]
    assert form(queue, AT_ONCE, now=0.0).take == tuple(queue[:2])


def test_a_request_larger_than_a_batch_is_taken_alone():
    queue = [request(1000), request(1)]
    assert form(queue, AT_ONCE, now=0.0).take == (queue[0],)


def test_a_request_larger_than_a_batch_waits_for_its_turn():
    queue = [request(1), request(1000)]
    assert form(queue, AT_ONCE, now=0.0).take == (queue[0],)


def test_worker_mode_takes_one_at_a_time():
    queue = [request(), request()]
    assert form(queue, WORKER, now=0.0).take == (queue[0],)


def test_a_timeout_holds_an_open_batch_until_the_oldest_has_waited_that_long():
    queue = [request(arrived=5.0), request(arrived=5.004)]
    waiting = form(queue, PATIENT, now=5.005)
    assert waiting.take == ()
    assert waiting.wake_at == 5.010
    assert form(queue, PATIENT, now=5.010).take == tuple(queue)


def test_a_full_batch_does_not_wait_for_the_timeout():
    by_requests = [request(arrived=5.0) for _ in range(4)]
    by_rows = [request(60, arrived=5.0), request(60, arrived=5.0)]
    exactly = [request(100, arrived=5.0)]
    assert form(by_requests, PATIENT, now=5.0).take == tuple(by_requests)
    assert form(by_rows, PATIENT, now=5.0).take == (by_rows[0],)
    assert form(exactly, PATIENT, now=5.0).take == tuple(exactly)


def test_a_deadline_before_the_timeout_is_when_to_look_again():
    queue = [request(arrived=5.0, deadline=5.003)]
    assert form(queue, PATIENT, now=5.0).wake_at == 5.003


def test_an_expired_request_is_sorted_out_and_the_rest_is_taken():
    late, good = request(deadline=4.0), request(deadline=6.0)
    decision = form([late, good], AT_ONCE, now=5.0)
    assert decision.expired == (late,)
    assert decision.take == (good,)


def test_a_deadline_that_is_now_has_passed():
    late = request(deadline=5.0)
    assert form([late], AT_ONCE, now=5.0).expired == (late,)


def test_a_cancelled_request_is_sorted_out_and_counts_as_cancelled_even_past_its_deadline():
    gone = request(deadline=4.0)
    gone.reply.cancelled = True
    decision = form([gone], AT_ONCE, now=5.0)
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
    decision = form(queue, policy, now)
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
    decision = form(queue, policy, now=10.0)
    alive = [one for one in queue if one.deadline is None or one.deadline > 10.0]
    assert bool(decision.take) == bool(alive)


@dataclass
class Claim:
    queue: list[Request]
    used: float = 0.0


def test_of_several_models_the_one_whose_request_came_first_is_served():
    a, b = Claim([request(arrived=2.0)]), Claim([request(arrived=1.0)])
    assert schedule([a, b], AT_ONCE, now=3.0).take == tuple(b.queue)


def test_a_batch_is_of_one_model():
    a, b = Claim([request(arrived=1.0), request(arrived=3.0)]), Claim([request(arrived=2.0)])
    assert schedule([a, b], AT_ONCE, now=3.0).take == tuple(a.queue)


def test_a_model_that_has_had_more_than_its_share_lets_another_go_first_however_old_its_requests():
    busy, other = Claim([request(arrived=1.0)], used=5.0), Claim([request(arrived=9.0)], used=5.0 - 1.01 * LEAD_S)
    assert schedule([busy, other], AT_ONCE, now=9.0).take == tuple(other.queue)
    other.used = 5.0 - 0.99 * LEAD_S
    assert schedule([busy, other], AT_ONCE, now=9.0).take == tuple(busy.queue)


def test_a_model_that_is_alone_gets_every_lane_whatever_it_has_had():
    alone, idle = Claim([request()], used=100.0), Claim([])
    assert schedule([alone, idle], AT_ONCE, now=0.0).take == tuple(alone.queue)


def test_a_model_that_waits_for_company_leaves_the_lane_to_the_next():
    patient = Claim([request(arrived=5.0)])
    full = Claim([request(arrived=5.001) for _ in range(4)])
    assert schedule([patient, full], PATIENT, now=5.002).take == tuple(full.queue)
    full.queue.clear()
    assert schedule([patient, full], PATIENT, now=5.002).wake_at == 5.010


def test_a_model_with_none_but_dead_requests_does_not_say_when_to_look_again():
    dead, patient = Claim([request(arrived=0.0, deadline=1.0)]), Claim([request(arrived=5.0)])
    decision = schedule([dead, patient], PATIENT, now=5.002)
    assert (decision.expired, decision.wake_at) == (tuple(dead.queue), 5.010)


def test_the_dead_of_every_model_that_was_looked_at_are_sorted_out():
    dead, alive = Claim([request(arrived=0.0, deadline=1.0)]), Claim([request(arrived=1.0)])
    decision = schedule([dead, alive], AT_ONCE, now=5.0)
    assert decision.expired == tuple(dead.queue)
    assert decision.take == tuple(alive.queue)


def test_of_two_models_that_always_have_work_each_gets_half_of_the_lanes_time():
    slow, quick = Claim([request(arrived=0.0)]), Claim([request(arrived=1.0)])
    cost = {id(slow): 0.010, id(quick): 0.001}
    for _ in range(2000):
        decision = schedule([slow, quick], WORKER, now=2.0)
        taken = slow if decision.take == tuple(slow.queue) else quick
        taken.used += cost[id(taken)]
    assert abs(slow.used - quick.used) <= LEAD_S + 0.010


def test_the_cancelled_of_every_model_that_was_looked_at_are_sorted_out():
    gone, alive = Claim([request(arrived=0.0)]), Claim([request(arrived=1.0)])
    gone.queue[0].reply.cancelled = True  # type: ignore[misc]
    decision = schedule([gone, alive], AT_ONCE, now=5.0)
    assert decision.cancelled == tuple(gone.queue)
    assert decision.take == tuple(alive.queue)
