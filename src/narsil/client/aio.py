"""The client for asyncio."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
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


class AsyncClient:
    """The same for asyncio; belongs to the event loop it is made in. Cancelling a call cancels it on the server."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (
            grpc.aio.insecure_channel(target, OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, OPTIONS)
        )
        self._methods: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {
            method: self._channel.unary_unary(method) for method in (PREDICT, GET_MODEL, INDEX, LOAD, UNLOAD)
        }
        self._known: Known = {}

    async def predict(
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
        """See Client.predict."""
        rows = rows_of(dense, ids, lengths, weights, context, feature_names, model, version, request_id)
        return await self._carry(predicting(rows, self._known), timeout)

    async def model(self, timeout: float | None = None, *, name: str = "", version: str = "") -> ModelInfo:
        """See Client.model."""
        return await self._carry(describing(name, version), timeout)

    async def models(self, timeout: float | None = None) -> list[ModelStatus]:
        """See Client.models."""
        return await self._carry(listing(), timeout)

    async def load(self, name: str, timeout: float | None = None) -> None:
        """See Client.load."""
        await self._carry(loading(name), timeout)

    async def unload(self, name: str, timeout: float | None = None) -> None:
        """See Client.unload."""
        await self._carry(unloading(name), timeout)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _carry(self, conversation: Conversation[T], timeout: float | None) -> T:
        """See Client._carry."""
        until = None if timeout is None else time.monotonic() + timeout
        try:
            ask = next(conversation)
            while True:
                left = None if until is None else until - time.monotonic()
                try:
                    answer = await self._methods[ask.method](ask.body, timeout=left, metadata=ask.metadata)
                    failure = None
                except grpc.RpcError as error:
                    failure = error_of(error)
                ask = conversation.send(answer) if failure is None else conversation.throw(failure)
        except StopIteration as done:
            result: T = done.value
            return result
