"""The native data plane: HTTP/2 and gRPC on libnghttp2, polled by whoever is idle. Built from csrc/native."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_Kind = Literal["predictor", "narsil", "oip", "scores", "unary", "stream", "health_check", "health_watch"]

class Model:
    """What requests are held against. Immutable, and compared by identity."""

    def __init__(
        self,
        served: object,
        *,
        name: str,
        version: str,
        dense_dim: int,
        nan_columns: Sequence[int],
        rows: Sequence[int],
        least: Sequence[int],
        wide_ids: bool,
        max_rows: int,
        max_ids: int,
        features: Sequence[str] = (),
        tasks: Sequence[str] = (),
    ) -> None:
        """``nan_columns`` are those of the D in which NaN is a value; ids are (T,) ``least`` to ``rows`` - 1;
        ``max_rows`` and ``max_ids`` those that one request may have.

        ``features`` are the names of all, or of none; ``tasks`` those whose scores a request may ask for by name. A
        message that uses others is left to Python.

        ``served`` is kept for Call.served. Not by the garbage collector's leave: it must not refer to this model, or
        neither is ever freed. Raises ValueError where the numbers are no schema.
        """
    @property
    def served(self) -> object:
        """What was given."""

class Call:
    """One RPC whose message is whole. Ended by the first of ``answer_scores``, ``answer`` and ``fail``."""

    @property
    def id(self) -> int:
        """Unlike any other call's of its plane."""
    @property
    def method(self) -> str:
        """/package.Service/Method."""
    @property
    def arrived(self) -> float:
        """When its headers came: seconds on CLOCK_MONOTONIC."""
    @property
    def deadline(self) -> float | None:
        """On the same clock, from grpc-timeout."""
    @property
    def size(self) -> int:
        """Bytes of the message, and of what of it had to be laid out anew."""
    @property
    def body(self) -> bytes:
        """A copy of the message."""
    @property
    def model_name(self) -> str:
        """The metadata ``narsil-model``; empty if there is none. Several are joined by commas."""
    @property
    def model_version(self) -> str:
        """The metadata ``narsil-model-version``, likewise."""
    @property
    def decoded(self) -> bool:
        """Whether it is a scoring request of a common form, right in every point, for a model that was served when it
        was taken. The properties below hold then."""
    @property
    def served(self) -> Any:
        """Of the model that it was decoded for, and keeps until it is freed; None unless decoded."""
    @property
    def rows(self) -> int:
        """B."""
    @property
    def ids(self) -> int:
        """N: ids in all bags together."""
    @property
    def one_hot(self) -> bool:
        """Every bag holds exactly one id."""
    @property
    def key_major(self) -> bool:
        """Ids and lengths are (T, B); else (B, T)."""
    @property
    def cancelled(self) -> bool:
        """Nobody waits for the answer any more."""
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.int32] | None]:
        """Read-only views: dense (B, D) float32, values (N,) int32 or int64, lengths (T, B) or (B, T) int32.

        Lengths are None where every one is 1. Raises ValueError unless decoded.
        """
    def answer_scores(
        self, scores: Mapping[str, NDArray[np.float32]], requests: int, rows: int, queue_s: float, execute_s: float
    ) -> None:
        """Answers a decoded call: (B,) or (B, k) scores by task, and the batch it was scored in. Sent by the next
        ``flush``.

        Raises ValueError unless decoded, and where scores are of another shape.
        """
    def answer(self, message: bytes) -> None:
        """Answers with a serialized message. Sent by the next ``flush``."""
    def fail(self, status: int, message: str) -> None:
        """Ends the call with a gRPC status code. Sent by the next ``flush``."""

