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
    max_bytes: int = 1 << 29


@dataclass(frozen=True, slots=True)
class _Load:
    """What one request, or all of them together, put on the queue."""

    requests: int = 0
    rows: int = 0
    ids: int = 0
    bytes: int = 0

    def __add__(self, other: _Load) -> _Load:
        return _Load(
            self.requests + other.requests, self.rows + other.rows, self.ids + other.ids, self.bytes + other.bytes
        )

    def __sub__(self, other: _Load) -> _Load:
        return _Load(
            self.requests - other.requests, self.rows - other.rows, self.ids - other.ids, self.bytes - other.bytes
        )

    def fits(self, limits: QueueLimits) -> bool:
        return (
            self.requests <= limits.max_requests
            and self.rows <= limits.max_rows
            and self.ids <= limits.max_ids
            and self.bytes <= limits.max_bytes
        )

    @staticmethod
    def of(request: Request) -> _Load:
        return _Load(1, request.rows, request.features.sparse.count, request.size)


class RequestQueue:
    """First in, first out; any member can leave at once. Not thread-safe by itself."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._requests: dict[int, tuple[Request, _Load]] = {}  # by identity, in the order of arrival
        self._load = _Load()

    @property
    def rows(self) -> int:
        """Rows of all waiting requests."""
        return self._load.rows

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return (request for request, _ in self._requests.values())

    def has_room_for(self, request: Request) -> bool:
        """Whether ``add`` would take it."""
        return (self._load + _Load.of(request)).fits(self._limits)

    def add(self, request: Request) -> None:
        """Appends the request.

        Raises QueueFull when the queue is at a limit, and InvalidRequest for a request that would not fit even
        into the empty queue.
        """
        limits, own = self._limits, _Load.of(request)
        after = self._load + own
        if not after.fits(limits):
            for what in ("rows", "ids", "bytes"):
                count, limit = getattr(own, what), getattr(limits, f"max_{what}")
                if count > limit:
                    raise InvalidRequest(
                        f"the request has {count} {what}; this server queues at most {limit} (--max-queue-{what}). "
                        "Send it in several requests"
                    )
            now = self._load
            raise QueueFull(
                f"the queue is full: {now.requests} of {limits.max_requests} requests, {now.rows} of {limits.max_rows} "
                f"rows, {now.ids} of {limits.max_ids} ids, {now.bytes} of {limits.max_bytes} bytes; this request has "
                f"{own.rows} rows. Retry with backoff"
            )
        self._requests[id(request)] = (request, own)
        self._load = after

    def remove(self, request: Request) -> bool:
        """Takes the request out wherever it stands. False when it is not (any more) in the queue."""
        found = self._requests.pop(id(request), None)
        if found is None:
            return False
        self._load -= found[1]
        return True
