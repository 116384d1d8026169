"""Whatever ModelInferRequest comes, both transports answer it alike: native code and the portable codec, to which it
leaves what is unusual, are two readers of one protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil.dataflow import RequestLimits
from narsil.extension import AVAILABLE
from tests import oip_messages
from tests.conformance.serving import serving
from tests.support import PATIENCE_S, SCHEMA

Answer = tuple[str, str, bytes]  # status, text, message
Ask = Callable[[bytes], Answer]

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="built without it")


@pytest.fixture(scope="module")
def transports() -> Iterator[dict[str, Ask]]:
    asks = {}
    with ExitStack() as opened:
        for kind in ("grpcio", "native"):
            address, _ = opened.enter_context(serving(kind, limits=RequestLimits(max_rows=10, max_ids=60)))
            channel = opened.enter_context(grpc.insecure_channel(address))
            asks[kind] = asking(channel)
        yield asks


def asking(channel: grpc.Channel) -> Ask:
    stub = channel.unary_unary(oip_messages.METHOD)

    def ask(body: bytes) -> Answer:
        try:
            return "OK", "", stub(body, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return error.code().name, error.details(), b""

    return ask


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_right_requests_are_answered_alike_in_every_byte(transports, data):
    request, _ = data.draw(oip_messages.infer_requests(SCHEMA))
    answers = {kind: ask(request.SerializeToString()) for kind, ask in transports.items()}
    assert answers["native"] == answers["grpcio"]


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_spoiled_requests_are_answered_alike_in_every_byte(transports, data):
    request, _ = data.draw(oip_messages.infer_requests(SCHEMA))
    body = data.draw(oip_messages.spoiled(request)).SerializeToString()
    answers = {kind: ask(body) for kind, ask in transports.items()}
    assert answers["native"] == answers["grpcio"]