class Plane:
    """Listening sockets and their connections. Thread-safe; every method that may wait drops the GIL.

    ``limits`` may hold, in bytes: max_message, max_metadata (of one call), max_buffered (of all messages that have come
    and wait, and of answers that are not let through). In numbers: max_connections, and of each connection
    max_streams (calls at once), max_watchers (of health) and max_resets_per_second (calls cancelled, as a mean over
    five seconds). In seconds: handshake_s (to a first frame), stall_s (without a byte of a call that comes or goes),
    idle_s (without a call), keepalive_s (of silence before a ping), keepalive_timeout_s (for its answer), drain_s
    (for the calls of a connection that is told to go), helper_s (the network's while nobody polls). Other names raise
    ValueError.
    """

    def __init__(self, methods: Mapping[str, _Kind], limits: Mapping[str, float] = ...) -> None: ...
    def serve(
        self,
        models: Sequence[Model],
        default: int = 0,
        routes: Sequence[tuple[str, str, Sequence[tuple[int, float]]]] = (),
    ) -> None:
        """From now on calls are decoded for these models, all at once; with none, no call is decoded here.

        A request names its model in a narsil.v1 message or, on any wire, in the metadata ``narsil-model`` and
        ``narsil-model-version``. One without a name means the name of ``models[default]``; one without a version means
        the first listed of its name, and without either it means ``models[default]`` itself. ``routes`` come before
        that: (name, a label or no version, (place in ``models``, share) for each model that it leads to), dealt out in
        proportion to the shares, which are above 0. What names another model in its message than in its metadata, or
        one that is not here, is not decoded. Calls that are out keep their models. Models of a set before that nobody
        else keeps are freed before this returns, unless another thread is just decoding for them: then they are freed
        with what it returns. Raises ValueError where two models have the
        same name and version, or ``default`` or a route's place is that of none.
        """
    def listen_tcp(self, host: str, port: int, reuse_port: bool = False) -> int:
        """Binds and listens; returns the port. Raises OSError."""
    def listen_unix(self, path: str) -> None:
        """Binds and listens; a socket file that a dead server left is replaced. Raises OSError."""
    def poll(self, timeout: float | None) -> tuple[list[Call], list[int]]:
        """Runs the network until something arrives, ``timeout`` seconds have passed or ``wake`` was called.

        Returns calls that are whole, and the ids of scoring calls returned before whose clients have gone away.
        Several threads may poll: whatever arrives goes to one of them.
        """
    def attend(self) -> tuple[list[Call], list[int]]:
        """As ``poll``, for one thread that looks after the network, and after timeouts, while nobody else polls.

        Returns nothing, twice, once the plane has stopped.
        """
    def wake(self) -> None:
        """Has one running poll, or the next, return."""
    def flush(self) -> None:
        """Sends every answer given so far."""
    def retire(self) -> None:
        """Health checks get NOT_SERVING from now on, and their watchers' calls end."""
    def refuse(self, why: str) -> None:
        """Scoring calls that come from now on are refused with UNAVAILABLE."""
    def stop(self, grace: float) -> None:
        """Stops listening, lets calls end for ``grace`` seconds, closes. Polls return at once from then on."""
    def statistics(self) -> dict[str, int]:
        """Counts since the start: ``connections`` taken, ``connections_refused`` (beyond max_connections, or out of
        descriptors) and ``connections_timed_out``; ``reset_floods`` and ``header_floods``, connections told
        to go for cancelling too much and for header blocks without end; ``calls`` begun, and of these
        ``answered`` (each message of a stream for itself), ``refused`` here and ``cancelled`` by clients
        before they had been answered; ``messages`` that came whole, ``decoded`` of them as scoring
        requests, the others being left to Python; ``bytes_in``, ``bytes_out`` on sockets; ``helper_polls``,
        looks at the network while nobody polled.

        And now: ``open_connections``, ``open_calls``, ``watchers`` (of health), ``buffered`` (bytes, see max_buffered).
        """

def collate(
    calls: Sequence[Call],
    rows: int,
    dense: NDArray[np.float32],
    values: NDArray[Any],
    lengths: NDArray[np.int32] | None,
) -> None:
    """Fuses decoded calls into a batch of ``rows`` rows, padding included: see narsil.engine.collate.

    All calls are of one model. ``dense`` has room for (rows, D), ``values`` for the batch's ids in the schema's type,
    and ``lengths``, given for jagged batches alone, for (T * rows,). Raises ValueError otherwise.
    """

def end_on_signal(number: int, last_words: bytes, /) -> None:
    """Has a signal write ``last_words`` to standard error and end the process as by its own action, whoever holds the
    interpreter's lock; process 1 of a container, which signals spare, exits with 128 + number.

    Raises OSError for a number that is no signal, or none that can be caught.
    """
