"""The native load generator against real gRPC servers, and against servers that say what they should not."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

pytest.importorskip("narsil._load", reason="narsil._load is not built; it needs a C++ compiler and libnghttp2-dev")

from narsil import _load
from tests import http2_peer as http2
from tests.http2_peer import Peer, grpc_message, http2_server
from tests.messages import narsil_pb2, predictor_pb2

METHOD = "/predictor.Predictor/Predict"
ROWS = 5
RIGHT = predictor_pb2.PredictionResponse(
    predictions={"default": predictor_pb2.FloatVec(data=[0.5] * ROWS)}
).SerializeToString()
SHORT = predictor_pb2.PredictionResponse(
    predictions={"default": predictor_pb2.FloatVec(data=[0.5] * 3)}
).SerializeToString()
Handler = Callable[[bytes, Any], bytes]


@contextmanager
def grpc_server(handler: Handler, address: str = "127.0.0.1:0", **options: Any) -> Iterator[str]:
    """A server of grpcio's with one method; yields its target."""

    class Service(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(handler) if details.method == METHOD else None

    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, handlers=[Service()], **options)
        port = server.add_insecure_port(address)
        server.start()
        try:
            yield address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
        finally:
            server.stop(None).wait()


@contextmanager
def client_of(target: str, bodies: list[bytes] | None = None, **options: Any) -> Iterator[Any]:
    """A connected client that expects RIGHT."""
    settings = {"wire": "predictor", "task": "default", "rows": ROWS, "timeout_s": 20.0, "method": METHOD, **options}
    client = _load.Client(target, bodies=bodies or [b"body"], **settings)
    try:
        client.connect()
        yield client
    finally:
        client.close()


def errors_of(script: Callable[[Peer], object], requests: int = 1, **options: Any) -> dict[str, int]:
    """What becomes of requests to a server of hand-written frames, one after the other; none may be lost."""
    with http2_server(script) as target, client_of(target, **options) as client:
        result = client.closed_loop(requests, 1)
    assert len(result.latencies) + sum(result.errors.values()) == requests
    return result.errors


def answering(answer: Callable[[Peer, int], object], settings: dict[int, int] | None = None) -> Callable[[Peer], None]:
    """A script that answers every request in the same way."""

    def script(peer: Peer) -> None:
        peer.greet(settings)
        while True:
            answer(peer, peer.request())

    return script


# ---------------------------------------------------------------- loops


@pytest.mark.parametrize("connections", [1, 3])
def test_every_request_is_answered_once_with_the_bodies_in_turn(connections):
    seen: list[bytes] = []
    bodies = [bytes([number]) * size for number, size in enumerate([0, 1, 16_379, 16_380, 70_000, 300_000])]
    with (
        grpc_server(lambda body, context: seen.append(body) or RIGHT) as target,
        client_of(target, bodies, connections=connections) as client,
    ):
        result = client.closed_loop(60, 7)
    assert result.errors == {}
    assert len(result.latencies) == 60
    assert (result.latencies > 0).all()
    assert sorted(seen) == sorted(bodies * 10)


def test_a_closed_loop_keeps_its_number_of_requests_in_flight_and_no_more():
    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(2):
            waiting = [peer.request() for _ in range(4)]
            peer.frame(http2.PING, 0, 0, b"and now?")
            while (frame := peer.read()).kind != http2.PING:
                assert frame.kind not in (http2.HEADERS, http2.DATA), "a fifth request, while four wait"
            for stream in waiting:
                peer.reply(stream, RIGHT)
        peer.until_gone()

    with http2_server(script) as target, client_of(target) as client:
        assert client.closed_loop(8, 4).errors == {}


def test_requests_are_spread_evenly_over_the_connections():
    peers: list[str] = []
    with (
        grpc_server(lambda body, context: peers.append(context.peer()) or RIGHT) as target,
        client_of(target, connections=4) as client,
    ):
        client.open_loop(np.zeros(40))
    assert sorted(peers.count(peer) for peer in set(peers)) == [10, 10, 10, 10]


