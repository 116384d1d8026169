"""HTTP/2 as no library writes it, over both transports: what is odd but right is served; what breaks harms nobody."""

from __future__ import annotations

import socket
import struct
import threading

import grpc
import numpy as np
import pytest

from narsil.backends.fake import FakeBehaviour
from narsil.bench.workload import predictor_body
from narsil.errors import InvalidRequest
from narsil.transports.codec import narsil_v1, predictor
from tests.conformance.http2_client import (
    CONTINUATION,
    HEADER_TABLE_SIZE,
    PADDED,
    PREDICT,
    PRIORITY,
    WITH_PRIORITY,
    RawClient,
    connected,
    frame,
    request_frames,
    request_headers,
    settings,
)
from tests.conformance.serving import predict_torchrec, scores_in, serving, serving_transport
from tests.http2_peer import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, RST_STREAM, grpc_message, hpack
from tests.support import TRANSPORTS, jagged, one_hot, scores_alone, unary, wait_until

CANCEL = 8
INVALID_ARGUMENT, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 3, 4, 12, 13, 14


@pytest.fixture(params=TRANSPORTS)
def kind(request) -> str:
    """The transport under test."""
    return request.param


native_only = pytest.mark.parametrize("kind", TRANSPORTS[1:], indirect=True)


def expect_served(client: RawClient, seed: int = 1) -> None:
    features = jagged(3, seed)
    answer = client.ask(predictor_body(features))
    assert answer.status == 0
    np.testing.assert_array_equal(scores_in(answer.messages[0]), scores_alone(features))


def test_bytes_that_come_one_by_one_are_a_request_all_the_same(kind):
    features = one_hot(2)
    with serving(kind) as (address, _), RawClient(address, greet=False) as client:
        for byte in PREFACE + settings() + request_frames(1, predictor_body(features)):
            client.send(bytes([byte]))
        answer = client.answer(1)
        assert (answer.headers[":status"], answer.status) == ("200", 0)
        np.testing.assert_array_equal(scores_in(answer.messages[0]), scores_alone(features))


@native_only  # grpcio knows no padding
def test_padding_changes_nothing(kind):
    features = one_hot(2)
    block = hpack(request_headers())
    body = grpc_message(predictor_body(features))
    with serving(kind) as (address, _), RawClient(address) as client:
        client.frame(HEADERS, PADDED | WITH_PRIORITY, 1, b"\x05" + struct.pack(">IB", 0, 9) + block[:20] + bytes(5))
        client.frame(CONTINUATION, END_HEADERS, 1, block[20:])
        client.frame(DATA, PADDED, 1, b"\xff" + body[:3] + bytes(255))  # inside the message's prefix
        client.frame(DATA, PADDED, 1, b"\x00" + body[3:9])
        client.frame(DATA, PADDED, 1, b"\x10" + bytes(16))
        client.frame(DATA, PADDED | END_STREAM, 1, b"\x01" + body[9:] + bytes(1))
        answer = client.answer(1)
        assert answer.status == 0
        np.testing.assert_array_equal(scores_in(answer.messages[0]), scores_alone(features))


def test_priorities_unknown_frames_and_divided_headers_change_nothing(kind):
    features = one_hot(2)
    block = hpack(request_headers())
    body = grpc_message(predictor_body(features))
    with serving(kind) as (address, _), RawClient(address) as client:
        client.frame(0x42, 0xFF, 0, b"of a kind that nobody knows")
        client.frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 7))
        client.frame(HEADERS, WITH_PRIORITY, 1, struct.pack(">IB", 0, 9) + block[:20])
        client.frame(CONTINUATION, 0, 1, block[20:40])
        client.frame(CONTINUATION, 0, 1, b"")
        client.frame(CONTINUATION, END_HEADERS, 1, block[40:])
        client.frame(0x43, 0, 1, b"")
        client.frame(DATA, 0, 1, body[:3])  # inside the message's prefix
        client.frame(DATA, 0, 1, body[3:9])
        client.frame(DATA, 0, 1, b"")
        client.frame(DATA, 0, 1, body[9:])
        client.frame(DATA, END_STREAM, 1, b"")
        answer = client.answer(1)
        assert answer.status == 0
        np.testing.assert_array_equal(scores_in(answer.messages[0]), scores_alone(features))


def test_many_requests_in_one_segment_are_all_answered(kind):
    with serving(kind) as (address, _), RawClient(address) as client:
        features = [jagged(1 + seed % 5, seed) for seed in range(60)]
        client.send(b"".join(request_frames(1 + 2 * n, predictor_body(one)) for n, one in enumerate(features)))
        for number, one in enumerate(features):
            np.testing.assert_array_equal(scores_in(client.answer(1 + 2 * number).messages[0]), scores_alone(one))


def test_an_answer_goes_through_a_window_of_one_byte(kind):
    features = one_hot(40)
    with serving(kind) as (address, _), RawClient(address, _4=1) as client:
        stream = client.call(predictor_body(features))
        np.testing.assert_array_equal(scores_in(client.answer(stream).messages[0]), scores_alone(features))


