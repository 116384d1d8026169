"""The engine ends every request exactly once: answered, rejected, expired, cancelled or failed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from narsil.backends.fake import FakeBackend, FakeBehaviour
from narsil.clock import FakeClock
from narsil.dataflow import Request
from narsil.engine.engine import Engine
from narsil.engine.queue import QueueLimits
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.errors import Cancelled, ConfigError, DeadlineExceeded, Draining, ForwardFailed, QueueFull
from tests.support import (
    PATIENCE_S,
    SCHEMA,
    AnEngine,
    ARequest,
    Reply,
    engine_with,
    fake_model,
    jagged,
    one_hot,
    request,
    scores_alone,
    wait_until,
)

WORKER = BatchPolicy(max_requests=1)


def submit(engine: AnEngine, **arguments) -> ARequest:
    made = request(model=engine.model, **arguments)
    engine.submit(made)
    return made


def held() -> FakeBehaviour:
    """Forwards that wait until the test lets them go."""
    return FakeBehaviour(hold=threading.Event())


def occupy(engine: AnEngine, behaviour: FakeBehaviour) -> ARequest:
    """A request that is running, so that what comes after it waits."""
    running = submit(engine)
    wait_until(lambda: len(behaviour.forwards) == 1)
    return running


def test_a_request_gets_its_own_rows_scores():
    with engine_with() as engine:
        features = jagged(9, seed=3)
        made = submit(engine, features=features)
        np.testing.assert_array_equal(made.reply.wait().scores["default"], scores_alone(features))


def test_what_waits_while_the_lane_is_busy_becomes_one_forward():
    behaviour = held()
    with engine_with(behaviour) as engine:
        occupy(engine, behaviour)
        waiting = [submit(engine, features=one_hot(rows, seed=rows)) for rows in (2, 3, 4)]
        behaviour.hold.set()
        for made in waiting:
            result = made.reply.wait()
            np.testing.assert_array_equal(result.scores["default"], scores_alone(made.features))
            assert (result.times.batch_requests, result.times.batch_rows) == (3, 9)
        assert behaviour.forwards == [1, 9]
        counts = engine.statistics()
        assert (counts.batches, counts.rows) == (2, 10)


def test_worker_mode_runs_requests_one_by_one():
    behaviour = held()
    with engine_with(behaviour, policy=WORKER) as engine:
        occupy(engine, behaviour)
        waiting = [submit(engine, rows=rows) for rows in (2, 3, 4)]
        behaviour.hold.set()
        for made in waiting:
            assert made.reply.wait().times.batch_requests == 1
        assert behaviour.forwards == [1, 2, 3, 4]


def test_a_request_larger_than_a_batch_runs_in_pieces_and_comes_back_whole():
    behaviour = FakeBehaviour()
    with engine_with(behaviour, policy=BatchPolicy(max_rows=10)) as engine:
        features = jagged(34, seed=5)
        result = submit(engine, features=features).reply.wait()
        np.testing.assert_array_equal(result.scores["default"], scores_alone(features))
        assert behaviour.forwards == [10, 10, 10, 4]


@pytest.mark.parametrize("rows", [7, 10, 34])
def test_padding_rows_reach_no_client_whole_or_in_pieces(rows):
    class Padding(FakeBackend):
        def bucket(self, rows):
            return rows + 3

    with engine_with(policy=BatchPolicy(max_rows=10), model=ServedModel("m", "1", [Padding(SCHEMA)])) as engine:
        features = jagged(rows, seed=rows)
        scores = submit(engine, features=features).reply.wait().scores["default"]
        np.testing.assert_array_equal(scores, scores_alone(features))


def test_lanes_run_at_the_same_time():
    behaviour = held()
    with engine_with(behaviour, lanes=2, policy=WORKER) as engine:
        submit(engine)
        submit(engine)
        wait_until(lambda: len(behaviour.forwards) == 2)
        assert engine.statistics().running == 2


def test_a_batch_waits_for_company_as_long_as_its_timeout_and_no_longer():
    clock, behaviour = FakeClock(), FakeBehaviour()
    policy = BatchPolicy(timeout=0.005)
    with engine_with(behaviour, policy=policy, clock=clock) as engine:
        first = submit(engine, arrived=0.0)
        clock.advance(0.003)
        second = submit(engine, arrived=0.003)
        wait_until(lambda: clock.advance(0.001) or bool(first.reply.results))
        assert second.reply.wait().times.batch_requests == 2
        assert behaviour.forwards == [2]


def test_after_a_timeout_the_other_lanes_take_their_shares_at_once():
    clock, behaviour = FakeClock(), held()
    policy = BatchPolicy(timeout=0.005, lanes=2)
    with engine_with(behaviour, lanes=2, policy=policy, clock=clock) as engine:
        for _ in range(4):
            submit(engine, arrived=0.0)
        wait_until(lambda: clock.advance(0.001) or len(behaviour.forwards) == 2)
        assert behaviour.forwards[0] == 2


def test_what_a_full_batch_leaves_over_is_taken_by_an_idle_lane_at_once():
    clock, behaviour = FakeClock(), held()
    policy = BatchPolicy(max_rows=4, timeout=0.005, lanes=2)
    with engine_with(behaviour, lanes=2, policy=policy, clock=clock) as engine:
        submit(engine, rows=2, arrived=0.0)
        submit(engine, rows=4, arrived=0.0)  # does not fit beside the first, and is a full batch by itself
        wait_until(lambda: sorted(behaviour.forwards) == [2, 4])


def test_draining_waits_for_no_company():
    clock, behaviour = FakeClock(), FakeBehaviour()
    with engine_with(behaviour, policy=BatchPolicy(timeout=60.0), clock=clock) as engine:
        waiting = submit(engine, arrived=0.0)
        assert engine.drain(PATIENCE_S)
        assert waiting.reply.wait().error is None


def test_a_request_in_pieces_is_given_up_when_its_client_goes_away():
    behaviour = held()
    with engine_with(behaviour, policy=BatchPolicy(max_rows=10)) as engine:
        large = submit(engine, rows=100)
        wait_until(lambda: behaviour.forwards == [10])
        large.reply.cancelled = True
        behaviour.hold.set()
        assert isinstance(large.reply.wait().error, Cancelled)
        assert behaviour.forwards == [10]
        assert engine.statistics().cancelled == 1


def test_a_request_in_pieces_is_given_up_when_its_deadline_passes():
    clock, behaviour = FakeClock(), held()
    with engine_with(behaviour, policy=BatchPolicy(max_rows=10), clock=clock) as engine:
        large = submit(engine, rows=100, arrived=0.0, deadline=1.0)
        wait_until(lambda: behaviour.forwards == [10])
        clock.advance(2.0)
        behaviour.hold.set()
        assert isinstance(large.reply.wait().error, DeadlineExceeded)
        assert behaviour.forwards == [10]
        assert engine.statistics().expired == 1


def test_an_expired_request_never_runs():
    clock, behaviour = FakeClock(), held()
    with engine_with(behaviour, clock=clock) as engine:
        occupy(engine, behaviour)
        late = submit(engine, rows=5, arrived=0.0, deadline=1.0)
        good = submit(engine, rows=2, arrived=0.0, deadline=9.0)
        clock.advance(2.0)
        behaviour.hold.set()
        assert good.reply.wait().error is None
        error = late.reply.wait().error
        assert isinstance(error, DeadlineExceeded)
        assert "2000.0 ms in the queue" in str(error)
        assert behaviour.forwards == [1, 2]


def test_a_cancelled_request_never_runs_and_gives_its_place_back_at_once():
    behaviour = held()
    with engine_with(behaviour, limits=QueueLimits(max_requests=1)) as engine:
        occupy(engine, behaviour)
        gone = submit(engine, rows=5)
        assert engine.cancel(gone)
        assert not engine.cancel(gone)
        after = submit(engine, rows=2)
        behaviour.hold.set()
        assert after.reply.wait().error is None
        assert behaviour.forwards == [1, 2]
        assert gone.reply.results == []


def test_a_request_marked_cancelled_by_its_transport_is_not_run():
    behaviour = held()
    with engine_with(behaviour) as engine:
        occupy(engine, behaviour)
        gone = submit(engine, rows=5)
        gone.reply.cancelled = True
        behaviour.hold.set()
        assert isinstance(gone.reply.wait().error, Cancelled)
        assert behaviour.forwards == [1]
        assert engine.statistics().cancelled == 1


def test_a_running_request_can_no_longer_be_cancelled_and_is_answered():
    behaviour = held()
    with engine_with(behaviour) as engine:
        running = occupy(engine, behaviour)
        assert not engine.cancel(running)
        behaviour.hold.set()
        assert running.reply.wait().error is None


def test_a_full_queue_refuses_at_once():
    behaviour = held()
    with engine_with(behaviour, limits=QueueLimits(max_requests=2)) as engine:
        occupy(engine, behaviour)
        submit(engine)
        submit(engine)
        with pytest.raises(QueueFull, match="2 of 2 requests"):
            submit(engine)
        assert engine.statistics().rejected == 1


def test_the_dead_give_way_before_the_living_are_refused():
    clock, behaviour = FakeClock(), held()
    with engine_with(behaviour, limits=QueueLimits(max_requests=2), clock=clock) as engine:
        occupy(engine, behaviour)
        late = submit(engine, deadline=1.0)
        gone = submit(engine)
        gone.reply.cancelled = True
        clock.advance(2.0)
        submit(engine)
        assert isinstance(late.reply.wait().error, DeadlineExceeded)
        assert isinstance(gone.reply.wait().error, Cancelled)
        counts = engine.statistics()
        assert (counts.expired, counts.cancelled, counts.queued) == (1, 1, 1)


def test_in_a_failed_batch_only_the_guilty_request_fails():
    behaviour = held()
    behaviour.fail_if = lambda batch: bool((batch.dense == 13.0).any())
    with engine_with(behaviour) as engine:
        occupy(engine, behaviour)
        innocent = [submit(engine, features=one_hot(3, seed=seed)) for seed in (1, 2)]
        poison = one_hot(2, seed=9)
        poison.dense[1, 0] = 13.0
        guilty = submit(engine, features=poison)
        innocent.append(submit(engine, features=jagged(4, seed=3)))
        behaviour.hold.set()
        for made in innocent:
            np.testing.assert_array_equal(made.reply.wait().scores["default"], scores_alone(made.features))
        error = guilty.reply.wait().error
        assert isinstance(error, ForwardFailed)
        assert "failed on this request (RuntimeError)" in str(error)
        assert behaviour.forwards == [1, 12, 3, 3, 2, 4]


def test_a_request_that_fails_alone_is_not_tried_again_and_the_lane_lives_on():
    behaviour = FakeBehaviour(fail_if=lambda batch: batch.rows == 5)
    with engine_with(behaviour) as engine:
        assert isinstance(submit(engine, rows=5).reply.wait().error, ForwardFailed)
        assert submit(engine, rows=2).reply.wait().error is None
        assert behaviour.forwards == [5, 2]
        assert engine.drain(PATIENCE_S)
        counts = engine.statistics()
        assert (counts.answered, counts.failed, counts.expired, counts.cancelled) == (1, 1, 0, 0)


def test_scores_of_a_wrong_shape_fail_the_request_instead_of_reaching_the_client():
    class Short(FakeBackend):
        def run(self, batch):
            return {"default": super().run(batch)["default"][:-1]}

    with engine_with(model=ServedModel("m", "1", [Short(SCHEMA)])) as engine:
        made = submit(engine, rows=3)
        assert "gave (2,) for 3 rows" in str(made.reply.wait().error)


def test_draining_finishes_what_was_admitted_and_admits_nothing_more():
    behaviour = held()
    with engine_with(behaviour) as engine:
        running, waiting = occupy(engine, behaviour), submit(engine)
        assert not engine.drain(timeout=0)
        with pytest.raises(Draining):
            submit(engine)
        behaviour.hold.set()
        assert engine.drain(PATIENCE_S)
    assert running.reply.wait().error is None
    assert waiting.reply.wait().error is None


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_engine_that_has_drained_lost_no_lane_to_an_error(lanes, caplog):
    with engine_with(lanes=lanes) as engine:
        submit(engine).reply.wait()
    assert caplog.text == ""


def test_what_runs_alone_holds_a_drain_up_and_so_does_what_waits_alone():
    behaviour = held()
    with engine_with(behaviour) as engine:
        occupy(engine, behaviour)
        assert not engine.drain(timeout=0)
    idle = Engine(1)  # no lane of it was started
    idle.submit(request())
    assert not idle.drain(timeout=0)


def test_a_lane_without_work_sleeps_until_work_comes_or_a_batch_has_waited_long_enough():
    class Watched(FakeClock):
        """Knows until when lanes sleep."""

        def __init__(self) -> None:
            super().__init__()
            self.untils: list[float | None] = []

        def wait(self, condition, until):
            self.untils.append(until)
            super().wait(condition, until)

    clock = Watched()
    with engine_with(policy=BatchPolicy(timeout=0.005), clock=clock) as engine:
        wait_until(lambda: None in clock.untils)
        clock.untils.clear()
        made = submit(engine, arrived=0.0)
        wait_until(lambda: clock.untils == [0.005])
        wait_until(lambda: clock.advance(0.005) or bool(made.reply.results))


def test_requests_state_their_times_on_the_engine_s_clock():
    clock = FakeClock(start=7.0)
    engine = Engine(1, clock=clock)
    assert engine.now() == 7.0
    clock.advance(0.5)
    assert engine.now() == 7.5


def test_a_transport_is_woken_once_for_all_results_of_a_batch():
    behaviour, wakes = held(), []

    def wake() -> None:
        wakes.append([len(one.reply.results) for one in waiting])

    class Waking(Reply):
        def deliver(self, result):
            super().deliver(result)
            return wake

    with engine_with(behaviour) as engine:
        occupy(engine, behaviour)
        waiting = [ARequest(engine.model, one_hot(1), Waking(), 0.0) for _ in range(3)]
        for made in waiting:
            engine.submit(made)
        behaviour.hold.set()
        wait_until(lambda: bool(wakes))
    assert wakes == [[1, 1, 1]]


def test_a_reply_that_raises_loses_its_own_result_and_nothing_else(caplog):
    class Broken(Reply):
        def deliver(self, result):
            raise OSError("the socket is gone")

    with engine_with() as engine:
        engine.submit(Request(engine.model, one_hot(1), Broken(), 0.0))
        assert submit(engine).reply.wait().error is None
    assert "failed to take a result" in caplog.text


def test_a_warmup_that_fails_fails_the_start():
    broken = fake_model(FakeBehaviour(fail_if=lambda batch: True), name="broken")
    with engine_with() as engine:
        with pytest.raises(RuntimeError, match="told to fail"):
            engine.add(broken, [one_hot(1)])
        assert submit(engine).reply.wait().error is None


def test_a_lane_that_is_lost_fails_the_model_that_it_was_to_open():
    asked = threading.Event()

    class Payloads(list):
        """Says when lanes are given their jobs."""

        def __iter__(self):
            asked.set()
            return super().__iter__()

    def lost(lane: int) -> None:
        assert asked.wait(PATIENCE_S)
        raise OSError("the lane has no processor")

    engine, errors = Engine(1, thread_setup=lost), []
    engine.start()

    def add() -> None:
        try:
            engine.add(fake_model(), Payloads([one_hot(1)]))
        except OSError as error:
            errors.append(str(error))

    threading.Thread(target=add, daemon=True).start()
    wait_until(lambda: errors == ["the lane has no processor"])


def test_a_model_is_warmed_by_turns_with_the_requests_of_others():
    turns: list[str] = []

    class Noted(FakeBackend):
        def __init__(self, turn: str) -> None:
            super().__init__(SCHEMA)
            self.turn = turn

        def run(self, batch):
            turns.append(self.turn)
            return super().run(batch)

    class Opened(Noted):
        def thread_setup(self) -> None:
            for made in flood:
                engine.submit(made)

    with engine_with(policy=WORKER, model=ServedModel("old", "1", [Noted("request")])) as engine:
        flood = [request(model=engine.model) for _ in range(4)]
        engine.add(ServedModel("new", "1", [Opened("warmup")]), [one_hot(1), one_hot(1)])
        flood[-1].reply.wait()
    assert turns == ["request", "warmup", "request", "warmup", "request", "request"]


def test_a_request_for_a_model_that_was_never_added_says_so():
    with engine_with() as engine:
        stranger = request(model=fake_model(name="stranger"))
        engine.submit(stranger)
        assert "model stranger was never added" in str(stranger.reply.wait().error)


def test_an_engine_needs_a_lane_and_a_backend_for_each():
    with pytest.raises(ConfigError, match="at least one lane"):
        Engine(0)
    with pytest.raises(ConfigError, match="at least one lane"):
        ServedModel("m", "1", [])
    with engine_with(lanes=2) as engine, pytest.raises(ConfigError, match="3 backends for 2 lanes"):
        engine.add(fake_model(lanes=3))


def test_under_a_storm_of_everything_each_request_ends_exactly_once():
    random = np.random.default_rng(0)
    behaviour = FakeBehaviour(fail_if=lambda batch: bool((batch.dense == 13.0).any()))
    everyone: list[tuple[ARequest, str]] = []
    guard = threading.Lock()

    def client(engine: AnEngine, seed: int) -> None:
        random = np.random.default_rng(seed)
        for number in range(100):
            features = jagged(int(random.integers(1, 20)), seed=number)
            if number % 17 == 0:
                features.dense[0, 0] = 13.0
            deadline = engine.now() if number % 13 == 0 else None
            made = ARequest(engine.model, features, Reply(), engine.now(), deadline)
            try:
                engine.submit(made)
            except QueueFull:
                kind = "rejected"
            else:
                kind = "cancelled" if number % 5 == 0 and engine.cancel(made) else "admitted"
            with guard:
                everyone.append((made, kind))

    policy, limits = BatchPolicy(max_requests=4, max_rows=30), QueueLimits(max_requests=20)
    with engine_with(behaviour, lanes=2, policy=policy, limits=limits) as engine:
        clients = [threading.Thread(target=client, args=(engine, int(random.integers(1 << 30)))) for _ in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert engine.drain(PATIENCE_S)
        stats = engine.statistics()

    for made, kind in everyone:
        assert len(made.reply.results) == (1 if kind == "admitted" else 0)
        result = made.reply.results[0] if kind == "admitted" else None
        if result is not None and result.error is None:
            np.testing.assert_array_equal(result.scores["default"], scores_alone(made.features))
    assert stats.submitted == 600
    assert stats.submitted == stats.answered + stats.rejected + stats.expired + stats.cancelled + stats.failed
    assert stats.queued == stats.running == 0


class Timed(FakeBackend):
    """Takes ten milliseconds of the test's clock, and notes whose turn it was."""

    def __init__(self, clock: FakeClock, turns: list[str], name: str, hold: threading.Event) -> None:
        super().__init__(SCHEMA, FakeBehaviour(hold=hold))
        self.clock, self.turns, self.label = clock, turns, name

    def run(self, batch):
        scores = super().run(batch)
        self.clock.advance(0.010)
        self.turns.append(self.label)
        return scores


