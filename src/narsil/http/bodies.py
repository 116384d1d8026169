"""Bodies of requests and answers: read within bounds of size and time, inflated and deflated.

Owns the count of bytes that all requests hold until they are answered. Used on the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from narsil.errors import InvalidRequest, MessageTooLarge, QueueFull

__all__ = ["SMALL", "Bodies", "deflated", "encoding_for"]

T = TypeVar("T")

SMALL = 1 << 16  # bytes that are worked on without leaving the event loop
_WORTH_DEFLATING = 1 << 10  # bytes
_MOST_THROWN_AWAY = 1 << 28  # bytes of a body that is too large, so that its sender reads the answer
_WINDOW = {"gzip": 31, "deflate": 15}  # zlib's wbits: deflate is zlib's format, as RFC 9110 has it
_TAKEN = (
    "application/json",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
)  # the last: curl's default


class Bodies:
    """Reads bodies."""

    def __init__(self, max_bytes: int, max_held: int, seconds: float, executor: Executor) -> None:
        """``max_bytes`` bounds one body, as sent and inflated, ``max_held`` all that are held, ``seconds`` the time
        that one may take to arrive."""
        self._max_bytes = max_bytes
        self._max_held = max_held
        self._seconds = seconds
        self._executor = executor
        self._held = 0

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body, inflated; its bytes are counted as long as the context lasts.

        Raises MessageTooLarge, QueueFull, InvalidRequest, ClientDisconnect, and HTTPException for what is no error of
        a request's own.
        """
        encoding = _encoding_of(request)
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated[:20]) > self._max_bytes:
            await self._throw_away(request)
            raise self._too_large()
        held = _Held(self)
        try:
            body = await self._received(request, held)
            if encoding is not None:
                body = await self.off_the_loop(len(body), lambda: self._inflated(body, encoding))
                held.add(len(body))
            yield body
        finally:
            held.give_back()

    async def off_the_loop(self, size: int, work: Callable[[], T]) -> T:
        """What ``work`` gives, done in another thread where so many bytes are too many for the loop's."""
        if size <= SMALL:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def hold(self, count: int) -> None:
        """Counts so many bytes more, or less. Raises QueueFull where they are more than all bodies may have."""
        if count > 0 and self._held + count > self._max_held:
            raise QueueFull(
                f"the requests that are here hold {self._held} bytes of {self._max_held} (--max-queue-bytes). Retry "
                "with backoff"
            )
        self._held += count

    async def _received(self, request: Request, held: _Held) -> bytes:
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    held.add(len(chunk))
                    parts.append(chunk)
                    if held.count > self._max_bytes:
                        parts.clear()
                        held.give_back()
                        await self._throw_away(request)
                        raise self._too_large()
        except TimeoutError:
            raise HTTPException(408, f"the body took more than {self._seconds:g} s to arrive") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _throw_away(self, request: Request) -> None:
        """Reads on, so that a client that writes first and reads then gets its answer. One that asks before it sends
        is told at once."""
        if "100-continue" in request.headers.get("expect", "").lower():
            return
        left = _MOST_THROWN_AWAY
        try:
            async with asyncio.timeout(self._seconds):
                while left > 0:
                    message = await request.receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _too_large(self) -> MessageTooLarge:
        return MessageTooLarge(
            f"the body has more than {self._max_bytes} bytes (--max-message-bytes); send fewer rows", self._max_bytes
        )

    def _inflated(self, body: bytes, encoding: str) -> bytes:
        inflater = zlib.decompressobj(_WINDOW[encoding])
        try:
            found = inflater.decompress(body, self._max_bytes + 1)
        except zlib.error as error:
            raise InvalidRequest(f"the body is not what Content-Encoding {encoding} says: {error}") from None
        if len(found) > self._max_bytes:
            raise self._too_large()
        if not inflater.eof or inflater.unused_data:
            wrong = "something follows" if inflater.eof else "its end is missing"
            raise InvalidRequest(f"the body is not what Content-Encoding {encoding} says: {wrong}")
        return found


class _Held:
    """What one request holds."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.count = 0

    def add(self, count: int) -> None:
        self._bodies.hold(count)
        self.count += count

    def give_back(self) -> None:
        self._bodies.hold(-self.count)
        self.count = 0


def _encoding_of(request: Request) -> str | None:
    """How the body is encoded. Raises HTTPException for types and encodings that are not read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind not in _TAKEN and not kind.endswith("+json"):
        raise HTTPException(415, f"Content-Type {kind[:80]} is not read here; send application/json, or octet-stream")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in _WINDOW:
        raise HTTPException(
            415,
            f"Content-Encoding {encoding[:80]} is not read here; send gzip, deflate or none",
            {"Accept-Encoding": ", ".join(_WINDOW)},
        )
    return encoding


def encoding_for(accepted: str, size: int) -> str | None:
    """How an answer of so many bytes is encoded for a client with this Accept-Encoding."""
    if size < _WORTH_DEFLATING:
        return None
    for each in accepted.lower().split(","):
        name, _, quality = each.replace(" ", "").partition(";q=")
        refused = quality != "" and not quality.strip("0.")  # q=0
        if name in _WINDOW and not refused:
            return name
    return None


def deflated(body: bytes, encoding: str) -> bytes:
    """The body, encoded. At the level that is the quickest: numbers hardly get smaller at a higher one."""
    deflater = zlib.compressobj(1, zlib.DEFLATED, _WINDOW[encoding])
    return deflater.compress(body) + deflater.flush()
