"""TorchRec's wire: what its own message classes write is read exactly, and everything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil.dataflow import Features, Jagged, OneHot
from narsil.engine.collate import Collator
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports.codec import predictor
from narsil.wire import put_len
from tests.messages import Message, predictor_pb2
from tests.support import SCHEMA, jagged, one_hot

LIMITS = RequestLimits(max_rows=1000, max_ids=100_000)


def message_of(features: Features) -> Message:
    batch = Collator(SCHEMA).collate([features])
    message = predictor_pb2.PredictionRequest(batch_size=batch.rows)
    message.float_features.num_features = SCHEMA.dense_dim
    message.float_features.values = batch.dense.tobytes()
    message.id_list_features.num_features = SCHEMA.num_features
    message.id_list_features.lengths = batch.lengths.tobytes()
    message.id_list_features.values = batch.values.tobytes()
    # As TorchRec's own client does: the unused groups are there, and empty.
    message.id_score_list_features.num_features = 0
    message.embedding_features.SetInParent()
    message.unary_features.SetInParent()
    return message


def same(found: Features, expected: Features) -> None:
    one, other = (Collator(SCHEMA).collate([each]) for each in (found, expected))
    np.testing.assert_array_equal(one.dense, other.dense)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.values, other.values)
    assert one.one_hot == other.one_hot


def decode(message: Message) -> Features:
    return predictor.decode(message.SerializeToString(), SCHEMA, LIMITS)


def test_the_numbers_of_a_wide_task_go_flattened_row_by_row():
    wide = np.arange(6, dtype=np.float32).reshape(2, 3).T
    reply = predictor_pb2.PredictionResponse.FromString(predictor.encode({"a (3)": wide, "b": wide[:, 0]}))
    assert list(reply.predictions["a (3)"].data) == [0, 3, 1, 4, 2, 5]
    assert list(reply.predictions["b"].data) == [0, 1, 2]


@settings(deadline=None)
@given(st.sampled_from([one_hot, jagged]), st.integers(1, 20), st.integers(0, 10_000))
def test_a_request_reads_as_the_rows_that_were_written(make, rows, seed):
    written = make(rows, seed)
    collator = Collator(SCHEMA)
    expected = collator.collate([written])
    found = Collator(SCHEMA).collate([decode(message_of(written))])
    np.testing.assert_array_equal(found.dense, expected.dense)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.values, expected.values)


def test_bags_of_one_id_each_are_recognized_as_one_hot_and_others_are_not():
    assert isinstance(decode(message_of(one_hot(5))).sparse, OneHot)
    assert isinstance(decode(message_of(jagged(5))).sparse, Jagged)


def test_nothing_is_copied():
    body = message_of(one_hot(5)).SerializeToString()
    features = predictor.decode(body, SCHEMA, LIMITS)
    assert isinstance(features.sparse, OneHot)
    for array in (features.dense, features.sparse.ids):
        assert not array.flags.owndata
        assert not array.flags.writeable


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=300), st.text(min_size=1, max_size=20))
def test_a_response_is_byte_for_byte_what_the_protobuf_runtime_writes(values, task):
    message = predictor_pb2.PredictionResponse()
    message.predictions[task].data.extend(values)
    assert predictor.encode({task: np.array(values, dtype=np.float32)}) == message.SerializeToString()


Change = Callable[[Message], None]


def set_dense(row: int, column: int, value: float) -> Change:
    def change(message):
        dense = np.frombuffer(message.float_features.values, np.float32).copy()
        dense[row * SCHEMA.dense_dim + column] = value
        message.float_features.values = dense.tobytes()

    return change


def set_id(feature: int, row: int, value: int) -> Change:
    def change(message):
        lengths = np.frombuffer(message.id_list_features.lengths, np.int32)
        values = np.frombuffer(message.id_list_features.values, np.int32).copy()
        bag = feature * message.batch_size + row
        assert lengths[bag] > 0
        values[lengths[:bag].sum()] = value
        message.id_list_features.values = values.tobytes()

    return change


def set_length(feature: int, row: int, value: int) -> Change:
    def change(message):
        lengths = np.frombuffer(message.id_list_features.lengths, np.int32).copy()
        lengths[feature * message.batch_size + row] = value
        message.id_list_features.lengths = lengths.tobytes()

    return change


def assign(path: str, value: object) -> Change:
    def change(message):
        *groups, field = path.split(".")
        for group in groups:
            message = getattr(message, group)
        setattr(message, field, value)

    return change


REFUSALS: dict[str, tuple[Change, str]] = {
    "negative rows": (assign("batch_size", -4), "batch_size is -4"),
    "too many rows": (assign("batch_size", 1001), "batch_size is 1001"),
    "no dense": (lambda m: m.ClearField("float_features"), "float_features.num_features is 0; the model takes 3"),
    "too few dense features": (assign("float_features.num_features", 2), "num_features is 2; the model takes 3"),
    "dense bytes cut": (assign("float_features.values", b"\0" * 13), "13 bytes are no whole number of float32"),
    "a dense row missing": (assign("float_features.values", b"\0" * 12), "12 bytes for 4 rows"),
    "NaN": (set_dense(2, 1, float("nan")), "row 2, column 1 is nan; values must be finite: --allow-nan serves"),
    "infinity": (set_dense(3, 0, float("-inf")), "row 3, column 0 is -inf"),
    "no sparse": (lambda m: m.ClearField("id_list_features"), r"num_features is 0; the model takes 4 .*user .. shop"),
    "missing feature": (assign("id_list_features.num_features", 3), "id_list_features.num_features is 3"),
    "extra feature": (assign("id_list_features.num_features", 5), "id_list_features.num_features is 5"),
    "lengths missing": (assign("id_list_features.lengths", b""), "0 bytes for 4 features x 4 rows; expected 64"),
    "lengths cut": (assign("id_list_features.lengths", b"\0" * 63), "63 bytes are no whole number of int32"),
    "lengths of a row missing": (assign("id_list_features.lengths", b"\0" * 48), "48 bytes for 4 features x 4 rows"),
    "values cut": (assign("id_list_features.values", b"\0" * 7), "7 bytes are no whole number of int32"),
    "values missing": (assign("id_list_features.values", b""), r"lengths add up to \d+ ids and values holds 0"),
    "values too long": (assign("id_list_features.values", b"\0" * 4000), "and values holds 1000 int32"),
    "negative length": (set_length(2, 3, -1), "feature tags, row 3: length -1 is negative"),
    "a length too long": (set_length(1, 0, 100), "lengths add up to"),
    "lengths that wrap around": (set_length(1, 0, 2**31 - 1), "lengths add up to 21474836"),
    "negative id": (set_id(2, 1, -1), "feature tags, row 1: id -1 is outside its table t_tags; ids are 0 to 999"),
    "id past its table": (set_id(1, 2, 7), "feature item, row 2: id 7 is outside its table t_item; ids are 0 to 6"),
    "weights": (assign("id_list_features.weights", b"\0" * 8), "2 weights given, but no table of this model takes"),
}


def plain(make: Callable[[int, int], Features]) -> Message:
    """Four rows in which the bags that the changes touch are not empty."""
    seed = 0
    while True:
        features = make(4, seed)
        lengths = Collator(SCHEMA).collate([features]).lengths.reshape(4, 4)
        if lengths[1, 2] and lengths[2, 1]:
            return message_of(features)
        seed += 1


@pytest.mark.parametrize("make", [one_hot, jagged])
@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_broken_request_is_refused_by_name(make, change, message):
    request = plain(make)
    decode(request)
    change(request)
    with pytest.raises(InvalidRequest, match=message):
        decode(request)


# --- what the model does not take


@pytest.mark.parametrize(
    ("group", "change"),
    [
        ("id_score_list_features", assign("id_score_list_features.num_features", 1)),
        ("id_score_list_features", assign("id_score_list_features.weights", b"x")),
        ("embedding_features", assign("embedding_features.values", bytes(4))),
        ("unary_features", assign("unary_features.num_features", 2)),
    ],
)
def test_groups_that_no_model_takes_are_passed_over_and_told(group, change):
    request = plain(jagged)
    assert predictor.read(request.SerializeToString()).passed_over() == ()
    change(request)
    read = predictor.read(request.SerializeToString())
    assert read.passed_over() == (group,)
    same(read.features(SCHEMA, LIMITS), decode(plain(jagged)))


def test_what_stands_in_for_ids_that_the_model_needs_is_not_passed_over():
    request = plain(jagged)
    request.id_score_list_features.CopyFrom(request.id_list_features)
    request.ClearField("id_list_features")
    with pytest.raises(InvalidRequest, match=r"id_list_features.num_features is 0; the model takes 4"):
        decode(request)


def test_weighted_lists_are_not_passed_over_for_a_model_with_weighted_bags():
    weighted = replace(SCHEMA, features=(replace(SCHEMA.features[0], weighted=True), *SCHEMA.features[1:]))
    request = plain(jagged)
    predictor.decode(request.SerializeToString(), weighted, LIMITS)
    request.id_score_list_features.num_features = 1
    with pytest.raises(InvalidRequest, match=r"both hold ids; this model takes one group, with weights"):
        predictor.decode(request.SerializeToString(), weighted, LIMITS)


def test_a_weighted_model_takes_its_ids_in_the_group_that_torchrec_s_clients_fill():
    weighted = replace(SCHEMA, features=tuple(replace(feature, weighted=True) for feature in SCHEMA.features))
    request = plain(jagged)
    count = len(request.id_list_features.values) // 4
    request.id_list_features.weights = np.arange(count, dtype="<f4").tobytes()
    moved = predictor_pb2.PredictionRequest()
    moved.CopyFrom(request)
    moved.id_score_list_features.CopyFrom(request.id_list_features)
    moved.ClearField("id_list_features")
    expected = predictor.decode(request.SerializeToString(), weighted, LIMITS)
    read = predictor.read(moved.SerializeToString())
    found = read.features(weighted, LIMITS)
    same(found, expected)
    assert isinstance(found.sparse, Jagged)
    assert isinstance(expected.sparse, Jagged)
    np.testing.assert_array_equal(found.sparse.weights, expected.sparse.weights)
    assert read.passed_over() == ()


def test_the_last_of_a_repeated_field_counts_as_protobuf_has_it():
    body = message_of(one_hot(3)).SerializeToString()
    again = predictor_pb2.PredictionRequest(batch_size=99).SerializeToString() + body
    assert predictor.decode(again, SCHEMA, LIMITS).rows == 3


def test_unknown_fields_are_ignored_as_protobuf_has_it():
    body = message_of(one_hot(3)).SerializeToString() + b"\xc2\x3e\x03abc"
    assert predictor.decode(body, SCHEMA, LIMITS).rows == 3


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (b"\x0a\x00", "batch_size has protobuf wire type 2, expected 0"),
        (b"\x10\x01", "float_features has protobuf wire type 0, expected 2"),
        (b"\x18\x01", "id_list_features has protobuf wire type 0, expected 2"),
        (b"\x20\x01", "id_score_list_features has protobuf wire type 0, expected 2"),
        (b"\x12\x02\x0a\x00", "float_features.num_features has protobuf wire type 2, expected 0"),
        (b"\x12\x02\x10\x01", "float_features field 2 has protobuf wire type 0, expected 2"),
        (b"\x1a\x02\x0a\x00", "id_list_features.num_features has protobuf wire type 2, expected 0"),
        (b"\x1a\x02\x18\x01", "id_list_features field 3 has protobuf wire type 0, expected 2"),
        (b"\x1a\x02\x20\x01", "id_list_features field 4 has protobuf wire type 0, expected 2"),
    ],
)
def test_a_field_of_another_wire_type_is_named(field, message):
    body = message_of(one_hot(3)).SerializeToString()
    with pytest.raises(InvalidRequest, match=message):
        predictor.decode(body + field, SCHEMA, LIMITS)


def test_what_a_group_does_not_know_is_ignored_and_an_unused_group_may_be_there_if_it_is_empty():
    body = message_of(one_hot(3)).SerializeToString()
    unknown = b"\x1a\x02\x28\x01"  # field 5 of id_list_features; the group's others were given before
    empty = b"\x22\x06\x12\x00\x1a\x00\x22\x00" + b"\x2a\x00"
    known = predictor_pb2.PredictionRequest.FromString(body).id_list_features.SerializeToString()
    grown = put_len(3, known + unknown[2:])
    assert predictor.decode(body + grown + empty, SCHEMA, LIMITS).rows == 3
    assert predictor.read(body + grown + empty).passed_over() == ()


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_damage_is_either_refused_or_leaves_every_id_inside_its_table(data):
    body = bytearray(plain(jagged).SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    try:
        features = predictor.decode(bytes(body), SCHEMA, LIMITS)
    except InvalidRequest:
        return
    batch = Collator(SCHEMA).collate([features])
    assert batch.lengths.min() >= 0
    assert batch.lengths.sum() == len(batch.values)
    assert np.isfinite(batch.dense).all()
    limits = np.repeat(np.repeat(SCHEMA.rows, batch.rows), batch.lengths)
    assert ((batch.values >= 0) & (batch.values < limits)).all()
