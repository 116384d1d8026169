"""RequestQueue: bounded in requests, rows and ids."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narsil.backends.fake import FakeBackend
from narsil.engine.queue import QueueLimits, RequestQueue
from narsil.engine.served_model import ServedModel
from narsil.errors import InvalidRequest, QueueFull
from narsil.transports.validate import id_count
from tests.support import SCHEMA, request


def test_requests_leave_in_the_order_in_which_they_came():
    queue = RequestQueue(QueueLimits())
    members = [request() for _ in range(5)]
    for member in members:
        queue.add(member)
    assert list(queue) == members
    assert len(queue) == 5


def test_a_member_can_leave_from_the_middle_exactly_once():
    queue = RequestQueue(QueueLimits())
    members = [request(rows) for rows in (1, 2, 3)]
    for member in members:
        queue.add(member)
    assert queue.remove(members[1])
    assert not queue.remove(members[1])
    assert list(queue) == [members[0], members[2]]


@pytest.mark.parametrize(
    "limits",
    [
        QueueLimits(max_requests=2),
        QueueLimits(max_rows=11),
        QueueLimits(max_ids=10 * SCHEMA.num_features + 3),
        QueueLimits(max_bytes=250),
    ],
    ids=["requests", "rows", "ids", "bytes"],
)
def test_at_a_limit_the_next_request_is_refused_and_says_what_is_full(limits):
    queue = RequestQueue(limits)
    queue.add(request(5, size=100))
    queue.add(request(5, size=100))
    with pytest.raises(QueueFull, match=r"the queue is full: 2 of \d+ requests, 10 of \d+ rows"):
        queue.add(request(5, size=100))
    assert len(queue) == 2


@pytest.mark.parametrize(
    "limits",
    [
        QueueLimits(max_requests=3),
        QueueLimits(max_rows=15),
        QueueLimits(max_ids=15 * SCHEMA.num_features),
        QueueLimits(max_bytes=300),
    ],
    ids=["requests", "rows", "ids", "bytes"],
)
def test_what_just_fits_is_taken_and_a_place_that_becomes_free_can_be_taken_again(limits):
    queue = RequestQueue(limits)
    members = [request(5, size=100) for _ in range(3)]
    for member in members:
        queue.add(member)
    for turn in range(3):
        with pytest.raises(QueueFull):
            queue.add(request(5, size=100))
        queue.remove(members[turn])
        queue.add(request(5, size=100))
    assert len(queue) == 3


def test_a_request_that_fills_the_queue_alone_is_unlucky_rather_than_invalid():
    queue = RequestQueue(QueueLimits(max_rows=5, max_ids=5 * SCHEMA.num_features, max_bytes=100))
    queue.add(request(5, size=100))
    with pytest.raises(QueueFull, match=r"5 of 5 rows, 20 of 20 ids, 100 of 100 bytes; this request has 5 rows"):
        queue.add(request(5, size=100))


def test_a_request_that_no_empty_queue_could_hold_is_invalid_rather_than_unlucky():
    with pytest.raises(InvalidRequest, match=r"has 12 rows; this server queues at most 11 \(--max-queue-rows\)"):
        RequestQueue(QueueLimits(max_rows=11)).add(request(12))
    with pytest.raises(InvalidRequest, match="--max-queue-bytes"):
        RequestQueue(QueueLimits(max_bytes=5)).add(request(2, size=6))
    with pytest.raises(InvalidRequest, match="--max-queue-ids"):
        RequestQueue(QueueLimits(max_ids=5)).add(request(2))


@pytest.mark.parametrize(("whole", "advice"), [(False, "Send it in several requests"), (True, "depend on each other")])
def test_a_request_that_cannot_be_cut_is_told_another_way_out(whole, advice):
    model = ServedModel("m", "1", [FakeBackend(SCHEMA)], whole=whole)
    for limits in (QueueLimits(max_rows=11), QueueLimits(max_ids=5), QueueLimits(max_bytes=5)):
        with pytest.raises(InvalidRequest, match=advice):
            RequestQueue(limits).add(request(12, model=model, size=6))
    with pytest.raises(InvalidRequest, match=advice):
        id_count(8, replace(model.limits, max_ids=7))
