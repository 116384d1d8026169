"""A client of HTTP/2 frames written by hand, for what no honest client sends. Waits for frames, never for time."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from hpack import Decoder

from tests.http2_peer import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PATIENCE_S,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    grpc_message,
    hpack,
)

PRIORITY, CONTINUATION = 2, 9
PADDED, WITH_PRIORITY = 0x8, 0x20
HEADER_TABLE_SIZE = 1
PREDICT = "/predictor.Predictor/Predict"


@dataclass
class Answer:
    """What came back on one stream, or why nothing more will."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None  # RST_STREAM's code

    @property
    def messages(self) -> list[bytes]:
        """gRPC messages that are whole."""
        out, at = [], 0
        while at + 5 <= len(self.data):
            size = int.from_bytes(self.data[at + 1 : at + 5])
            out.append(self.data[at + 5 : at + 5 + size])
            at += 5 + size
        return out

    @property
    def status(self) -> int | None:
        """grpc-status, wherever it stands."""
        text = self.trailers.get("grpc-status", self.headers.get("grpc-status"))
        return None if text is None else int(text)

    @property
    def detail(self) -> str:
        """grpc-message."""
        return unquote(self.trailers.get("grpc-message", self.headers.get("grpc-message", "")))


class ConnectionEnded(AssertionError):
    """The server closed the connection while an answer was waited for."""


def request_headers(
    path: str = PREDICT, extra: Sequence[tuple[str, str]] = (), *, method: str = "POST", kind: str = "application/grpc"
) -> tuple[tuple[str, str], ...]:
    """The fields of a right request, and others after them."""
    pseudo = ((":method", method), (":scheme", "http"), (":path", path), (":authority", "test"))
    return (*pseudo, ("content-type", kind), ("te", "trailers"), *extra)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame as bytes."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """A SETTINGS frame; by number, as _3=100."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", int(key[1:]), value) for key, value in values.items()))


def request_frames(stream: int, message: bytes, path: str = PREDICT, extra: Sequence[tuple[str, str]] = ()) -> bytes:
    """A whole unary call."""
    body = grpc_message(message)
    pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)]
    out = frame(HEADERS, END_HEADERS, stream, hpack(request_headers(path, extra)))
    for piece in pieces[:-1]:
        out += frame(DATA, 0, stream, piece)
    return out + frame(DATA, END_STREAM, stream, pieces[-1])


class RawClient:
    """One connection. Nothing is sent but what the test sends, acknowledgements excepted."""

    def __init__(self, address: str, *, greet: bool = True, windows: bool = True, **values: int) -> None:
        """``windows``: gives back flow control as it reads. ``values``: SETTINGS by number, as _4=1."""
        with contextlib.ExitStack() as opened:  # a server that is going away must not cost the test a socket
            if address.startswith("unix:"):
                self.socket = opened.enter_context(socket.socket(socket.AF_UNIX))
                self.socket.connect(address.removeprefix("unix:"))
            else:
                host, _, port = address.rpartition(":")
                self.socket = opened.enter_context(socket.create_connection((host, int(port))))
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.settimeout(PATIENCE_S)
            if greet:
                self.socket.sendall(PREFACE + settings(**values))
            opened.pop_all()
        self.answers: dict[int, Answer] = {}
        self.goaway: tuple[int, int] | None = None  # (last stream, code)
        self.pongs: list[bytes] = []
        self.settings: dict[int, int] = {}
        self._decoder = Decoder()
        self._windows = windows
        self._buffer = b""
        self._stream = -1

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _reply(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the server may have closed behind its last frame
            self.send(data)

    def frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        self.send(frame(kind, flags, stream, payload))

    def headers(self, stream: int, fields: Sequence[tuple[str, str]], *, end: bool = False) -> None:
        self.frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, hpack(fields))

    def next_stream(self) -> int:
        self._stream += 2
        return self._stream

    def call(self, message: bytes, path: str = PREDICT, extra: Sequence[tuple[str, str]] = ()) -> int:
        """Sends a whole unary call; returns its stream."""
        stream = self.next_stream()
        self.send(request_frames(stream, message, path, extra))
        return stream

    def ask(self, message: bytes, path: str = PREDICT, extra: Sequence[tuple[str, str]] = ()) -> Answer:
        """A whole unary call and its answer."""
        return self.answer(self.call(message, path, extra))

    def answer(self, stream: int) -> Answer:
        """Reads until this stream has ended. Raises ConnectionEnded when the connection does first."""
        found = self.answers.setdefault(stream, Answer())
        while not found.ended and found.reset is None:
            if self.read() is None:
                raise ConnectionEnded(f"closed without an answer on stream {stream}; GOAWAY was {self.goaway}")
        return found

    def ping(self, payload: bytes = b"narsil!!") -> None:
        """Returns once the ping has been answered."""
        before = len(self.pongs)
        self.frame(PING, 0, 0, payload)
        while len(self.pongs) == before:
            assert self.read() is not None, f"the connection ended; GOAWAY was {self.goaway}"
        assert self.pongs[-1] == payload

    def read(self) -> Frame | None:
        """The next frame, noted; None when the server has closed."""
        head = self._exactly(9)
        payload = b"" if head is None else self._exactly(int.from_bytes(head[:3]))
        if head is None or payload is None:
            return None
        found = Frame(head[3], head[4], struct.unpack(">I", head[5:])[0], payload)
        self._note(found)
        return found

    def until_closed(self) -> RawClient:
        """Reads until the server closes."""
        while self.read() is not None:
            pass
        return self

    def _note(self, found: Frame) -> None:
        answer = self.answers.setdefault(found.stream, Answer())
        if found.kind == HEADERS:
            fields: dict[str, str] = dict(self._decoder.decode(found.payload))  # type: ignore[arg-type]  # they are texts
            if answer.headers:
                answer.trailers = fields
            else:
                answer.headers = fields
        elif found.kind == DATA:
            answer.data += found.payload
            if self._windows and found.payload:
                more = struct.pack(">I", len(found.payload))
                self._reply(frame(WINDOW_UPDATE, 0, 0, more) + frame(WINDOW_UPDATE, 0, found.stream, more))
        elif found.kind == RST_STREAM:
            answer.reset = int.from_bytes(found.payload)
        elif found.kind == GOAWAY:
            self.goaway = struct.unpack(">II", found.payload[:8])
        elif found.kind == PING and found.flags & ACK:
            self.pongs.append(found.payload)
        elif found.kind == PING:
            self._reply(frame(PING, ACK, 0, found.payload))
        elif found.kind == SETTINGS and not found.flags & ACK:
            self.settings.update(struct.iter_unpack(">HI", found.payload))
            self._reply(frame(SETTINGS, ACK, 0))
        if found.kind in (HEADERS, DATA) and found.flags & END_STREAM:
            answer.ended = True

    def _exactly(self, size: int) -> bytes | None:
        while len(self._buffer) < size:
            try:
                part = self.socket.recv(1 << 20)
            except ConnectionError:
                part = b""
            if not part:
                return None
            self._buffer += part
        out, self._buffer = self._buffer[:size], self._buffer[size:]
        return out


@contextlib.contextmanager
def connected(address: str, *, windows: bool = True, **values: int) -> Iterator[RawClient]:
    """A client that has greeted and been greeted."""
    with RawClient(address, greet=True, windows=windows, **values) as client:
        client.ping()
        yield client