def test_replies_to_the_first_bodies_are_kept_and_no_others():
    with (
        grpc_server(lambda body, context: RIGHT) as target,
        client_of(target, [b"a", b"b", b"c"]) as client,
    ):
        assert client.closed_loop(9, 2, keep=2).replies == {0: RIGHT, 1: RIGHT}
        assert client.closed_loop(9, 2).replies == {}


def test_narsils_own_wire_is_checked_alike():
    right = narsil_pb2.PredictResponse(scores=[narsil_pb2.TaskScores(task="default", values=bytes(4 * ROWS))])
    answers = iter([right, narsil_pb2.PredictResponse()])
    with (
        grpc_server(lambda body, context: next(answers).SerializeToString()) as target,
        client_of(target, wire="narsil") as client,
    ):
        result = client.closed_loop(2, 1)
    assert len(result.latencies) == 1
    assert result.errors == {f"0 scores for {ROWS} rows": 1}


def test_a_request_looks_like_any_grpc_clients():
    seen: dict[str, Any] = {}

    def look(body: bytes, context: Any) -> bytes:
        seen.update(context.invocation_metadata(), left=context.time_remaining())
        return RIGHT

    with grpc_server(look) as target, client_of(target, timeout_s=7.0, user_agent="narsil-load/1") as client:
        client.closed_loop(1, 1)
    assert seen["user-agent"] == "narsil-load/1"
    assert 0 < seen["left"] <= 7.0


def test_progress_is_reported_while_it_runs():
    gate = threading.Event()
    seen: list[int] = []

    def on_progress(done: int) -> None:
        seen.append(done)
        if done == 1:
            gate.set()

    def handle(body: bytes, context: Any) -> bytes:
        assert body == b"first" or gate.wait(20)
        return RIGHT

    with grpc_server(handle) as target, client_of(target, [b"first", b"second"]) as client:
        client.closed_loop(2, 1, on_progress=on_progress)
    assert seen[0] in (0, 1)
    assert 1 in seen
    assert seen == sorted(seen)


def test_a_client_takes_unix_sockets_and_ipv6(tmp_path):
    targets = [f"unix:{tmp_path}/s"]
    if socket.has_ipv6:
        targets.append("[::1]:0")
    for address in targets:
        with grpc_server(lambda body, context: RIGHT, address) as target, client_of(target) as client:
            assert client.closed_loop(3, 1).errors == {}


# ---------------------------------------------------------------- open loop


def test_no_request_is_sent_before_it_is_due():
    due = np.array([0.0, 0.03, 0.03, 0.1])
    seen: list[float] = []
    with (
        grpc_server(lambda body, context: seen.append(time.monotonic()) or RIGHT) as target,
        client_of(target) as client,
    ):
        began = time.monotonic()
        result = client.open_loop(due)
    assert result.errors == {}
    assert (np.array(sorted(seen)) - began >= due).all()


def test_latency_counts_from_when_a_request_was_due():
    """All are due at once, so each one's latency includes the time that sending those before it took."""
    with grpc_server(lambda body, context: RIGHT) as target, client_of(target, [bytes(20_000)]) as client:
        began = time.perf_counter()
        result = client.open_loop(np.zeros(500))
        wall = time.perf_counter() - began
    assert result.errors == {}
    assert 0 < result.late_s <= result.latencies.max() <= wall
    assert (np.diff(result.latencies) >= 0).all()  # in order of completion, all from the same moment


def test_an_open_loop_does_not_wait_for_replies():
    gate = threading.Barrier(6)  # six requests come before the first is answered
    with (
        grpc_server(lambda body, context: (gate.wait(20), RIGHT)[1]) as target,
        client_of(target) as client,
    ):
        assert len(client.open_loop(np.linspace(0, 0.01, 6)).latencies) == 6


@pytest.mark.parametrize("due", [[1.0, 0.5], [-1.0], [float("nan")], [float("inf")], [[0.0]]])
def test_a_schedule_that_does_not_ascend_is_refused(due):
    with grpc_server(lambda body, context: RIGHT) as target, client_of(target) as client:
        with pytest.raises(ValueError, match="due must"):
            client.open_loop(due)
        assert len(client.open_loop([]).latencies) == 0


