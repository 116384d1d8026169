"""TorchRec's wire does not say how wide ids and lengths are, nor need it say how many rows there are: its bytes do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import OneHot
from narsil.engine.collate import Collator
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports.codec import predictor
from tests.messages import Message, predictor_pb2
from tests.support import SCHEMA, jagged, one_hot
from tests.unit.test_codec_predictor import LIMITS, assign, decode, plain, same

ONE_FEATURE = replace(SCHEMA, dense_dim=0, features=SCHEMA.features[:1])
NO_DENSE = replace(SCHEMA, dense_dim=0)


def widen(message: Message, *fields: str) -> Message:
    """The message with these fields of its ids as int64."""
    for field in fields:
        narrow = np.frombuffer(getattr(message.id_list_features, field), np.int32)
        setattr(message.id_list_features, field, narrow.astype(np.int64).tobytes())
    return message


def ids_of(message: Message, ids: list[int], kind: str) -> Message:
    """The message with these ids."""
    message.id_list_features.values = np.array(ids, kind).tobytes()
    return message


@pytest.mark.parametrize("fields", [("values",), ("lengths",), ("values", "lengths")])
@pytest.mark.parametrize("make", [one_hot, jagged])
@pytest.mark.parametrize("says_rows", [True, False])
def test_ids_and_lengths_may_be_int64_and_batch_size_left_out(make, fields, says_rows):
    message = widen(plain(make), *fields)
    message.batch_size = 4 if says_rows else 0
    same(decode(message), decode(plain(make)))


def test_int64_ids_are_views_of_the_message_too():
    found = decode(widen(plain(one_hot), "values"))
    assert isinstance(found.sparse, OneHot)
    assert found.sparse.ids.dtype == np.int64
    assert not found.sparse.ids.flags.owndata


@pytest.mark.parametrize("outside", [-1, -(1 << 40), 1 << 31, 1 << 32, (1 << 32) + 5, 1 << 62])
def test_an_int64_id_is_held_against_its_table_as_it_is(outside):
    """Their low 32 bits would be ids that the table has, or negative ones."""
    message = plain(one_hot)
    ids = np.frombuffer(message.id_list_features.values, np.int32).tolist()
    ids[4 * 2 + 1] = outside
    with pytest.raises(InvalidRequest, match=f"feature tags, row 1: id {outside} is outside its table t_tags"):
        decode(ids_of(message, ids, "<i8"))


@pytest.mark.parametrize(
    ("outside", "wrong"), [(-1, "negative"), (-(1 << 32), "negative"), ((1 << 32) + 1, "no int32")]
)
def test_an_int64_length_is_checked_before_it_is_narrowed(outside, wrong):
    message = widen(plain(one_hot), "lengths")
    lengths = np.frombuffer(message.id_list_features.lengths, np.int64).copy()
    lengths[4 * 1 + 2] = outside
    message.id_list_features.lengths = lengths.tobytes()
    with pytest.raises(InvalidRequest, match=f"feature item, row 2: length {outside} is {wrong}"):
        decode(message)


def test_the_declared_width_counts_where_both_would_do():
    """Without ids both widths hold as many: none."""
    message = plain(one_hot)
    message.id_list_features.lengths, message.id_list_features.values = bytes(64), b""
    assert decode(message).ids == 0
    message.id_list_features.lengths = bytes(128)
    assert decode(message).ids == 0


def test_int64_ids_beyond_int32_are_read_for_tables_that_have_them():
    vast = replace(SCHEMA, features=(replace(SCHEMA.features[0], rows=1 << 40), *SCHEMA.features[1:]))
    message = plain(one_hot)
    ids = np.frombuffer(message.id_list_features.values, np.int32).tolist()
    ids[3] = (1 << 40) - 1
    body = ids_of(message, ids, "<i8").SerializeToString()
    found = predictor.decode(body, vast, LIMITS).sparse
    assert isinstance(found, OneHot)
    assert found.ids.ravel().tolist() == ids


def without_dense(lengths: list[int], ids: list[int], kind: str, rows: int = 0) -> bytes:
    message = predictor_pb2.PredictionRequest(batch_size=rows)
    message.id_list_features.num_features = 4
    message.id_list_features.lengths = np.array(lengths, kind).tobytes()
    message.id_list_features.values = np.array(ids, np.int32).tobytes()
    return message.SerializeToString()


def test_without_dense_columns_the_lengths_tell_the_rows():
    one_row = without_dense([1, 2, 0, 1], [3, 4, 5, 6], "<i4")
    assert predictor.decode(one_row, NO_DENSE, LIMITS).rows == 1
    two_rows = without_dense([1, 2, 0, 1, 0, 0, 0, 0], [3, 4, 5, 6], "<i4")  # as int64, 1 + (2 << 32) and so on
    assert predictor.decode(two_rows, NO_DENSE, LIMITS).rows == 2
    wide = without_dense([1] * 12, [0] * 12, "<i8", rows=3)
    assert predictor.decode(wide, NO_DENSE, LIMITS).rows == 3


def test_lengths_that_may_be_of_two_numbers_of_rows_are_refused_with_the_way_out():
    wide = without_dense([1, 2, 0, 1], [3, 4, 5, 6], "<i8")  # or int32 of two rows, of which the second is empty
    with pytest.raises(InvalidRequest, match=r"32 bytes may be int32 of 2 rows or int64 of 1; send batch_size"):
        predictor.decode(wide, NO_DENSE, LIMITS)
    for rows in (1, 2):
        said = wide + predictor_pb2.PredictionRequest(batch_size=rows).SerializeToString()
        assert predictor.decode(said, NO_DENSE, LIMITS).rows == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            assign("float_features.values", bytes(40)),
            "float_features.values: 40 bytes are no whole number of rows of 12",
        ),
        (assign("float_features.values", b""), "0 bytes are no whole number of rows of 12 bytes; send batch_size"),
        (assign("float_features.values", bytes(12012)), "as float_features.values has it, it is 1001; it must be 1 to"),
        (assign("float_features.values", bytes(36)), "lengths: 64 bytes for 4 features x 3 rows; expected 48"),
        (assign("float_features.values", bytes(24)), "is no int32"),  # rows that int64 lengths could be of
        (assign("float_features.num_features", 4), "float_features.num_features is 4; the model takes 3"),
    ],
)
def test_rows_that_the_bytes_do_not_tell_are_refused(change, message):
    request = plain(one_hot)
    request.batch_size = 0
    decode(request)
    change(request)
    with pytest.raises(InvalidRequest, match=message):
        decode(request)


def read_plainly(message: Message, schema: ModelSchema) -> tuple[int, list[list[int]]] | None:
    """(B, T * B bags) by trying out every way in which the bytes could be meant; None where there is not just one B.

    Of ways that give the same rows the declared one, int32, is taken.
    """
    sparse, features = message.id_list_features, schema.num_features

    def ways() -> Iterator[tuple[int, list[list[int]]]]:
        for length_type, id_type in ((a, b) for a in ("<i4", "<i8") for b in ("<i4", "<i8")):
            try:
                lengths, ids = (
                    np.frombuffer(sparse.lengths, length_type),
                    np.frombuffer(sparse.values, id_type).tolist(),
                )
            except ValueError:
                continue  # no whole number of them
            rows = len(lengths) // features
            dense_rows = rows if not schema.dense_dim else len(message.float_features.values) / (4 * schema.dense_dim)
            right = len(lengths) == features * rows and rows == dense_rows and (message.batch_size or rows) == rows
            if rows and right and min(lengths.tolist()) >= 0 and sum(lengths.tolist()) == len(ids):
                each = iter(ids)
                yield rows, [[next(each) for _ in range(length)] for length in lengths.tolist()]

    found = list(ways())
    if len({rows for rows, _ in found}) != 1:
        return None
    rows, bags = found[0]
    dense = np.frombuffer(message.float_features.values, "<f4")
    inside = all(0 <= id < schema.features[bag // rows].rows for bag, ids in enumerate(bags) for id in ids)
    return (rows, bags) if inside and np.isfinite(dense).all() else None


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_every_message_is_read_as_a_plain_reading_of_its_bytes_has_it(data):
    schema = data.draw(st.sampled_from([SCHEMA, NO_DENSE, ONE_FEATURE]))
    rows = data.draw(st.integers(1, 4))
    counts = data.draw(st.lists(st.integers(0, 2), min_size=schema.num_features * rows, max_size=4 * rows + 4))
    counts = counts[: schema.num_features * rows]
    some_id = st.integers(0, 6) | st.sampled_from([-1, 1 << 31, 1 << 32, -(1 << 32)])
    ids = [data.draw(some_id if data.draw(st.integers(0, 40)) == 0 else st.integers(0, 2)) for _ in range(sum(counts))]
    message = predictor_pb2.PredictionRequest(batch_size=data.draw(st.sampled_from([rows, 0, 0, 2 * rows])))
    message.float_features.num_features = schema.dense_dim
    message.float_features.values = bytes(4 * rows * schema.dense_dim)
    message.id_list_features.num_features = schema.num_features
    widths = st.sampled_from(["<i4", "<i8"])
    message.id_list_features.lengths = np.array(counts, data.draw(widths)).tobytes()
    message.id_list_features.values = np.array(ids, np.int64).astype(data.draw(widths)).tobytes()
    for field in ("lengths", "values"):
        if data.draw(st.integers(0, 5)) == 0:
            odd = bytearray(getattr(message.id_list_features, field))
            if odd and data.draw(st.booleans()):
                odd[data.draw(st.integers(0, len(odd) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            else:
                odd = odd[: -data.draw(st.sampled_from([1, 4, 8]))]
            setattr(message.id_list_features, field, bytes(odd))
    expected = read_plainly(message, schema)
    try:
        found = predictor.decode(message.SerializeToString(), schema, LIMITS)
    except InvalidRequest:
        assert expected is None
        return
    batch = Collator(schema).collate([found])
    bags = [bag.tolist() for bag in np.split(batch.values, np.cumsum(batch.lengths)[:-1])]
    assert (batch.rows, bags) == expected


def test_more_ids_than_a_request_may_hold_are_refused():
    held = decode(plain(jagged)).ids
    for message in (plain(jagged), widen(plain(jagged), "values")):
        with pytest.raises(InvalidRequest, match=rf"holds {held} ids in all; the limit is 3 \(--max-request-ids\)"):
            predictor.decode(message.SerializeToString(), SCHEMA, RequestLimits(max_ids=3))


def test_int64_ids_count_once_each():
    request = widen(plain(one_hot), "values")
    assert predictor.decode(request.SerializeToString(), SCHEMA, RequestLimits(max_ids=16)).ids == 16
