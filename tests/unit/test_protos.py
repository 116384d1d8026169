"""The descriptors that the build makes, held against protobuf's runtime and against gRPC's own packages."""

from __future__ import annotations

import subprocess
import sys

import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from narsil import protos
from narsil.errors import ArtifactError
from narsil.protos import files


@pytest.fixture(scope="module")
def pool() -> DescriptorPool:
    made = DescriptorPool()
    for file in files():
        made.AddSerializedFile(file.descriptor)
    return made


def test_every_proto_file_is_described():
    assert [file.name for file in files()] == [
        "grpc/health/v1/health.proto",
        "grpc/reflection/v1alpha/reflection.proto",
        "inference.proto",
        "narsil.proto",
        "predictor.proto",
    ]


def test_symbols_are_what_the_runtime_reads_in_a_descriptor(pool):
    for file in files():
        described = pool.FindFileByName(file.name)
        expected: set[str] = set()
        messages = list(described.message_types_by_name.values())
        while messages:
            message = messages.pop()
            messages += message.nested_types
            expected |= {message.full_name, *(field.full_name for field in message.fields)}
            expected |= {enum.full_name for enum in message.enum_types}
            expected |= {f"{message.full_name}.{value.name}" for enum in message.enum_types for value in enum.values}
            expected |= {oneof.full_name for oneof in message.oneofs}
        for service in described.services_by_name.values():
            expected |= {service.full_name, *(method.full_name for method in service.methods)}
        for enum in described.enum_types_by_name.values():
            expected |= {enum.full_name, *(f"{described.package}.{value.name}" for value in enum.values)}
        assert file.symbols == expected


def test_an_enum_s_values_stand_beside_it():
    symbols = {symbol for file in files() for symbol in file.symbols}
    assert {"narsil.v1.IdType", "narsil.v1.INT64", "grpc.health.v1.HealthCheckResponse.SERVING"} <= symbols
    assert "narsil.v1.IdType.INT64" not in symbols


@pytest.mark.parametrize("theirs", [health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR], ids=["health", "reflection"])
def test_what_grpc_defines_is_as_grpc_defines_it(pool, theirs):
    """Field by field, of all that Narsil answers."""

    def shape(message) -> dict[int, tuple[str, int, str | None]]:
        kind = {field.number: field.message_type for field in message.fields}
        return {
            field.number: (field.name, field.type, kind[field.number] and kind[field.number].full_name)
            for field in message.fields
        }

    (ours,) = (pool.FindFileByName(file.name) for file in files() if file.name.endswith(theirs.name.split("/")[-1]))
    assert ours.package == theirs.package
    for name, message in ours.message_types_by_name.items():
        assert shape(message) == shape(theirs.message_types_by_name[name])
        for enum in message.enum_types:
            their_enum = theirs.message_types_by_name[name].enum_types_by_name[enum.name]
            assert {v.name: v.number for v in enum.values} == {v.name: v.number for v in their_enum.values}
    for name, service in ours.services_by_name.items():
        for method in service.methods:
            their_method = theirs.services_by_name[name].methods_by_name[method.name]
            assert method.input_type.full_name == their_method.input_type.full_name
            assert method.output_type.full_name == their_method.output_type.full_name
            assert (method.client_streaming, method.server_streaming) == (
                their_method.client_streaming,
                their_method.server_streaming,
            )


def test_a_package_that_was_not_built_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(protos, "DESCRIPTORS", tmp_path / "descriptors.binpb")
    files.cache_clear()
    try:
        with pytest.raises(ArtifactError, match=r"No such file or directory.*setup\.py build_py"):
            files()
    finally:
        monkeypatch.undo()
        files.cache_clear()


def test_neither_server_nor_client_loads_protobuf():
    """What a neighbour in the same environment pins is then no matter of Narsil's."""
    script = (
        "import sys\n"
        "import narsil.server, narsil.client, narsil.bench.workload\n"
        "import narsil.transports.grpc_aio, narsil.transports.native\n"
        "from narsil.transports.reflection import Reflection\n"
        "Reflection()\n"
        "print(sorted(name for name in sys.modules if name.startswith('google')))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[]\n"


def test_the_client_loads_grpcio_and_numpy_and_nothing_else():
    script = (
        "import sys\n"
        "import grpc.aio, numpy, numpy.typing\n"
        "before = set(sys.modules)\n"
        "import narsil\n"
        "narsil.Client, narsil.AsyncClient\n"
        "print(*({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["narsil"]
