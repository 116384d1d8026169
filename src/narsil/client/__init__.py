"""A small typed client for ``narsil.v1``: ``Client`` for threads, ``AsyncClient`` for asyncio.

with narsil.Client("127.0.0.1:50051") as client:
    prediction = client.predict(dense, ids)          # (B, D) float32, (B, T) integers
    prediction.scores["default"]                     # (B,) float32

Needs grpcio and numpy, and no protobuf: it lives beside any other gRPC client, whatever version of protobuf that pins.
"""

from narsil.client.aio import AsyncClient
from narsil.client.answers import ModelInfo, ModelStatus, Prediction, read_model, read_response
from narsil.client.blocking import Client
from narsil.client.calls import TransportError
from narsil.client.rows import Context, build_request

__all__ = [
    "AsyncClient",
    "Client",
    "Context",
    "ModelInfo",
    "ModelStatus",
    "Prediction",
    "TransportError",
    "build_request",
    "read_model",
    "read_response",
]
