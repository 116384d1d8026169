"""The benchmark's own parts: seeded workloads, schedules, summaries, ratios and what is rendered from them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from narsil.backends.fake import FakeBackend, FakeBehaviour
from narsil.bench.generator import choose_client, run_load
from narsil.bench.load import Load, LoadError, Outcome, due_times
from narsil.bench.measure import BUCKET_EDGES_S, Measurement, deviation, measure, ratio, reference_scores, summarize
from narsil.bench.pictures import draw
from narsil.bench.report import loaded_by, make_report, ratio_lines, render_table, write_report
from narsil.bench.servers import AttachedServer, ServerDied, cpu_seconds
from narsil.bench.workload import Workload
from narsil.cli.bench import command
from narsil.engine.served_model import RequestLimits
from narsil.transports.codec import narsil_v1, predictor
from tests.support import SCHEMA, engine_with, grpc_server

WORKLOAD = Workload(SCHEMA, rows=5, bodies=30)
NATIVE_IS_BUILT = importlib.util.find_spec("narsil._load") is not None
needs_native = pytest.mark.skipif(not NATIVE_IS_BUILT, reason="narsil._load is not built")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "grpcio"])
def client(request) -> str:
    """What the load is made with: either gives the same answers."""
    return request.param


@pytest.mark.parametrize("max_ids", [1, 3])
def test_the_same_seed_gives_the_same_bodies_all_distinct_and_valid(max_ids):
    workload = Workload(SCHEMA, rows=5, bodies=30, max_ids=max_ids, seed=4)
    wires: tuple[Any, ...] = (("predictor", predictor.decode), ("narsil", narsil_v1.decode))
    for wire, decode in wires:
        bodies = workload.serialized(wire)
        assert bodies == workload.serialized(wire)
        assert bodies[:7] == workload.serialized(wire, 7)
        assert len(set(bodies)) == 30
        for body in bodies:
            decode(body, SCHEMA, RequestLimits())


def test_another_seed_gives_other_bodies():
    assert Workload(SCHEMA, seed=1, bodies=1).serialized("narsil") != Workload(SCHEMA, seed=2, bodies=1).serialized(
        "narsil"
    )


def test_poisson_arrivals_keep_their_rate_on_average_and_uniform_ones_exactly():
    load = Load("", WORKLOAD, requests=20_000, rate=100.0)
    times = due_times(load, 100.0)
    assert (np.diff(times) >= 0).all()
    assert times[-1] == pytest.approx(200.0, rel=0.05)
    assert np.diff(times).std() == pytest.approx(0.01, rel=0.05)  # exponential gaps: deviation equals the mean
    even = due_times(Load("", WORKLOAD, requests=5, rate=10.0, arrivals="uniform"), 10.0)
    np.testing.assert_allclose(even, [0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("protocol", ["predictor", "narsil"])
@pytest.mark.parametrize("rate", [None, 400.0])
@pytest.mark.parametrize("connections", [1, 2])
def test_a_load_counts_checks_and_compares_every_reply(client, protocol, rate, connections):
    expected = reference_scores(FakeBackend(SCHEMA), WORKLOAD, 8)
    with engine_with(lanes=2) as engine, grpc_server(engine) as address:
        load = Load(
            address, WORKLOAD, protocol, requests=50, warmup=3, concurrency=4, rate=rate, keep=8,
            connections=connections, client=client,
        )  # fmt: skip
        found = measure("fake", load, expected=expected)
        assert engine.statistics().answered == 53
    assert found.errors == {}
    assert found.max_abs_deviation == 0.0
    assert (found.client, found.connections) == (client, connections)
    assert found.client_cpu_us_per_req > 0
    assert sum(found.histogram) == 50
    assert found.p50_ms <= found.p90_ms <= found.p99_ms <= found.p999_ms


def test_an_open_loop_charges_the_server_for_the_time_a_request_was_due(client):
    """One forward holds everybody up: requests due meanwhile wait, and their latency says so."""
    behaviour = FakeBehaviour(hold=threading.Event())
    with engine_with(behaviour) as engine, grpc_server(engine) as address:
        load = Load(address, WORKLOAD, requests=40, warmup=0, rate=200.0, arrivals="uniform", client=client)
        outcome = run_load(load, on_measure=threading.Timer(0.5, behaviour.hold.set).start)
    assert len(outcome.latencies) == 40
    assert outcome.latencies.max() > 0.15
    assert np.median(outcome.latencies) > 0.05


def test_failures_are_counted_by_kind_and_have_no_latency(client):
    behaviour = FakeBehaviour(fail_if=lambda batch: bool(batch.values[0] % 2))
    with engine_with(behaviour) as engine, grpc_server(engine) as address:
        outcome = run_load(Load(address, WORKLOAD, requests=30, warmup=0, concurrency=1, client=client))
    assert set(outcome.errors) == {"INTERNAL"}
    assert len(outcome.latencies) == 30 - outcome.errors["INTERNAL"] > 0


def test_a_server_that_answers_nothing_rightly_is_an_error_at_once(client):
    with (
        engine_with(FakeBehaviour(fail_if=lambda batch: True)) as engine,
        grpc_server(engine) as address,
        pytest.raises(LoadError, match=r"every warmup request failed: \{'INTERNAL': 5\}"),
    ):
        run_load(Load(address, WORKLOAD, requests=5, warmup=5, client=client))


def test_a_server_that_is_not_there_is_an_error(client, tmp_path):
    target = f"unix:{tmp_path / 'nobody'}"
    with pytest.raises(LoadError, match=f"no server answers at {target}"):
        run_load(Load(target, WORKLOAD, timeout_s=0.2, client=client))


def test_progress_and_the_two_moments_are_heard_in_their_order(client):
    heard: list[str] = []
    behaviour = FakeBehaviour(hold=threading.Event())

    def on_progress(done: int) -> None:
        heard.append("progress")
        behaviour.hold.set()

    with engine_with(behaviour) as engine, grpc_server(engine) as address:
        run_load(
            Load(address, WORKLOAD, requests=3, warmup=0, client=client),
            on_measure=lambda: heard.append("measure"),
            on_progress=on_progress,
            on_measured=lambda: heard.append("measured"),
        )
    assert heard[0] == "measure"
    assert heard[-1] == "measured"
    assert set(heard[1:-1]) == {"progress"}


def test_the_client_is_the_native_one_where_it_is_built_and_takes_the_target():
    best = "native" if NATIVE_IS_BUILT else "grpcio"
    assert choose_client("auto") == best
    assert choose_client("auto", ["127.0.0.1:1", "[::1]:1", "unix:/run/narsil"]) == best
    assert choose_client("auto", ["127.0.0.1:1", "dns:///localhost:1"]) == "grpcio"
    assert choose_client("grpcio", ["127.0.0.1:1"]) == "grpcio"


@needs_native
def test_a_target_that_the_native_client_does_not_take_is_an_error_where_it_is_asked_for():
    with pytest.raises(LoadError, match="dns:///localhost:1 is none of HOST:PORT"):
        choose_client("native", ["dns:///localhost:1"])


def test_the_native_client_that_is_not_built_is_an_error_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "narsil._load", None)  # importing it raises ImportError
    assert choose_client("auto") == "grpcio"
    with pytest.raises(LoadError, match="native client is not there"):
        choose_client("native")


def made(name: str, samples: float, deviation: float | None = 0.0, **changes) -> Measurement:
    values = {
        "name": name, "concurrency": 16, "batch_size": 100, "req_per_s": samples / 100, "samples_per_s": samples,
        "p50_ms": 10.0, "p90_ms": 11.0, "p99_ms": 12.0, "p999_ms": 13.0, "errors": {}, "peak_mib": 100.0,
        "server_cpu_us_per_req": 500.0, "client_cpu_us_per_req": 100.0, "client_busy": 0.1,
        "max_abs_deviation": deviation, "histogram": tuple(int(n == 60) for n in range(len(BUCKET_EDGES_S) - 1)),
    }  # fmt: skip
    return Measurement(**{**values, **changes})


def test_a_row_is_the_median_of_its_rounds_with_the_worst_memory_and_deviation():
    runs = [
        made("a", 100, 1e-7, peak_mib=90.0),
        made("a", 300, 3e-7, peak_mib=120.0, errors={"INTERNAL": 2}),
        made("a", 200, None),
    ]
    row = summarize(runs)
    assert (row.samples_per_s, row.peak_mib, row.max_abs_deviation, row.errors) == (200, 120.0, 3e-7, {"INTERNAL": 2})
    assert sum(row.histogram) == 3


def test_a_ratio_is_taken_round_by_round():
    found = ratio([made("a", 200), made("a", 90)], [made("b", 100), made("b", 100)], "samples_per_s")
    assert (found.median, found.min, found.max, found.rounds, found.left_out) == pytest.approx((1.45, 0.9, 2.0, 2, 0))


def silent(name: str) -> Measurement:
    """A run in which every request failed."""
    return made(name, 0.0, None, p50_ms=float("nan"), p99_ms=float("nan"), errors={"INTERNAL": 9})


def test_rounds_without_an_answer_are_left_out_of_a_ratio_and_counted():
    ours, theirs = [made("a", 200), made("a", 300), silent("a")], [made("b", 100), silent("b"), made("b", 100)]
    throughput, latency = (ratio(ours, theirs, metric) for metric in ("samples_per_s", "p50_ms"))
    assert (throughput.median, throughput.min, throughput.max) == (1.0, 0.0, 2.0)  # nothing answered is a throughput
    assert (throughput.rounds, throughput.left_out) == (2, 1)
    assert (latency.median, latency.rounds, latency.left_out) == (1.0, 1, 2)  # but no latency
    report = make_report([ours, theirs], [throughput])
    assert ratio_lines(report)[0].endswith(
        "1.00x the throughput (0.00 to 2.00; rounds without an answer left out: 1) of b"
    )


def test_a_baseline_that_answers_nothing_leaves_nothing_to_compare(tmp_path):
    ours, theirs = [made("a", 200)] * 3, [silent("b")] * 3
    report = make_report([ours, theirs], [ratio(ours, theirs, metric) for metric in ("samples_per_s", "p50_ms")])
    write_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["ratios"][0]["median"] is None
    (line,) = ratio_lines(report)
    assert "no throughput to compare" in line
    assert "no median latency to compare" in line
    for picture in draw(report, tmp_path, "title"):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_a_run_that_answered_nothing_has_no_part_in_the_median_of_latencies(order):
    runs = [made("a", 100, p50_ms=5.0), silent("a"), made("a", 100, p50_ms=7.0)]
    row = summarize([runs[number] for number in order])
    assert (row.p50_ms, row.samples_per_s, row.errors) == (6.0, 100, {"INTERNAL": 9})


def test_one_round_is_said_to_be_one():
    report = make_report([], [ratio([made("a", 200)], [made("b", 100)], "samples_per_s")])
    assert ratio_lines(report) == ["concurrency 16: a: 2.00x the throughput (one round) of b"]


def test_deviation_is_the_largest_difference_of_any_score():
    outcome = Outcome(
        np.array([]), {}, 1.0, 1.0, {0: np.array([0.1, 0.2], np.float32), 1: np.array([0.5, 0.9], np.float32)}
    )
    assert deviation(outcome, [np.array([0.1, 0.2], np.float32), np.array([0.5, 0.5], np.float32)]) == pytest.approx(
        0.4
    )
    assert deviation(outcome, []) is None


@pytest.mark.parametrize("protocol", ["predictor", "narsil"])
def test_the_scores_of_every_task_are_compared(client, protocol):
    schema = replace(SCHEMA, tasks=("click", "buy"), widths=())
    workload = Workload(schema, rows=5, bodies=8)
    expected = reference_scores(FakeBackend(schema), workload, 8)
    expected[3][5 + 2] += 0.5  # the third row of the second task
    with engine_with(schema=schema) as engine, grpc_server(engine) as address:
        found = measure(
            "fake", Load(address, workload, protocol, requests=8, warmup=0, keep=8, client=client), expected=expected
        )
    assert found.errors == {}
    assert found.max_abs_deviation == pytest.approx(0.5, rel=1e-4)


def test_a_task_that_is_missing_in_a_reply_deviates_beyond_all_bounds():
    outcome = Outcome(np.array([]), {}, 1.0, 1.0, {0: np.array([0.1, 0.2], np.float32)})
    assert deviation(outcome, [np.array([0.1, 0.2, 0.3, 0.4], np.float32)]) == np.inf


@pytest.mark.parametrize("number", [0, 1])
def test_a_score_that_is_no_number_deviates_beyond_all_bounds(number):
    scores = [np.array([0.1, 0.2], np.float32), np.array([0.5, 0.5], np.float32)]
    found = {body: one.copy() for body, one in enumerate(scores)}
    found[number][1] = np.nan
    worst = deviation(Outcome(np.array([]), {}, 1.0, 1.0, found), scores)
    assert worst == np.inf
    report = json.loads(json.dumps(make_report([[made("a", 1, worst)]]), allow_nan=False))
    assert report["rows"][0]["max_abs_deviation"] == "inf"
    assert list(render_table(report, "title").columns[7].cells)[1] == "inf"


def test_arrivals_without_a_rate_are_refused():
    found = CliRunner().invoke(command, ["--arrivals", "uniform"])
    assert found.exit_code == 2
    assert "--arrivals is for an open loop: give --rate too" in found.output


def test_a_servers_cpu_time_is_read_from_its_own_clock():
    before, found, after = time.process_time(), cpu_seconds(os.getpid()), time.process_time()
    assert before <= found <= after


def test_a_server_that_has_ended_is_said_so():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    with pytest.raises(ServerDied, match=f"there is no process {ended.pid}"):
        AttachedServer(ended.pid).cpu_s()


def test_a_report_says_what_made_the_load():
    native, both = made("a", 1, client="native"), [made("a", 1, client="native"), made("b", 1, connections=4)]
    assert loaded_by(make_report([[native]])) == "load: native client, 1 connection"
    assert loaded_by(make_report([[one] for one in both])) == (
        "load: grpcio client, 4 connections; native client, 1 connection"
    )
    assert loaded_by({"rows": [{"name": "of an older report"}]}) == "load: grpcio client, 1 connection"


def test_a_busy_client_is_called_client_bound():
    assert made("a", 1, client_busy=0.95).client_bound
    assert not made("a", 1, client_busy=0.3).client_bound


def test_a_report_is_plain_json_and_everything_is_rendered_from_it(tmp_path):
    runs = [[made("C++ (baseline)", 100), made("C++ (baseline)", 110)], [made("ours", 220), made("ours", 250, None)]]
    report = make_report(runs, [ratio(runs[1], runs[0], "samples_per_s")], {"seed": 0})
    write_report(report, tmp_path / "out" / "report.json")
    read = json.loads((tmp_path / "out" / "report.json").read_text())
    assert read == json.loads(json.dumps(report))
    assert [row["name"] for row in read["rows"]] == ["C++ (baseline)", "ours"]
    assert len(read["runs"]) == 4
    assert read["machine"]["cores"] >= 1
    assert render_table(read, "title").row_count == 3
    assert ratio_lines(read) == ["concurrency 16: ours: 2.24x the throughput (2.20 to 2.27) of C++ (baseline)"]
    for picture in draw(read, tmp_path / "pictures", "title"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_in_which_every_request_failed_is_still_a_valid_report(tmp_path):
    nothing = made("ours", 0.0, None, p50_ms=float("nan"), p99_ms=float("nan"), errors={"INTERNAL": 9})
    report = make_report([[nothing]])
    write_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["p50_ms"] is None
    assert render_table(report, "title").row_count == 2
