"""The client's half of narsil.v1, held against protobuf's runtime: what it writes, and what it reads."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.client import Context, TransportError, build_request, read_model, read_response
from narsil.client.calls import reading
from narsil.errors import ArtifactError, InvalidRequest
from tests.messages import Message, narsil_pb2

names = st.text(max_size=5)
id_types = st.sampled_from([np.int32, np.int64])


@st.composite
def requests(draw) -> tuple[dict, Message]:
    """build_request's arguments, and the message that they mean."""
    rows, dense_dim, columns = draw(st.integers(0, 5)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    dense = random.random((rows, dense_dim), dtype=np.float32)
    lengths = random.integers(0, 3, (rows, columns)).astype(np.int32) if draw(st.booleans()) else None
    ids = random.integers(0, 1 << 31, (rows, columns) if lengths is None else lengths.sum()).astype(draw(id_types))
    weights = random.random(ids.size).astype(np.float32) if draw(st.booleans()) else None
    given_names = draw(st.lists(names, max_size=3))
    model, version, request_id = draw(names), draw(names), draw(names)
    message = narsil_pb2.PredictRequest(
        model_name=model, model_version=version, request_id=request_id, batch_size=rows, dense=dense.tobytes()
    )
    sparse = message.sparse
    sparse.SetInParent()
    sparse.num_features, sparse.id_type, sparse.values = columns, int(ids.dtype == np.int64), ids.tobytes()
    sparse.feature_names.extend(given_names)
    if lengths is not None:
        sparse.lengths = lengths.tobytes()
    if weights is not None:
        sparse.weights = weights.tobytes()
    context = None
    if draw(st.booleans()):
        bags = draw(st.dictionaries(names, st.lists(st.integers(0, 1 << 40), max_size=3), max_size=3))
        shared = draw(st.lists(st.tuples(st.integers(0, 1000), st.floats(width=32, allow_nan=False)), max_size=3))
        context = Context(bags, [column for column, _ in shared], [value for _, value in shared])
        message.context.SetInParent()
        message.context.dense_columns.extend(context.dense_columns)
        message.context.dense = np.array(context.dense, "<f4").tobytes()
        message.context.feature_names.extend(bags)
        message.context.id_type = 1
        message.context.values = np.array([i for bag in bags.values() for i in bag], "<i8").tobytes()
        message.context.lengths = np.array([len(bag) for bag in bags.values()], "<i4").tobytes()
    arguments = {
        "dense": dense,
        "ids": ids,
        "lengths": lengths,
        "weights": weights,
        "context": context,
        "feature_names": given_names,
        "model": model,
        "version": version,
        "request_id": request_id,
    }
    return arguments, message


@given(requests())
def test_a_request_has_the_bytes_that_the_runtime_would_write(request_):
    arguments, message = request_
    assert build_request(**arguments) == message.SerializeToString()


@pytest.mark.parametrize("order", ["F", "strided", "big endian"])
def test_arrays_of_any_layout_are_sent_row_by_row_in_little_endian(order):
    plain, ids = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(6, dtype=np.int32).reshape(3, 2)
    changes: dict[str, Any] = {
        "F": np.asfortranarray,
        "strided": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
        "big endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    }
    change = changes[order]
    assert build_request(change(plain), change(ids)) == build_request(plain, ids)


responses = st.builds(
    narsil_pb2.PredictResponse,
    model_name=names,
    model_version=names,
    request_id=names,
    scores=st.lists(
        st.builds(
            lambda task, count, width: narsil_pb2.TaskScores(
                task=task, values=np.arange(count * max(width, 1), dtype="<f4").tobytes(), width=width
            ),
            names,
            st.integers(0, 5),
            st.integers(0, 3),
        ),
        max_size=3,
    ),
    provenance=st.builds(
        narsil_pb2.Provenance,
        batch_requests=st.integers(0, 2**32 - 1),
        batch_rows=st.integers(0, 2**32 - 1),
        queue_us=st.integers(0, 2**32 - 1),
        execute_us=st.integers(0, 2**32 - 1),
    ),
)


def same(body: bytes, message: Message) -> None:
    found = read_response(body)
    assert {task: values.tobytes() for task, values in found.scores.items()} == {
        scores.task: scores.values for scores in message.scores
    }
    widths = {scores.task: scores.width for scores in message.scores}
    assert {task: values.shape[1:] for task, values in found.scores.items()} == {
        task: (width,) if width > 1 else () for task, width in widths.items()
    }
    about = message.provenance
    assert (found.model_name, found.model_version, found.request_id) == (
        message.model_name,
        message.model_version,
        message.request_id,
    )
    assert (found.batch_requests, found.batch_rows, found.queue_us, found.execute_us) == (
        about.batch_requests,
        about.batch_rows,
        about.queue_us,
        about.execute_us,
    )


@given(responses, responses)
def test_an_answer_is_read_as_the_runtime_reads_it_merged_and_with_unknown_fields(message, more):
    unknown = b"\xfa\x01\x03abc"  # field 31
    body = message.SerializeToString() + unknown + more.SerializeToString()
    same(body, narsil_pb2.PredictResponse.FromString(body))


@given(responses, st.integers(0), st.binary(max_size=4))
def test_a_damaged_answer_is_refused_or_read_as_the_runtime_reads_it(message, at, junk):
    body = bytearray(message.SerializeToString() + b"\x0a\x01m")
    body[at % len(body) : at % len(body) + len(junk)] = junk
    try:
        read_response(bytes(body))
    except InvalidRequest:
        return
    with contextlib.suppress(DecodeError):  # the runtime looks deeper into what is skipped here
        same(bytes(body), narsil_pb2.PredictResponse.FromString(bytes(body)))


def test_a_model_is_read_as_it_was_written():
    message = narsil_pb2.Model(name="dlrm", version="3", backend="torch", dense_dim=13, tasks=["click", "buy"])
    message.features.add(name="a", table="t_a", rows=1 << 40, dim=8, pooling="mean", weighted=True)
    message.features.add(name="b", table="t_b", rows=10, dim=16, pooling="sum")
    info = read_model(message.SerializeToString() + b"\xfa\x01\x03abc")
    features = (Feature("a", "t_a", 1 << 40, 8, "mean", True), Feature("b", "t_b", 10, 16, "sum", False))
    assert (info.name, info.version, info.backend) == ("dlrm", "3", "torch")
    assert info.schema == ModelSchema(13, features, ("click", "buy"))


@given(st.binary(max_size=100))
def test_any_bytes_are_a_model_or_refused(body):
    with contextlib.suppress(InvalidRequest, ArtifactError):
        read_model(body)


A_MODEL = narsil_pb2.Model(
    name="m",
    tasks=["a"],
    features=[narsil_pb2.Feature(name="a", table="t", rows=9, dim=4, pooling="sum")],
).SerializeToString()


@pytest.mark.parametrize("written", [b"\x52\x02\x01\x05", b"\x50\x01\x50\x05"])
def test_widths_are_read_packed_and_one_by_one(written):
    body = A_MODEL + narsil_pb2.Model(tasks=["b"]).SerializeToString() + written
    assert read_model(body).schema.outputs == {"a": 1, "b": 5}


@pytest.mark.parametrize(
    ("read", "body", "why"),
    [
        (read_response, b"\xff", "not a valid protobuf message"),
        (read_response, b"\x0a\x01\xff", "a name is not UTF-8"),
        (read_response, b"\x22\x05\x12\x03abc", "3 bytes are no whole number of float32"),
        (read_response, b"\x22\x08\x12\x04abcd\x18\x02", "4 bytes are no whole number of rows of 2 float32"),
        (read_model, A_MODEL + b"\x52\x02\x01\x02", "widths must be positive integers, one for each of 1 task"),
        (read_model, b"\x0a\x05", "field 1 claims 5 bytes"),
        (read_model, b"", "neither dense columns nor sparse features"),
    ],
)
def test_an_answer_that_cannot_be_read_is_the_server_s_fault_and_not_the_request_s(read, body, why):
    with pytest.raises(TransportError, match=f"the server's answer cannot be read: .*{why}"):
        reading(read, body)
