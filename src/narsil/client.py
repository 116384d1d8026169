"""A small typed client for ``narsil.v1``: ``Client`` for threads, ``AsyncClient`` for asyncio.

with narsil.Client("127.0.0.1:50051") as client:
    prediction = client.predict(dense, ids)          # (B, D) float32, (B, T) integers
    prediction.scores["default"]                     # (B,) float32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.errors import STATUS, NarsilError
from narsil.protos import narsil_pb2

_PREDICT = "/narsil.v1.Inference/Predict"
_GET_MODEL = "/narsil.v1.Inference/GetModel"
_ERRORS = {code: error for error, (code, _) in STATUS.items()}
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class TransportError(NarsilError):
    """The call failed before or beside the server: unreachable, TLS, or a status that Narsil does not send."""


@dataclass(frozen=True)
class Context:
    """Features that all rows of a request share, sent once."""

    features: Mapping[str, Sequence[int]]  # sparse feature name -> its bag of ids
    dense_columns: Sequence[int] = ()  # which dense columns are given here, ascending
    dense: Sequence[float] = ()


@dataclass(frozen=True)
class Prediction:
    """Scores by task, and how they came about."""

    scores: dict[str, NDArray[np.float32]]  # (B,) each
    model_name: str
    model_version: str
    request_id: str
    batch_requests: int  # requests that shared the forward
    batch_rows: int
    queue_us: int
    execute_us: int


@dataclass(frozen=True)
class ModelInfo:
    """What the server serves."""

    name: str
    version: str
    backend: str
    schema: ModelSchema


class Client:
    """Blocking client; safe to share between threads."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (
            grpc.insecure_channel(target, _OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, _OPTIONS)
        )
        self._predict: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_PREDICT)
        self._get_model: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_GET_MODEL)

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
            return read_response(self._predict(body, timeout=timeout))
        except grpc.RpcError as error:
            raise error_of(error) from None

    def model(self, timeout: float | None = None) -> ModelInfo:
        """The served model and its schema."""
        try:
            return read_model(self._get_model(b"", timeout=timeout))
        except grpc.RpcError as error:
            raise error_of(error) from None

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio; belongs to the event loop it is made in. Cancelling a call cancels it on the server."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (
            grpc.aio.insecure_channel(target, _OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, _OPTIONS)
        )
        self._predict: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_PREDICT)
        self._get_model: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_GET_MODEL)

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
            return read_response(await self._predict(body, timeout=timeout))
        except grpc.RpcError as error:
            raise error_of(error) from None

    async def model(self, timeout: float | None = None) -> ModelInfo:
        """The served model and its schema."""
        try:
            return read_model(await self._get_model(b"", timeout=timeout))
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


def build_request(
    dense: ArrayLike,
    ids: ArrayLike,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    context: Context | None = None,
    feature_names: Sequence[str] = (),
    model: str = "",
    version: str = "",
    request_id: str = "",
) -> bytes:
    """A serialized narsil.v1.PredictRequest; arguments as in Client.predict. Ids stay int32 if they are, else int64."""
    rows_dense = np.ascontiguousarray(dense, dtype="<f4")
    values, id_type = _ids(ids)
    if lengths is None:
        columns = values.shape[1] if values.ndim == 2 else 0
    else:
        lengths = np.ascontiguousarray(lengths, dtype="<i4")
        columns = lengths.shape[1] if lengths.ndim == 2 else 0
    request = narsil_pb2.PredictRequest(
        model_name=model,
        model_version=version,
        request_id=request_id,
        batch_size=rows_dense.shape[0] if rows_dense.ndim else 0,
        dense=rows_dense.tobytes(),
    )
    sparse = request.sparse
    sparse.num_features = columns
    sparse.feature_names.extend(feature_names)
    sparse.id_type = id_type
    sparse.values = values.tobytes()
    if lengths is not None:
        sparse.lengths = np.asarray(lengths).tobytes()
    if weights is not None:
        sparse.weights = np.ascontiguousarray(weights, dtype="<f4").tobytes()
    if context is not None:
        _add_context(request, context)
    body: bytes = request.SerializeToString()
    return body


def _add_context(request: Any, context: Context) -> None:
    bags = [np.atleast_1d(np.asarray(bag, dtype="<i8")) for bag in context.features.values()]
    request.context.dense_columns.extend(context.dense_columns)
    request.context.dense = np.asarray(context.dense, dtype="<f4").tobytes()
    request.context.feature_names.extend(context.features)
    request.context.id_type = narsil_pb2.INT64
    request.context.values = b"".join(bag.tobytes() for bag in bags)
    request.context.lengths = np.array([len(bag) for bag in bags], dtype="<i4").tobytes()


def _ids(ids: ArrayLike) -> tuple[NDArray[Any], int]:
    array = np.asarray(ids)
    if array.dtype == np.int32:
        return np.ascontiguousarray(array, dtype="<i4"), narsil_pb2.INT32
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"ids must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype="<i8"), narsil_pb2.INT64


def read_response(body: bytes) -> Prediction:
    """A serialized narsil.v1.PredictResponse as a Prediction."""
    response = narsil_pb2.PredictResponse.FromString(body)
    about = response.provenance
    return Prediction(
        scores={task.task: np.frombuffer(task.values, "<f4") for task in response.scores},
        model_name=response.model_name,
        model_version=response.model_version,
        request_id=response.request_id,
        batch_requests=about.batch_requests,
        batch_rows=about.batch_rows,
        queue_us=about.queue_us,
        execute_us=about.execute_us,
    )


def read_model(body: bytes) -> ModelInfo:
    """A serialized narsil.v1.Model as a ModelInfo."""
    model = narsil_pb2.Model.FromString(body)
    features = tuple(Feature(f.name, f.table, f.rows, f.dim, f.pooling, f.weighted) for f in model.features)
    schema = ModelSchema(model.dense_dim, features, tuple(model.tasks))
    return ModelInfo(model.name, model.version, model.backend, schema)


def error_of(error: grpc.RpcError) -> NarsilError:
    """The RequestError that the server meant, or TransportError; a foreign exception is translated here alone."""
    code = error.code() if hasattr(error, "code") else None
    details = error.details() if hasattr(error, "details") else None
    kind = _ERRORS.get(code.value[0]) if code is not None else None
    if kind is None or code is None or code is grpc.StatusCode.UNAVAILABLE:
        return TransportError(f"{code.name if code else 'call failed'}: {details or error}")
    return kind(details or code.name)
