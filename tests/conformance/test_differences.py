"""Where the transports differ is what docs/protocol.md says, and nothing else of it: asked of real servers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from narsil.bench.workload import predictor_body
from tests.conformance.serving import serving
from tests.documents import read, rows_of, sections
from tests.support import PATIENCE_S, TRANSPORTS, one_hot

PREDICT = "/predictor.Predictor/Predict"
SOON_S = 1.0  # for a call that never ends

Act = Callable[[Any], object]  # of a channel


def predict(body: bytes, **options: Any) -> Act:
    return lambda channel: channel.unary_unary(PREDICT)(body, timeout=PATIENCE_S, **options)


def stream(*bodies: bytes) -> Act:
    return lambda channel: channel.stream_unary(PREDICT)(iter(bodies), timeout=PATIENCE_S if bodies else SOON_S)


def ask(method: str, body: bytes) -> Act:
    return lambda channel: channel.unary_unary(method)(body, timeout=PATIENCE_S)


GOOD = predictor_body(one_hot(3))

ACTS: dict[str, Act] = {
    "a compressed message": predict(predictor_body(one_hot(100)), compression=grpc.Compression.Gzip),
    "a method that is not there": ask("/predictor.Predictor/Train", b""),
    "a message of 17,000,000 bytes": predict(bytes(17_000_000)),
    "metadata of 17,000 bytes": predict(GOOD, metadata=[("baggage", "x" * 17_000)]),
    "a call without a message": stream(),
    "a second message of one call": stream(GOOD, GOOD),
    "a HealthCheckRequest that is none": ask("/grpc.health.v1.Health/Check", b"\xff"),
}


def table() -> dict[str, dict[str, str]]:
    """What differs -> transport -> what the page says that a client is told."""
    rows = rows_of(sections(read("docs/protocol.md"), 2)["The two transports"])
    return {about: {"native": native, "grpcio": grpcio} for about, native, grpcio in rows}


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("about", ACTS)
def test_a_difference_is_as_the_page_has_it(kind: str, about: str) -> None:
    said = table()[about][kind]
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with serving(kind) as (address, _), grpc.insecure_channel(address, options) as channel:
        try:
            ACTS[about](channel)
        except grpc.RpcError as error:
            code, text = error.code().name, re.sub(r"\bhas \d+ bytes", "has N bytes", error.details() or "")
        else:
            code, text = "OK", ""
    beginning = f"{code}: `{text}`" if "`" in said else code
    assert said.startswith(beginning), f"docs/protocol.md: {about}, {kind}: it is {beginning}"
    others = [other for other in table()[about].values() if other != said]
    assert others, f"docs/protocol.md: {about} is no difference"
