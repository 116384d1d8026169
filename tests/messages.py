"""Message classes of every .proto file, made by protobuf's runtime: what the hand-written codecs are held against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from narsil.protos import files

Message = Any  # one of these classes' objects

_POOL = DescriptorPool()
for _file in files():
    _POOL.AddSerializedFile(_file.descriptor)


def _classes(name: str) -> Any:
    """The message classes of a file, as attributes."""
    described = _POOL.FindFileByName(name)
    return SimpleNamespace(**{name: GetMessageClass(m) for name, m in described.message_types_by_name.items()})


narsil_pb2 = _classes("narsil.proto")
predictor_pb2 = _classes("predictor.proto")
health_pb2 = _classes("grpc/health/v1/health.proto")
inference_pb2 = _classes("inference.proto")