def test_a_busy_model_does_not_starve_another_and_neither_wastes_the_lane():
    clock, turns, hold = FakeClock(), [], threading.Event()
    models = {name: ServedModel(name, "1", [Timed(clock, turns, name, hold)]) for name in ("flooded", "quiet")}
    with engine_with(clock=clock, policy=WORKER) as engine:
        for model in models.values():
            engine.add(model)
        flood = [request(model=models["flooded"], arrived=0.0) for _ in range(60)]
        quiet = [request(model=models["quiet"], arrived=1.0) for _ in range(3)]
        for made in (*flood, *quiet):
            engine.submit(made)
        hold.set()
        for made in (*flood, *quiet):
            assert made.reply.wait().error is None
    # The flood came first, and is ahead by the least that counts when the others get their turns.
    assert [at for at, name in enumerate(turns) if name == "quiet"] == [3, 5, 7]
    assert len(turns) == 63


def test_what_a_model_has_had_is_not_forgotten_while_it_wants_nothing():
    clock, turns = FakeClock(), []
    holds = {name: threading.Event() for name in ("greedy", "other")}

    class Costly(Timed):
        def run(self, batch):
            clock.advance(5.0 * (self.label == "greedy"))
            return super().run(batch)

    backends = {name: Costly(clock, turns, name, hold) for name, hold in holds.items()}
    models = {name: ServedModel(name, "1", [backend]) for name, backend in backends.items()}
    with engine_with(clock=clock, policy=WORKER) as engine:
        for model in models.values():
            engine.add(model)
        first, again = (request(model=models["greedy"], arrived=arrived) for arrived in (0.0, 1.0))
        others = [request(model=models["other"], arrived=2.0) for _ in range(3)]
        engine.submit(first)
        wait_until(lambda: len(backends["greedy"].behaviour.forwards) == 1)
        for made in others:
            engine.submit(made)
        holds["greedy"].set()
        first.reply.wait()  # the greedy model has nothing more, and the other one is at work
        wait_until(lambda: len(backends["other"].behaviour.forwards) == 1)
        engine.submit(again)
        holds["other"].set()
        for made in (*others, again):
            made.reply.wait()
    assert turns == ["greedy", "other", "other", "other", "greedy"]