# ---------------------------------------------------------------- what a server may answer


def test_grpc_errors_are_counted_by_their_codes_name():
    def refuse(body: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        raise AssertionError

    with grpc_server(refuse) as target, client_of(target) as client:
        result = client.closed_loop(4, 2)
    assert result.errors == {"RESOURCE_EXHAUSTED": 4}
    assert len(result.latencies) == 0


def test_an_unknown_method_is_unimplemented():
    with grpc_server(lambda body, context: RIGHT) as target, client_of(target, method="/no.Such/Method") as client:
        assert client.closed_loop(1, 1).errors == {"UNIMPLEMENTED": 1}


def test_a_compressed_reply_is_refused():
    def compressed(peer: Peer, stream: int) -> None:
        peer.headers(stream, (*http2.RESPONSE, ("grpc-encoding", "gzip")))
        peer.frame(http2.DATA, 0, stream, grpc_message(RIGHT, flag=1))
        peer.headers(stream, http2.OK, end=True)

    assert errors_of(answering(compressed)) == {"compressed reply": 1}


def replying(payload: bytes, trailers: Any = http2.OK) -> Callable[[Peer], None]:
    def answer(peer: Peer, stream: int) -> None:
        peer.headers(stream, http2.RESPONSE)
        peer.frame(http2.DATA, 0, stream, payload)
        peer.headers(stream, trailers, end=True)

    return answering(answer)


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (grpc_message(SHORT), f"3 scores for {ROWS} rows"),
        (grpc_message(b""), f"0 scores for {ROWS} rows"),
        (grpc_message(b"\xff\xff"), "unreadable reply"),
        (grpc_message(RIGHT[:-1]), "unreadable reply"),
        (grpc_message(RIGHT, length=len(RIGHT) + 1), "message cut off"),
        (grpc_message(RIGHT, length=0xFFFFFFFF), "message cut off"),
        (grpc_message(RIGHT) * 2, "more than one message"),
        (grpc_message(RIGHT, length=1), "more than one message"),
        (grpc_message(RIGHT, flag=7), "unreadable message prefix"),
        (b"\0\0\0", "message cut off"),
        (b"", "OK without a message"),
    ],
)
def test_a_wrong_message_is_named(payload, name):
    assert errors_of(replying(payload), requests=3) == {name: 3}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ([(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "14")], "UNAVAILABLE"),
        ([(":status", "200"), ("content-type", "application/grpc+proto"), ("grpc-status", "7")], "PERMISSION_DENIED"),
        ([(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "0")], "OK without a message"),
        ([(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "99")], "grpc-status 99"),
        ([(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "-1")], "unreadable grpc-status"),
        ([(":status", "200"), ("content-type", "application/grpc")], "no grpc-status"),
        ([(":status", "200"), ("content-type", "application/grpcx")], "content-type is not application/grpc"),
        ([(":status", "200")], "content-type is not application/grpc"),
        ([(":status", "502"), ("content-type", "text/html")], "HTTP status 502"),
        ([("content-type", "application/grpc")], "the stream broke HTTP/2: PROTOCOL_ERROR"),
        ([(":status", "200"), (":status", "200")], "the stream broke HTTP/2: PROTOCOL_ERROR"),
    ],
)
def test_an_answer_without_a_message_is_named(fields, name):
    assert errors_of(answering(lambda peer, stream: peer.headers(stream, fields, end=True)), requests=3) == {name: 3}


def test_a_reply_without_trailers_has_no_status():
    def answer(peer: Peer, stream: int) -> None:
        peer.headers(stream, (*http2.RESPONSE, *http2.OK))  # a status before the message counts for nothing
        peer.frame(http2.DATA, http2.END_STREAM, stream, grpc_message(RIGHT))

    assert errors_of(answering(answer)) == {"no grpc-status": 1}


def test_interim_responses_are_passed_over():
    def answer(peer: Peer, stream: int) -> None:
        peer.headers(stream, [(":status", "103"), ("link", "<x>")])
        peer.reply(stream, RIGHT)

    assert errors_of(answering(answer), requests=2) == {}