def test_a_client_that_opens_its_window_late_gets_its_answer_late_and_holds_nobody_up(kind):
    features = one_hot(40)
    with (
        serving(kind) as (address, engine),
        RawClient(address, windows=False, _4=0) as late,
        RawClient(address) as other,
    ):
        stream = late.call(predictor_body(features))
        wait_until(lambda: engine.statistics().answered == 1)
        expect_served(other)
        late.ping()
        assert late.answers[stream].data == b""
        late.send(settings(_4=5))  # windows of streams that are open grow by it, too
        while len(late.answers[stream].data) < 5:
            late.read()
        late.ping()
        assert len(late.answers[stream].data) == 5
        late.frame(8, 0, stream, struct.pack(">I", 10_000))
        np.testing.assert_array_equal(scores_in(late.answer(stream).messages[0]), scores_alone(features))


def test_header_tables_may_change_size_at_any_time(kind):
    with serving(kind) as (address, _), RawClient(address) as client:
        for size in (0, 4096, 100):
            client._decoder.max_allowed_table_size = max(size, 4096)
            client.send(settings(**{f"_{HEADER_TABLE_SIZE}": size}))
            expect_served(client)


@pytest.mark.parametrize("end", ["close", "reset", "half-close"])
def test_a_connection_that_ends_anywhere_in_a_request_harms_nobody(kind, end):
    whole = PREFACE + settings() + request_frames(1, predictor_body(one_hot(1)))
    step = 1 if kind == "native" else 7
    with serving_transport(kind) as (address, engine, transport), RawClient(address) as honest:
        for size in range(0, len(whole), step):
            with RawClient(address, greet=False) as client:
                client.send(whole[:size])
                if end == "reset":
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif end == "half-close":
                    client.socket.shutdown(socket.SHUT_WR)
                    client.until_closed()
        expect_served(honest)
        assert engine.statistics().submitted == 1
        if kind == "native":
            wait_until(lambda: transport.statistics()["open_connections"] == 1)
            assert transport.statistics()["open_calls"] == 0


def test_streams_that_are_reset_anywhere_in_a_request_never_run(kind):
    with serving(kind) as (address, engine), connected(address) as client:
        body = grpc_message(predictor_body(one_hot(1)))
        for size in range(len(body)):
            stream = client.next_stream()
            client.headers(stream, request_headers())
            client.frame(DATA, 0, stream, body[:size])
            client.frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
        expect_served(client)
        assert engine.statistics().submitted == 1


@pytest.mark.parametrize("value", ["50m", "50000u", "50000000n", "1u"])
def test_a_deadline_in_a_small_unit_passes(kind, value):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour) as (address, engine), RawClient(address) as client:
        client.call(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        late = client.call(predictor_body(one_hot(2)), extra=[("grpc-timeout", value)])
        if kind == "native":  # it ends when a lane looks at the queue, 60 ms after it came at the earliest
            wait_until(lambda: engine.statistics().queued == 1)
            threading.Timer(0.06, behaviour.hold.set).start()
        answer = client.answer(late)
        assert answer.status in (DEADLINE_EXCEEDED, None)  # grpcio resets the stream instead
        behaviour.hold.set()
        client.answer(1)
        assert behaviour.forwards == [1]


@pytest.mark.parametrize("value", ["1S", "60S", "1M", "8H", "99999999H", "99999999S", "00000001H", "20000m"])
def test_a_deadline_in_a_large_unit_does_not(kind, value):
    with serving(kind) as (address, _), RawClient(address) as client:
        assert client.ask(predictor_body(one_hot(1)), extra=[("grpc-timeout", value)]).status == 0


def test_pings_are_answered_while_every_lane_is_held(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour, lanes=2) as (address, _), RawClient(address) as client, RawClient(address) as other:
        streams = []
        for count in (1, 2):
            streams.append(client.call(predictor_body(one_hot(1))))
            wait_until(lambda count=count: len(behaviour.forwards) == count)
        client.ping(b"\x00\xff\x00\xff1234")
        other.ping()
        with RawClient(address) as newcomer:
            newcomer.ping()
        behaviour.hold.set()
        assert [client.answer(stream).status for stream in streams] == [0, 0]


def test_health_is_answered_while_every_lane_is_held(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour) as (address, _), RawClient(address) as client:
        stream = client.call(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        assert client.ask(b"", "/grpc.health.v1.Health/Check").messages == [b"\x08\x01"]
        assert client.ask(b"\x0a\x03abc", "/grpc.health.v1.Health/Check").status == 5
        watch = client.call(b"", "/grpc.health.v1.Health/Watch")
        while not client.answers.get(watch) or not client.answers[watch].messages:
            client.read()
        assert client.answers[watch].messages == [b"\x08\x01"]
        client.frame(RST_STREAM, 0, watch, struct.pack(">I", CANCEL))
        behaviour.hold.set()
        assert client.answer(stream).status == 0


@pytest.mark.parametrize("path", ["/predictor.Predictor/Train", "/", "/grpc.health.v1.Health/Chec", "/" + "x" * 3000])
def test_a_method_that_is_not_there_is_unimplemented(kind, path):
    with serving(kind) as (address, _), RawClient(address) as client:
        assert client.ask(b"", path).status == UNIMPLEMENTED
        expect_served(client)


@native_only  # grpcio lets some of them wait for ever
def test_no_message_two_messages_and_half_a_message_are_refused(kind):
    message = grpc_message(predictor_body(one_hot(1)))
    with serving(kind) as (address, engine), RawClient(address) as client:
        for body in (b"", message + message, message[:-1], message[:4], message + b"\x00"):
            stream = client.next_stream()
            client.headers(stream, request_headers())
            client.frame(DATA, END_STREAM, stream, body)
            answer = client.answer(stream)
            assert answer.status in (INTERNAL, UNIMPLEMENTED) or answer.reset is not None
        stream = client.next_stream()
        client.headers(stream, request_headers(), end=True)
        answer = client.answer(stream)
        assert answer.status in (INTERNAL, UNIMPLEMENTED) or answer.reset is not None
        expect_served(client)
        assert engine.statistics().submitted == 1


def test_bytes_that_are_no_http2_end_the_connection_and_nothing_else(kind):
    hostile = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        PREFACE + b"\xff" * 64,
        PREFACE + settings() + frame(HEADERS, END_HEADERS, 2, hpack(request_headers())),  # an even stream
        PREFACE + settings() + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),  # no header block
        PREFACE + settings() + frame(DATA, 0, 1, b"1"),  # of a stream that is idle
        PREFACE + settings() + frame(CONTINUATION, 0, 1, b""),
        PREFACE + settings() + frame(6, 0, 0, b"1234"),  # a ping too short
        PREFACE + settings() + frame(4, 0, 0, b"12345"),  # settings too short
        PREFACE + settings(_4=1 << 31),  # a window too large
        PREFACE + settings() + frame(8, 0, 0, struct.pack(">I", 0x7FFFFFFF)),  # a window that overflows
        PREFACE + settings() + frame(5, END_HEADERS, 1, struct.pack(">I", 2)),  # a client's push
    ]
    with serving(kind) as (address, _), RawClient(address) as honest:
        for data in hostile:
            with RawClient(address, greet=False) as client:
                client.send(data)
                client.socket.shutdown(socket.SHUT_WR)
                client.until_closed()
        expect_served(honest)


