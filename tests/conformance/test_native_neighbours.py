"""One caller's fault costs that caller's call. Whoever shares its connection, as behind a proxy, is served."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from narsil.backends.fake import FakeBehaviour
from narsil.bench.workload import predictor_body
from narsil.extension import AVAILABLE
from tests.conformance.http2_client import CONTINUATION, RawClient, connected, frame, request_headers
from tests.conformance.serving import native_transport, predict_torchrec, scores_in
from tests.http2_peer import CANCEL, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, RST_STREAM, grpc_message
from tests.http2_peer import hpack as literals
from tests.support import PATIENCE_S, engine_with, one_hot, scores_alone, wait_until

if not AVAILABLE:
    pytest.skip("built without the native extension", allow_module_level=True)

RESOURCE_EXHAUSTED, UNAVAILABLE = 8, 14
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
MESSAGE = predictor_body(one_hot(3))


@contextmanager
def one_running(**limits: float) -> Iterator[tuple[str, RawClient, Callable[[], None], Callable[[], dict[str, int]]]]:
    """(address, client with one call that runs, a function that lets it end and expects its answer, statistics)."""
    behaviour = FakeBehaviour(hold=threading.Event())
    with (
        engine_with(behaviour) as engine,
        native_transport(engine, limits=limits) as (transport, address),
        connected(address) as client,
    ):
        stream = client.call(MESSAGE)
        wait_until(lambda: behaviour.forwards == [3])

        def expect_answered() -> None:
            behaviour.hold.set()
            answer = client.answer(stream)
            assert answer.status == 0
            np.testing.assert_array_equal(scores_in(answer.messages[0]), scores_alone(one_hot(3)))

        try:
            yield address, client, expect_answered, transport.statistics
        finally:
            behaviour.hold.set()


def string(text: str) -> bytes:
    """As HPACK writes it, without Huffman's code."""
    return literals([("", text)])[2:]


def field(name: str, value: str, kind: int = 0x00) -> bytes:
    """A field in full: not to be put into the table (0x00), to be put there (0x40), or never (0x10)."""
    return bytes([kind]) + string(name) + string(value)


def block_frames(stream: int, block: bytes, piece: int, flags: int = 0) -> bytes:
    pieces = [block[at : at + piece] for at in range(0, len(block), piece)]
    out = b""
    for number, part in enumerate(pieces):
        last = END_HEADERS if number == len(pieces) - 1 else 0
        out += frame(CONTINUATION, last, stream, part) if number else frame(HEADERS, flags | last, stream, part)
    return out


def call_with(client: RawClient, fields: bytes, piece: int = 1 << 20) -> int:
    stream = client.next_stream()
    client.send(block_frames(stream, literals(request_headers()) + fields, piece))
    client.frame(DATA, END_STREAM, stream, grpc_message(MESSAGE))
    return stream


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))


# --- metadata


@pytest.mark.parametrize("piece", [1_000_000, 16_384], ids=["few frames", "frames of 16 KB"])
@pytest.mark.parametrize("kind", [0x00, 0x10, 0x40], ids=["plain", "never indexed", "indexed"])
@pytest.mark.parametrize("size", [17_000, 65_535, 65_536, 65_537, 300_000, 900_000])
def test_a_value_of_any_size_is_refused_with_its_size_and_nobody_else_is(size, kind, piece):
    with one_running() as (_, client, expect_answered, _):
        answer = client.answer(call_with(client, field("x-large", "v" * size, kind), piece))
        whole = size + len("x-large") + 32 + sum(len(n) + len(v) + 32 for n, v in request_headers())
        assert (answer.status, answer.detail) == (
            RESOURCE_EXHAUSTED,
            f"the call's metadata has {whole} bytes; the limit is 16384 (--max-metadata-bytes)",
        )
        expect_answered()
        assert client.ask(MESSAGE).status == 0


