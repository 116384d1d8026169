"""One HTTP connection: uvicorn's, within bounds.

What uvicorn leaves open is closed here: how many connections there are, how large a request's head is, how long a head
may take to arrive and an answer to be read, and how many requests may come before the first one is answered.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from httptools import HttpParserError
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

__all__ = ["Connection", "ConnectionCounts", "ConnectionLimits"]

_MOST_PIPELINED = 16
_FIELD_BYTES = 32  # that a header field counts beside its name and value, as in HTTP/2
_SILENT_BYTES = 1 << 16  # of a body's framing that may come without a byte of the body


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a connection may have. Times in seconds."""

    connections: int = 1024  # at a time
    head_bytes: int = 16 << 10  # of a request's line and header fields
    head_seconds: float = 10.0  # for a request's head to arrive
    idle_seconds: float = 75.0  # between two requests
    write_seconds: float = 60.0  # without an answer being read


@dataclass(slots=True)
class ConnectionCounts:
    """Since the start, but for the last. Kept by the event loop's thread."""

    connections: int = 0
    connections_refused: int = 0  # closed at once, for want of room
    connections_timed_out: int = 0
    requests: int = 0
    malformed: int = 0  # no HTTP, or a head beyond its bounds
    bytes_in: int = 0
    open_connections: int = 0


class Connection(HttpToolsProtocol):
    """Made by the listener for each connection; all of it runs on the event loop's thread."""

    def __init__(self, config: Config, state: ServerState, limits: ConnectionLimits, counts: ConnectionCounts) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._limits = limits
        self._counts = counts
        self._head = 0  # bytes of the last head, and of its body's trailers
        self._in_head = False
        self._silent = 0  # bytes since the last one that was of a body
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refusal = (400, "this is no HTTP that is read here")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._counts.connections += 1
        self._counts.open_connections += 1
        if len(self.connections) > self._limits.connections:
            self._counts.connections_refused += 1
            self._end(
                503, f"this server has {self._limits.connections} connections (--http-connections); try again later"
            )
        else:
            self._expect_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._counts.open_connections -= 1
        self._arrived()
        self._was_read()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.transport.is_closing():
            return
        self._counts.bytes_in += len(data)
        self._silent += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._silent > self._limits.head_bytes + _SILENT_BYTES:
            self._counts.malformed += 1
            self._end(431, "a header or a trailer without end")
        elif self.timeout_keep_alive_task is None and not self._busy:
            self._expect_a_head()  # a byte that begins no request ends uvicorn's wait for one

    def send_400_response(self, msg: str) -> None:
        """What the parser does not take, or one of the callbacks below."""
        self._counts.malformed += 1
        self._end(*self._refusal)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._head, self._in_head = 0, True
        self._expect_a_head()

    def on_url(self, url: bytes) -> None:
        """A part of the request's line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or a trailer's, which nobody reads."""
        self._count(len(name) + len(value) + _FIELD_BYTES)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._arrived()
        self._in_head, self._silent = False, 0
        self._counts.requests += 1
        super().on_headers_complete()
        if len(self.pipeline) > _MOST_PIPELINED:
            raise self._refuse(400, f"more than {_MOST_PIPELINED} requests before the first one's answer")

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._silent = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request's end."""
        self._silent = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._was_read()
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self._give_up)

    def resume_writing(self) -> None:
        """It has read nearly all."""
        super().resume_writing()
        self._was_read()

    def timeout_keep_alive_handler(self) -> None:
        """No request has come for a while."""
        if self.transport.get_write_buffer_size():
            self._give_up()
        else:
            self._too_late()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > self._limits.head_bytes:
            raise self._refuse(
                431, f"the request's head has more than {self._limits.head_bytes} bytes (--max-metadata-bytes)"
            )

    def _refuse(self, status: int, why: str) -> HttpParserError:
        self._refusal = (status, why)
        return HttpParserError(why)

    def _expect_a_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_seconds, self._too_late)

    def _arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _was_read(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _too_late(self) -> None:
        """No head has come, or not all of one."""
        self._counts.connections_timed_out += 1
        if self._in_head and not self._busy:
            self._end(408, f"the request's head took more than {self._limits.head_seconds:g} s to arrive")
        else:
            self.transport.close()

    def _give_up(self) -> None:
        """Nobody reads the answer: it is not waited for."""
        self._counts.connections_timed_out += 1
        self.transport.abort()

    def _end(self, status: int, why: str) -> None:
        """Answers whatever it was, and closes."""
        self._arrived()
        self.transport.write(refusal(status, why))
        self.transport.close()


def refusal(status: int, why: str) -> bytes:
    """A whole answer with an error, as the last one of a connection."""
    body = json.dumps({"error": why}).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[status] + head.encode() + body