def test_a_reply_in_many_small_frames_is_put_together():
    def answer(peer: Peer, stream: int) -> None:
        peer.headers(stream, http2.RESPONSE)
        for byte in grpc_message(RIGHT):
            peer.frame(http2.DATA, 0, stream, bytes([byte]))
        peer.headers(stream, http2.OK, end=True)

    assert errors_of(answering(answer), requests=2) == {}


def test_an_answer_before_the_request_has_been_sent_ends_it():
    """The server answers at the headers and takes no more of the body; the connection serves the next one."""

    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(2):
            while (frame := peer.read()).kind != http2.HEADERS:
                pass
            peer.headers(frame.stream, [*http2.RESPONSE, ("grpc-status", "8")], end=True)
        peer.until_gone()

    assert errors_of(script, requests=2, bodies=[bytes(200_000)]) == {"RESOURCE_EXHAUSTED": 2}


@pytest.mark.parametrize(
    ("code", "name"),
    [(http2.INTERNAL_ERROR, "INTERNAL_ERROR"), (http2.REFUSED_STREAM, "REFUSED_STREAM"), (http2.NO_ERROR, "NO_ERROR")],
)
def test_a_reset_stream_is_named_and_the_connection_goes_on(code, name):
    assert errors_of(answering(lambda peer, stream: peer.reset(stream, code)), requests=3) == {f"RST_STREAM: {name}": 3}


def test_a_reply_beyond_the_limit_is_given_up_and_the_stream_reset():
    seen: list[http2.Frame] = []

    def script(peer: Peer) -> None:
        peer.greet()
        stream = peer.request()
        peer.headers(stream, http2.RESPONSE)
        for _ in range(10):
            peer.frame(http2.DATA, 0, stream, bytes(16_384))
        seen.extend(peer.until_gone())

    with http2_server(script) as target, client_of(target, max_reply_bytes=100_000) as client:
        assert client.closed_loop(1, 1).errors == {"a reply of more than 100000 bytes": 1}
    assert (http2.RST_STREAM, struct.pack(">I", http2.CANCEL)) in [(frame.kind, frame.payload) for frame in seen]


def test_headers_without_end_are_given_up():
    def answer(peer: Peer, stream: int) -> None:
        fields = [("x", "y" * 14_000)]
        for _ in range(6):
            peer.headers(stream, [(":status", "103"), *fields])
        peer.reply(stream, RIGHT)

    assert errors_of(answering(answer)) == {"headers of more than 65536 bytes": 1}


def test_a_server_cannot_make_up_any_number_of_error_names():
    numbers = iter(range(100, 1000))

    def answer(peer: Peer, stream: int) -> None:
        peer.headers(stream, [*http2.RESPONSE, ("grpc-status", str(next(numbers)))], end=True)

    errors = errors_of(answering(answer), requests=100)
    assert len(errors) == 65
    assert errors["other errors"] == 36


# ---------------------------------------------------------------- timeouts


def test_a_request_that_is_never_answered_times_out_and_is_cancelled():
    seen: list[http2.Frame] = []

    def script(peer: Peer) -> None:
        peer.greet()
        seen.extend(peer.until_gone())

    with http2_server(script) as target, client_of(target, timeout_s=0.1) as client:
        assert client.closed_loop(3, 3).errors == {"DEADLINE_EXCEEDED": 3}
    cancelled = [frame for frame in seen if frame.kind == http2.RST_STREAM]
    assert [frame.payload for frame in cancelled] == [struct.pack(">I", http2.CANCEL)] * 3


def test_a_reply_after_the_timeout_counts_for_nothing():
    def script(peer: Peer) -> None:
        peer.greet()
        stream = peer.request()
        while peer.read().kind != http2.RST_STREAM:
            pass
        peer.reply(stream, RIGHT)  # too late
        peer.reply(peer.request(), RIGHT)
        peer.until_gone()

    with http2_server(script) as target, client_of(target, timeout_s=1.0) as client:
        result = client.closed_loop(2, 1)
    assert result.errors == {"DEADLINE_EXCEEDED": 1}
    assert len(result.latencies) == 1