@pytest.mark.parametrize(
    "fields",
    [
        b"".join(field(f"x{number}", "v" * 100) for number in range(1500)),
        b"".join(field(f"x{number}", "v" * 4_000, 0x40) for number in range(40)),
        b"".join(field(f"x{number}", "v" * 60_000, 0x40) for number in range(30)),
        field("n" * 100_000, "v"),
        field("n" * 100_000, "v" * 100_000, 0x40),
    ],
    ids=["many small", "many", "many large", "name", "name and value"],
)
def test_metadata_of_any_shape_is_refused_and_nobody_else_is(fields):
    with one_running() as (_, client, expect_answered, _):
        assert client.answer(call_with(client, fields, 16_384)).status == RESOURCE_EXHAUSTED
        expect_answered()
        assert client.ask(MESSAGE).status == 0


def test_metadata_within_the_limit_is_taken_in_any_frames():
    with one_running(max_metadata=1 << 20) as (_, client, expect_answered, _):
        expect_answered()
        for size in (0, 17_000, 200_000, 1_000_000):
            for piece in (1 << 20, 16_384, 10_000):
                assert client.answer(call_with(client, field("x-large", "v" * size), piece)).status == 0


def test_large_metadata_of_what_is_no_grpc_is_431():
    with one_running() as (_, client, expect_answered, _):
        stream = client.next_stream()
        client.headers(stream, request_headers(kind="text/plain", extra=[("x", "y" * 17_000)]), end=True)
        assert client.answer(stream).headers[":status"] == "431"
        expect_answered()


def test_trailers_of_any_size_say_nothing():
    with one_running() as (_, client, expect_answered, _):
        stream = client.next_stream()
        client.headers(stream, request_headers())
        client.frame(DATA, 0, stream, grpc_message(MESSAGE))
        client.send(block_frames(stream, field("x-large", "v" * 100_000, 0x40), 16_384, END_STREAM))
        expect_answered()
        assert client.answer(stream).status == 0


def test_a_real_client_learns_the_sizes_and_keeps_its_connection():
    behaviour = FakeBehaviour(hold=threading.Event())
    with (
        engine_with(behaviour) as engine,
        native_transport(engine) as (transport, address),
        grpc.insecure_channel(address) as channel,
    ):
        call = channel.unary_unary("/predictor.Predictor/Predict")
        running = call.future(MESSAGE, timeout=PATIENCE_S)
        wait_until(lambda: behaviour.forwards == [3])
        try:
            for size in (17_000, 65_000, 70_000, 1_000_000):
                with pytest.raises(grpc.RpcError) as caught:
                    call(MESSAGE, timeout=PATIENCE_S, metadata=(("x-large", "v" * size),))
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "the limit is 16384" in caught.value.details()
        finally:
            behaviour.hold.set()
        np.testing.assert_array_equal(scores_in(running.result()), scores_alone(one_hot(3)))
        assert len(predict_torchrec(channel, one_hot(1))) == 1
        assert transport.statistics()["connections"] == 1


def test_padding_and_priorities_of_a_block_in_pieces_are_left_out():
    with one_running() as (_, client, expect_answered, _):
        expect_answered()
        block = literals(request_headers()) + field("x-large", "v" * 9_000)
        for flags, before, behind in ((0x8, b"\x07", bytes(7)), (0x20, bytes(5), b""), (0x28, b"\x00" + bytes(5), b"")):
            stream = client.next_stream()
            client.frame(HEADERS, flags, stream, before + block[:50] + behind)
            client.frame(CONTINUATION, 0, stream, b"")
            client.frame(CONTINUATION, END_HEADERS, stream, block[50:])
            client.frame(DATA, END_STREAM, stream, grpc_message(MESSAGE))
            assert client.answer(stream).status == 0


@pytest.mark.parametrize(
    "data",
    [
        frame(HEADERS, 0, 3, literals(request_headers())) + frame(DATA, 0, 1, b""),
        frame(HEADERS, 0, 3, literals(request_headers())) + frame(CONTINUATION, END_HEADERS, 5, b""),
        frame(HEADERS, 0x8, 3, b"\x09" + bytes(5)),
        frame(HEADERS, 0x20, 3, bytes(4)),
        frame(HEADERS, 0, 3, b"\x00\x05") + frame(CONTINUATION, END_HEADERS, 3, b""),
        frame(HEADERS, 0, 3, b"\x00\x7f\xff\xff\xff\xff\xff\xff"),
        frame(CONTINUATION, END_HEADERS, 3, b""),
    ],
    ids=["another frame", "another stream", "padding", "priority", "cut off", "endless number", "continues nothing"],
)
def test_a_block_that_breaks_http2_ends_its_connection(data):
    with one_running() as (address, _, expect_answered, _), connected(address) as client:
        client.send(data)
        assert client.until_closed().goaway is not None
        expect_answered()


