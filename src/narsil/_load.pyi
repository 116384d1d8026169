"""The native load generator: HTTP/2 and gRPC on nghttp2 and epoll, in the thread that calls it, without the GIL.

Receives serialized requests and how to send them, produces latencies, errors by name and replies. Built from
csrc/load when the package is built and libnghttp2 is there; `narsil.bench.generator` does without where it is not.
"""

from collections.abc import Callable, Sequence
from typing import Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Wire = Literal["predictor", "narsil", "oip"]

def is_target(text: str) -> bool:
    """Whether the text is HOST:PORT, [IPV6]:PORT or unix:PATH: what a Client can be given."""

def count_scores(wire: _Wire, task: str, message: bytes) -> int:
    """Scores (float32) of a task in a serialized reply, 0 where it has none.

    Raises ValueError where the bytes are no reply of the wire.
    """

@final
class Result:
    """What came of one loop."""

    @property
    def latencies(self) -> NDArray[np.float64]:
        """(requests - errors,) seconds, in order of completion."""

    @property
    def errors(self) -> dict[str, int]:
        """Failed requests by what went wrong: at most 64 names, and then ``other errors``.

        A gRPC status by its name (``INTERNAL``), ``DEADLINE_EXCEEDED`` also where the timeout passed here,
        ``UNAVAILABLE: reason`` where the connection was lost or refused, ``RST_STREAM: code``, or what is wrong with
        the reply (``3 scores for 5 rows``, ``compressed reply``, ``message cut off``, ``HTTP status 502``, ...).
        """

    @property
    def replies(self) -> dict[int, bytes]:
        """Body number -> its last right reply, serialized, of the bodies below ``keep``."""

    @property
    def late_s(self) -> float:
        """Open loop: the furthest, in seconds, that sending fell behind the times given."""

    @property
    def reconnects(self) -> int:
        """Lost connections that were replaced."""

@final
class Client:
    """Connections to one server, and the requests that go over them.

    Every reply is checked: HTTP status, content type, gRPC status, message length, compression, and that it holds
    ``rows`` scores of ``task``. One thread may use a client at a time; RuntimeError tells a second one.
    """

    def __init__(
        self,
        target: str,
        method: str,
        bodies: Sequence[bytes],
        *,
        wire: _Wire,
        task: str,
        rows: int,
        connections: int = 1,
        timeout_s: float = 30.0,
        reconnects: int = 20,
        max_reply_bytes: int = 4194304,
        user_agent: str = "narsil-load",
    ) -> None:
        """Connects nothing yet.

        ``target`` is what is_target accepts, ``method`` is /package.Service/Method. Request n carries
        ``bodies[n % len(bodies)]``; the bodies are sent from where they lie. ``timeout_s`` is each request's, told to
        the server too (grpc-timeout), and that of connecting. ``reconnects`` bounds the lost connections that are
        replaced over the client's life; after that requests fail at once. Memory for replies is bounded by
        ``max_reply_bytes`` for each request in flight. Raises ValueError.
        """

    def connect(self) -> None:
        """Opens the connections and waits until the server has spoken HTTP/2 on each.

        Tries again while it is refused. Raises ConnectionError when the timeout passes or the server speaks something
        else, RuntimeError where the name cannot be resolved or the client is closed. After an error it is closed.
        """

    def closed_loop(
        self,
        requests: int,
        concurrency: int,
        *,
        keep: int = 0,
        on_progress: Callable[[int], None] | None = None,
    ) -> Result:
        """Keeps ``concurrency`` requests in flight, spread evenly over the connections, until ``requests`` have ended.

        A request's latency counts from when it is handed to HTTP/2. ``on_progress`` hears ten times a second how many
        have ended; what it raises, and KeyboardInterrupt, ends the loop and closes the client.
        """

    def open_loop(self, due: ArrayLike, *, keep: int = 0, on_progress: Callable[[int], None] | None = None) -> Result:
        """Sends request n ``due[n]`` seconds from now, whatever has become of those before it.

        ``due`` is (requests,) float64, ascending from 0. A request's latency counts from the time at which it was due,
        its timeout from when it is sent. ``on_progress`` as in closed_loop. Raises ValueError where ``due`` does not
        ascend.
        """

    def close(self) -> None:
        """Says goodbye to the server and closes the connections. Closing again does nothing."""
