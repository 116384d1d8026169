"""grpc.health.v1 for an asyncio server, bytes in, bytes out: the messages of proto/grpc/health/v1/health.proto.

grpcio's own servicer writes to a watching client while it holds the lock that every status change needs, so that one
client that does not read could keep the server from shutting down. This one holds no lock, and bounds its watchers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, TypeAlias

import grpc

from narsil.errors import InvalidRequest
from narsil.wire import LEN, expect, put_uint, scan, text

if TYPE_CHECKING:
    _Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

MAX_WATCHERS = 256  # of one connection

_UNIX = "unix:"  # what grpcio calls every peer of a Unix socket, which is thus bounded by streams alone

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3  # HealthCheckResponse.ServingStatus


class Health:
    """One status for all services: serving, from ``serve`` until ``retire``. Belongs to one event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._retired = asyncio.Event()
        self._watchers: Counter[str] = Counter()  # by connection

    def serve(self) -> None:
        """From now on the answer is SERVING."""
        self._serving = True

    def retire(self) -> None:
        """From now on, and for good, the answer is NOT_SERVING. Watchers are told, and their calls end."""
        self._serving = False
        self._retired.set()

    async def check(self, body: bytes, context: _Context) -> bytes:
        """The status now; NOT_FOUND for a service that is not here."""
        if await _service(body, context) not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return self._status()

    async def watch(self, body: bytes, context: _Context) -> AsyncIterator[bytes]:
        """The status now and when it changes, which it does once."""
        known = await _service(body, context) in self._services
        peer = context.peer()
        if peer != _UNIX and self._watchers[peer] >= MAX_WATCHERS:
            text = f"more than {MAX_WATCHERS} health watchers on one connection; end some of them"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._watchers[peer] += 1
        try:
            told = self._status()
            yield told if known else _response(SERVICE_UNKNOWN)
            await self._retired.wait()
            if known and self._status() != told:  # which may have happened while that was sent
                yield self._status()
        finally:
            self._watchers -= Counter([peer])  # and what is 0 is left out

    def _status(self) -> bytes:
        return _response(SERVING if self._serving else NOT_SERVING)


def _response(status: int) -> bytes:
    """A serialized HealthCheckResponse."""
    return put_uint(1, status)


async def _service(body: bytes, context: _Context) -> str:
    """The service that a serialized HealthCheckRequest names; INVALID_ARGUMENT where it is none."""
    name = ""
    try:
        for found in scan(body, 0, len(body)):
            if found[0] == 1:
                expect(found, LEN, "service")
                name = text(body, found[2], found[3], "service")
    except InvalidRequest as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    return name
