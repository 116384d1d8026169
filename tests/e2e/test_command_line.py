"""The newcomer's path through the command line: package, inspect, serve, predict, bench, compare."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

from narsil.artifacts.artifact import open_artifact
from narsil.backends.registry import load_backend
from narsil.bench.generator import choose_client
from narsil.bench.servers import ServerProcess, narsil_server
from narsil.dataflow import Features, OneHot
from narsil.engine.collate import Collator

ROOT = Path(__file__).parents[2]
ROW_KEYS = {
    "name", "concurrency", "batch_size", "req_per_s", "samples_per_s", "p50_ms", "p99_ms", "errors", "peak_mib",
    "server_cpu_us_per_req", "client_cpu_us_per_req", "max_abs_deviation",
}  # fmt: skip


def narsil(*arguments: object) -> str:
    return output(sys.executable, "-m", "narsil", *arguments)


def output(*argv: object) -> str:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "dlrm"
    options = "--rows 40,9,500 --tables 3 --dim 16 --dense-features 4 --dense-arch 32,16 --over-arch 32,1 --seed 5"
    printed = narsil("package", "dlrm", "--out", out, *options.split())
    assert f"narsil serve --model {out}" in printed.replace("\n", " ")
    return out


@pytest.fixture(scope="module")
def server(model) -> Iterator[ServerProcess]:
    with narsil_server(model, lanes=1) as process:
        yield process


def test_package_writes_both_models_and_a_manifest(model):
    names = {path.name for path in model.iterdir()}
    assert {"model_default.pt", "narsil_dlrm_default.onnx", "manifest.json"} <= names
    schema = json.loads((model / "manifest.json").read_text())["schema"]
    assert [feature["rows"] for feature in schema["features"]] == [40, 9, 500]


@pytest.mark.parametrize("path", [".", "model_default.pt"])
def test_inspect_reads_the_schema_from_the_manifest_or_the_artifact_itself(model, path):
    found = json.loads(narsil("inspect", model / path, "--json"))
    assert found["schema"] == json.loads((model / "manifest.json").read_text())["schema"]


def test_inspect_of_something_else_is_one_clear_sentence(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"not a model")
    done = subprocess.run(
        [sys.executable, "-m", "narsil", "inspect", str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("narsil: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_predict_sends_random_rows(server):
    found = json.loads(narsil("predict", "--target", server.address, "--rows", 7, "--json"))
    scores = found["scores"]["default"]
    assert len(scores) == 7
    assert len(set(scores)) == 7
    assert all(0 < score < 1 for score in scores)


def test_predict_sends_a_file_s_rows_and_prints_their_scores(server, model, tmp_path):
    rows = [{"dense": [0.5, 0, 1, 2], "sparse": {"cat_0": [i], "cat_1": [i], "cat_2": [400 + i]}} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    found = json.loads(narsil("predict", "--target", server.address, "--schema", model, "--file", path, "--json"))
    backend = load_backend(open_artifact(model), "torch")
    features = Features(
        3,
        np.array([row["dense"] for row in rows], np.float32),
        OneHot(np.array([[0, 1, 2], [0, 1, 2], [400, 401, 402]], np.int32)),
    )
    direct = backend.run(Collator(backend.schema).collate([features]))["default"]
    np.testing.assert_allclose(found["scores"]["default"], direct, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"dense": [0, 0, 0, 0], "sparse": {"cat_0": [1], "cat_1": [1]}}', "line 1: no 'cat_2'"),
        ('{"dense": [0, 0, 0], "sparse": {"cat_0": [1], "cat_1": [1], "cat_2": [1]}}', "line 1: "),
        ('{"dense": [0, 0, 0, 0], "sprase": {}}', "unknown key 'sprase'"),
        (
            '{"dense": [0, 0, 0, 0], "sparse": {"cat_0": [1.7], "cat_1": [1], "cat_2": [1]}}',
            "line 1: feature cat_0, position 0: 1.7 is of type float",
        ),
        (
            '{"dense": [0, 0, 0, 0], "sparse": {"cat_0": [1], "cat_1": [true], "cat_2": [1]}}',
            "line 1: feature cat_1, position 0: True is of type bool",
        ),
        (
            '{"dense": [0, 0, 0, 0], "sparse": {"cat_0": 1, "cat_1": [1], "cat_2": [1]}}',
            "line 1: feature cat_0: 1 is not a list of ids",
        ),
        (
            '{"dense": ["0", 0, 0, 0], "sparse": {"cat_0": [1], "cat_1": [1], "cat_2": [1]}}',
            "dense must be numbers, not",
        ),
        ("nonsense", "line 1: "),
    ],
)
def test_predict_names_the_line_that_is_wrong(server, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "narsil", "predict", "--target", server.address, "--file", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--rows", "--seed"])
def test_predict_refuses_what_a_file_of_rows_leaves_without_effect(tmp_path, option):
    (tmp_path / "rows.jsonl").touch()
    arguments = ["--file", str(tmp_path / "rows.jsonl"), option, "5"]
    done = subprocess.run(
        [sys.executable, "-m", "narsil", "predict", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"{option} has no effect with --file" in done.stderr


@pytest.mark.parametrize("protocol", ["predictor", "narsil"])
@pytest.mark.parametrize(
    "arrivals",
    [
        ["--concurrency", 4],
        ["--rate", 200, "--arrivals", "poisson"],
        ["--concurrency", 4, "--connections", 2, "--client", "grpcio"],
    ],
)
def test_bench_measures_checks_and_writes_json(server, model, tmp_path, protocol, arrivals):
    path = tmp_path / "bench.json"
    narsil(
        "bench", "--target", server.address, "--protocol", protocol, *arrivals, "--requests", 60, "--warmup", 5,
        "--batch-size", 10, "--verify", model, "--server-pid", server.pid, "--json", path,
    )  # fmt: skip
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row) >= ROW_KEYS
    assert row["errors"] == 0
    assert row["req_per_s"] > 0
    assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"]
    assert row["max_abs_deviation"] < 1e-5
    assert row["server_cpu_us_per_req"] > 0
    assert row["peak_mib"] > 10
    assert row["client"] == ("grpcio" if "grpcio" in arrivals else choose_client("auto"))
    assert row["connections"] == (2 if "--connections" in arrivals else 1)


def test_bench_of_a_server_that_is_not_there_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "narsil", "bench", "--target", "127.0.0.1:1", "--requests", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "narsil: " in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "--narsil-backend torch --skip-torchrec --narsil-torch-model MODEL --narsil-execution-mode batch "
        "--narsil-batch-size 16 --narsil-batch-timeout-ms 5 --requests 100 --warmup 5 --concurrency 16 --batch-size 10",
        "--narsil-backend torch --skip-torchrec --narsil-torch-model MODEL --narsil-execution-mode worker "
        "--requests 20 --warmup 2 --concurrency 1 --batch-size 10",
    ],
    ids=["batch", "worker"],
)
def test_the_comparison_takes_its_documented_command_lines(model, tmp_path, line):
    path = tmp_path / "compare.json"
    arguments = [str(model / "model_default.pt") if word == "MODEL" else word for word in line.split()]
    output(sys.executable, "benchmarks/torchrec_dlrm_compare.py", *arguments, "--json", path)
    report = json.loads(path.read_text())
    assert set(report) >= {"machine", "rows", "ratios"}
    (row,) = report["rows"]
    assert set(row) >= ROW_KEYS
    assert row["errors"] == 0
    assert row["max_abs_deviation"] < 1e-5
