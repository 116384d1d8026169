"""Decides what a free lane runs next: which model, and which of its requests. Pure: no clock, no lock, no side effect.

``schedule`` picks among models, ``form`` among one model's requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from narsil.dataflow import Request


class Waiting(Protocol):
    """Requests that wait, in the order in which they came."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Request]: ...


class Claim(Protocol):
    """One model's claim on the lanes; see narsil.engine.backlog.Backlog."""

    @property
    def queue(self) -> Waiting:
        """What waits for it."""

    @property
    def used(self) -> float:
        """Seconds of lane time that it has had, over its share."""


# How far one model may run ahead of another that has work too, in seconds of lane time over its share. Within it the
# oldest request goes first, whoever it is for: fairness finer than a few forwards would only cost latency.
LEAD_S = 0.02


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """The limits of one batch. Worker mode is ``max_requests=1, timeout=0``."""

    max_requests: int = 16
    max_rows: int = 4096
    timeout: float = 0.0  # seconds a free lane lets the oldest request wait for company
    lanes: int = 1  # lanes that serve the queue, and so share what waits in it


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with the queues now. The three tuples hold different requests, each in queue order."""

    take: tuple[Request, ...] = ()  # of one model
    expired: tuple[Request, ...] = ()
    cancelled: tuple[Request, ...] = ()
    wake_at: float | None = None  # nothing to take before this time unless the queue changes; None: wait for ever


def schedule(claims: Sequence[Claim], policy: BatchPolicy, now: float) -> Decision:
    """What a lane that is free at ``now`` takes, of all models.

    The model whose oldest request came first is served, unless it has had more than LEAD_S above its share of the
    lanes' time, as seen from the waiting model that has had the least: so a busy model does not starve another, and one
    that is alone gets everything. A model whose batch still waits for company leaves the lane to the next.
    """
    if len(claims) == 1:
        return form(claims[0].queue, policy, now)
    expired: list[Request] = []
    cancelled: list[Request] = []
    wakes: list[float] = []
    for claim in _by_turn(claims):
        decision = form(claim.queue, policy, now)
        expired += decision.expired
        cancelled += decision.cancelled
        if decision.take:
            return Decision(decision.take, tuple(expired), tuple(cancelled))
        if decision.wake_at is not None:
            wakes.append(decision.wake_at)
    return Decision((), tuple(expired), tuple(cancelled), min(wakes, default=None))


def _by_turn(claims: Sequence[Claim]) -> list[Claim]:
    waiting = [claim for claim in claims if len(claim.queue)]
    least = min((claim.used for claim in waiting), default=0.0)

    def turn(claim: Claim) -> tuple[bool, float]:
        return claim.used > least + LEAD_S, next(iter(claim.queue)).arrived

    return sorted(waiting, key=turn)


def form(queue: Waiting, policy: BatchPolicy, now: float) -> Decision:
    """What a lane that is free at ``now`` takes from one model's queue, oldest first.

    It takes its share, one lane's part of all that waits, as far as a batch may hold it: a lane that took more would
    leave the others idle now, and everybody waiting for one long forward. First come, first served: a request that
    does not fit any more closes the batch and nobody overtakes it, so none starves. A request with more rows than a
    batch may have is taken alone (the lane runs it in pieces). Expired and cancelled requests met on the way are
    sorted out and never taken.
    """
    take: list[Request] = []
    expired: list[Request] = []
    cancelled: list[Request] = []
    rows = 0
    closed = False
    for request in queue:
        if request.reply.cancelled:
            cancelled.append(request)
        elif request.expired(now):
            expired.append(request)
        elif take and rows + request.rows > policy.max_rows:
            closed = True
            break
        else:
            take.append(request)
            rows += request.rows
            if len(take) >= policy.max_requests or rows >= policy.max_rows:
                closed = True
                break
    wake_at = None
    if take and not closed and take[0].arrived + policy.timeout > now:
        deadlines = [request.deadline for request in take if request.deadline is not None]
        wake_at = min([take[0].arrived + policy.timeout, *deadlines])
        take = []
    waiting = len(queue) - len(expired) - len(cancelled)
    take = take[: -(-waiting // policy.lanes)]
    return Decision(tuple(take), tuple(expired), tuple(cancelled), wake_at)