def test_a_server_that_takes_no_bytes_does_not_stall_the_load():
    """No window is ever opened: the bodies cannot leave."""

    def script(peer: Peer) -> None:
        peer.greet({http2.INITIAL_WINDOW_SIZE: 0})
        peer.until_gone()

    assert errors_of(script, requests=2, timeout_s=0.1) == {"DEADLINE_EXCEEDED": 2}


def test_a_server_that_allows_no_stream_does_not_stall_the_load():
    def script(peer: Peer) -> None:
        peer.greet({http2.MAX_CONCURRENT_STREAMS: 0})
        peer.until_gone()

    with http2_server(script) as target, client_of(target, timeout_s=0.1) as client:
        assert client.closed_loop(20, 4).errors == {"DEADLINE_EXCEEDED": 20}


# ---------------------------------------------------------------- HTTP/2's limits


def test_windows_are_respected():
    """The server opens its window a thousand bytes at a time and counts what comes."""
    body = random.Random(0).randbytes(5_000)
    got = bytearray()

    def script(peer: Peer) -> None:
        peer.greet({http2.INITIAL_WINDOW_SIZE: 1000})
        allowed = 1000
        while True:
            frame = peer.read()
            if frame.kind != http2.DATA:
                continue
            got.extend(frame.payload)
            assert len(got) <= allowed
            if frame.flags & http2.END_STREAM:
                break
            if len(got) == allowed:
                allowed += 1000
                peer.window(frame.stream, 1000)
        peer.reply(frame.stream, RIGHT)
        peer.until_gone()

    with http2_server(script) as target, client_of(target, [body]) as client:
        assert client.closed_loop(1, 1).errors == {}
    assert bytes(got) == grpc_message(body)


@pytest.mark.parametrize("limit", [16_384, 60_000])
def test_frames_are_as_long_as_the_server_takes_and_no_longer(limit):
    sizes: list[int] = []

    def script(peer: Peer) -> None:
        peer.greet({http2.MAX_FRAME_SIZE: limit, http2.INITIAL_WINDOW_SIZE: 1 << 20})
        peer.window(0, 1 << 20)
        while peer.read().flags & http2.ACK == 0:  # of the settings
            pass
        while not (frame := peer.read()).flags & http2.END_STREAM:
            sizes.append(len(frame.payload))
        peer.reply(frame.stream, RIGHT)
        peer.until_gone()

    with http2_server(script) as target, client_of(target, [bytes(200_000)]) as client:
        assert client.closed_loop(1, 1).errors == {}
    assert max(sizes) == limit


def test_no_more_streams_are_open_than_the_server_allows():
    def script(peer: Peer) -> None:
        peer.greet({http2.MAX_CONCURRENT_STREAMS: 2})
        waiting: list[int] = []
        for _ in range(12):
            waiting.append(peer.request())
            assert len(waiting) <= 2
            if len(waiting) == 2:
                for stream in waiting:
                    peer.reply(stream, RIGHT)
                waiting.clear()
        peer.until_gone()

    with http2_server(script) as target, client_of(target) as client:
        assert client.closed_loop(12, 6).errors == {}


def test_a_ping_is_answered():
    def answer(peer: Peer, stream: int) -> None:
        peer.frame(http2.PING, 0, 0, b"01234567")
        frame = peer.read()
        assert (frame.kind, frame.flags, frame.payload) == (http2.PING, http2.ACK, b"01234567")
        peer.reply(stream, RIGHT)

    assert errors_of(answering(answer)) == {}


# ---------------------------------------------------------------- connections that are lost


def test_a_lost_connection_fails_its_requests_and_is_replaced_a_bounded_number_of_times():
    connections: list[Peer] = []

    def script(peer: Peer) -> None:
        connections.append(peer)
        peer.greet()
        peer.request()

    with http2_server(script) as target, client_of(target, reconnects=2) as client:
        result = client.closed_loop(7, 1)
    assert sum(result.errors.values()) == 7
    assert all(name.startswith("UNAVAILABLE: ") for name in result.errors)
    assert result.reconnects == 2
    assert len(connections) == 3


