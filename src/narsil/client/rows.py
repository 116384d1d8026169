"""Rows to score, to bytes: a narsil.v1.PredictRequest for all of them or for some. Pure functions, no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from narsil.client.numbers import floats, names, whole
from narsil.wire import Part, put_len, put_parts, put_text, put_uint, put_varint

_INT32, _INT64 = 0, 1  # IdType
_INT32_RANGE = (1 << 31) - 1, -(1 << 31)


@dataclass(frozen=True)
class Context:
    """Features that all rows of a request share, sent once."""

    features: Mapping[str, Sequence[int]]  # sparse feature name -> its bag of ids
    dense_columns: Sequence[int] = ()  # which dense columns are given here, ascending
    dense: Sequence[float] = ()


@dataclass(frozen=True)
class Rows:
    """B rows, whom they ask, and what they share: all that a request says, in the wire's kinds of numbers."""

    dense: NDArray[np.float32]  # (B, D), less the context's columns
    ids: NDArray[Any]  # (B, T) without lengths, else flat: all bags of row 0 first; int32 or int64
    lengths: NDArray[np.int32] | None = None  # (B, T)
    weights: NDArray[np.float32] | None = None  # one for each id
    context: tuple[Part, ...] | None = None  # the fields of a Context message
    shared_ids: int = 0  # in it
    feature_names: tuple[str, ...] = ()
    model: str = ""
    version: str = ""
    request_id: str = ""

    def __len__(self) -> int:
        """B."""
        return len(self.dense)

    @property
    def columns(self) -> int:
        """T, less the context's features."""
        return int((self.ids if self.lengths is None else self.lengths).shape[1])

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(B + 1,) where each row's ids begin and the last one's end, counted in ids."""
        if self.lengths is None:
            return np.arange(len(self) + 1, dtype=np.int64) * self.columns
        ends = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(self.lengths.sum(axis=1, dtype=np.int64), out=ends[1:])
        return ends

    @property
    def divisible(self) -> bool:
        """Whether its parts agree, so that some of the rows can be taken out; if not, the server says what is wrong."""
        given = self.ids if self.lengths is None else self.lengths
        agree = len(given) == len(self) and (self.lengths is None or not (self.lengths < 0).any())
        agree = agree and (self.lengths is None or int(self.ends[-1]) == self.ids.size)
        return agree and (self.weights is None or self.weights.size == self.ids.size)

    def part(self, start: int, stop: int) -> Rows:
        """Rows start .. stop - 1, with the same context; of ``divisible`` rows."""
        first, last = int(self.ends[start]), int(self.ends[stop])
        return replace(
            self,
            dense=self.dense[start:stop],
            ids=self.ids[start:stop] if self.lengths is None else self.ids.reshape(-1)[first:last],
            lengths=None if self.lengths is None else self.lengths[start:stop],
            weights=None if self.weights is None else self.weights.reshape(-1)[first:last],
        )

    def serialized(self) -> bytes:
        """The narsil.v1.PredictRequest."""
        sparse = [
            put_uint(1, self.columns),
            *(put_len(2, name.encode()) for name in self.feature_names),
            put_uint(3, _INT32 if self.ids.dtype.itemsize == 4 else _INT64),
            *_put_array(4, self.ids),
        ]
        for number, array in ((5, self.lengths), (6, self.weights)):
            if array is not None:
                sparse += _put_array(number, array)
        parts = [
            put_text(1, self.model),
            put_text(2, self.version),
            put_text(3, self.request_id),
            put_uint(4, len(self)),
            *_put_array(5, self.dense),
            *put_parts(6, sparse),
            *(() if self.context is None else put_parts(7, self.context)),
        ]
        return b"".join(parts)


def rows_of(
    dense: ArrayLike,
    ids: ArrayLike,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    context: Context | None = None,
    feature_names: Sequence[str] = (),
    model: str = "",
    version: str = "",
    request_id: str = "",
) -> Rows:
    """The rows that Client.predict was given. Raises TypeError or ValueError for what the wire would change."""
    matrix = floats(dense, "dense")
    if matrix.ndim != 2:
        raise ValueError(f"dense has shape {matrix.shape}; it must be (B, D), a row for each candidate")
    features = names(feature_names, "feature_names")
    values = _ids(ids, "ids", features)
    given = values
    if lengths is not None:
        given = whole(lengths, "lengths", features, *_INT32_RANGE)
    if given.ndim != 2:
        what = "ids without lengths" if lengths is None else "lengths"
        raise ValueError(f"{what} has shape {given.shape}; it must be (B, T), a column for each feature")
    names((model, version, request_id), "model, version and request_id")
    fields, shared = (None, 0) if context is None else _context(context)
    return Rows(
        matrix,
        values,
        None if lengths is None else np.ascontiguousarray(given, dtype="<i4"),
        None if weights is None else floats(weights, "weights"),
        fields,
        shared,
        features,
        model,
        version,
        request_id,
    )


def build_request(dense: ArrayLike, ids: ArrayLike, *arguments: Any, **named: Any) -> bytes:
    """A serialized narsil.v1.PredictRequest; arguments as in rows_of. Ids stay int32 if they are, else int64."""
    return rows_of(dense, ids, *arguments, **named).serialized()


def _context(context: Context) -> tuple[tuple[Part, ...], int]:
    """The fields of a Context message, and how many ids it holds."""
    features = names(context.features, "context.features")
    bags = [_ids(bag, f"context feature {name}").reshape(-1) for name, bag in context.features.items()]
    columns = whole(context.dense_columns, "context.dense_columns", (), (1 << 32) - 1, 0).ravel().tolist()
    values = np.concatenate(bags, dtype="<i8") if bags else np.empty(0, dtype="<i8")
    fields = [
        *(put_parts(1, [b"".join(map(put_varint, columns))]) if columns else ()),
        *_put_array(2, floats(context.dense, "context.dense")),
        *(put_len(3, name.encode()) for name in features),
        put_uint(4, _INT64),
        *_put_array(5, values),
        *_put_array(6, np.array([len(bag) for bag in bags], dtype="<i4")),
    ]
    return tuple(fields), values.size


def _ids(ids: ArrayLike, what: str, columns: Sequence[str] = ()) -> NDArray[Any]:
    array = whole(ids, what, columns)
    kind = "<i4" if array.dtype.newbyteorder("=") == np.int32 else "<i8"
    return np.ascontiguousarray(array, dtype=kind).reshape(array.shape)


def _put_array(number: int, array: NDArray[Any]) -> list[Part]:
    """A contiguous array's bytes as a field, uncopied; nothing for an empty one, as proto3 has it."""
    return put_parts(number, [array.ravel().view(np.uint8).data]) if array.size else []
