"""Server reflection by hand, asked with gRPC's own messages."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import (
    ExtensionRequest,
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from narsil.errors import InvalidRequest
from narsil.transports.reflection import Reflection

NOT_FOUND, INVALID_ARGUMENT = 5, 3


@pytest.fixture(scope="module")
def reflection() -> Reflection:
    return Reflection()


def ask(reflection: Reflection, **request: Any) -> Any:
    asked = ServerReflectionRequest(**request)
    answer = ServerReflectionResponse.FromString(reflection.answer(asked.SerializeToString()))
    assert answer.original_request == asked
    return answer


def test_the_services_are_listed_in_order(reflection):
    assert [service.name for service in ask(reflection, list_services="*").list_services_response.service] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
        "narsil.v1.Inference",
        "predictor.Predictor",
    ]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("predictor.Predictor", "predictor.proto"),
        ("predictor.PredictionResponse.PredictionsEntry", "predictor.proto"),
        ("narsil.v1.Inference.Predict", "narsil.proto"),
        ("narsil.v1.PredictRequest.dense", "narsil.proto"),
        ("narsil.v1.IdType", "narsil.proto"),
        ("grpc.health.v1.Health", "grpc/health/v1/health.proto"),
        ("grpc.reflection.v1alpha.ServerReflection", "grpc/reflection/v1alpha/reflection.proto"),
    ],
)
def test_a_symbol_leads_to_its_file_and_so_does_the_file_s_name(reflection, symbol, name):
    (by_symbol,) = ask(reflection, file_containing_symbol=symbol).file_descriptor_response.file_descriptor_proto
    (by_name,) = ask(reflection, file_by_filename=name).file_descriptor_response.file_descriptor_proto
    assert by_symbol == by_name
    assert FileDescriptorProto.FromString(by_name).name == name


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"file_containing_symbol": "narsil.v1.Nothing"}, NOT_FOUND),
        ({"file_containing_symbol": ""}, NOT_FOUND),
        ({"file_by_filename": "other.proto"}, NOT_FOUND),
        ({"all_extension_numbers_of_type": "narsil.v1.Nothing"}, NOT_FOUND),
        ({"file_containing_extension": ExtensionRequest(containing_type="narsil.v1.Model")}, NOT_FOUND),
        ({"host": "here"}, INVALID_ARGUMENT),
    ],
)
def test_what_is_not_there_is_an_error_in_the_answer(reflection, request_, code):
    assert ask(reflection, **request_).error_response.error_code == code


def test_no_message_has_extensions(reflection):
    answer = ask(reflection, all_extension_numbers_of_type="narsil.v1.Model").all_extension_numbers_response
    assert (answer.base_type_name, list(answer.extension_number)) == ("narsil.v1.Model", [])


def test_of_two_questions_the_last_counts(reflection):
    first = ServerReflectionRequest(file_by_filename="narsil.proto").SerializeToString()
    last = ServerReflectionRequest(list_services="").SerializeToString()
    assert ServerReflectionResponse.FromString(reflection.answer(first + last)).HasField("list_services_response")


@pytest.mark.parametrize("body", [b"\xff", b"\x1a\x05ab", b"\x1a\x01\xff", b"\x18\x01"])
def test_what_is_no_request_is_refused(reflection, body):
    with pytest.raises(InvalidRequest):
        reflection.answer(body)
