"""Real clients in numbers and sizes: grpcio's two, a C++ client, h2load."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import threading
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest

from narsil.backends.fake import FakeBehaviour
from narsil.bench.workload import predictor_body
from narsil.client import build_request
from narsil.engine.queue import QueueLimits
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports.codec import narsil_v1, predictor
from tests.conformance.http2_client import connected
from tests.conformance.serving import predict_torchrec, scores_in, serving, serving_transport
from tests.memory import Held
from tests.messages import narsil_pb2
from tests.support import PATIENCE_S, TRANSPORTS, jagged, one_hot, run, scores_alone, unary, wait_until

ROOT = Path(__file__).parents[2]
native_only = pytest.mark.parametrize("kind", TRANSPORTS[1:], indirect=True)
LARGE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@pytest.fixture(params=TRANSPORTS)
def kind(request) -> str:
    """The transport under test."""
    return request.param


def test_messages_of_every_size_are_taken_and_answered(kind):
    limits = RequestLimits(max_rows=1 << 22, max_ids=1 << 24)
    with (
        serving(kind, limits=limits, message_bytes=64 << 20, engine_limits=QueueLimits(max_rows=1 << 22)) as (
            address,
            _,
        ),
        grpc.insecure_channel(address, LARGE) as channel,
    ):
        call = channel.unary_unary(predictor.METHOD)
        for size in (0, 1, 4, 5, 16_379, 16_384, 65_530, 65_536, 1 << 20):  # borders of frames and windows, in noise
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff" * size, timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for rows in (1, 350, 400, 23_000, 90_000):  # up to 4 MB
            features = one_hot(rows)
            np.testing.assert_array_equal(predict_torchrec(channel, features), scores_alone(features))
        # 64 MB to the byte: a request_id fills what the rows leave.
        rows = (64 << 20) // 28 - 100
        features = one_hot(rows)
        body = build_request(features.dense, np.ascontiguousarray(features.sparse.ids.T))
        filler = (64 << 20) - len(body) - 5
        body = build_request(features.dense, np.ascontiguousarray(features.sparse.ids.T), request_id="r" * filler)
        body += b"\x0a\x00" * ((64 << 20) - len(body) > 1)
        assert (64 << 20) - 3 <= len(body) <= 64 << 20
        reply = narsil_pb2.PredictResponse.FromString(unary(channel, narsil_v1.METHOD)(body, timeout=PATIENCE_S))
        assert len(reply.request_id) == filler
        found = np.frombuffer(reply.scores[0].values, np.float32)
        np.testing.assert_array_equal(found, scores_alone(features))
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes((64 << 20) + 1), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_thousand_streams_of_one_channel_are_in_flight_at_once(kind):
    behaviour = FakeBehaviour(hold=threading.Event())
    with serving(kind, behaviour) as (address, engine), grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(predictor.METHOD)
        features = [jagged(1 + seed % 7, seed) for seed in range(1000)]
        futures = [call.future(predictor_body(one), timeout=PATIENCE_S) for one in features]
        wait_until(lambda: engine.statistics().queued + engine.statistics().running == 1000)
        behaviour.hold.set()
        for one, future in zip(features, futures, strict=True):
            np.testing.assert_array_equal(scores_in(future.result()), scores_alone(one))


def test_a_storm_of_cancellations_leaves_nothing_behind(kind):
    async def storm(address: str) -> None:
        random = np.random.default_rng(0)
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary(predictor.METHOD)
            for _ in range(4):
                calls = [call(predictor_body(one_hot(1 + n % 5, n))) for n in range(150)]
                for number in random.permutation(150)[:120]:
                    if random.random() < 0.5:
                        await asyncio.sleep(0)
                    calls[number].cancel()
                ended = await asyncio.gather(*calls, return_exceptions=True)
                for number, reply in enumerate(ended):
                    if isinstance(reply, bytes):
                        np.testing.assert_array_equal(scores_in(reply), scores_alone(one_hot(1 + number % 5, number)))
                assert sum(isinstance(reply, bytes) for reply in ended) >= 30

    with serving_transport(kind, FakeBehaviour(seconds_per_forward=0.001), lanes=2) as (address, engine, transport):
        run(storm(address))
        wait_until(lambda: engine.statistics().queued + engine.statistics().running == 0)
        statistics = engine.statistics()
        assert statistics.failed == statistics.rejected == 0
        if kind == "native":
            wait_until(lambda: transport.statistics()["open_calls"] == 0)
            assert not transport._requests


def test_a_queue_that_is_full_under_load_refuses_and_loses_nothing(kind):
    behaviour, limits = FakeBehaviour(seconds_per_forward=0.002), QueueLimits(max_requests=20)
    with (
        serving(kind, behaviour, engine_limits=limits) as (address, engine),
        grpc.insecure_channel(address) as channel,
    ):
        call = channel.unary_unary(predictor.METHOD)
        futures = [call.future(predictor_body(one_hot(1)), timeout=PATIENCE_S) for _ in range(500)]
        ended = [future.code() for future in futures]
        assert set(ended) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        statistics = engine.statistics()
        assert ended.count(grpc.StatusCode.OK) == statistics.answered
        assert ended.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == statistics.rejected


@native_only  # grpcio sends more than its own clients take
def test_a_status_s_text_is_cut_to_what_clients_take(kind, monkeypatch):
    text = "zażółć %41 \r\n\x00 " + "é" * 2000

    def refuse(*_: object) -> None:
        raise InvalidRequest(text)

    async def ask(address: str) -> str:
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                await unary(channel, predictor.METHOD)(b"x")
            except grpc.RpcError as error:
                return error.details()
        raise AssertionError("it was not refused")

    monkeypatch.setattr(predictor, "read", refuse)
    with serving(kind) as (address, _):
        found = run(ask(address))
        assert found.startswith("zażółć %41 \r\n\x00 ééé")
        assert text.startswith(found.rstrip("\ufffd"))  # it may be cut, and never grows


def test_nothing_stays_of_requests_that_have_ended(kind):
    """What is lost with each request is lost in every round; what buffers and caches happen to hold is not."""
    requests, lost = (20_000, 8) if kind == "native" else (3_000, 64)  # bytes a request; grpcio's own core wavers more
    bodies = [predictor_body(make(100, seed)) for seed in range(10) for make in (one_hot, jagged)]
    behaviour = FakeBehaviour()
    with serving_transport(kind, behaviour, lanes=2) as (address, _, transport):

        def after(requests: int) -> Held:
            with connected(address) as client:
                for _ in range(0, requests, 2 * len(bodies)):
                    served = [client.call(body) for body in bodies]
                    refused = [client.call(b"\xff") for _ in bodies]
                    assert {client.answer(stream).status for stream in served} == {0}
                    assert {client.answer(stream).status for stream in refused} == {3}
                    client.answers.clear()
            if kind == "native":
                wait_until(lambda: transport.statistics()["open_connections"] == 0)
            behaviour.forwards.clear()  # what the fake remembers
            return Held.now()

        held = [after(2000), after(requests), after(requests)]
    stayed = [after - before for before, after in pairwise(held)]
    assert min(one.native for one in stayed) < lost * requests, stayed  # none of ours counts less than 32
    assert min(one.objects for one in stayed) < requests / 20, stayed


CPP_CLIENT = r"""
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <atomic>
#include <fstream>
#include <iostream>
#include <iterator>
#include <thread>

