"""Header blocks of any size and in any pieces, as a real encoder writes them: what is left out of them costs both ends'
tables nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hpack import Encoder, NeverIndexedHeaderTuple
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narsil.extension import AVAILABLE

if not AVAILABLE:
    pytest.skip("built without the native extension", allow_module_level=True)

from narsil._native import Call, Plane
from tests.conformance.http2_client import CONTINUATION, RawClient, frame, request_headers
from tests.http2_peer import DATA, END_HEADERS, END_STREAM, HEADERS, grpc_message, hpack
from tests.unit.test_native_plane import next_call

ASK = "/a.A/Ask"
SIZES = [0, 1, 126, 127, 128, 255, 4_000, 4_096, 5_000, 65_535, 65_536, 65_537, 70_000, 140_000]

fields = st.tuples(st.sampled_from("abcd"), st.sampled_from(SIZES), st.sampled_from("v~"), st.booleans())
blocks = st.tuples(
    st.lists(fields, max_size=3),
    st.text("xyz", min_size=1, max_size=20),  # the model that the call names
    st.booleans(),  # Huffman's code
    st.sampled_from([7, 1_000, 16_384, 70_000, 1 << 20]),  # bytes of a frame, as far as 100 of them do
)


class Caller:
    """A connection whose header blocks come from an encoder with a table of its own."""

    def __init__(self, plane: Plane, path: str) -> None:
        self.plane = plane
        self.client = RawClient(f"unix:{path}")
        self.encoder = Encoder()
        plane.poll(0)
        while not self.client.settings:  # until they are acknowledged, no frame may be larger than 16 KiB
            self.client.read()

    def call(self, block: bytes, piece: int = 1 << 20, sent_in: int = 50_000) -> tuple[int, Call]:
        """The stream, and the call as the plane hands it out."""
        stream = self.client.next_stream()
        piece = max(piece, len(block) // 100 + 1)
        parts = [block[at : at + piece] for at in range(0, len(block), piece)]
        data = b""
        for number, part in enumerate(parts):
            last = END_HEADERS if number == len(parts) - 1 else 0
            data += frame(CONTINUATION if number else HEADERS, last, stream, part)
        data += frame(DATA, END_STREAM, stream, grpc_message(b"m"))
        calls: list[Call] = []
        for at in range(0, len(data), sent_in):
            self.client.send(data[at : at + sent_in])
            calls += self.plane.poll(0)[0]
        return stream, calls[0] if calls else next_call(self.plane)


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def plane(path) -> Iterator[Plane]:
    made = Plane({ASK: "unary"}, {"max_metadata": 1 << 20})
    made.listen_unix(path)
    yield made
    made.stop(0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(blocks, min_size=1, max_size=4), sent_in=st.sampled_from([4_999, 50_000]))
def test_every_call_is_understood_after_any_others(plane, path, calls, sent_in):
    caller = Caller(plane, path)
    with caller.client as client:
        for large, model, huffman, piece in calls:
            extra = [
                NeverIndexedHeaderTuple(f"x-{name}", letter * size) if never else (f"x-{name}", letter * size)
                for name, size, letter, never in large
            ]
            headers = [*request_headers(ASK), *extra, ("narsil-model", model)]
            stream, call = caller.call(caller.encoder.encode(headers, huffman=huffman), piece, sent_in)
            assert call.model_name == model
            call.answer(b"")
            plane.flush()
            assert client.answer(stream).status == 0


def test_a_table_that_a_long_value_has_emptied_is_empty(plane, path):
    """By RFC 7541, 4.4: a field larger than the table leaves nothing in it, as the fields of later calls show."""
    caller = Caller(plane, path)
    base = hpack(request_headers(ASK))
    named = b"\x40" + hpack([("narsil-model", "m")])[1:]  # and put into the table
    large = b"\x40" + hpack([("x", "v" * 70_000)])[1:]
    newest, older = b"\xbe", b"\xbf"
    with caller.client as client:
        for fields in (named, newest, large + named, newest):
            assert caller.call(base + fields)[1].model_name == "m"
        client.frame(HEADERS, END_HEADERS | END_STREAM, client.next_stream(), base + older)
        plane.poll(0.05)
        assert client.until_closed().goaway is not None
