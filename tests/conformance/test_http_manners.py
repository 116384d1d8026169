"""HTTP connections that do not behave: each is bounded, told so where it can hear it, and harms no other."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from narsil.artifacts.schema import ModelSchema
from narsil.http.connection import ConnectionLimits
from tests.conformance.serving import ask, http_transport
from tests.conformance.test_oip_http import INFER, as_binary, as_json, scores
from tests.support import PATIENCE_S, SCHEMA, engine_with, one_hot, scores_alone, wait_until

HEAD = b"POST /v2/models/fake/infer HTTP/1.1\r\nHost: h\r\n"
SOON = 0.2  # seconds


@contextmanager
def serving_http(limits: dict[str, Any] | None = None, **options: Any) -> Iterator[tuple[Any, str]]:
    with (
        engine_with(None) as engine,
        http_transport(engine, limits=ConnectionLimits(**(limits or {})), **options) as (transport, address),
    ):
        yield transport, address
        wait_until(lambda: is_served(address))  # whatever has happened, others are, if they come in time


def is_served(address: str) -> bool:
    features = one_hot(2)
    try:
        answer = ask(address, INFER, as_json(features))
    except OSError:
        return False
    return answer.status != 408 and np.array_equal(scores(answer), scores_alone(features))


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host, int(port)), PATIENCE_S)
    made.settimeout(PATIENCE_S)
    return made


def everything(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    try:
        while more := client.recv(1 << 16):
            found += more
    except ConnectionResetError:
        pass
    return found


def status_and_error(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"X: " + b"x" * 5000 + b"\r\n\r\n",
        HEAD + b"X: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_a_head_that_is_too_large_is_refused(sent):
    with serving_http({"head_bytes": 4096}) as (_, address), connected(address) as client:
        client.sendall(sent)
        status, error = status_and_error(everything(client))
    assert status == 431
    assert error == "the request's head has more than 4096 bytes (--max-metadata-bytes)"


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"X: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;e=",
    ],
)
def test_a_field_without_end_is_refused_before_it_fills_the_memory(sent):
    with serving_http({"head_bytes": 4096}) as (transport, address), connected(address) as client:
        client.sendall(sent)
        with suppress(OSError):
            for _ in range(1000):
                client.sendall(b"x" * 65536)
        wait_until(lambda: transport.statistics.open_connections == 0)
        assert transport.statistics.malformed == 1
        assert transport.statistics.bytes_in < 1 << 20


def test_trailers_are_passed_over_within_the_bounds_of_a_head():
    body = as_json(one_hot(2))
    chunked = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n"
    with serving_http({"head_bytes": 4096}) as (_, address):
        with connected(address) as client:
            client.sendall(chunked + b"Content-Encoding: br\r\n\r\n")
            assert everything(client).startswith(b"HTTP/1.1 200 ")
        with connected(address) as client:
            client.sendall(chunked + b"X: y\r\n" * 500 + b"\r\n")
            assert b"431" in everything(client).splitlines()[0]


@pytest.mark.parametrize("sent", [b"", b"\r\n", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(sent):
    with serving_http({"head_seconds": SOON}) as (transport, address), connected(address) as client:
        client.sendall(sent)
        answer = everything(client)
        assert transport.statistics.connections_timed_out == 1
    if sent == HEAD:
        assert status_and_error(answer) == (408, f"the request's head took more than {SOON} s to arrive")
    else:
        assert answer == b""


def test_bytes_between_two_requests_do_not_keep_a_connection():
    with serving_http({"head_seconds": SOON}) as (_, address), connected(address) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            more = client.recv(1 << 16)
            assert more, answer
            answer += more
        client.sendall(b"\r\n")
        assert everything(client) == b""


def test_an_idle_connection_is_closed():
    with serving_http({"idle_seconds": SOON}) as (_, address), connected(address) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
        assert everything(client).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_does_not_come_is_not_waited_for():
    with serving_http(body_seconds=SOON) as (_, address), connected(address) as client:
        client.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert status_and_error(everything(client)) == (408, f"the body took more than {SOON} s to arrive")


def test_whoever_asks_before_sending_is_told_before_sending():
    with serving_http(max_message_bytes=4096) as (_, address), connected(address) as client:
        client.sendall(HEAD + b"Content-Length: 100000\r\nExpect: 100-continue\r\n\r\n")
        status, _ = status_and_error(everything(client))
    assert status == 413


def test_connections_beyond_the_limit_are_told_so():
    with serving_http({"connections": 2}) as (transport, address):
        with connected(address), connected(address):
            wait_until(lambda: transport.statistics.open_connections == 2)
            with connected(address) as third:
                status, error = status_and_error(everything(third))
            assert status == 503
            assert error == "this server has 2 connections (--http-connections); try again later"
        wait_until(lambda: transport.statistics.open_connections == 0)
        assert transport.statistics.connections_refused == 1


def test_a_few_requests_may_come_before_the_first_answer_and_no_more():
    one = b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n"
    with serving_http() as (_, address):
        with connected(address) as client:
            client.sendall(one * 9 + one.replace(b"Host", b"Connection: close\r\nHost"))
            assert everything(client).count(b"HTTP/1.1 200 ") == 10
        with connected(address) as client:
            client.sendall(one * 30)
            assert b"more than 16 requests before the first one's answer" in everything(client)


def test_an_answer_that_nobody_reads_is_not_kept():
    schema = ModelSchema(SCHEMA.dense_dim, SCHEMA.features, tasks=tuple("abcdefgh"))  # 10 MB, which no socket buffers
    body, length = as_binary(one_hot(60_000))
    head = HEAD + f"Content-Length: {len(body)}\r\n{next(iter(length))}: {next(iter(length.values()))}\r\n\r\n".encode()
    with (
        engine_with(None, schema=schema) as engine,
        http_transport(engine, limits=ConnectionLimits(write_seconds=SOON)) as (transport, address),
        connected(address) as client,
    ):
        client.sendall(head + body)
        wait_until(lambda: engine.statistics().answered == 1)
        wait_until(lambda: transport.statistics.open_connections == 0)
        assert transport.statistics.connections_timed_out == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # a TLS hello
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b" folded\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so_and_closed(sent):
    with serving_http() as (transport, address), connected(address) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = everything(client)
        assert transport.statistics.malformed == 1
    assert status_and_error(answer)[0] == 400


def test_tls_is_that_of_grpc_and_may_ask_for_the_client_s_certificate(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=h"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True, timeout=PATIENCE_S)
    context = ssl.create_default_context(cafile=str(certificate))
    files = {"tls_certificate": certificate, "tls_key": key}
    with engine_with(None) as engine:
        with http_transport(engine, **files) as (transport, address):
            assert over_tls(address, context).status == 200
            with connected(address) as client:
                client.sendall(b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
                assert not everything(client).startswith(b"HTTP")
            assert transport.statistics.connections == 1
        with http_transport(engine, **files, tls_client_ca=certificate) as (_, address):
            with pytest.raises(OSError, match=r"certificate required|reset|closed"):
                over_tls(address, context)
            context.load_cert_chain(certificate, key)
            assert over_tls(address, context).status == 200


def over_tls(address: str, context: ssl.SSLContext) -> http.client.HTTPResponse:
    connection = http.client.HTTPSConnection(address, timeout=PATIENCE_S, context=context)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse()
    finally:
        connection.close()


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
def test_another_protocol_is_not_taken_up(upgrade):
    head = b"GET /livez HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: " + upgrade
    with serving_http({"idle_seconds": SOON}) as (_, address), connected(address) as client:
        client.sendall(head + b"\r\nSec-WebSocket-Key: a\r\n\r\n")
        assert everything(client).startswith(b"HTTP/1.1 200 ")
