"""A server of HTTP/2 frames written by hand, for what no honest server sends. One thread a connection; no sleeping."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 30.0

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE, MAX_CONCURRENT_STREAMS, MAX_FRAME_SIZE = 4, 3, 5
NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 0, 2, 7, 8, 11

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
RESPONSE = ((":status", "200"), ("content-type", "application/grpc"))
OK = (("grpc-status", "0"),)


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


def grpc_message(message: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """With its prefix; ``length`` lies about its size."""
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


def hpack(fields: Any) -> bytes:
    """Header fields, all literal and none indexed."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)


def _text(text: str) -> bytes:
    out, left = bytearray(), len(text)
    if left < 127:
        out.append(left)
    else:
        out.append(127)
        left -= 127
        while left > 127:
            out.append(left & 127 | 128)
            left >>= 7
        out.append(left)
    return bytes(out) + text.encode()


class Peer:
    """The server's end of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def greet(self, settings: dict[int, int] | None = None) -> None:
        """Takes the client's preface and sends SETTINGS."""
        assert self._exactly(len(PREFACE)) == PREFACE
        self.frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *one) for one in (settings or {}).items()))

    def frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    def headers(self, stream: int, fields: Any, *, end: bool = False) -> None:
        self.frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, hpack(fields))

    def reply(self, stream: int, message: bytes) -> None:
        """A right reply with this message."""
        self.headers(stream, RESPONSE)
        self.frame(DATA, 0, stream, grpc_message(message))
        self.headers(stream, OK, end=True)

    def goaway(self, last_stream: int, code: int = NO_ERROR) -> None:
        self.frame(GOAWAY, 0, 0, struct.pack(">II", last_stream, code))

    def reset(self, stream: int, code: int) -> None:
        self.frame(RST_STREAM, 0, stream, struct.pack(">I", code))

    def window(self, stream: int, more: int) -> None:
        self.frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))

    def read(self) -> Frame:
        """The next frame; answers SETTINGS and PING. Raises ConnectionError when the client has gone."""
        while True:
            head = self._exactly(9)
            frame = Frame(head[3], head[4], struct.unpack(">I", head[5:])[0], self._exactly(int.from_bytes(head[:3])))
            if frame.kind in (SETTINGS, PING) and not frame.flags & ACK:
                self.frame(frame.kind, ACK, 0, frame.payload if frame.kind == PING else b"")
            else:
                return frame

    def request(self) -> int:
        """The stream of the next request that is complete."""
        while True:
            frame = self.read()
            if frame.kind in (DATA, HEADERS) and frame.flags & END_STREAM:
                return frame.stream

    def until_gone(self) -> list[Frame]:
        """What the client still sends before it goes away."""
        frames = []
        with contextlib.suppress(ConnectionError):
            while True:
                frames.append(self.read())
        return frames

    def _exactly(self, size: int) -> bytes:
        out = b""
        while len(out) < size:
            part = self.socket.recv(size - len(out))
            if not part:
                raise ConnectionError("the client has gone")
            out += part
        return out


@contextlib.contextmanager
def http2_server(script: Callable[[Peer], object]) -> Iterator[str]:
    """Runs the script on every connection, and closes it when the script ends. Yields HOST:PORT.

    A script may end with ConnectionError; any other exception of it fails the test.
    """
    threads: list[threading.Thread] = []
    failures: list[BaseException] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(PATIENCE_S)
            try:
                script(Peer(connection))
            except ConnectionError:
                pass
            except BaseException as error:
                failures.append(error)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # it was shut down
                return
            threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(PATIENCE_S)
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive(), "a script is still waiting: the client has not closed its connection"
            if failures:
                raise failures[0]
