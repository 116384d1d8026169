"""What the load generator sends and reads by hand, held against protobuf's runtime."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from narsil.bench.workload import PROTOCOLS, oip_body, predictor_body, score_reader
from narsil.dataflow import RequestLimits
from narsil.engine.collate import Collator
from narsil.errors import InvalidRequest
from narsil.transports.codec import oip
from narsil.wire import put_len, put_varint
from tests.messages import inference_pb2, narsil_pb2, predictor_pb2
from tests.support import SCHEMA, jagged, one_hot

SCORES = [0.25, 0.75, 1.5]


def runtime_scores(wire: str, task: str, message: bytes) -> list[float]:
    if wire == "predictor":
        return list(predictor_pb2.PredictionResponse.FromString(message).predictions[task].data)
    if wire == "oip":
        reply = inference_pb2.ModelInferResponse.FromString(message)
        places = [place for place, output in enumerate(reply.outputs) if output.name == task]
        return np.frombuffer(b"".join(reply.raw_output_contents[p] for p in places[:1]), "<f4").tolist()
    found = {scores.task: scores.values for scores in narsil_pb2.PredictResponse.FromString(message).scores}
    return np.frombuffer(found.get(task, b""), "<f4").tolist()


def reply(wire: str, tasks: list[str]) -> bytes:
    """Every task has its own scores."""
    scores = {task: (np.array(SCORES, "<f4") + number) for number, task in enumerate(tasks)}
    if wire == "predictor":
        vectors = {task: predictor_pb2.FloatVec(data=values.tolist()) for task, values in scores.items()}
        return predictor_pb2.PredictionResponse(predictions=vectors).SerializeToString()
    if wire == "oip":
        return oip.encode("m", "1", "", scores, ())
    parts = [narsil_pb2.TaskScores(task=task, values=values.tobytes()) for task, values in scores.items()]
    return narsil_pb2.PredictResponse(model_name="m", scores=parts).SerializeToString()


@pytest.mark.parametrize("make", [one_hot, jagged])
def test_a_request_of_torchrec_s_wire_is_what_the_runtime_would_write(make):
    features = make(5, 3)
    body = predictor_body(features)
    message = predictor_pb2.PredictionRequest.FromString(body)
    assert message.SerializeToString() == body
    assert (message.batch_size, message.float_features.num_features) == (5, 3)
    assert message.float_features.values == features.dense.tobytes()
    sparse = message.id_list_features
    assert sparse.num_features == 4
    assert sparse.values == (features.sparse.ids if make is one_hot else features.sparse.values).tobytes()
    lengths = np.ones((4, 5), "<i4") if make is one_hot else features.sparse.lengths
    assert sparse.lengths == lengths.tobytes()


@pytest.mark.parametrize("make", [one_hot, jagged])
def test_a_request_of_the_open_inference_protocol_is_what_the_runtime_would_write(make):
    features = make(5, 3)
    body = oip_body(features)
    assert inference_pb2.ModelInferRequest.FromString(body).SerializeToString() == body
    found = oip.read(body).features(SCHEMA, RequestLimits())
    one, other = Collator(SCHEMA).collate([found]), Collator(SCHEMA).collate([features])
    assert one.one_hot == (make is one_hot)
    for tensor in ("dense", "lengths", "values"):
        np.testing.assert_array_equal(getattr(one, tensor), getattr(other, tensor))


@pytest.mark.parametrize("wire", PROTOCOLS)
def test_a_task_s_scores_are_read_and_of_a_task_that_is_not_there_none(wire):
    message = reply(wire, ["click", "buy"])
    assert score_reader(wire, "buy")(message).tolist() == [1.25, 1.75, 2.5]
    assert score_reader(wire, "other")(message).tolist() == []


@given(st.sampled_from(PROTOCOLS), st.integers(0), st.binary(max_size=4))
def test_damaged_replies_are_refused_or_read_as_the_runtime_reads_them(wire, at, junk):
    message = bytearray(reply(wire, ["default", "buy"]))
    message[at % len(message) : at % len(message) + len(junk)] = junk
    try:
        scores = score_reader(wire, "default")(bytes(message)).tolist()
    except InvalidRequest:
        return
    try:
        expected = runtime_scores(wire, "default", bytes(message))
    except (DecodeError, ValueError):  # it looks deeper into what is skipped here
        return
    np.testing.assert_array_equal(scores, expected)


def test_floats_may_be_packed_or_not_and_come_in_parts():
    alone = put_varint(1 << 3 | 5) + np.array([1.0], "<f4").tobytes()
    packed = put_len(1, np.array(SCORES, "<f4").tobytes())
    entry = put_len(1, b"default") + put_len(2, alone + packed) + put_len(2, alone)
    message = put_len(1, entry)
    expected = runtime_scores("predictor", "default", message)
    assert score_reader("predictor", "default")(message).tolist() == expected == [1.0, *SCORES, 1.0]
