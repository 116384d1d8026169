"""The types that travel along a request's path. Each is complete when it is made and never filled in later.

    Request  features + deadline + reply handle          transport -> engine
    Batch    requests, row offsets, fused tensors        engine    -> backend
    Scores   one array per task                          backend   -> engine
    Result   scores or one error, plus stage times       engine    -> transport

Letters in shapes: B rows, D dense columns, T sparse features, N ids in all bags together, k numbers of a task for each
row (its width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from narsil.errors import RequestError

Floats = NDArray[np.float32]
Ints = NDArray[np.signedinteger[Any]]

Scores = Mapping[str, Floats]  # task -> (B,) float32 where its width is 1, else (B, k) float32


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may hold, checked before anything of that size is allocated; the client asks for it."""

    max_rows: int = 131_072
    # In all bags together; with a context, what it expands to: its ids, bags and columns for each row.
    max_ids: int = 1 << 22
    # Of its message. The transport holds it, for whichever model the message is.
    max_bytes: int = 16 << 20
    # Whether rows depend on each other, so that a request cannot be cut: what is refused is then told another way out.
    whole: bool = False

    @property
    def advice(self) -> str:
        """What to do with a request that has too much."""
        if self.whole:
            return (
                "This model's rows depend on each other, so that several requests would score them otherwise: send less"
            )
        return "Send it in several requests"


@dataclass(frozen=True, slots=True)
class OneHot:
    """Sparse ids where every bag holds exactly one: the common case, and one that needs no lengths."""

    ids: Ints  # (T, B), any strides: a sample-major payload is its own transposed view

    @property
    def count(self) -> int:
        """N: ids in all bags together."""
        return self.ids.size

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold, shared or not."""
        return self.ids.nbytes

    def slice(self, start: int, stop: int) -> OneHot:
        """Rows start .. stop - 1, as a view."""
        return OneHot(self.ids[:, start:stop])

    def jagged(self) -> Jagged:
        """The same ids in bags of one, for a part that shares a batch with jagged company."""
        count = self.ids.size
        starts = np.arange(count, dtype=np.int64).reshape(self.ids.shape)
        return Jagged(self.ids.reshape(count), starts, np.ones(self.ids.shape, np.int32))


@dataclass(frozen=True, slots=True)
class Jagged:
    """Sparse ids in bags of any length: bag (t, b) is ``values[starts[t, b] : starts[t, b] + lengths[t, b]]``.

    This one form holds key-major and sample-major payloads and row slices of both, so nothing moves before collation.
    """

    values: Ints  # in the order in which they came
    starts: Ints  # (T, B)
    lengths: Ints  # (T, B)
    weights: Floats | None = None  # beside values

    @classmethod
    def laid_out(cls, values: Ints, lengths: Ints, *, key_major: bool = True) -> Jagged:
        """Bags end to end in the order of ``lengths``: (T, B) where ``key_major``, else (B, T)."""
        starts = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape) - lengths
        return cls(values, starts, lengths) if key_major else cls(values, starts.T, lengths.T)

    def jagged(self) -> Jagged:
        """Itself."""
        return self

    def weights_or_ones(self) -> Floats:
        """(N,) beside values: an id without a weight weighs 1."""
        return np.ones(len(self.values), np.float32) if self.weights is None else self.weights

    @property
    def count(self) -> int:
        """N: ids in all bags together; more than ``len(values)`` where bags share ids."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold, shared or not."""
        weights = 0 if self.weights is None else self.weights.nbytes
        return self.values.nbytes + self.starts.nbytes + self.lengths.nbytes + weights

    def slice(self, start: int, stop: int) -> Jagged:
        """Rows start .. stop - 1, as views; values stay whole."""
        return Jagged(self.values, self.starts[:, start:stop], self.lengths[:, start:stop], self.weights)


@dataclass(frozen=True, slots=True)
class Features:
    """One request's rows, already validated. Arrays may be read-only views of the request's own bytes."""

    rows: int  # B
    dense: Floats  # (B, D)
    sparse: OneHot | Jagged

    @property
    def ids(self) -> int:
        """N: ids in all bags together."""
        return self.sparse.count

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold, shared or not."""
        return self.dense.nbytes + self.sparse.nbytes

    def slice(self, start: int, stop: int) -> Features:
        """Rows start .. stop - 1, as views."""
        return Features(stop - start, self.dense[start:stop], self.sparse.slice(start, stop))

    def portable(self) -> Features:
        """See Payload.portable."""
        return self


class Served(Protocol):
    """The model that a request is for; see narsil.engine.served_model.ServedModel."""

    @property
    def name(self) -> str:
        """As clients name it."""

    @property
    def version(self) -> str:
        """As clients name it."""

    @property
    def limits(self) -> RequestLimits:
        """What one of its requests may hold."""


class Payload(Protocol):
    """A request's rows, already validated, wherever they lie: Features, or a message that native code has read."""

    @property
    def rows(self) -> int:
        """B."""

    @property
    def ids(self) -> int:
        """N: ids in all bags together."""

    def slice(self, start: int, stop: int) -> Features:
        """Rows start .. stop - 1, as views."""

    def portable(self) -> Features:
        """The same rows as arrays."""


class Reply(Protocol):
    """Where a request's one Result goes. Owned by the transport; ``deliver`` may be called from any thread."""

    @property
    def cancelled(self) -> bool:
        """Whether the client has gone away: such a request need not run."""

    def deliver(self, result: Result) -> Callable[[], None] | None:
        """Takes the result. Called exactly once for each request the engine admitted and did not hand back.

        May return what wakes the transport. The engine calls it after it has delivered all results at hand, once if
        several return the same: a transport woken by the first of a batch would contend with the lane for the rest.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One client request: its model, its rows, when it came, when it stops mattering, and where its result goes."""

    model: Served  # that it was decoded for, and that scores it
    features: Payload
    reply: Reply
    arrived: float  # seconds on the engine's clock
    deadline: float | None = None  # seconds on the engine's clock
    size: int = 0  # bytes that the request keeps alive: its message, or what its context expanded to
    priority: int = 0  # reserved for priority scheduling; 0 is normal

    @property
    def rows(self) -> int:
        """B."""
        return self.features.rows

    def expired(self, now: float) -> bool:
        """Whether its deadline has come."""
        return self.deadline is not None and self.deadline <= now


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward takes: the rows of all requests one after the other, sparse ids key-major over all rows.

    Padding rows, where a backend asks for some, come last: zeros and the id 0 or empty bags. Their scores mean nothing.
    """

    rows: int  # B, of all requests together and the padding
    dense: Floats  # (B, D) contiguous
    lengths: Ints  # (T * B,) int32, key-major
    values: Ints  # (N,) int32 or int64, key-major
    one_hot: bool  # every length is 1
    weights: Floats | None = None  # (N,) beside values


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds that a request spent in each stage, and the company it had."""

    queue: float = 0.0
    collate: float = 0.0
    execute: float = 0.0
    batch_requests: int = 0
    batch_rows: int = 0
    split: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """How one request ended: scores, or one error."""

    scores: Scores | None = None
    error: RequestError | None = None
    times: StageTimes = field(default_factory=StageTimes)
