"""What every transport shares: the engine as transports see it, and the address.

A transport receives bytes, turns them into Requests through an endpoint's Wire, submits them to the engine and turns
each Result back into bytes. Transports differ in sockets and threads and in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from narsil.catalog.catalog import Catalog
from narsil.dataflow import Request
from narsil.engine.source import Source

__all__ = ["MAX_STREAMS", "UNIX", "EngineLike", "Transport", "address_of"]

UNIX = "unix:"  # a host that begins so is the path of a Unix socket
MAX_STREAMS = 1024  # calls in flight on one connection; clients queue more on their side


class EngineLike(Protocol):
    """The engine's side that transports use; see narsil.engine.engine.Engine."""

    def now(self) -> float:
        """Seconds on the engine's clock."""

    def submit(self, request: Request) -> None:
        """Admits a request or raises a RequestError."""

    def cancel(self, request: Request) -> bool:
        """Takes a waiting request back."""

    def attach(self, source: Source | None) -> None:
        """Has idle lanes poll this source, or none."""


class Transport(ABC):
    """Listens, and connects clients with the engine."""

    @abstractmethod
    def serve(self, catalog: Catalog) -> None:
        """These are the models from now on, in one step; a call keeps the one it was decoded for. Any thread."""

    @abstractmethod
    async def start(self) -> str:
        """Begins to accept; returns the address it is bound to, as HOST:PORT."""

    @abstractmethod
    def retire(self) -> None:
        """Tells health checkers to send no more. Still accepts: the engine, draining, refuses by itself."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Accepts nothing more, lets what is in flight finish for ``grace`` seconds, then closes."""


def address_of(host: str, port: int) -> str:
    """What clients connect to: HOST:PORT, an IPv6 address in brackets; or unix:PATH as it is."""
    if host.startswith(UNIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
