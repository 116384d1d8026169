"""The plane by itself: one thread is client, network and lane in turn, so that nothing depends on time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from narsil.extension import AVAILABLE
from tests.support import PATIENCE_S

if not AVAILABLE:
    pytest.skip("built without the native extension", allow_module_level=True)

from narsil._native import Call, Plane
from tests.conformance.http2_client import RawClient, connected, request_headers
from tests.http2_peer import CANCEL, DATA, END_STREAM, RST_STREAM, grpc_message

METHODS: dict[str, Any] = {
    "/a.A/Score": "predictor",
    "/a.A/Ask": "unary",
    "/a.A/Talk": "stream",
    "/a.A/Watch": "health_watch",
}
ASK, SCORE, TALK, WATCH = "/a.A/Ask", "/a.A/Score", "/a.A/Talk", "/a.A/Watch"
RESOURCE_EXHAUSTED, UNAVAILABLE = 8, 14


def plane_with(**limits: float) -> Plane:
    return Plane(METHODS, limits)


@pytest.fixture
def plane() -> Iterator[Plane]:
    made = plane_with()
    yield made
    made.stop(0)


@pytest.fixture
def client(plane, tmp_path) -> Iterator[RawClient]:
    path = str(tmp_path / "socket")
    plane.listen_unix(path)
    with RawClient(f"unix:{path}") as made:
        yield made


def next_call(plane: Plane) -> Call:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        calls, _ = plane.poll(0.1)
        if calls:
            assert len(calls) == 1
            return calls[0]
    raise AssertionError("no call came")


def next_gone(plane: Plane) -> list[int]:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        calls, gone = plane.poll(0.1)
        assert not calls
        if gone:
            return gone
    raise AssertionError("nobody went")


def poll_until(plane: Plane, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        assert plane.poll(0.01) == ([], [])


def reset(client: RawClient, stream: int) -> None:
    client.frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4))


def test_a_call_is_handed_out_once_with_what_came(plane, client):
    before = time.monotonic()
    stream = client.call(b"hello", ASK, [("grpc-timeout", "5S")])
    call = next_call(plane)
    assert (call.method, call.body, call.size, call.decoded, call.cancelled) == (ASK, b"hello", 5, False, False)
    assert before <= call.arrived <= time.monotonic()
    assert call.deadline == pytest.approx(call.arrived + 5)
    with pytest.raises(ValueError, match="not decoded"):
        call.arrays()
    assert plane.poll(0.0) == ([], [])
    call.answer(b"world")
    plane.flush()
    assert client.answer(stream).messages == [b"world"]


def test_a_call_without_a_deadline_has_none(plane, client):
    client.call(b"", ASK)
    call = next_call(plane)
    assert (call.deadline, call.body) == (None, b"")


def test_only_scoring_calls_whose_clients_went_away_after_they_were_taken_are_told(plane, client):
    early = client.call(b"x", SCORE)
    reset(client, early)  # before it is taken
    asked = client.call(b"x", ASK)
    call = next_call(plane)
    reset(client, asked)
    taken = client.call(b"y", SCORE)
    score = next_call(plane)
    assert call.cancelled
    assert not score.cancelled
    reset(client, taken)
    assert next_gone(plane) == [score.id]
    assert score.cancelled
    score.answer(b"too late")
    plane.flush()
    assert plane.poll(0.0) == ([], [])


def test_a_client_that_closes_takes_all_its_calls_with_it(plane, client):
    ids = set()
    for _ in range(5):
        client.call(b"x", SCORE)
        ids.add(next_call(plane).id)
    assert len(ids) == 5
    client.socket.close()
    assert set(next_gone(plane)) == ids
    assert plane.statistics()["open_connections"] == plane.statistics()["open_calls"] == 0


def test_a_stream_s_messages_are_handed_out_one_at_a_time_and_in_order(plane, client):
    stream = client.next_stream()
    client.headers(stream, request_headers(TALK))
    client.frame(DATA, 0, stream, b"".join(grpc_message(bytes([n])) for n in range(5)))
    client.frame(DATA, END_STREAM, stream, b"")
    for number in range(5):
        call = next_call(plane)
        assert plane.poll(0.0) == ([], [])
        assert call.body == bytes([number])
        call.answer(call.body * 2)
        plane.flush()
    answer = client.answer(stream)
    assert answer.status == 0
    assert answer.messages == [bytes([n, n]) for n in range(5)]


def test_a_stream_that_fails_ends_and_its_other_messages_are_dropped(plane, client):
    stream = client.next_stream()
    client.headers(stream, request_headers(TALK))
    client.frame(DATA, 0, stream, grpc_message(b"a") + grpc_message(b"b"))
    next_call(plane).fail(9, "not now")
    plane.flush()
    answer = client.answer(stream)
    assert (answer.status, answer.detail, answer.messages) == (9, "not now", [])
    assert plane.poll(0.0) == ([], [])


def test_a_stream_refused_while_its_message_is_being_answered_keeps_its_own_status(plane, client):
    stream = client.next_stream()
    client.headers(stream, request_headers(TALK))
    client.frame(DATA, 0, stream, grpc_message(b"a"))
    call = next_call(plane)
    client.frame(DATA, 0, stream, grpc_message(b"b") * 20)  # more than may wait
    plane.poll(0.05)
    call.fail(9, "x" * 100)
    plane.flush()
    assert client.answer(stream).status == 8


def test_a_stream_that_ends_inside_a_message_is_told_so(plane, client):
    stream = client.next_stream()
    client.headers(stream, request_headers(TALK))
    client.frame(DATA, END_STREAM, stream, b"\0\0")
    plane.poll(0.05)
    assert client.answer(stream).status == 13


def test_an_empty_stream_ends_well(plane, client):
    stream = client.next_stream()
    client.headers(stream, request_headers(TALK), end=True)
    plane.poll(0.05)
    assert client.answer(stream).status == 0


def test_a_wake_ends_one_poll_or_the_next(plane):
    plane.wake()
    assert plane.poll(None) == ([], [])
    polls = [threading.Thread(target=plane.poll, args=(None,)) for _ in range(3)]
    for poll in polls:
        poll.start()
    for _ in polls:
        plane.wake()
    for poll in polls:
        poll.join(PATIENCE_S)
        assert not poll.is_alive()


@pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.000_1, 0.01])
def test_a_poll_ends_in_time(plane, timeout):
    before = time.monotonic()
    assert plane.poll(timeout) == ([], [])
    assert time.monotonic() - before >= timeout


def test_polls_and_the_attendant_end_with_the_plane(plane, client):
    client.call(b"x", ASK)
    held = next_call(plane)
    waiting = [threading.Thread(target=plane.poll, args=(None,)) for _ in range(3)]
    waiting.append(threading.Thread(target=plane.attend))
    for thread in waiting:
        thread.start()
    plane.stop(0)
    plane.stop(0)
    for _ in waiting:
        plane.wake()
    for thread in waiting:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert plane.poll(None) == ([], [])
    assert plane.attend() == ([], [])
    held.answer(b"too late")
    plane.flush()
    assert client.until_closed().goaway is not None


def test_a_refusing_plane_refuses_what_scores_alone(plane, client):
    plane.refuse("going home")
    refused, asked = client.call(b"x", SCORE), client.call(b"y", ASK)
    call = next_call(plane)
    assert call.body == b"y"
    call.answer(b"")
    plane.flush()
    answer = client.answer(refused)
    assert (answer.status, answer.detail) == (UNAVAILABLE, "going home")
    assert client.answer(asked).status == 0


def test_statistics_count_what_happened(plane, client):
    stream = client.call(b"abc", ASK)
    call = next_call(plane)
    assert plane.statistics()["open_calls"] == 1
    call.answer(b"d")
    plane.flush()
    client.answer(stream)
    found = plane.statistics()
    assert {key: found[key] for key in ("connections", "calls", "messages", "answered", "refused", "cancelled")} == {
        "connections": 1,
        "calls": 1,
        "messages": 1,
        "answered": 1,
        "refused": 0,
        "cancelled": 0,
    }
    assert found["bytes_in"] > 0
    assert found["bytes_out"] > 0


def test_watchers_count_against_the_plane_s_memory(tmp_path):
    path = str(tmp_path / "socket")
    plane = plane_with(max_buffered=5_000)
    plane.listen_unix(path)

    def held() -> tuple[int, int]:
        found = plane.statistics()
        return found["watchers"], found["buffered"]

    with RawClient(f"unix:{path}") as one, RawClient(f"unix:{path}") as other:
        one.call(b"", WATCH)
        other.call(b"", WATCH)
        poll_until(plane, lambda: held() == (2, 2 * 2048))
        stream = other.call(b"", WATCH)
        poll_until(plane, lambda: plane.statistics()["refused"] == 1)
        assert other.answer(stream).status == RESOURCE_EXHAUSTED
        assert held() == (2, 2 * 2048)
        one.socket.close()
        poll_until(plane, lambda: held() == (1, 2048))
        other.call(b"", WATCH)
        poll_until(plane, lambda: held() == (2, 2 * 2048))
    plane.stop(0)
    assert held() == (0, 0)


def test_a_plane_that_nobody_stops_lets_go_of_everything(tmp_path):
    path = str(tmp_path / "socket")
    plane = plane_with()
    plane.listen_unix(path)
    with RawClient(f"unix:{path}") as client:
        client.call(b"x", ASK)
        call = next_call(plane)
        del plane  # the call still holds it
        call.answer(b"")
        del call
        client.until_closed()


def test_a_limit_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no such limit: max_strems"):
        plane_with(max_strems=1)


def test_names_that_lead_nowhere_and_ports_that_are_taken_raise_oserror(plane):
    port = plane.listen_tcp("127.0.0.1", 0)
    for host, where in (("127.0.0.1", port), ("no.such.host.invalid", 0), ("192.0.2.1", 0)):
        with pytest.raises(OSError, match=r"\S"):
            plane.listen_tcp(host, where)


def test_two_planes_share_a_port_when_both_say_so():
    one, other = plane_with(), plane_with()
    try:
        port = one.listen_tcp("127.0.0.1", 0, reuse_port=True)
        assert other.listen_tcp("127.0.0.1", port, reuse_port=True) == port
        with pytest.raises(OSError, match=r"\S"):
            other.listen_tcp("127.0.0.1", port)
    finally:
        one.stop(0)
        other.stop(0)


def test_a_plane_listens_on_several_addresses_at_once(plane, tmp_path):
    port = plane.listen_tcp("127.0.0.1", 0)
    path = str(tmp_path / "socket")
    plane.listen_unix(path)
    polling = threading.Thread(target=plane.poll, args=(None,))
    polling.start()
    for address in (f"127.0.0.1:{port}", f"unix:{path}"):
        with connected(address):
            pass
    plane.wake()
    polling.join(PATIENCE_S)
