"""The native plane's limits and manners, against clients that have none: what each may cost, and who is served."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pytest

from narsil.backends.fake import FakeBehaviour
from narsil.bench.workload import predictor_body
from narsil.engine.queue import QueueLimits
from narsil.engine.scheduler import BatchPolicy
from narsil.extension import AVAILABLE
from narsil.transports.codec import narsil_v1
from narsil.transports.endpoints import REFLECTION
from tests.conformance.http2_client import (
    CONTINUATION,
    RawClient,
    connected,
    frame,
    request_frames,
    request_headers,
    settings,
)
from tests.conformance.serving import native_transport, scores_in
from tests.http2_peer import (
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    grpc_message,
    hpack,
)
from tests.memory import Held
from tests.support import PATIENCE_S, engine_with, jagged, one_hot, scores_alone, wait_until

if not AVAILABLE:
    pytest.skip("built without the native extension", allow_module_level=True)

INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, UNAVAILABLE = 3, 8, 12, 14
REFUSED_STREAM = 7
FLOOD = 16 << 20  # bytes; hundreds of times what a flood may leave behind
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"


@contextmanager
def native(behaviour=None, *, message_bytes=16 << 20, buffered=1 << 29, host="127.0.0.1", engine=None, **limits):
    """Yields (address, engine, statistics of the plane). ``limits`` are the plane's."""
    options = {"max_message_bytes": message_bytes, "max_buffered_bytes": buffered, "host": host, "limits": limits}
    with (
        engine_with(behaviour, **(engine or {})) as made,
        native_transport(made, **options) as (transport, address),
    ):
        try:
            yield address, made, transport.statistics
        finally:
            if behaviour is not None and behaviour.hold is not None:
                behaviour.hold.set()


def expect_served(client: RawClient, seed: int = 1) -> None:
    features = jagged(3, seed)
    answer = client.ask(predictor_body(features))
    assert answer.status == 0
    np.testing.assert_array_equal(scores_in(answer.messages[0]), scores_alone(features))


@contextmanager
def holding_at_most(most: int):
    """What native code holds may not have grown by more bytes than this at the end. What it held between, may."""
    before = Held.now()
    yield
    grown = (Held.now() - before).native
    assert grown < most, f"native code holds {grown} bytes more than before; {most} were allowed"


