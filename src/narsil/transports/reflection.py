"""Server reflection: what grpcurl and its like ask a server for. Answered by grpcio's own implementation."""

from __future__ import annotations

from collections.abc import Sequence

from grpc_reflection.v1alpha import reflection, reflection_pb2

METHOD = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"


def names(services: Sequence[str]) -> tuple[str, ...]:
    """All services that a server with these has. Loads their messages into protobuf's descriptor pool."""
    from narsil.protos import narsil_pb2, predictor_pb2  # noqa: F401

    return (*services, "grpc.health.v1.Health", reflection.SERVICE_NAME)


class Reflection:
    """ServerReflectionInfo for a transport that carries bytes."""

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = reflection.ReflectionServicer(names(services))

    def answer(self, body: bytes) -> bytes:
        """One serialized ServerReflectionRequest's answer."""
        request = reflection_pb2.ServerReflectionRequest.FromString(body)
        (response,) = self._servicer.ServerReflectionInfo(iter([request]), None)
        return bytes(response.SerializeToString())