def test_a_model_s_share_is_its_part_of_the_lanes_where_all_have_work():
    clock, turns, hold = FakeClock(), [], threading.Event()
    models = [
        ServedModel(name, "1", [Timed(clock, turns, name, hold)], share=share)
        for name, share in (("large", 3.0), ("small", 1.0))
    ]
    with engine_with(clock=clock, policy=WORKER) as engine:
        for model in models:
            engine.add(model)
        made = [request(model=model) for model in models for _ in range(100)]
        for one in made:
            engine.submit(one)
        hold.set()
        for one in made:
            one.reply.wait()
    assert turns[:100].count("large") == pytest.approx(75, abs=5)


def test_a_job_for_one_lane_reaches_it_wherever_the_wake_went():
    """All lanes wait in one source; each has to warm the new model itself."""

    class Shared:
        """A source whose wakes reach the same poll every time, as long as there is more than one."""

        def __init__(self) -> None:
            self.woken = threading.Semaphore(0)

        def poll(self, timeout):
            if timeout is None:
                assert self.woken.acquire(timeout=PATIENCE_S)
            return ()

        def wake(self):
            self.woken.release()

        def close(self, why):
            pass

    with engine_with(lanes=3) as engine:
        engine.attach(Shared())
        for number in range(20):
            engine.add(fake_model(lanes=3, name=f"m{number}"), [one_hot(1)])
