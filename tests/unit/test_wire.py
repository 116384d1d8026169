"""The hand-written protobuf reader and writer, held against the protobuf runtime and against hostile bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from narsil.errors import InvalidRequest
from narsil.wire import FIXED32, FIXED64, LEN, VARINT, put_len, put_uint, put_varint, scan, signed32, text, varint
from tests.messages import narsil_pb2


@given(st.integers(0, 2**64 - 1))
def test_a_varint_reads_back_as_it_was_written(value):
    data = put_varint(value)
    assert varint(data, 0, len(data)) == (value, len(data))


@given(st.integers(-(2**31), 2**31 - 1))
def test_a_negative_int32_is_read_from_its_ten_bytes(value):
    assert signed32(value & (2**64 - 1)) == value


@given(st.integers(0, 2**32 - 1), st.text(max_size=300), st.binary(max_size=300))
def test_fields_are_written_as_the_protobuf_runtime_writes_them(number, name, payload):
    ours = put_len(1, name.encode()) * bool(name) + put_uint(4, number) + put_len(5, payload) * bool(payload)
    assert narsil_pb2.PredictRequest(model_name=name, batch_size=number, dense=payload).SerializeToString() == ours


@given(st.binary(max_size=200))
@example(b"\x0a")
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x00")
@example(b"\x0b\x0c")
def test_any_bytes_are_either_fields_inside_their_bounds_or_refused(data):
    try:
        fields = scan(data, 0, len(data))
    except InvalidRequest:
        return
    for number, kind, start, stop in fields:
        assert 0 < number < 2**29
        if kind == LEN:
            assert 0 <= start <= stop <= len(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05abc", "field 1 claims 5 bytes and 3 are left"),
        (b"\x08", "a varint does not end"),
        (b"\x08" + b"\xff" * 11, "a varint does not end"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "a varint does not end"),  # not within ten bytes
        (b"\x0d\x00\x00", "field 1 is cut off"),
        (b"\x0b", "field 1 has wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\x80\x80\x80\x80\x10\x00", f"field number {2**29}"),
    ],
)
def test_what_is_no_message_is_named_with_its_place(data, message):
    with pytest.raises(InvalidRequest, match=f"not a valid protobuf message: at byte \\d+: {message}"):
        scan(data, 0, len(data))


def test_a_string_that_is_not_utf8_is_named():
    with pytest.raises(InvalidRequest, match="request_id is not UTF-8"):
        text(b"\xff\xfe", 0, 2, "request_id")


def test_a_message_of_nothing_but_fields_is_refused_before_it_costs_anything():
    with pytest.raises(InvalidRequest, match="more than 10000 fields"):
        scan(b"\x7a\x00" * 1_000_000, 0, 2_000_000)


def test_every_wire_type_is_stepped_over_to_the_field_after_it():
    data = (
        b"\x08\x96\x01" + b"\x15abcd" + b"\x19abcdefgh" + b"\x22\x03xyz" + b"\x80\x01\x05" + b"\xf8\xff\xff\xff\x0f\x07"
    )
    assert scan(data, 0, len(data)) == [
        (1, VARINT, 150, 0),
        (2, FIXED32, 4, 8),
        (3, FIXED64, 9, 17),
        (4, LEN, 19, 22),
        (16, VARINT, 5, 0),  # the first number whose key takes two bytes
        (2**29 - 1, VARINT, 7, 0),
    ]
    assert scan(data, 3, 8) == [(2, FIXED32, 4, 8)]
    for stop in (7, 16, 21):  # inside a fixed32, a fixed64 and a payload
        with pytest.raises(InvalidRequest):
            scan(data, 0, stop)