def reset(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def flood(client: RawClient, data: bytes, times: int) -> None:
    """Sends without reading, until the server has had enough."""
    try:
        for _ in range(times):
            client.send(data)
    except OSError:
        pass


# --- requests that are no gRPC, or not of the kind that is served here


@pytest.mark.parametrize(
    ("method", "kind", "status"),
    [
        ("GET", "application/grpc", "405"),
        ("OPTIONS", "", "405"),
        ("POST", "application/json", "415"),
        ("POST", "", "415"),
        ("POST", "application/grpc-web", "415"),
        ("POST", "application/grpc-web+proto", "415"),
        ("POST", "application/grpcx", "415"),
    ],
)
def test_what_is_no_grpc_gets_an_http_status(method, kind, status):
    with native() as (address, _, _), RawClient(address) as client:
        stream = client.next_stream()
        client.headers(stream, request_headers(method=method, kind=kind))
        answer = client.answer(stream)  # before its body is whole
        assert (answer.headers[":status"], answer.status) == (status, None)
        expect_served(client)


@pytest.mark.parametrize("kind", ["application/grpc+proto", "application/grpc;charset=utf-8", "application/grpc+x"])
def test_grpc_s_content_type_may_have_a_format(kind):
    with native() as (address, _, _), RawClient(address) as client:
        stream = client.next_stream()
        client.headers(stream, request_headers(kind=kind))
        client.frame(DATA, END_STREAM, stream, grpc_message(predictor_body(one_hot(1))))
        assert client.answer(stream).status == 0


@pytest.mark.parametrize("value", ["", "5", "S", "5x", "-1S", "+1S", "123456789S", "1.5S", "1 S", "0x1S"])
def test_a_timeout_that_is_none_is_an_invalid_argument(value):
    with native() as (address, _, _), RawClient(address) as client:
        answer = client.ask(predictor_body(one_hot(1)), extra=[("grpc-timeout", value)])
        assert (answer.status, "grpc-timeout" in answer.detail) == (INVALID_ARGUMENT, True)


def test_trailers_of_a_request_say_nothing():
    with native() as (address, _, _), RawClient(address) as client:
        stream = client.next_stream()
        client.headers(stream, request_headers())
        client.frame(DATA, 0, stream, grpc_message(predictor_body(one_hot(1))))
        client.headers(stream, [("grpc-timeout", "1n"), ("content-type", "text/plain")], end=True)
        assert client.answer(stream).status == 0


@pytest.mark.parametrize("flag", [1, 2, 255])
def test_a_compressed_message_is_unimplemented_before_it_is_whole(flag):
    with native() as (address, _, _), RawClient(address) as client:
        stream = client.next_stream()
        client.headers(stream, request_headers(extra=[("grpc-encoding", "gzip")]))
        client.frame(DATA, 0, stream, grpc_message(b"", flag=flag, length=1000))
        answer = client.answer(stream)
        assert (answer.status, "compressed" in answer.detail) == (UNIMPLEMENTED, True)


def test_a_message_too_large_is_refused_by_its_announcement():
    with native(message_bytes=1000) as (address, _, statistics), RawClient(address) as client:
        for size in (1001, 2**32 - 1):
            stream = client.next_stream()
            client.headers(stream, request_headers())
            client.frame(DATA, 0, stream, grpc_message(b"", length=size))
            answer = client.answer(stream)
            assert (answer.status, "--max-message-bytes" in answer.detail) == (RESOURCE_EXHAUSTED, True)
        assert client.ask(bytes(1000)).status == INVALID_ARGUMENT  # of the largest size, and no request
        wait_until(lambda: statistics()["open_calls"] == 0)


def test_more_streams_than_allowed_are_refused_and_none_is_lost():
    behaviour = FakeBehaviour(hold=threading.Event())
    with native(behaviour, max_streams=3) as (address, _, _), connected(address) as client:
        assert client.settings[3] == 3
        streams = [client.call(predictor_body(one_hot(1))) for _ in range(3)]
        wait_until(lambda: behaviour.forwards != [])
        behaviour.hold.set()
        assert [client.answer(stream).status for stream in streams] == [0, 0, 0]
        expect_served(client)


def test_streams_beyond_the_limit_opened_before_it_is_known_are_refused():
    behaviour = FakeBehaviour(hold=threading.Event())
    with native(behaviour, max_streams=3) as (address, _, _), RawClient(address, greet=False) as client:
        body = predictor_body(one_hot(1))
        client.send(PREFACE + settings() + b"".join(request_frames(1 + 2 * n, body) for n in range(5)))
        assert client.answer(7).reset == REFUSED_STREAM
        assert client.answer(9).reset == REFUSED_STREAM
        behaviour.hold.set()
        assert [client.answer(stream).status for stream in (1, 3, 5)] == [0, 0, 0]


# --- floods


def test_a_client_that_opens_streams_to_reset_them_is_told_to_be_calm():
    behaviour = FakeBehaviour()
    with native(behaviour, max_streams=64) as (address, engine, statistics), connected(address) as honest:
        with connected(address) as client:
            head = hpack(request_headers())
            opened = b"".join(frame(HEADERS, END_HEADERS, stream, head) + reset(stream) for stream in range(1, 6001, 2))
            flood(client, opened, 1)
            assert client.until_closed().goaway in (None, (0, ENHANCE_YOUR_CALM)) or (
                client.goaway[1] == ENHANCE_YOUR_CALM
            )
        expect_served(honest)
        assert statistics()["reset_floods"] == 1
        assert engine.statistics().submitted == 1
        assert statistics()["calls"] < 1100


def test_many_deadlines_that_pass_are_no_flood():
    """libnghttp2 by itself would end the connection at a thousand, and then at 33 a second."""
    with native(max_resets_per_second=2_000) as (address, _, _), connected(address) as client:
        head = hpack(request_headers())
        client.send(b"".join(frame(HEADERS, END_HEADERS, stream, head) + reset(stream) for stream in range(1, 6001, 2)))
        client._stream = 6001
        expect_served(client)
        assert client.goaway is None


def test_a_client_that_has_its_streams_reset_by_breaking_the_protocol_is_told_the_same():
    behaviour = FakeBehaviour(hold=threading.Event())
    with (
        native(behaviour, max_resets_per_second=10, engine={"limits": QueueLimits(max_requests=20)}) as (
            address,
            _,
            statistics,
        ),
        connected(address) as client,
    ):
        body = predictor_body(one_hot(1))
        overflow = struct.pack(">I", 0x7FFFFFFF)
        attack = (request_frames(s, body) + frame(WINDOW_UPDATE, 0, s, overflow) for s in range(1, 10_001, 2))
        flood(client, b"".join(attack), 1)
        client.until_closed()
        behaviour.hold.set()
        wait_until(lambda: statistics()["open_connections"] == 0)
        assert statistics()["reset_floods"] == 1
        assert statistics()["calls"] < 2000  # of 5000: what one read may hold


def test_a_header_block_without_end_is_ended():
    with native() as (address, _, _), connected(address) as honest:
        for part in (b"", hpack([("x", "y")])):
            with connected(address) as client:
                client.frame(HEADERS, 0, 1, hpack(request_headers()))
                flood(client, frame(CONTINUATION, 0, 1, part) * 1000, 100)
                client.until_closed()
        expect_served(honest)


def test_a_header_block_that_unpacks_to_much_is_cut_off():
    with native() as (address, _, statistics), connected(address) as honest, connected(address) as client:
        name = (
            b"\x40" + bytes([1]) + b"x" + b"\x7f" + bytes([0x80 | (3900 - 127) & 0x7F, (3900 - 127) >> 7]) + b"y" * 3900
        )
        bomb = name + b"\xbe" * 12_000  # the field, by its number in the table, each time 4 KB
        with holding_at_most(1 << 20):
            for stream in (1, 3, 5):
                client.frame(
                    HEADERS,
                    END_HEADERS | END_STREAM,
                    stream,
                    hpack(request_headers()) + (bomb if stream == 1 else bomb[-12_000:]),
                )
            for stream in (1, 3, 5):
                assert client.answer(stream).status == RESOURCE_EXHAUSTED
            expect_served(honest)
        assert statistics()["open_calls"] == 0


@pytest.mark.parametrize(
    "data",
    [
        frame(PING, 0, 0, b"12345678") * 500,
        settings(_4=65535) * 500,
        frame(SETTINGS, 0, 0, b"") * 500,
        settings(**{f"_{number}": 1 for number in range(100, 140)}) * 100,
        frame(RST_STREAM, 0, 1, bytes(4)) * 500,
        frame(2, 0, 1, struct.pack(">IB", 0, 1)) * 500,
        b"".join(frame(2, 0, 1 + 2 * stream, struct.pack(">IB", 0, 1)) for stream in range(500)),
        frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * 500,
        frame(0x42, 0, 0, bytes(100)) * 500,
    ],
    ids=["ping", "settings", "empty-settings", "odd-settings", "reset", "priority", "priorities", "window", "unknown"],
)
def test_a_flood_of_frames_costs_no_memory_and_no_service(data, tmp_path):
    host = f"unix:{tmp_path / 'narsil.sock'}"  # the kernel takes less of it
    with native(host=host) as (address, _, _), connected(address) as honest, connected(address) as client:
        expect_served(honest)  # so that what is made once is made
        with holding_at_most(1 << 20):
            flooding = threading.Thread(target=flood, args=(client, data, FLOOD // len(data)))
            flooding.start()
            expect_served(honest)
            flooding.join(PATIENCE_S)
            assert not flooding.is_alive()
            expect_served(honest, 2)


def test_empty_data_frames_are_no_progress_for_anyone_else_to_wait_for():
    with native() as (address, _, _), connected(address) as honest, connected(address) as client:
        client.headers(1, request_headers())
        flood(client, frame(DATA, 0, 1) * 1000, 100)
        expect_served(honest)
        client.frame(DATA, END_STREAM, 1, grpc_message(predictor_body(one_hot(1))))
        assert client.answer(1).status == 0


# --- clients that are slow, or gone


def test_a_client_that_never_says_what_it_wants_is_let_go():
    with native(handshake_s=0.2) as (address, _, statistics), connected(address) as honest:
        for data in (b"", PREFACE[:7], PREFACE, PREFACE + settings()[:5]):
            with RawClient(address, greet=False) as client:
                client._reply = lambda data: None
                client.send(data)
                client.until_closed()
        expect_served(honest)
        assert statistics()["connections_timed_out"] == 4


def test_a_request_that_stops_half_way_is_reset_and_one_that_goes_on_is_not():
    with native(stall_s=0.4) as (address, _, statistics), connected(address) as client:
        client.frame(HEADERS, END_HEADERS, 1, hpack(request_headers()))  # and no message
        client.headers(3, request_headers())
        client.frame(DATA, 0, 3, grpc_message(predictor_body(one_hot(1)))[:50])
        client.headers(5, request_headers())
        whole = grpc_message(predictor_body(one_hot(1)))
        going_on = threading.Event()

        def slowly() -> None:
            for byte in whole[:-1]:
                client.frame(DATA, 0, 5, bytes([byte]))
                if going_on.wait(2.0 / len(whole)):  # five times what a silence may last
                    break

        thread = threading.Thread(target=slowly)
        thread.start()
        assert client.answer(1).reset == CANCEL
        assert client.answer(3).reset == CANCEL
        thread.join()
        client.frame(DATA, END_STREAM, 5, whole[-1:])
        assert client.answer(5).status == 0
        assert statistics()["open_calls"] == 0


def test_headers_that_stop_half_way_do_not_stay():
    with native(stall_s=0.3) as (address, _, statistics), connected(address) as client:
        client.frame(HEADERS, 0, 1, hpack(request_headers()))
        wait_until(lambda: statistics()["buffered"] > 0)
        assert client.until_closed().goaway == (0, ENHANCE_YOUR_CALM)
        assert statistics()["buffered"] == 0


def test_a_running_request_is_not_taken_for_a_stalled_one():
    behaviour = FakeBehaviour(hold=threading.Event())
    with native(behaviour, stall_s=0.1, idle_s=0.1, keepalive_s=0.1) as (address, _, _), connected(address) as client:
        stream = client.call(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        pings = []
        while len(pings) < 3:  # of the server: several times the limits have passed
            found = client.read()
            assert found is not None
            pings += [found] if found.kind == PING else []
        behaviour.hold.set()
        assert client.answer(stream).status == 0


def test_answers_that_nobody_reads_are_given_up():
    with native(stall_s=0.3) as (address, _, statistics), connected(address, windows=False, _4=10) as client:
        streams = [client.call(predictor_body(one_hot(50))) for _ in range(5)]
        assert [client.answer(stream).reset for stream in streams] == [CANCEL] * 5
        assert statistics()["open_calls"] == 0


def test_a_socket_that_nobody_reads_is_closed_and_what_it_held_is_freed(tmp_path):
    body = predictor_body(one_hot(1000))
    host = f"unix:{tmp_path / 'narsil.sock'}"  # the kernel takes less of it
    one_at_a_time = {"policy": BatchPolicy(max_requests=1)}  # the lane keeps what its largest batch needed
    with (
        native(stall_s=0.5, host=host, engine=one_at_a_time) as (address, engine, statistics),
        connected(address) as honest,
    ):
        assert honest.ask(body).status == 0
        with holding_at_most(1 << 20):  # of 44 MB of requests and 4 MB of answers
            with RawClient(address, _4=1 << 30) as client:
                client.frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30))
                flood(client, b"".join(request_frames(1 + 2 * n, body) for n in range(1000)), 1)
                expect_served(honest)
                wait_until(lambda: statistics()["open_connections"] == 1)
            wait_until(lambda: engine.statistics().queued + engine.statistics().running == 0)
        assert statistics()["connections_timed_out"] == 1
        expect_served(honest)


def test_a_stream_s_answers_that_nobody_reads_do_not_pile_up():
    """A stream may hold a megabyte of them: the message after that is refused, whatever the server could still hold."""
    ask = grpc_message(b"\x22\x13" + b"predictor.Predictor")
    with native() as (address, _, statistics), connected(address) as honest:
        size = 5 + len(honest.ask(ask[5:], REFLECTION).messages[0])
        with connected(address, windows=False, _4=0) as client:
            client.headers(1, request_headers(REFLECTION))
            answered = 0
            while statistics()["refused"] == 0:
                assert answered * size < 4 << 20, "nothing was refused"
                client.frame(DATA, 0, 1, ask)
                wait_until(lambda last=answered: statistics()["refused"] == 1 or statistics()["answered"] == last + 2)
                answered = statistics()["answered"] - 1  # the honest client's
            assert 1 << 20 < answered * size <= (1 << 20) + size
        expect_served(honest)


def test_unread_answers_count_against_the_budget_and_are_freed_with_their_streams():
    with native(buffered=100_000) as (address, engine, statistics):
        with connected(address, windows=False, _4=0) as greedy:
            while statistics()["refused"] == 0:
                number = greedy.call(predictor_body(one_hot(500)))  # 22 KB in, 2 KB out
                wait_until(
                    lambda calls=number // 2 + 1: engine.statistics().answered + statistics()["refused"] == calls
                )
            assert 60 < number < 100
            with connected(address) as client:
                refused = client.ask(predictor_body(one_hot(1000)))
                assert (refused.status, "--max-queue-bytes" in refused.detail) == (RESOURCE_EXHAUSTED, True)
        with connected(address) as client:
            wait_until(lambda: client.ask(predictor_body(one_hot(1000))).status == 0)


def test_messages_that_are_still_arriving_are_bounded_together():
    with native(buffered=100_000) as (address, _, _), connected(address) as client:
        body = grpc_message(bytes(60_000))
        for stream in (1, 3):
            client.headers(stream, request_headers())
            for at in range(0, 48_000, 16_000):
                client.frame(DATA, 0, stream, body[at : at + 16_000])
        client.ping()
        assert not client.answers.keys() & {1, 3}
        client.headers(5, request_headers())
        client.frame(DATA, 0, 5, body[:16_000])
        assert client.answer(5).status == RESOURCE_EXHAUSTED
        client.send(reset(1))
        client._stream = 5
        expect_served(client)


def test_messages_that_are_only_announced_cost_nothing():
    with native(buffered=1 << 20, message_bytes=64 << 20) as (address, _, _), connected(address) as client:
        with holding_at_most(1000 * (72 << 10)):  # a first block of 64 KB, of which nothing is touched, and its stream
            for stream in range(1, 2000, 2):
                client.headers(stream, request_headers())
                client.frame(DATA, 0, stream, grpc_message(b"x", length=64 << 20))
            client.ping()
        assert not any(answer.headers for answer in client.answers.values())
        with connected(address) as honest:
            expect_served(honest)


def test_a_peer_that_answers_pings_stays_and_one_that_does_not_goes():
    limits = {"keepalive_s": 0.15, "keepalive_timeout_s": 0.3}
    with native(**limits) as (address, _, statistics), connected(address) as live, connected(address) as dead:
        asked = 0
        while asked < 3:
            found = live.read()
            assert found is not None
            asked += found.kind == PING
        dead._reply = lambda data: None
        dead.until_closed()
        expect_served(live)
        assert statistics()["connections_timed_out"] == 1


def test_a_connection_without_calls_is_closed_in_time_and_with_a_word():
    with native(idle_s=0.3) as (address, _, _), connected(address) as client:
        expect_served(client)
        assert client.until_closed().goaway[1] == 0


def test_connections_beyond_the_limit_are_closed_at_once():
    with native(max_connections=3) as (address, _, statistics):
        with ExitStack() as stack:
            clients = [stack.enter_context(connected(address)) for _ in range(3)]
            with RawClient(address, greet=False) as fourth:
                fourth.until_closed()
            assert statistics()["connections_refused"] == 1
            for client in clients:
                expect_served(client)
        wait_until(lambda: statistics()["open_connections"] == 0)
        with connected(address) as client:
            expect_served(client)


def test_without_file_descriptors_connections_are_refused_and_open_ones_served():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with native() as (address, _, statistics), connected(address) as honest, ExitStack() as stack:
        host, port = address.split(":")
        made = [stack.enter_context(socket.socket()) for _ in range(12)]
        taken = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(one.fileno() for one in made) + 4, hard))
            while True:  # descriptors that were free below
                try:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            for one in made:
                one.settimeout(PATIENCE_S)
                one.connect((host, int(port)))
            wait_until(lambda: statistics()["connections_refused"] == 12)
            expect_served(honest)
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with connected(address) as client:
            expect_served(client)


