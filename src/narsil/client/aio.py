"""The client for asyncio."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import grpc
from numpy.typing import ArrayLike

from narsil.client.calls import GET_MODEL, OPTIONS, PREDICT, error_of, reading
from narsil.client.messages import Context, ModelInfo, Prediction, build_request, read_model, read_response


class AsyncClient:
    """The same for asyncio; belongs to the event loop it is made in. Cancelling a call cancels it on the server."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (
            grpc.aio.insecure_channel(target, OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, OPTIONS)
        )
        self._predict: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(PREDICT)
        self._get_model: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(GET_MODEL)

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
        body = build_request(dense, ids, lengths, weights, context, feature_names, model, version, request_id)
        try:
            return reading(read_response, await self._predict(body, timeout=timeout))
        except grpc.RpcError as error:
            raise error_of(error) from None

    async def model(self, timeout: float | None = None) -> ModelInfo:
        """The served model and its schema."""
        try:
            return reading(read_model, await self._get_model(b"", timeout=timeout))
        except grpc.RpcError as error:
            raise error_of(error) from None

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