// ADDRESS METHOD REQUEST REPLY THREADS COUNT: sends the request so often, and compares what comes back.
static std::string read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int main(int, char** argv) {
  const std::string request = read(argv[3]), expected = read(argv[4]);
  const int threads = std::stoi(argv[5]), count = std::stoi(argv[6]);
  auto channel = grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials());
  std::atomic<int> right{0}, wrong{0}, refused{0};
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      grpc::GenericStub stub(channel);
      for (int i = 0; i < count; ++i) {
        grpc::ClientContext context;
        context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
        grpc::CompletionQueue queue;
        grpc::Slice slice(request);
        grpc::ByteBuffer out(&slice, 1), in;
        grpc::Status status;
        auto call = stub.PrepareUnaryCall(&context, argv[2], out, &queue);
        call->StartCall();
        call->Finish(&in, &status, nullptr);
        void* tag;
        bool ok;
        queue.Next(&tag, &ok);
        std::vector<grpc::Slice> slices;
        std::string reply;
        if (status.ok()) {
          in.Dump(&slices);
          for (const auto& one : slices) reply.append(reinterpret_cast<const char*>(one.begin()), one.size());
          ++(reply == expected ? right : wrong);
        } else {
          ++refused;
          if (i == 0 && t == 0) std::cout << status.error_code() << " " << status.error_message() << "\n";
        }
      }
    });
  for (auto& thread : running) thread.join();
  std::cout << right << " " << wrong << " " << refused << "\n";
}
"""


@pytest.fixture(scope="module")
def cpp_client(tmp_path_factory) -> Path:
    """A client of grpc++ by way of its generic stub; compiled once."""
    folder = tmp_path_factory.mktemp("cpp")
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "grpc++"], capture_output=True, text=True, check=False)
    if flags.returncode or not shutil.which("g++"):
        pytest.skip("no g++ or no libgrpc++-dev")
    source, program = folder / "client.cpp", folder / "client"
    source.write_text(CPP_CLIENT)
    command = ["g++", "-std=c++17", "-O0", str(source), "-o", str(program), *flags.stdout.split()]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return program


def test_a_cpp_client_gets_its_answers_and_its_refusals(kind, cpp_client, tmp_path):
    features = jagged(40, 3)
    request, reply = tmp_path / "request", tmp_path / "reply"
    request.write_bytes(predictor_body(features))
    reply.write_bytes(predictor.encode({"default": scores_alone(features)}))

    def ask(address: str, method: str, threads: int = 4, count: int = 25) -> list[str]:
        command = [str(cpp_client), address, method, str(request), str(reply), str(threads), str(count)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()

    with serving(kind, lanes=2) as (address, _):
        assert ask(address, predictor.METHOD) == ["100 0 0"]
        assert ask(address, "/predictor.Predictor/Nothing", 1, 1)[0].startswith("12 ")
        request.write_bytes(b"\xff")
        refusal, counts = ask(address, predictor.METHOD, 2, 5)
        assert refusal.startswith("3 not a valid protobuf message")
        assert counts == "0 0 10"


def test_h2load_s_requests_all_succeed(kind, tmp_path):
    if not shutil.which("h2load"):
        pytest.skip("no h2load (Debian: nghttp2-client)")
    body = predictor_body(one_hot(30))
    data = tmp_path / "body"
    data.write_bytes(b"\x00" + len(body).to_bytes(4) + body)
    with serving(kind, lanes=2) as (address, engine):
        command = ["h2load", "-n", "1500", "-c", "15", "-m", "20", "-d", str(data)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        found = subprocess.run(
            [*command, f"http://{address}{predictor.METHOD}"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        assert re.search(r"1500 done, 1500 succeeded, 0 failed, 0 errored, 0 timeout", found), found
        assert "status codes: 1500 2xx" in found
        assert engine.statistics().answered == 1500