def test_all_requests_of_a_lost_connection_are_counted():
    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(5):
            peer.request()

    with http2_server(script) as target, client_of(target, reconnects=0) as client:
        result = client.closed_loop(5, 5)
    assert sum(result.errors.values()) == 5
    assert result.reconnects == 0


def test_one_of_two_connections_lost_leaves_the_other_to_the_load():
    first = threading.Event()

    def script(peer: Peer) -> None:
        peer.greet()
        if not first.is_set():
            first.set()
            peer.request()
            return
        while True:
            peer.reply(peer.request(), RIGHT)

    with http2_server(script) as target, client_of(target, connections=2, reconnects=0) as client:
        result = client.closed_loop(20, 2)
    assert sum(result.errors.values()) == 1
    assert len(result.latencies) == 19


def test_goaway_lets_what_it_names_end_and_sends_the_rest_elsewhere():
    def script(peer: Peer) -> None:
        peer.greet()
        stream = peer.request()
        peer.goaway(stream)
        peer.reply(stream, RIGHT)
        assert [frame.kind for frame in peer.until_gone() if frame.kind in (http2.HEADERS, http2.DATA)] == []

    with http2_server(script) as target, client_of(target) as client:
        result = client.closed_loop(4, 1)
    assert result.errors == {}
    assert result.reconnects == 3


def test_requests_that_goaway_refuses_are_named():
    def answer(peer: Peer, stream: int) -> None:
        peer.goaway(0, http2.ENHANCE_YOUR_CALM)

    assert errors_of(answering(answer), requests=2) == {"UNAVAILABLE: GOAWAY (ENHANCE_YOUR_CALM)": 2}


@pytest.mark.parametrize(
    "junk",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        bytes(64),
        b"\xff" * 64,
        struct.pack(">I", 3)[1:] + struct.pack(">BBI", http2.PING, 0, 0) + b"abc",  # a ping of three bytes
        struct.pack(">I", 0xFFFFFF)[1:] + struct.pack(">BBI", http2.DATA, 0, 1) + bytes(100),  # beyond the frame limit
        struct.pack(">I", 5)[1:] + struct.pack(">BBI", http2.HEADERS, http2.END_HEADERS, 1) + b"\xff" * 5,  # no HPACK
        struct.pack(">I", 4)[1:] + struct.pack(">BBI", http2.WINDOW_UPDATE, 0, 0) + bytes(4),  # of nothing
        struct.pack(">I", 4)[1:] + struct.pack(">BBI", 5, http2.END_HEADERS, 1) + struct.pack(">I", 2),  # a push
    ],
    ids=["http1", "zeros", "ones", "ping", "long", "hpack", "window", "push"],
)
def test_a_server_that_breaks_http2_midway_is_named(junk):
    def answer(peer: Peer, stream: int) -> None:
        peer.socket.sendall(junk)
        peer.until_gone()
        raise ConnectionError

    errors = errors_of(answering(answer), requests=2, timeout_s=5.0)
    assert list(errors) in (["UNAVAILABLE: the server broke HTTP/2"], ["DEADLINE_EXCEEDED"])
    assert sum(errors.values()) == 2


def test_a_flood_of_pings_ends_the_connection():
    def answer(peer: Peer, stream: int) -> None:
        ping = struct.pack(">I", 8)[1:] + struct.pack(">BBI", http2.PING, 0, 0) + bytes(8)
        peer.socket.sendall(ping * 20_000)
        peer.until_gone()
        raise ConnectionError

    (name,) = errors_of(answering(answer))
    assert name.startswith("UNAVAILABLE: ")


