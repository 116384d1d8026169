"""Counting scores in a reply in C++: as the protobuf runtime reads it, whatever the bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("narsil._load", reason="narsil._load is not built; it needs a C++ compiler and libnghttp2-dev")

from narsil import _load
from narsil.wire import put_len, put_uint, put_varint
from tests.messages import inference_pb2, narsil_pb2, predictor_pb2

names = st.text(max_size=8)
counts = st.integers(0, 300)
tasks = st.lists(st.tuples(names, counts), max_size=4)


def predictor_reply(found: list[tuple[str, int]]) -> bytes:
    """Entries as they come, a name twice too."""
    return b"".join(
        predictor_pb2.PredictionResponse(
            predictions={name: predictor_pb2.FloatVec(data=[1.5] * count)}
        ).SerializeToString()
        for name, count in found
    )


def narsil_reply(found: list[tuple[str, int]]) -> bytes:
    scores = [narsil_pb2.TaskScores(task=name, values=np.ones(count, "<f4").tobytes()) for name, count in found]
    body: bytes = narsil_pb2.PredictResponse(model_name="m", scores=scores).SerializeToString()
    return body


def oip_reply(found: list[tuple[str, int]]) -> bytes:
    reply = inference_pb2.ModelInferResponse(model_name="m", id="r")
    for name, count in found:
        reply.outputs.add(name=name, datatype="FP32", shape=[count])
        reply.raw_output_contents.append(np.ones(count, "<f4").tobytes())
    body: bytes = reply.SerializeToString()
    return body


def scores_in(wire: str, task: str, message: bytes) -> list[float]:
    """As the runtime reads it."""
    if wire == "predictor":
        return list(predictor_pb2.PredictionResponse.FromString(message).predictions[task].data)
    if wire == "oip":
        reply = inference_pb2.ModelInferResponse.FromString(message)
        names = [output.name for output in reply.outputs]
        place = names.index(task) if task in names else len(reply.raw_output_contents)
        return np.frombuffer(b"".join(reply.raw_output_contents[place : place + 1]), "<f4").tolist()
    for scores in narsil_pb2.PredictResponse.FromString(message).scores:
        if scores.task == task:
            return np.frombuffer(scores.values, "<f4").tolist()
    return []


REPLIES = {"predictor": predictor_reply, "narsil": narsil_reply, "oip": oip_reply}
wires = st.sampled_from(sorted(REPLIES))


@given(wires, tasks, names)
def test_scores_are_counted_as_the_runtime_counts_them(wire, found, task):
    message = REPLIES[wire](found)
    assert _load.count_scores(wire, task, message) == len(scores_in(wire, task, message))


@given(wires, tasks.filter(bool), st.integers(0), st.binary(max_size=4))
def test_damaged_replies_are_refused_or_read_as_the_runtime_reads_them(wire, found, at, junk):
    message = bytearray(REPLIES[wire](found))
    message[at % len(message) : at % len(message) + len(junk)] = junk
    task = found[0][0]
    try:
        count = _load.count_scores(wire, task, bytes(message))
    except ValueError:
        return
    try:
        scores = scores_in(wire, task, bytes(message))
    except DecodeError:  # the runtime also refuses names that are not UTF-8
        return
    assert count == len(scores)


@given(wires, st.binary(max_size=200))
def test_any_bytes_are_counted_or_refused(wire, message):
    with contextlib.suppress(ValueError):
        assert 0 <= _load.count_scores(wire, "default", message) <= len(message) // 4


def test_floats_may_be_packed_or_not_and_come_in_parts():
    alone = put_varint(1 << 3 | 5) + b"\0\0\0\0"
    packed = put_len(1, b"\0\0\0\0" * 3)
    entry = put_len(1, b"default") + put_len(2, alone + packed) + put_len(2, alone)
    message = put_len(1, entry)
    assert len(scores_in("predictor", "default", message)) == 5
    assert _load.count_scores("predictor", "default", message) == 5


@pytest.mark.parametrize("wire", sorted(REPLIES))
@pytest.mark.parametrize(
    "message",
    [
        b"\x0a",  # a length that is missing
        b"\x0a\x05abc",  # more than there is
        b"\x0a" + b"\xff" * 9 + b"\x01",  # 2**64 - 1 bytes
        b"\x80" * 11,  # a varint without end
        b"\x00\x00",  # field 0
        b"\x0b\x0c",  # a group
        b"\x79\x00",  # a fixed64 cut off
    ],
)
def test_bytes_that_are_no_message_are_refused(wire, message):
    with pytest.raises(ValueError, match="no reply of this wire"):
        _load.count_scores(wire, "default", message)


def test_scores_that_are_no_whole_number_of_floats_are_refused():
    for message in (
        put_len(4, put_len(1, b"default") + put_len(2, bytes(7))),
        put_len(4, put_len(1, b"default") + put_uint(2, 7)),
    ):
        with pytest.raises(ValueError, match="no reply of this wire"):
            _load.count_scores("narsil", "default", message)
    with pytest.raises(ValueError, match="no reply of this wire"):
        _load.count_scores("oip", "default", put_len(6, bytes(7)))


@pytest.mark.parametrize(
    "text", ["127.0.0.1:50051", "localhost:1", "a-b.example:65535", "[::1]:50051", "unix:s", "unix:/a/b", "unix:///a"]
)
def test_targets(text):
    assert _load.is_target(text)


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":1", "host:0", "host:65536", "host:1a", "::1:50051", "[]:1", "a b:1", "a\r\nb:1", "unix:",
     "unix:" + "x" * 108, "dns:///host:1", "http://host:1", "host:1/path"],
)  # fmt: skip
def test_what_is_no_target(text):
    assert not _load.is_target(text)
