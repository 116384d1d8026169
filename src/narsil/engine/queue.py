"""The bounded queue of admitted requests. Owned by the engine, which holds its lock around every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from narsil.dataflow import Request
from narsil.errors import InvalidRequest, QueueFull


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait."""

    max_requests: int = 1024
    max_rows: int = 131072
    max_ids: int = 1 << 24


class RequestQueue:
    """First in, first out; any member can leave at once. Not thread-safe by itself."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._requests: dict[int, tuple[Request, int]] = {}  # by identity, in order; with its count of ids
        self._rows = 0
        self._ids = 0

    @property
    def rows(self) -> int:
        """Rows of all waiting requests."""
        return self._rows

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: object) -> bool:
        return id(request) in self._requests

    def __iter__(self) -> Iterator[Request]:
        return (request for request, _ in self._requests.values())

    def has_room_for(self, request: Request) -> bool:
        """Whether ``add`` would take it."""
        return (
            len(self._requests) < self._limits.max_requests
            and self._rows + request.rows <= self._limits.max_rows
            and self._ids + request.features.sparse.count <= self._limits.max_ids
        )

    def add(self, request: Request) -> None:
        """Appends the request.

        Raises QueueFull when the queue is at a limit, and InvalidRequest for a request that would not fit even
        into the empty queue.
        """
        limits, ids = self._limits, request.features.sparse.count
        for what, count, limit in (("rows", request.rows, limits.max_rows), ("ids", ids, limits.max_ids)):
            if count > limit:
                raise InvalidRequest(
                    f"the request has {count} {what}; this server queues at most {limit} (--max-queue-{what}). "
                    "Send it in several requests"
                )
        if not self.has_room_for(request):
            raise QueueFull(
                f"the queue is full: {len(self)} of {limits.max_requests} requests, {self._rows} of {limits.max_rows} "
                f"rows, {self._ids} of {limits.max_ids} ids; this request has {request.rows} rows. Retry with backoff"
            )
        self._requests[id(request)] = (request, ids)
        self._rows += request.rows
        self._ids += ids

    def remove(self, request: Request) -> bool:
        """Takes the request out wherever it stands. False when it is not (any more) in the queue."""
        found = self._requests.pop(id(request), None)
        if found is None:
            return False
        self._rows -= request.rows
        self._ids -= found[1]
        return True