def test_damaged_replies_never_crash_or_lose_a_request():
    """A right reply with bytes changed, dropped or doubled, from the first frame on."""
    dice = random.Random(7)

    def script(peer: Peer) -> None:
        peer.greet()
        while True:
            stream = peer.request()
            head = http2.hpack(http2.RESPONSE)
            tail = http2.hpack(http2.OK)
            frames = [
                (http2.HEADERS, http2.END_HEADERS, head),
                (http2.DATA, 0, grpc_message(RIGHT)),
                (http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, tail),
            ]
            raw = bytearray()
            for kind, flags, payload in frames:
                raw += struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
            for _ in range(dice.randrange(3)):
                at = dice.randrange(len(raw))
                raw[at : at + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
            peer.socket.sendall(raw)

    with http2_server(script) as target, client_of(target, timeout_s=0.5, reconnects=1000) as client:
        result = client.closed_loop(150, 3)
    assert len(result.latencies) + sum(result.errors.values()) == 150
    assert len(result.latencies) > 10


# ---------------------------------------------------------------- connecting


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda peer: peer.until_gone(), "no server answers at"),
        (lambda peer: None, "no server answers at .*: (the server closed|Connection reset)"),
    ],
    ids=["silent", "closes"],
)
def test_a_server_that_does_not_speak_is_given_up_after_the_timeout(script, message):
    with (
        http2_server(script) as target,
        pytest.raises(ConnectionError, match=message),
        client_of(target, timeout_s=0.3),
    ):
        pass


def test_a_server_that_speaks_something_else_is_given_up_at_once():
    def script(peer: Peer) -> None:
        peer.socket.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        peer.until_gone()

    with (
        http2_server(script) as target,
        pytest.raises(ConnectionError, match=f"{target}: the server broke HTTP/2"),
        client_of(target, timeout_s=3600.0),
    ):
        pass


def test_a_port_that_nobody_listens_on_is_said_so():
    with socket.socket() as bound:  # to nobody else, while it does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with (
            pytest.raises(ConnectionError, match=f"no server answers at 127.0.0.1:{port}: Connection refused"),
            client_of(f"127.0.0.1:{port}", timeout_s=0.1),
        ):
            pass


def test_a_server_that_starts_late_is_waited_for(tmp_path):
    path = tmp_path / "s"
    client = _load.Client(f"unix:{path}", METHOD, [b"x"], wire="predictor", task="default", rows=ROWS, timeout_s=20.0)
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(client.connect)
        assert not connecting.done()
        with grpc_server(lambda body, context: RIGHT, f"unix:{path}"):
            connecting.result(20)
            assert client.closed_loop(1, 1).errors == {}
            client.close()


# ---------------------------------------------------------------- the client's own rules


def test_what_progress_raises_ends_the_loop_and_closes_the_client():
    def stop(done: int) -> None:
        raise KeyError(done)

    with http2_server(lambda peer: (peer.greet(), peer.until_gone())) as target, client_of(target) as client:
        with pytest.raises(KeyError):
            client.closed_loop(3, 3, on_progress=stop)
        with pytest.raises(RuntimeError, match="not connected"):
            client.closed_loop(1, 1)


def test_one_call_at_a_time():
    with (
        http2_server(lambda peer: (peer.greet(), peer.until_gone())) as target,
        client_of(target) as client,
        pytest.raises(RuntimeError, match="in use by another call"),
    ):
        client.closed_loop(1, 1, on_progress=lambda done: client.close())


def test_loops_follow_each_other_on_the_same_connections():
    peers: set[str] = set()
    with (
        grpc_server(lambda body, context: peers.add(context.peer()) or RIGHT) as target,
        client_of(target) as client,
    ):
        for _ in range(3):
            assert len(client.closed_loop(5, 2).latencies) == 5
            assert len(client.open_loop([0.0]).latencies) == 1
    assert len(peers) == 1


def test_a_client_that_is_not_connected_or_closed_says_so():
    client = _load.Client("127.0.0.1:1", METHOD, [b""], wire="predictor", task="t", rows=1)
    with pytest.raises(RuntimeError, match="not connected"):
        client.closed_loop(1, 1)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.connect()


@pytest.mark.parametrize(
    "wrong",
    [
        {"bodies": []}, {"connections": 0}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"wire": "other"},
        {"target": "nowhere"}, {"target": "unix:"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong):
    settings = {"target": "127.0.0.1:1", "bodies": [b""], "wire": "predictor", "task": "t", "rows": 1, **wrong}
    with pytest.raises(ValueError, match=r".+"):
        _load.Client(method=METHOD, **settings)
