"""The Open Inference Protocol's messages, held against protobuf's own runtime, both ways."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.dataflow import OneHot, RequestLimits
from narsil.errors import InvalidRequest
from narsil.telemetry.observer import ModelCounts
from narsil.transports.codec import oip
from narsil.transports.codec.tensors import DTYPES
from narsil.wire import put_len, scan
from tests.messages import inference_pb2 as pb
from tests.support import SCHEMA

LIMITS = RequestLimits()
B = 3
DENSE = (np.arange(9, dtype=np.float32) - 4).reshape(B, 3)
IDS = np.array([[1, 2, 3, 4], [49, 6, 999, 19], [0, 0, 0, 0]], np.int64)


def message(raw=True, dense="FP32", ids="INT64", **fields):
    out = pb.ModelInferRequest(**fields)
    for name, values, kind in (("dense", DENSE, dense), ("ids", IDS, ids)):
        tensor = out.inputs.add(name=name, datatype=kind, shape=values.shape)
        if raw:
            out.raw_input_contents.append(values.astype(DTYPES[kind]).tobytes())
        else:
            contents = {"FP32": "fp32", "FP64": "fp64", "INT32": "int", "INT64": "int64"}[kind]
            getattr(tensor.contents, contents + "_contents").extend(values.ravel().tolist())
    return out


def features(request):
    return oip.read(request.SerializeToString()).features(SCHEMA, LIMITS)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dense", ["FP32", "FP64"])
@pytest.mark.parametrize("ids", ["INT32", "INT64"])
def test_tensors_are_read_raw_and_typed(raw, dense, ids):
    found = features(message(raw, dense, ids))
    assert found.dense.tolist() == DENSE.tolist()
    assert isinstance(found.sparse, OneHot)
    assert found.sparse.ids.T.tolist() == IDS.tolist()


def test_raw_tensors_are_views_of_the_message():
    body = message().SerializeToString()
    found = oip.read(body).features(SCHEMA, LIMITS)
    assert np.shares_memory(found.dense, np.frombuffer(body, np.uint8))
    assert isinstance(found.sparse, OneHot)
    assert np.shares_memory(found.sparse.ids, np.frombuffer(body, np.uint8))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40))
def test_typed_int64_are_read_as_protobuf_writes_them(values):
    contents = pb.InferTensorContents(int64_contents=values).SerializeToString()
    found = [oip._packed_varints(contents, a, b).view(np.int64) for _, _, a, b in scan(contents, 0, len(contents))]
    assert np.concatenate([np.empty(0, np.int64), *found]).tolist() == values


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
def test_typed_int32_are_read_as_protobuf_writes_them(values):
    tensor = oip._Input("x", "INT32", [len(values)], None)
    body = pb.InferTensorContents(int_contents=values).SerializeToString()
    tensor.contents = (0, len(body))
    assert oip._typed(body, tensor, oip._Budget()).tolist() == values


def test_whom_it_asks_and_what_it_wants_back():
    request = message(model_name="m", model_version="7", id="r1")
    request.parameters["timeout"].int64_param = 2500
    request.parameters["priority"].uint64_param = 3
    request.parameters["sequence_id"].int64_param = 0
    request.parameters["anything"].string_param = "else"
    request.outputs.add(name="default")
    found = oip.read(request.SerializeToString())
    assert (found.model_name, found.model_version, found.request_id) == ("m", "7", "r1")
    assert (found.timeout_s, found.priority, found.outputs) == (0.0025, 3, ["default"])
    assert oip.read(message().SerializeToString()).timeout_s is None


def planted(change):
    request = message()
    change(request)
    return request.SerializeToString()


def set_parameter(of, key, **value):
    for name, number in value.items():
        setattr(of.parameters[key], name, number)


REFUSED = [
    (lambda r: set_parameter(r, "sequence_id", int64_param=4), "the request has the parameter sequence_id: Narsil"),
    (lambda r: set_parameter(r, "sequence_start", bool_param=True), "sequence_start"),
    (lambda r: set_parameter(r, "timeout", int64_param=-1), "timeout must be a number of microseconds"),
    (lambda r: set_parameter(r, "timeout", string_param="soon"), "timeout must be a number of microseconds"),
    (lambda r: set_parameter(r.inputs[0], "shared_memory_region", string_param="x"), "input 'dense' has .* shared"),
    (lambda r: set_parameter(r.outputs.add(name="default"), "classification", int64_param=2), "output 'default' has"),
    (lambda r: r.outputs.add(name="other"), "output 'other' is asked for; the model has default"),
    (lambda r: (r.outputs.add(name="default"), r.outputs.add(name="default")), "asked for twice"),
    (lambda r: r.raw_input_contents.pop(), "raw_input_contents has 1 entries for 2 inputs"),
    (lambda r: r.raw_input_contents.append(b""), "raw_input_contents has 3 entries for 2 inputs"),
    (lambda r: setattr(r.inputs[1], "datatype", "BYTES"), "ids has the datatype 'BYTES'"),
    (lambda r: setattr(r.inputs[1], "datatype", ""), "ids has the datatype ''"),
    (lambda r: r.inputs[1].shape.append(2), r"ids: 12 INT64 are given for the shape \[3, 4, 2\]"),
    (lambda r: r.inputs[1].shape.extend([1] * 9), "more than 8 dimensions"),
    (lambda r: r.inputs[0].contents.fp32_contents.append(1), "dense has contents beside raw_input_contents"),
    (lambda r: r.raw_input_contents.__setitem__(0, b"123"), "dense: 3 bytes are no whole number of float32"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), REFUSED)
def test_what_is_not_served_is_refused_by_name(change, text):
    with pytest.raises(InvalidRequest, match=text):
        oip.read(planted(change)).features(SCHEMA, LIMITS)


@pytest.mark.parametrize("octets", [b"\x80", b"\x01\xff", b"\x80" * 10 + b"\x01"])
def test_numbers_that_do_not_end_are_refused(octets):
    with pytest.raises(InvalidRequest, match=r"a varint does not end"):
        oip._packed_varints(octets, 0, len(octets))


def test_typed_numbers_stand_in_their_own_field():
    request = message(raw=False)
    request.inputs[1].ClearField("contents")
    request.inputs[1].contents.int_contents.extend(IDS.ravel().tolist())
    with pytest.raises(InvalidRequest, match=r"ids is INT64: its numbers must be in contents.int64_contents"):
        features(request)
    half = message(raw=False)
    half.inputs[0].datatype = "FP16"
    with pytest.raises(InvalidRequest, match=r"FP16 has no typed contents; send it in raw_input_contents"):
        features(half)


def test_the_fields_of_a_message_are_bounded_wherever_they_stand():
    request = pb.ModelInferRequest()
    for _ in range(400):
        tensor = request.inputs.add(name="x")
        for n in range(8):
            tensor.parameters[str(n)].int64_param = 1
    with pytest.raises(InvalidRequest, match=r"more than 10000 fields"):
        oip.read(request.SerializeToString())
    contents = pb.ModelInferRequest()
    for _ in range(9):
        # Empty entries of fp32_contents: two bytes each, and a tensor of none.
        contents.inputs.add(name="x", datatype="FP32", shape=[0])
    body = b"".join(
        put_len(5, message.SerializeToString() + put_len(5, b"\x32\x00" * 2000)) for message in contents.inputs
    )
    with pytest.raises(InvalidRequest, match=r"more than 10000 fields"):
        oip.read(body).features(SCHEMA, LIMITS)


@given(
    st.binary(max_size=200)
    | st.builds(lambda a, b: message().SerializeToString()[a:b], st.integers(0, 99), st.integers(0, 260))
)
def test_whatever_bytes_come_it_is_features_or_an_invalid_request(body):
    with suppress(InvalidRequest):
        oip.read(body).features(SCHEMA, LIMITS)


def test_scores_are_written_raw():
    scores = {"a": np.array([0.25, 0.5], np.float32), "b": np.arange(6, dtype=np.float32).reshape(2, 3)}
    reply = pb.ModelInferResponse.FromString(oip.encode("m", "3", "r", scores, ()))
    assert (reply.model_name, reply.model_version, reply.id) == ("m", "3", "r")
    assert [(each.name, each.datatype, list(each.shape)) for each in reply.outputs] == [
        ("a", "FP32", [2]),
        ("b", "FP32", [2, 3]),
    ]
    assert [np.frombuffer(raw, "<f4").tolist() for raw in reply.raw_output_contents] == [
        [0.25, 0.5],
        [0, 1, 2, 3, 4, 5],
    ]
    only = pb.ModelInferResponse.FromString(oip.encode("m", "3", "", scores, ["b"]))
    assert [each.name for each in only.outputs] == ["b"]
    streamed = pb.ModelStreamInferResponse.FromString(oip.encode_streamed(oip.encode("m", "3", "r", scores, ())))
    assert streamed.infer_response == reply
    assert pb.ModelStreamInferResponse.FromString(oip.encode_stream_error("no")).error_message == "no"


def test_a_model_is_described():
    found = pb.ModelMetadataResponse.FromString(oip.encode_metadata("m", ["1", "2"], "torch", SCHEMA))
    assert (found.name, list(found.versions), found.platform) == ("m", ["1", "2"], "narsil_torch")
    assert [(i.name, i.datatype, list(i.shape)) for i in found.inputs] == [
        ("dense", "FP32", [-1, 3]),
        ("ids", "INT64", [-1, 4]),
    ]
    assert [(o.name, o.datatype, list(o.shape)) for o in found.outputs] == [("default", "FP32", [-1])]
    config = pb.ModelConfigResponse.FromString(oip.encode_config("m", "torch", SCHEMA)).config
    assert (config.name, config.backend, config.max_batch_size) == ("m", "narsil", 0)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("dense", 11, [-1, 3]), ("ids", 9, [-1, 4])]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [("default", 11, [-1])]


def test_statistics_say_what_happened():
    counts = ModelCounts(batches=2, rows=70, queue=0.5, collate=0.25, execute=1.0, answered=1.5, failed=0.25, last=12.5)
    counts.ends.update(answered=3, QueueFull=1)
    (found,) = pb.ModelStatisticsResponse.FromString(oip.encode_statistics({("m", "2"): counts})).model_stats
    assert (found.name, found.version, found.last_inference) == ("m", "2", 12500)
    assert (found.inference_count, found.execution_count) == (70, 2)
    stats = found.inference_stats
    assert (stats.success.count, stats.success.ns, stats.fail.count, stats.fail.ns) == (3, 1500000000, 1, 250000000)
    assert (stats.queue.ns, stats.compute_input.ns, stats.compute_infer.ns) == (500000000, 250000000, 1000000000)
    index = pb.RepositoryIndexResponse.FromString(
        oip.encode_index([("m", "2", "READY", ""), ("n", "", "UNAVAILABLE", "damaged")])
    )
    assert [(each.name, each.version, each.state, each.reason) for each in index.models] == [
        ("m", "2", "READY", ""),
        ("n", "", "UNAVAILABLE", "damaged"),
    ]
