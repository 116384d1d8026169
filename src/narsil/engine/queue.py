"""The bounded queue of admitted requests. Owned by the engine, which holds its lock around every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from narsil.dataflow import Request
from narsil.errors import InvalidRequest, QueueFull


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait."""

    max_requests: int = 1024
    max_rows: int = 131072
    max_ids: int = 1 << 24
    max_bytes: int = 1 << 29


class RequestQueue:
    """First in, first out; any member can leave at once. Not thread-safe by itself."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._requests: dict[int, tuple[Request, int]] = {}  # by identity, in the order of arrival; with its ids
        self._rows = self._ids = self._bytes = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return (request for request, _ in self._requests.values())

    @property
    def load(self) -> dict[str, int]:
        """How much waits: requests, rows, ids, bytes."""
        return {"requests": len(self._requests), "rows": self._rows, "ids": self._ids, "bytes": self._bytes}

    def add(self, request: Request) -> None:
        """Appends the request.

        Raises QueueFull when the queue is at a limit, and InvalidRequest for a request that would not fit even
        into the empty queue.
        """
        limits, features = self._limits, request.features
        rows, ids = self._rows + features.rows, self._ids + features.ids
        size = self._bytes + request.size
        if (
            len(self._requests) >= limits.max_requests
            or rows > limits.max_rows
            or ids > limits.max_ids
            or size > limits.max_bytes
        ):
            self._refuse(request)
        self._requests[id(request)] = (request, ids - self._ids)
        self._rows, self._ids, self._bytes = rows, ids, size

    def remove(self, request: Request) -> bool:
        """Takes the request out wherever it stands. False when it is not (any more) in the queue."""
        found = self._requests.pop(id(request), None)
        if found is None:
            return False
        self._rows -= request.rows
        self._ids -= found[1]
        self._bytes -= request.size
        return True

    def _refuse(self, request: Request) -> NoReturn:
        limits = self._limits
        own = {"rows": request.rows, "ids": request.features.ids, "bytes": request.size}
        for what, count in own.items():
            limit = getattr(limits, f"max_{what}")
            if count > limit:
                raise InvalidRequest(
                    f"the request has {count} {what}; this server queues at most {limit} (--max-queue-{what}). "
                    f"{request.model.limits.advice}"
                )
        raise QueueFull(
            f"the queue is full: {len(self)} of {limits.max_requests} requests, {self._rows} of {limits.max_rows} "
            f"rows, {self._ids} of {limits.max_ids} ids, {self._bytes} of {limits.max_bytes} bytes; this request has "
            f"{request.rows} rows. Retry with backoff"
        )
