"""Narsil's own wire: sample-major rows, named or ordered columns, int32 or int64, and a context sent once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.client import Context, build_request, read_model, read_response
from narsil.dataflow import Features, Jagged, OneHot, StageTimes
from narsil.engine.collate import Collator
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports.codec import narsil_v1
from narsil.wire import put_len
from tests.messages import narsil_pb2
from tests.support import SCHEMA, jagged, one_hot

LIMITS = RequestLimits(max_rows=1000, max_ids=100_000)
WEIGHTED = ModelSchema(1, (Feature("a", "t_a", 10, 8, weighted=True), Feature("b", "t_b", 10, 8, weighted=True)))
NAMES = [feature.name for feature in SCHEMA.features]


def decode(body: bytes, schema: ModelSchema = SCHEMA, limits: RequestLimits = LIMITS) -> Features:
    return narsil_v1.decode(body, schema, limits)


def rows_of(features: Features) -> list[list[list[int]]]:
    """[row][feature] -> bag."""
    batch = Collator(SCHEMA).collate([features])
    bags = np.split(batch.values, np.cumsum(batch.lengths)[:-1])
    return [[bags[t * batch.rows + b].tolist() for t in range(SCHEMA.num_features)] for b in range(batch.rows)]


def body_of(dense, rows: list[list[list[int]]], dtype=np.int32, **arguments) -> bytes:
    """The wire form of rows of bags."""
    lengths = np.array([[len(bag) for bag in row] for row in rows], dtype=np.int32)
    values = np.array([i for row in rows for bag in row for i in bag], dtype=dtype)
    return build_request(dense, values, lengths, **arguments)


@settings(deadline=None)
@given(st.sampled_from([one_hot, jagged]), st.integers(1, 12), st.integers(0, 10_000), st.sampled_from(["i4", "i8"]))
def test_rows_read_as_they_were_written(make, rows, seed, dtype):
    written = make(rows, seed)
    found = decode(body_of(written.dense, rows_of(written), dtype))
    assert rows_of(found) == rows_of(written)
    np.testing.assert_array_equal(found.dense, written.dense)


def test_a_request_says_whom_it_asks_and_by_which_name_it_is_told_of():
    asked = narsil_v1.read(change(model_name="dlrm", model_version="3", request_id="r-7"))
    assert (asked.model_name, asked.model_version, asked.request_id) == ("dlrm", "3", "r-7")
    anybody = narsil_v1.read(build_request(**GOOD))
    assert (anybody.model_name, anybody.model_version, anybody.request_id) == ("", "", "")


def test_the_type_of_ids_may_be_written_out_where_it_is_the_default():
    int32 = narsil_pb2.PredictRequest.FromString(build_request(GOOD["dense"], np.array(GOOD["ids"], np.int32)))
    body = int32.SerializeToString() + put_len(6, b"\x18\x00")
    assert rows_of(decode(body)) == rows_of(decode(build_request(**GOOD)))


def test_ids_without_lengths_are_one_a_bag_and_are_not_copied():
    written = one_hot(6)
    assert isinstance(written.sparse, OneHot)
    found = decode(build_request(written.dense, written.sparse.ids.T))
    assert isinstance(found.sparse, OneHot)
    assert not found.sparse.ids.flags.owndata
    assert rows_of(found) == rows_of(written)


@settings(deadline=None)
@given(st.sampled_from([one_hot, jagged]), st.permutations(range(4)), st.integers(0, 1000))
def test_named_columns_may_come_in_any_order(make, order, seed):
    written = make(5, seed)
    shuffled = [[row[t] for t in order] for row in rows_of(written)]
    found = decode(body_of(written.dense, shuffled, feature_names=[NAMES[t] for t in order]))
    assert rows_of(found) == rows_of(written)


@settings(deadline=None)
@given(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 2)), st.integers(1, 8), st.integers(0, 1000))
def test_a_context_reads_as_if_it_had_been_sent_with_every_row(shared, columns, rows, seed):
    written = jagged(rows, seed)
    expected = rows_of(written)
    dense = written.dense.copy()
    for row in expected:
        for t in shared:
            row[t] = expected[0][t]
    dense[:, sorted(columns)] = dense[0, sorted(columns)]
    own = [t for t in range(4) if t not in shared]
    body = body_of(
        np.delete(dense, sorted(columns), axis=1),
        [[row[t] for t in own] for row in expected],
        context=Context(
            {NAMES[t]: expected[0][t] for t in sorted(shared, reverse=True)},
            sorted(columns),
            dense[0, sorted(columns)].tolist(),
        ),
    )
    found = decode(body)
    assert rows_of(found) == expected
    np.testing.assert_array_equal(found.dense, dense)


def test_a_context_of_single_ids_becomes_one_hot():
    body = build_request(np.zeros((3, 3)), [[1, 2, 3]] * 3, context=Context({"user": [4]}))
    found = decode(body)
    assert isinstance(found.sparse, OneHot)
    assert rows_of(found) == [[[4], [1], [2], [3]]] * 3


def test_weights_travel_with_their_ids():
    body = build_request([[0.0]] * 2, [1, 2, 3], [[1, 1], [0, 1]], weights=[0.1, 0.2, 0.3])
    sparse = decode(body, WEIGHTED).sparse
    assert isinstance(sparse, Jagged)
    batch = Collator(WEIGHTED).collate([Features(2, np.zeros((2, 1), np.float32), sparse)])
    assert batch.values.tolist() == [1, 2, 3]
    assert batch.lengths.tolist() == [1, 0, 1, 1]
    np.testing.assert_allclose(batch.weights, [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.1, float("nan"), 0.3], "sparse: weight 1 is nan; weights must be finite"),
        ([0.1, 0.2, float("-inf")], "sparse: weight 2 is -inf; weights must be finite"),
        ([0.1, 0.2], "sparse: 2 weights for 3 ids; there must be one per id"),
        ([0.1, 0.2, 0.3, 0.4], "sparse: 4 weights for 3 ids; there must be one per id"),
    ],
)
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_weight_that_no_bag_can_take_is_refused_by_its_place(weights, message, names):
    body = narsil_pb2.PredictRequest(
        batch_size=2,
        dense=np.zeros(2, np.float32).tobytes(),
        sparse=narsil_pb2.SparseFeatures(
            num_features=2,
            feature_names=names,
            values=np.array([1, 2, 3], np.int32).tobytes(),
            lengths=np.array([1, 1, 0, 1], np.int32).tobytes(),
            weights=np.array(weights, np.float32).tobytes(),
        ),
    ).SerializeToString()
    with pytest.raises(InvalidRequest, match=message):
        decode(body, WEIGHTED)


def test_weights_follow_reordered_columns():
    body = build_request([[0.0]] * 2, [1, 2, 3], [[1, 1], [0, 1]], weights=[0.1, 0.2, 0.3], feature_names=["b", "a"])
    batch = Collator(WEIGHTED).collate([decode(body, WEIGHTED)])
    assert batch.values.tolist() == [2, 3, 1]
    np.testing.assert_allclose(batch.weights, [0.2, 0.3, 0.1])


GOOD: dict[str, Any] = {"dense": np.zeros((2, 3)), "ids": [[1, 2, 3, 4], [5, 6, 7, 8]]}


def change(**fields) -> bytes:
    """A good request with fields of its message (``sparse__x`` for nested ones) set otherwise."""
    message = narsil_pb2.PredictRequest.FromString(build_request(**GOOD))
    for path, value in fields.items():
        *groups, field = path.split("__")
        target = message
        for group in groups:
            target = getattr(target, group)
        if isinstance(value, list):
            getattr(target, field).extend(value)
        else:
            setattr(target, field, value)
    return message.SerializeToString()


REFUSALS = {
    "no rows": (change(batch_size=0), "batch_size is 0"),
    "too many rows": (change(batch_size=5000), r"batch_size is 5000; it must be 1 to 1000 rows \(--max-request-rows\)"),
    "rows that disagree": (change(batch_size=3), "dense: 24 bytes for 3 rows"),
    "no dense": (change(dense=b""), "dense: 0 bytes for 2 rows; the model takes 3 float32 a row, 24 bytes"),
    "dense cut": (change(dense=b"\0" * 23), "dense: 23 bytes are no whole number of float32"),
    "NaN": (build_request([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]], GOOD["ids"]), "dense: row 1, column 1 is nan"),
    "missing feature": (change(sparse__num_features=3), r"num_features is 3; the model takes 4 here \(user, item"),
    "no sparse": (build_request(GOOD["dense"], np.empty((0, 0), int)), "sparse.num_features is 0"),
    "wrong dtype": (change(sparse__id_type=0), "sparse.values: 64 bytes for 2 rows x 4 features"),
    "unknown dtype": (change(sparse__id_type=7), "sparse.id_type is 7; it must be INT32"),
    "values cut": (change(sparse__values=b"\0" * 63), "63 bytes are no whole number of int64"),
    "values short": (change(sparse__values=b"\0" * 56), "without lengths each bag holds one int64, 64 bytes in all"),
    "lengths short": (change(sparse__lengths=b"\0" * 28), "28 bytes for 2 rows x 4 features; expected 32"),
    "lengths empty": (change(sparse__lengths=b""), None),
    "lengths that do not add up": (change(sparse__lengths=b"\0" * 32), "lengths add up to 0 ids and values holds 8"),
    "negative length": (
        build_request(GOOD["dense"], [1, 2], [[1, 1, 0, 0], [0, 0, -1, 1]]),
        "feature tags, row 1: length -1 is negative",
    ),
    "negative id": (build_request(GOOD["dense"], [[1, 2, 3, 4], [5, 6, -7, 8]]), "feature tags, row 1: id -7"),
    "id past its table": (
        build_request(GOOD["dense"], [[1, 7, 3, 4], [5, 6, 7, 8]]),
        "feature item, row 0: id 7 is outside its table t_item; ids are 0 to 6",
    ),
    "an int64 id past int32": (
        build_request(GOOD["dense"], [[1, 2, 2**32 + 3, 4], [5, 6, 7, 8]]),
        "feature tags, row 0: id 4294967299",
    ),
    "weights on an unweighted model": (
        change(sparse__weights=b"\0" * 32),
        "8 weights given, but no table of this model takes weights",
    ),
    "unknown name": (change(sparse__feature_names=["user", "item", "tags", "colour"]), "no feature 'colour'"),
    "name twice": (change(sparse__feature_names=["user", "item", "tags", "user"]), "feature user is given twice"),
    "name missing": (change(sparse__feature_names=["user", "item", "tags"]), "sparse.feature_names lacks shop"),
    "context repeats a row feature": (
        change(
            context__feature_names=["user"],
            context__values=b"\0" * 4,
            sparse__feature_names=["user", "item", "tags", "shop"],
        ),
        "sparse.feature_names gives user, which the context gives already",
    ),
    "context leaves too many columns": (
        change(context__feature_names=["user"], context__values=b"\0" * 4),
        "sparse.num_features is 4; the model takes 3 here",
    ),
    "context of an unknown feature": (
        change(context__feature_names=["colour"]),
        "context.feature_names: the model has",
    ),
    "context column too high": (change(context__dense_columns=[3], context__dense=b"\0" * 4), "be below 3"),
    "context columns unsorted": (change(context__dense_columns=[1, 0], context__dense=b"\0" * 8), "must ascend"),
    "context dense short": (
        change(context__dense_columns=[1], context__dense=b""),
        "0 bytes for 1 columns; expected 4",
    ),
    "model name not text": (b"\x0a\x02\xff\xfe", "model_name is not UTF-8"),
    "a message in very many parts": (build_request(**GOOD) + b"\x32\x00" * 20, "given in more than 16 parts"),
    "more context columns than there are": (
        change(context__dense_columns=[0] * 31, context__dense=b"\0" * 124),
        "context.dense_columns holds more than the model's 3 columns",
    ),
    "weights beside a context": (
        change(sparse__weights=b"\0" * 32, context__dense_columns=[0], context__dense=b"\0" * 4, dense=b"\0" * 16),
        "weights together with a context are not supported; send the rows without a context",
    ),
    "weights in a context": (
        change(context__dense_columns=[0], context__dense=b"\0" * 4, context__weights=b"\0" * 4, dense=b"\0" * 16),
        "weights together with a context are not supported; send the rows without a context",
    ),
    "a context without lengths and with too few ids": (
        change(
            context__feature_names=["user", "item"],
            context__values=b"\0" * 4,
            sparse__num_features=2,
            sparse__values=b"\0" * 32,
        ),
        "context.values: 4 bytes for 1 rows x 2 features",
    ),
    "no message at all": (b"\xff\xff\xff", "not a valid protobuf message"),
}


@pytest.mark.parametrize(("body", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_broken_request_is_refused_by_name(body, message):
    if message is None:  # protobuf cannot tell an empty field from an absent one
        decode(body)
        return
    with pytest.raises(InvalidRequest, match=message):
        decode(body)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[1, 1, 1, 1], [1, 1, 1, -1]], "feature user, row 1: length -1 is negative"),
        ([[1, 1, 1, 1], [1, 1, 1, 2]], "lengths add up to 9 ids and values holds 8"),
    ],
)
@pytest.mark.parametrize("context", [None, Context({"shop": [3]})])
def test_bags_that_do_not_fit_are_refused_by_name_in_whatever_order_columns_come(lengths, message, context):
    names = ["shop", "tags", "item", "user"]
    values = [1] * 8
    if context is not None:
        names, lengths, values = names[1:], [row[1:] for row in lengths], values[2:]
        message = message.replace("9 ids", "7 ids").replace("holds 8", "holds 6")
    body = build_request(np.zeros((2, 3)), values, lengths, feature_names=names, context=context)
    with pytest.raises(InvalidRequest, match=message):
        decode(body)


def test_columns_beside_a_context_may_come_in_any_order():
    body = build_request(
        np.zeros((2, 3)), [[3, 1, 2], [6, 4, 5]], feature_names=["shop", "item", "tags"], context=Context({"user": [9]})
    )
    assert rows_of(decode(body)) == [[[9], [1], [2], [3]], [[9], [4], [5], [6]]]


@pytest.mark.parametrize("context", [None, Context({"shop": [3]})])
def test_names_say_how_many_columns_there_are_where_nothing_else_does(context):
    names = NAMES if context is None else NAMES[:3]
    body = build_request(GOOD["dense"], [[1] * len(names)] * 2, feature_names=names, context=context)
    message = narsil_pb2.PredictRequest.FromString(body)
    message.sparse.ClearField("num_features")
    assert rows_of(decode(message.SerializeToString())) == rows_of(decode(body))


@pytest.mark.parametrize("lengths", [None, [[1] * 4] * 2])
def test_a_request_holds_as_many_ids_as_it_may_and_no_more(lengths):
    body = build_request(GOOD["dense"], np.ravel(GOOD["ids"]) if lengths else GOOD["ids"], lengths)
    assert decode(body, limits=RequestLimits(max_ids=8)).ids == 8
    with pytest.raises(InvalidRequest, match=r"holds 8 ids in all; the limit is 7 \(--max-request-ids\)"):
        decode(body, limits=RequestLimits(max_ids=7))


def test_of_many_features_an_error_names_a_few():
    wide = ModelSchema(3, tuple(Feature(f"f{n}", f"t{n}", 10, 8) for n in range(7)))
    narrow = ModelSchema(3, wide.features[:6])
    with pytest.raises(InvalidRequest, match=r"takes 7 here \(f0, f1, f2 \.\. f6\)"):
        decode(build_request(**GOOD), wide)
    with pytest.raises(InvalidRequest, match=r"takes 6 here \(f0, f1, f2, f3, f4, f5\)"):
        decode(build_request(**GOOD), narrow)


COLUMNS = {
    "packed": b"\x0a\x03\x00\x01\x02",
    "one by one": b"\x08\x00\x08\x01\x08\x02",
    "in as many bytes as a number may have": b"\x0a\x1e"
    + b"".join(bytes([0x80 | n]) + b"\x80" * 8 + b"\0" for n in range(3)),
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS.keys())
def test_a_context_s_columns_are_read_however_protobuf_may_write_them(columns):
    dense = np.array([1, 2, 3], np.float32)
    context = columns + put_len(2, dense.tobytes())
    assert narsil_pb2.Context.FromString(context).dense_columns == [0, 1, 2]
    body = build_request(np.zeros((2, 0)), GOOD["ids"]) + put_len(7, context)
    np.testing.assert_array_equal(decode(body).dense, [dense, dense])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (b"\x08\x01", "model_name has protobuf wire type 0, expected 2"),
        (b"\x10\x01", "model_version has protobuf wire type 0, expected 2"),
        (b"\x18\x01", "request_id has protobuf wire type 0, expected 2"),
        (b"\x22\x00", "batch_size has protobuf wire type 2, expected 0"),
        (b"\x28\x01", "dense has protobuf wire type 0, expected 2"),
        (b"\x30\x01", "sparse has protobuf wire type 0, expected 2"),
        (b"\x38\x01", "context has protobuf wire type 0, expected 2"),
        (b"\x32\x02\x0a\x00", "sparse.num_features has protobuf wire type 2, expected 0"),
        (b"\x32\x02\x10\x01", "sparse.feature_names has protobuf wire type 0, expected 2"),
        (b"\x32\x02\x1a\x00", "sparse.id_type has protobuf wire type 2, expected 0"),
        (b"\x32\x02\x20\x01", "sparse field 4 has protobuf wire type 0, expected 2"),
        (b"\x32\x02\x28\x01", "sparse field 5 has protobuf wire type 0, expected 2"),
        (b"\x32\x02\x30\x01", "sparse field 6 has protobuf wire type 0, expected 2"),
        (b"\x3a\x05\x0d\x00\x00\x00\x00", "context.dense_columns has protobuf wire type 5, expected 2"),
        (b"\x3a\x02\x10\x01", "context.dense has protobuf wire type 0, expected 2"),
    ],
)
def test_a_field_of_another_wire_type_is_named(field, message):
    with pytest.raises(InvalidRequest, match=message):
        decode(build_request(**GOOD) + field)


def test_a_small_message_cannot_claim_a_large_expansion():
    ids = list(range(50))
    body = build_request(
        np.zeros((900, 0)),
        np.empty((0, 0), int),
        context=Context({n: ids if n == "tags" else [] for n in NAMES}, [0, 1, 2], [0] * 3),
    )
    assert decode(body).rows == 900
    with pytest.raises(InvalidRequest, match="holds 45000 ids in all; the limit is 44999"):
        decode(body, limits=RequestLimits(max_ids=44_999))


def test_empty_bags_and_shared_columns_count_towards_what_a_context_expands_to():
    nothing = Context({name: [] for name in NAMES}, [0, 1, 2], [0] * 3)
    body = build_request(np.zeros((1000, 0)), np.empty((0, 0), int), context=nothing)
    assert decode(body, limits=RequestLimits(max_rows=1000, max_ids=7000)).rows == 1000
    with pytest.raises(InvalidRequest, match="holds 7000 ids in all; the limit is 6999"):
        decode(body, limits=RequestLimits(max_rows=1000, max_ids=6999))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_damage_is_either_refused_or_leaves_every_id_inside_its_table(data):
    bodies = [
        build_request(**GOOD),
        body_of(np.zeros((3, 3)), rows_of(jagged(3, 1)), feature_names=["shop", "tags", "item", "user"][::-1]),
        body_of(np.zeros((2, 3)), [[[1], [], [5, 6]]] * 2, context=Context({"user": [1, 2]})),
    ]
    body = bytearray(data.draw(st.sampled_from(bodies)))
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        features = decode(bytes(body))
    except InvalidRequest:
        return
    batch = Collator(SCHEMA).collate([features])
    assert batch.lengths.min() >= 0
    assert batch.lengths.sum() == len(batch.values)
    limits = np.repeat(np.repeat(SCHEMA.rows, batch.rows), batch.lengths)
    assert ((batch.values >= 0) & (batch.values < limits)).all()


@pytest.mark.parametrize("request_id", ["r-7", ""])
def test_a_response_carries_scores_names_and_provenance(request_id):
    asked = narsil_v1.read(build_request(**GOOD, request_id=request_id))
    scores = {
        "click": np.array([0.25, 0.5], np.float32),
        "which of 3": np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], np.float32),
        "点击": np.array([0.1, 0.2], np.float32),
    }
    body = narsil_v1.encode(asked.request_id, "dlrm", "3", scores, StageTimes(1.25, 0.0, 2.5, 2, 17))
    prediction = read_response(body)
    assert {task: values.tolist() for task, values in prediction.scores.items()} == {
        task: values.tolist() for task, values in scores.items()
    }
    assert (prediction.model_name, prediction.model_version, prediction.request_id) == ("dlrm", "3", request_id)
    assert (prediction.batch_requests, prediction.batch_rows) == (2, 17)
    assert (prediction.queue_us, prediction.execute_us) == (1_250_000, 2_500_000)
    assert narsil_pb2.PredictResponse.FromString(body).SerializeToString() == body


def test_a_model_is_asked_for_by_name():
    asked = narsil_pb2.GetModelRequest(model_name="dlrm").SerializeToString()
    assert narsil_v1.decode_get_model(asked) == "dlrm"
    assert narsil_v1.decode_get_model(b"") == ""  # the default one
    assert narsil_v1.decode_get_model(asked + b"\x12\x03new") == "dlrm"  # a field of later versions
    with pytest.raises(InvalidRequest, match="model_name has protobuf wire type 0, expected 2"):
        narsil_v1.decode_get_model(b"\x08\x01")
    with pytest.raises(InvalidRequest, match="model_name is not UTF-8"):
        narsil_v1.decode_get_model(b"\x0a\x01\xff")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("widths", [(1, 1), (1, 200)])
def test_a_schema_survives_the_wire(widths, whole):
    schema = replace(WEIGHTED, tasks=("click", "点击率 (7d)"), widths=widths)
    limits = RequestLimits(1000, 1 << 31, 16 << 20)
    body = narsil_v1.encode_model("dlrm", "3", "torch", schema, limits, whole=whole)
    info = read_model(body)
    assert (info.name, info.version, info.backend, info.schema) == ("dlrm", "3", "torch", schema)
    assert (info.limits, info.whole_requests) == (limits, whole)
    assert narsil_pb2.Model.FromString(body).SerializeToString() == body