@pytest.mark.parametrize(
    "text", ["plain", "100% sure\n\ttabs", "naïve 模型 🧂", "\x01\x7f\x80", "%", "ends in space ", "x" * 3000]
)
def test_a_status_s_text_arrives_as_it_was(kind, text, monkeypatch):
    def refuse(*_: object) -> None:
        raise InvalidRequest(text)

    monkeypatch.setattr(predictor, "read", refuse)
    with serving(kind) as (address, _), grpc.insecure_channel(address) as channel, RawClient(address) as raw:
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, PREDICT)(b"x", timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == text
        assert raw.ask(b"x").detail == text


def test_a_cancelled_request_whose_batch_runs_is_never_touched_again(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour) as (address, engine), RawClient(address) as client:
        first = client.call(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        company = [client.call(predictor_body(one_hot(2, seed))) for seed in range(6)]
        wait_until(lambda: engine.statistics().queued == 6)
        behaviour.hold.set()
        behaviour.hold = threading.Event()
        wait_until(lambda: len(behaviour.forwards) == 2)
        for stream in company[::2]:
            client.frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
        client.ping()
        behaviour.hold.set()
        assert client.answer(first).status == 0
        for seed, stream in list(enumerate(company))[1::2]:
            np.testing.assert_array_equal(scores_in(client.answer(stream).messages[0]), scores_alone(one_hot(2, seed)))
        client.ping()
        assert all(not client.answers[stream].data for stream in company[::2] if stream in client.answers)


def test_stopping_says_so_and_lets_what_runs_finish(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    features = one_hot(3)
    with serving(kind, behaviour) as (address, _):
        client = RawClient(address)
        stream = client.call(predictor_body(features))
        wait_until(lambda: behaviour.forwards == [3])

        def let_go() -> None:  # once the client has been told
            while client.goaway is None:
                assert client.read() is not None
            behaviour.hold.set()
            client.until_closed()

        thread = threading.Thread(target=let_go)
        thread.start()
    thread.join()
    with client:
        np.testing.assert_array_equal(scores_in(client.answer(stream).messages[0]), scores_alone(features))
        assert client.goaway[1] == 0


def test_get_model_and_predict_share_a_connection(kind):
    with serving(kind) as (address, _), RawClient(address) as client:
        streams = [client.call(b"", narsil_v1.METHOD_GET_MODEL) for _ in range(20)]
        expect_served(client)
        assert len({client.answer(stream).messages[0] for stream in streams}) == 1


def test_a_real_client_beside_a_broken_one(kind):
    features = one_hot(3)
    with (
        serving(kind) as (address, _),
        grpc.insecure_channel(address) as channel,
        RawClient(address, greet=False) as broken,
    ):
        broken.send(PREFACE[:10])
        np.testing.assert_array_equal(predict_torchrec(channel, features), scores_alone(features))
