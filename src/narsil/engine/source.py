"""Where idle lanes fetch requests by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from narsil.dataflow import Request

__all__ = ["Source"]


class Source(Protocol):
    """Requests that idle lanes fetch by themselves: a transport that has no thread of its own.

    Every method may be called from any thread, and ``poll`` by several lanes at once.
    """

    def poll(self, timeout: float | None) -> Sequence[Request]:
        """Requests that have arrived. Waits for some until ``timeout`` seconds have passed or ``wake`` was called."""

    def wake(self) -> None:
        """Has one running poll, or the next, return."""

    def close(self, why: str) -> None:
        """No lane will poll any more: what comes from now on is refused with this text, as Draining is."""
