"""What threads have seen adds up, whoever reads it and when; and no count ever falls."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from narsil.dataflow import Features, Jagged, OneHot, Result, StageTimes
from narsil.errors import QueueFull
from narsil.telemetry import tally as module
from narsil.telemetry.tally import FEATURE_COUNTS, SCORES, SECONDS, Distribution, Tally
from tests.support import fake_model, jagged, one_hot, request

MODEL = fake_model()
TIMES = StageTimes(queue=1e-3, collate=2e-4, execute=5e-3, split=1e-5)


def answered(scores: dict[str, np.ndarray] | None = None, features: Features | None = None):
    return request(model=MODEL, features=features), Result(scores, times=TIMES)


def test_a_distribution_has_its_values_under_their_bounds():
    found = Distribution.of(np.array([0.5, 1.0, 1.5, 9.0]), (1.0, 2.0))
    assert found.counts.tolist() == [2, 1, 1]
    assert (found.count, found.total) == (4, 12.0)
    assert (found + found).counts.tolist() == [4, 2, 2]


@pytest.mark.parametrize("count", [1, 511, 512, 513, 2000])
def test_requests_are_counted_however_many_have_been_folded(count):
    tally = Tally()
    for _ in range(count):
        tally.ended([answered()])
    refused = request(model=MODEL), Result(error=QueueFull("full"))
    tally.ended([refused, refused])
    ends = tally.ends()
    stages = ends["fake", "1", "answered"]
    assert {stage: found.count for stage, found in stages.items()} == dict.fromkeys(stages, count)
    assert stages["queue"].total == pytest.approx(count * 1e-3)
    assert stages["total"].total == pytest.approx(count * 6.21e-3)
    assert stages["execute"].counts[SECONDS.index(0.005)] == count
    assert ends["fake", "1", "QueueFull"]["total"].count == 2


@pytest.mark.parametrize("count", [1, 1500])
def test_batches_are_counted_by_thread(count):
    tally = Tally()

    def lane() -> None:
        for _ in range(count):
            tally.ran("m", "1", 4, 100, 0.5)

    threads = [threading.Thread(target=lane, name=f"lane-{number}") for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batches = tally.batches()
    assert set(batches) == {("m", "1", "lane-0"), ("m", "1", "lane-1")}
    for requests, rows, seconds in batches.values():
        assert (requests.count, requests.total, rows.total, seconds) == (count, 4 * count, 100 * count, count / 2)


def test_no_count_falls_while_threads_go_on(monkeypatch):
    monkeypatch.setattr(module, "_FOLD_AT", 3)
    tally, stop = Tally(), threading.Event()

    def lane() -> None:
        while not stop.is_set():
            tally.ended([answered({"default": np.ones(1, np.float32)})])
            tally.ran("fake", "1", 1, 1, 0.0)

    threads = [threading.Thread(target=lane) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = (0, 0, 0)
    try:
        for _ in range(300):
            ends, batches, scores = tally.ends(), tally.batches(), tally.scores()
            now = (
                sum(stages["total"].count for stages in ends.values()),
                sum(requests.count for requests, _, _ in batches.values()),
                sum(found.count for found in scores.values()),
            )
            assert all(a <= b for a, b in zip(before, now, strict=True))
            before = now
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert before[0] > 0


def test_scores_are_sampled_task_by_task():
    tally = Tally()
    scores = {"click": np.full(3, 0.25, np.float32), "buy": np.array([-3.0, 0.0, 40.0], np.float32)}
    for _ in range(32 * 4):
        tally.ended([answered(scores)])
    found = tally.scores()
    click, buy = found["fake", "1", "click"], found["fake", "1", "buy"]
    assert click.count == buy.count > 0
    assert click.count < 3 * 32
    assert click.total / click.count == 0.25
    assert click.counts[SCORES.index(0.3)] == click.count
    assert buy.counts[[SCORES.index(-2.0), SCORES.index(0.0), -1]].tolist() == [buy.count // 3] * 3


def counts(features: Features) -> dict[str, list[int]]:
    tally = Tally()
    tally.ended([answered({"default": np.ones(features.rows, np.float32)}, features)])
    return dict(zip(FEATURE_COUNTS, tally.features()["fake", "1"].tolist(), strict=True))


def test_ids_bags_and_zeros_of_each_feature_are_counted():
    ids = np.array([[0, 1, 0], [2, 3, 4]], np.int32)
    assert counts(Features(3, np.empty((3, 0), np.float32), OneHot(ids))) == {
        "bags": [3, 3],
        "ids": [3, 3],
        "empty_bags": [0, 0],
        "zero_ids": [2, 0],
    }
    lengths = np.array([[2, 0, 1], [0, 0, 3]], np.int32)
    bags = Jagged.laid_out(np.array([0, 5, 0, 7, 0, 0], np.int32), lengths)
    assert counts(Features(3, np.empty((3, 0), np.float32), bags)) == {
        "bags": [3, 3],
        "ids": [3, 3],
        "empty_bags": [1, 2],
        "zero_ids": [2, 2],
    }


@pytest.mark.parametrize("seed", range(5))
def test_bags_in_either_order_are_counted_alike(seed):
    features = jagged(40, seed=seed)
    sparse = features.sparse
    lengths = np.ascontiguousarray(sparse.lengths.T)
    values = np.concatenate(
        [
            sparse.values[sparse.starts[t, b] : sparse.starts[t, b] + sparse.lengths[t, b]]
            for b in range(features.rows)
            for t in range(len(sparse.lengths))
        ]
    )
    sample_major = Jagged.laid_out(values, lengths, key_major=False)
    assert counts(features) == counts(Features(features.rows, features.dense, sample_major))


def test_a_sample_of_a_large_request_is_a_part_of_it():
    assert counts(one_hot(100_000))["bags"] == [1024] * 4
    long = np.full((1, 8), 8000, np.int32)
    wide = Jagged.laid_out(np.ones(64_000, np.int32), long)
    assert counts(Features(8, np.empty((8, 0), np.float32), wide))["bags"] == [1]
    tally = Tally()  # a single row that is too long is passed over
    endless = Jagged.laid_out(np.ones(9000, np.int32), np.full((1, 1), 9000, np.int32))
    tally.ended([answered({"default": np.ones(1)}, Features(1, np.empty((1, 0), np.float32), endless))])
    assert tally.features() == {}
