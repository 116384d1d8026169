"""Server reflection: what grpcurl and its like ask a server for. Answered by grpcio's own implementation."""

from __future__ import annotations

from grpc_reflection.v1alpha import reflection, reflection_pb2

from narsil.transports.endpoints import ALL_SERVICES


def services() -> tuple[str, ...]:
    """All services. Loads their messages into protobuf's descriptor pool."""
    from narsil.protos import narsil_pb2, predictor_pb2  # noqa: F401

    return ALL_SERVICES


class Reflection:
    """ServerReflectionInfo for a transport that carries bytes."""

    def __init__(self) -> None:
        self._servicer = reflection.ReflectionServicer(services())

    def answer(self, body: bytes) -> bytes:
        """One serialized ServerReflectionRequest's answer."""
        request = reflection_pb2.ServerReflectionRequest.FromString(body)
        (response,) = self._servicer.ServerReflectionInfo(iter([request]), None)
        return bytes(response.SerializeToString())