# --- resets


def test_a_client_whose_calls_have_been_reset_often_is_refused_calls_until_it_has_rested():
    with one_running(max_resets_per_second=2, max_streams=50) as (_, client, expect_answered, statistics):
        head = literals(request_headers())
        for _ in range(12):
            stream = client.next_stream()
            client.send(frame(HEADERS, END_HEADERS, stream, head) + reset(stream))
        answer = client.ask(MESSAGE)
        assert (answer.status, "--max-resets-per-second" in answer.detail) == (RESOURCE_EXHAUSTED, True)
        assert client.ask(b"", CHECK).status == 0
        expect_answered()
        wait_until(lambda: client.ask(MESSAGE).status == 0)
        assert client.goaway is None
        assert statistics()["reset_floods"] == 0


def test_one_that_goes_on_is_told_to_go_and_what_runs_is_answered_first():
    with one_running(max_resets_per_second=2, max_streams=20) as (_, client, expect_answered, statistics):
        watch = client.call(b"", WATCH)
        head = literals(request_headers())
        for _ in range(100):
            stream = client.next_stream()
            client.send(frame(HEADERS, END_HEADERS, stream, head) + reset(stream))
        wait_until(lambda: statistics()["reset_floods"] == 1)
        late = client.call(MESSAGE)
        expect_answered()
        client.until_closed()
        assert client.goaway[1] == ENHANCE_YOUR_CALM
        assert client.goaway[0] < late
        assert client.answers[watch].status == UNAVAILABLE


def test_what_runs_on_a_connection_that_has_to_go_has_its_time():
    with one_running(max_resets_per_second=2, max_streams=2, drain_s=0.2) as (_, client, _, statistics):
        head = literals(request_headers())
        for _ in range(30):
            stream = client.next_stream()
            client.send(frame(HEADERS, END_HEADERS, stream, head) + reset(stream))
        client.until_closed()  # though the call still runs
        assert statistics()["connections_timed_out"] == 1


# --- header blocks without end


@pytest.mark.parametrize(
    "pieces",
    [[b""] * 200, [field("x", "y" * 3_000, 0x40) * 5] * 40, [b"\xbe" * 16_000] * 40],
    ids=["of empty frames", "of fields", "of fields by number"],
)
def test_a_block_without_end_is_given_up_and_what_runs_is_answered_first(pieces):
    with one_running() as (_, client, expect_answered, statistics):
        stream = client.next_stream()
        client.frame(HEADERS, 0, stream, literals(request_headers()) + field("x", "y", 0x40))
        for piece in pieces:
            client.frame(CONTINUATION, 0, stream, piece)
        wait_until(lambda: statistics()["header_floods"] == 1)
        client.frame(CONTINUATION, END_HEADERS, stream, b"")
        client.frame(DATA, END_STREAM, stream, grpc_message(MESSAGE))
        client.call(MESSAGE)
        client.ping()
        expect_answered()
        client.until_closed()
        assert client.goaway == (1, ENHANCE_YOUR_CALM)
        assert statistics()["header_floods"] == 1


def test_a_block_that_is_half_there_counts_against_the_plane_s_memory():
    with one_running(max_buffered=100_000) as (address, client, expect_answered, statistics):
        with connected(address) as other:
            other.frame(HEADERS, 0, 1, field("x", "y" * 60_000))
            wait_until(lambda: 60_000 < statistics()["buffered"] < 61_000)
        wait_until(lambda: statistics()["buffered"] == 0)
        client.frame(HEADERS, 0, 3, field("x", "y" * 60_000))
        client.frame(CONTINUATION, 0, 3, field("x", "y" * 60_000))
        wait_until(lambda: statistics()["header_floods"] == 1)
        assert statistics()["buffered"] == 0
        expect_answered()
        assert client.until_closed().goaway == (1, ENHANCE_YOUR_CALM)