# --- lanes, the attendant, and stopping


def test_a_full_queue_is_refused_at_once_while_every_lane_is_held():
    behaviour = FakeBehaviour(hold=threading.Event())
    engine = {"lanes": 2, "policy": BatchPolicy(max_requests=1), "limits": QueueLimits(max_requests=2)}
    with native(behaviour, engine=engine) as (address, made, statistics), connected(address) as client:
        streams = []
        for count in (1, 2):
            streams.append(client.call(predictor_body(one_hot(1))))
            wait_until(lambda count=count: len(behaviour.forwards) == count)
        streams += [client.call(predictor_body(one_hot(1))) for _ in range(2)]
        wait_until(lambda: made.statistics().queued == 2)
        assert client.ask(predictor_body(one_hot(1))).status == RESOURCE_EXHAUSTED
        assert statistics()["helper_polls"] > 0
        behaviour.hold.set()
        assert [client.answer(stream).status for stream in streams] == [0] * 4


def test_cancellation_is_seen_while_every_lane_is_held():
    behaviour = FakeBehaviour(hold=threading.Event())
    with native(behaviour) as (address, made, _), connected(address) as client:
        running = client.call(predictor_body(one_hot(1)))
        wait_until(lambda: behaviour.forwards == [1])
        waiting = [client.call(predictor_body(one_hot(2))) for _ in range(50)]
        wait_until(lambda: made.statistics().queued == 50)
        for stream in waiting:
            client.send(reset(stream))
        wait_until(lambda: made.statistics().cancelled == 50)
        behaviour.hold.set()
        assert client.answer(running).status == 0
        expect_served(client)
        assert behaviour.forwards == [1, 3]


