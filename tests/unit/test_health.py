"""The health of a server, as grpcio's watchers are told of it."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from narsil.transports.health import NOT_SERVING, SERVING, Health
from narsil.wire import put_uint


class Context:
    """Of a call from the one connection there is."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


def test_a_watcher_is_told_of_a_change_that_comes_while_the_status_before_is_sent() -> None:
    async def watch() -> list[bytes]:
        health, context = Health([""]), cast(Any, Context())
        health.serve()
        watching = health.watch(b"", context)
        told = [await anext(watching)]
        health.retire()
        told += [status async for status in watching]
        late = [status async for status in health.watch(b"", context)]
        return told + late

    assert asyncio.run(watch()) == [put_uint(1, status) for status in (SERVING, NOT_SERVING, NOT_SERVING)]
