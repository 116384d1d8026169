"""The client for threads."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from numpy.typing import ArrayLike

from narsil.client.calls import GET_MODEL, OPTIONS, PREDICT, error_of, reading
from narsil.client.messages import Context, ModelInfo, Prediction, build_request, read_model, read_response


class Client:
    """Blocking client; safe to share between threads."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (
            grpc.insecure_channel(target, OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, OPTIONS)
        )
        self._predict: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(PREDICT)
        self._get_model: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(GET_MODEL)

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
        flat, all bags of row 0 first. ``timeout`` in seconds is also the server's deadline. Raises the RequestError
        that the server answered with, TransportError when it could not be asked.
        """
        body = build_request(dense, ids, lengths, weights, context, feature_names, model, version, request_id)
        try:
            return reading(read_response, self._predict(body, timeout=timeout))
        except grpc.RpcError as error:
            raise error_of(error) from None

    def model(self, timeout: float | None = None) -> ModelInfo:
        """The served model and its schema."""
        try:
            return reading(read_model, self._get_model(b"", timeout=timeout))
        except grpc.RpcError as error:
            raise error_of(error) from None

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
