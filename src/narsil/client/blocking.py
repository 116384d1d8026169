"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

import grpc
from numpy.typing import ArrayLike

from narsil.client.answers import ModelInfo, ModelStatus, Prediction
from narsil.client.calls import (
    OPTIONS,
    Conversation,
    Known,
    describing,
    error_of,
    listing,
    loading,
    predicting,
    unloading,
)
from narsil.client.rows import Context, rows_of
from narsil.wire import GET_MODEL, INDEX, LOAD, PREDICT, UNLOAD

T = TypeVar("T")


class Client:
    """Blocking client; safe to share between threads."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (
            grpc.insecure_channel(target, OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, OPTIONS)
        )
        self._methods: dict[str, grpc.UnaryUnaryMultiCallable[bytes, bytes]] = {
            method: self._channel.unary_unary(method) for method in (PREDICT, GET_MODEL, INDEX, LOAD, UNLOAD)
        }
        self._known: Known = {}

    def predict(
        self,
        dense: ArrayLike,
        ids: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        weights: ArrayLike | None = None,
        context: Context | None = None,
        feature_names: Sequence[str] = (),
        model: str = "",
        version: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> Prediction:
        """Scores B rows.

        ``dense`` is (B, D). Without ``lengths``, ``ids`` is (B, T), one id a bag; with ``lengths`` (B, T), ``ids`` is
        flat, all bags of row 0 first. ``timeout`` in seconds is also the server's deadline.

        Rows that are more than the server takes of one request are sent in several, one after the other, to one version
        of the model; their ``batch_rows`` and times are then sums.

        Raises TypeError or ValueError, before anything is sent, for numbers that the wire would change: ids and lengths
        that are not whole numbers or too large, dense values that are no numbers or beyond float32. Raises the
        RequestError that the server answered with (InvalidRequest for NaN and for ids beyond their table), and
        TransportError when it could not be asked.
        """
        rows = rows_of(dense, ids, lengths, weights, context, feature_names, model, version, request_id)
        return self._carry(predicting(rows, self._known), timeout)

    def model(self, timeout: float | None = None, *, name: str = "", version: str = "") -> ModelInfo:
        """A served model, its schema and what a request may hold; the default model where none is named."""
        return self._carry(describing(name, version), timeout)

    def models(self, timeout: float | None = None) -> list[ModelStatus]:
        """Every model and version that the server serves or should, and where it stands."""
        return self._carry(listing(), timeout)

    def load(self, name: str, timeout: float | None = None) -> None:
        """Has the server serve what its repository holds of a model now; returns when it does.

        Raises Refused where it does not load models for clients, or cannot load this one: what it served, it serves.
        """
        self._carry(loading(name), timeout)

    def unload(self, name: str, timeout: float | None = None) -> None:
        """Has the server serve no version of a model any more. Raises as load."""
        self._carry(unloading(name), timeout)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _carry(self, conversation: Conversation[T], timeout: float | None) -> T:
        """The conversation's result, its calls made one after the other within ``timeout`` in all."""
        until = None if timeout is None else time.monotonic() + timeout
        try:
            ask = next(conversation)
            while True:
                left = None if until is None else until - time.monotonic()
                try:
                    answer = self._methods[ask.method](ask.body, timeout=left, metadata=ask.metadata)
                    failure = None
                except grpc.RpcError as error:
                    failure = error_of(error)
                ask = conversation.send(answer) if failure is None else conversation.throw(failure)
        except StopIteration as done:
            result: T = done.value
            return result
