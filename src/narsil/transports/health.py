"""grpc.health.v1 for an asyncio server.

grpcio's own servicer writes to a watching client while it holds the lock that every status change needs, so that one
client that does not read could keep the server from shutting down. This one holds no lock, and bounds its watchers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

MAX_WATCHERS = 256

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking has no types
    """One status for all services: serving, from ``serve`` until ``retire``. Belongs to one event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._retired = asyncio.Event()
        self._watchers = 0

    def serve(self) -> None:
        """From now on the answer is SERVING."""
        self._serving = True

    def retire(self) -> None:
        """From now on, and for good, the answer is NOT_SERVING. Watchers are told, and their calls end."""
        self._serving = False
        self._retired.set()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """The status now; NOT_FOUND for a service that is not here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return _Status(status=self._status())

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
        """The status now and when it changes, which it does once."""
        if self._watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {MAX_WATCHERS} health watchers")
        known = request.service in self._services
        self._watchers += 1
        try:
            yield _Status(status=self._status() if known else _Status.SERVICE_UNKNOWN)
            if not self._retired.is_set():
                await self._retired.wait()
                if known:
                    yield _Status(status=self._status())
        finally:
            self._watchers -= 1

    def _status(self) -> Any:
        return _Status.SERVING if self._serving else _Status.NOT_SERVING