def test_many_lanes_that_poll_at_once_lose_nothing_and_mix_nothing_up():
    wrong: list[str] = []

    def client_of(address: str, seed: int) -> None:
        with connected(address) as client:
            for round_ in range(12):
                features = [jagged(1 + (seed + n) % 9, seed * 1000 + round_ * 10 + n) for n in range(6)]
                streams = [client.call(predictor_body(one)) for one in features]
                for one, stream in zip(features, streams, strict=True):
                    answer = client.answer(stream)
                    if answer.status or not np.array_equal(scores_in(answer.messages[0]), scores_alone(one)):
                        wrong.append(f"{seed}/{round_}: {answer}")

    with native(engine={"lanes": 8}) as (address, made, statistics):
        threads = [threading.Thread(target=client_of, args=(address, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert wrong == []
        assert made.statistics().answered == 8 * 12 * 6
        assert statistics()["answered"] == 8 * 12 * 6


def test_calls_that_come_while_no_lane_polls_are_admitted_all_the_same():
    with native() as (address, made, _), connected(address) as client:
        made.attach(None)
        expect_served(client)
        assert client.ask(b"", CHECK).messages == [b"\x08\x01"]


@pytest.mark.parametrize("grace", [0.0, 1.0])
def test_stopping_waits_no_longer_than_its_grace_and_a_late_answer_goes_nowhere(grace):
    behaviour = FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour) as made:
        with native_transport(made) as (transport, address):
            client = RawClient(address)
            client.call(predictor_body(one_hot(1)))
            wait_until(lambda: behaviour.forwards == [1])
            began = time.monotonic()
            asyncio.run(transport.stop(grace))
            assert grace <= time.monotonic() - began < grace + 5
            assert client.until_closed().goaway is not None
            behaviour.hold.set()
        wait_until(lambda: made.statistics().answered == 1)
    client.socket.close()


def test_stopping_ends_health_watches_at_once():
    with engine_with() as made, native_transport(made) as (transport, address), connected(address) as client:
        watch = client.call(b"", WATCH)
        while watch not in client.answers or not client.answers[watch].messages:
            client.read()
        began = time.monotonic()
        stopped = threading.Thread(target=lambda: asyncio.run(transport.stop(PATIENCE_S)))
        stopped.start()
        assert client.answer(watch).messages == [b"\x08\x01", b"\x08\x02"]
        client.until_closed()
        stopped.join()
        assert time.monotonic() - began < PATIENCE_S / 2


def test_calls_that_come_while_the_plane_stops_are_still_ended():
    behaviour = FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour) as made, native_transport(made) as (transport, address):  # noqa: SIM117
        with connected(address) as client, connected(address) as busy:
            first = client.call(predictor_body(one_hot(1)))
            wait_until(lambda: behaviour.forwards == [1])
            stopped = threading.Thread(target=lambda: asyncio.run(transport.stop(PATIENCE_S)))
            stopped.start()
            while client.goaway is None:
                client.read()
            late = client.call(b"", narsil_v1.METHOD_GET_MODEL)  # sent before the word could be known
            for _ in range(20):
                busy.ping()
            assert client.answer(late).status == 0
            behaviour.hold.set()
            assert client.answer(first).status == 0
            client.until_closed()
            stopped.join()


def test_a_refusing_engine_is_unavailable_and_health_goes_on():
    with engine_with() as made, native_transport(made) as (_, address), connected(address) as client:
        assert made.drain(PATIENCE_S)
        answer = client.ask(predictor_body(one_hot(1)))
        assert (answer.status, "shutting down" in answer.detail) == (UNAVAILABLE, True)
        assert client.ask(b"", CHECK).status == 0
        assert client.ask(b"", narsil_v1.METHOD_GET_MODEL).status == 0


# --- Unix sockets


def test_a_unix_socket_is_served_and_gone_afterwards(tmp_path):
    path = tmp_path / "narsil.sock"
    with native(host=f"unix:{path}") as (address, _, _), connected(address) as client:
        assert address == f"unix:{path}"
        expect_served(client)
    assert not path.exists()


def test_a_socket_file_that_a_dead_server_left_is_replaced(tmp_path):
    path = tmp_path / "narsil.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with native(host=f"unix:{path}") as (address, _, _), connected(address) as client:
        expect_served(client)


def test_a_socket_that_is_in_use_and_a_file_that_is_none_are_left_alone(tmp_path):
    file = tmp_path / "precious"
    file.write_text("a model, perhaps")
    with pytest.raises(OSError, match="cannot listen on unix:"), native(host=f"unix:{file}"):
        pass
    assert file.read_text() == "a model, perhaps"
    path = tmp_path / "narsil.sock"
    with native(host=f"unix:{path}") as (address, _, _), connected(address) as client:
        with pytest.raises(OSError, match="cannot listen on unix:"), native(host=f"unix:{path}"):
            pass
        expect_served(client)
    for wrong in ("/" + "x" * 200, "", str(tmp_path / "nowhere" / "narsil.sock")):
        with pytest.raises(OSError, match="cannot listen on unix:"), native(host=f"unix:{wrong}"):
            pass


# --- everything at once


def _erratic(address: str, seed: int, stop: threading.Event) -> None:
    """A client that asks, cancels, sends nonsense and goes away as the dice fall."""
    dice = random.Random(seed)
    while not stop.is_set():
        with suppress(OSError, AssertionError), RawClient(address) as client:
            live = []
            for _ in range(dice.randrange(1, 40)):
                turn = dice.random()
                if turn < 0.5:
                    live.append(client.call(predictor_body(jagged(1 + dice.randrange(5), dice.randrange(100)))))
                elif turn < 0.7 and live:
                    client.send(reset(live.pop(dice.randrange(len(live)))))
                elif turn < 0.8:
                    client.call(b"\xff")
                elif turn < 0.85:
                    client.call(b"", narsil_v1.METHOD_GET_MODEL)
                elif turn < 0.9:
                    stream = client.next_stream()
                    client.headers(stream, request_headers(REFLECTION))
                    client.frame(DATA, 0, stream, grpc_message(b"\x3a\x00") * dice.randrange(1, 25))
                elif live:
                    client.answer(live.pop())
            if dice.random() < 0.5:
                for stream in live:
                    client.answer(stream)


@pytest.mark.parametrize("end", ["clients", "plane"])
def test_a_storm_of_everything_leaves_nothing_behind(end):
    behaviour = FakeBehaviour(seconds_per_forward=0.0005)
    with (
        engine_with(behaviour, lanes=4) as made,
        native_transport(made, limits={"helper_s": 0.001, "max_resets_per_second": 20_000}) as (transport, address),
    ):
        stop = threading.Event()
        clients = [threading.Thread(target=_erratic, args=(address, seed, stop)) for seed in range(6)]
        for client in clients:
            client.start()
        wait_until(lambda: made.statistics().answered > 500)
        if end == "plane":
            asyncio.run(transport.stop(0.2))
        stop.set()
        for client in clients:
            client.join(PATIENCE_S)
            assert not client.is_alive()
        wait_until(lambda: transport.statistics()["open_calls"] == transport.statistics()["open_connections"] == 0)
        wait_until(lambda: made.statistics().queued + made.statistics().running == 0)
        if end == "clients":
            wait_until(lambda: not transport._requests)
        assert made.statistics().failed == 0
