"""What is rendered from results: Markdown of one machine and of several, and the repository's own documents."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from narsil.bench.machine import Sources, folder_of
from narsil.bench.markdown import provenance, summary, tables
from narsil.bench.measure import ratio
from narsil.bench.report import make_report
from tests.unit.test_bench import made

ROOT = Path(__file__).parents[2]
BASE = "C++ (baseline)"


@pytest.fixture
def scripts(monkeypatch):
    """The benchmarks' folder as a place to import from."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def measured(name: str, base: list[float], ours: list[float], layers: tuple[str, ...] = ()) -> dict:
    """A report of a machine of this name: a contender over the baseline."""
    theirs = [made(BASE, one) for one in base]
    found = [made("ours", one) for one in ours]
    about = {"microarchitecture": name, "cpu": "AMD EPYC", "commit": "abc"}
    return make_report(
        [theirs, found],
        [ratio(found, theirs, "samples_per_s")],
        about=about,
        layers={"ours": layers} if layers else None,
    )


def test_machines_stand_side_by_side_with_the_range_to_expect_over_all_their_rounds():
    reports = [measured("Zen 4", [100, 100], [310, 290]), measured("Zen 5", [100, 200, 100], [500, 1000, 590])]
    lines = summary(reports, BASE).splitlines()
    columns = "samples/s | p50 ms | times the baseline"
    assert lines[2] == f"|  | Zen 4: {columns} | Zen 5: {columns} | to expect |"
    assert lines[-1] == "| ours | 300 | 10.00 | 3.00 (2.90 to 3.10) | 590 | 10.00 | 5.00 (5.00 to 5.90) | 2.9 to 5.9 |"
    assert lines[-2] == "| C++ (baseline) | 100 | 10.00 | - | 100 | 10.00 | - | - |"


def test_a_contender_or_baseline_that_one_machine_lacks_leaves_its_cells_empty():
    there, alone = measured("Zen 4", [100], [300]), measured("Zen 5", [100], [500])
    alone["rows"] = [row for row in alone["rows"] if row["name"] == "ours"]
    alone["ratios"] = []
    lines = summary([there, alone], BASE).splitlines()
    assert lines[-2] == "| C++ (baseline) | 100 | 10.00 | - | - | - | - | - |"
    assert lines[-1] == "| ours | 300 | 10.00 | 3.00 (one round) | 500 | 10.00 | - | 3.0 to 3.0 |"


def test_a_row_says_which_kinds_of_layers_it_really_has():
    mostly = measured("Zen 4", [100], [300], ("int16", "int16", "fp32"))
    assert "| ours (2 int16 + 1 fp32 layers) | 3 |" in tables(mostly)
    other = measured("Zen 5", [100], [500], ("bf16", "bf16", "fp32"))
    assert "| ours (2 int16 + 1 fp32 layers) or ours (2 bf16 + 1 fp32 layers) |" in summary([mostly, other], BASE)


def test_each_report_names_its_own_commit_and_what_no_commit_has():
    def told(**about: object) -> str:
        return provenance({"machine": about})

    assert told(commit="abc", uncommitted=[]) == "commit abc"
    assert (
        told(commit="abc", uncommitted=["src/a", "src/b"]) == "commit abc with uncommitted changes in `src/a`, `src/b`"
    )
    assert told(commit="abc", uncommitted=list("vwxyz")).endswith("`v`, `w`, `x` and 2 more")
    assert told(commit="abc-dirty") == "commit abc, with uncommitted changes that were not recorded"
    assert told(commit=None) == "from no commit"


def test_the_documents_are_what_the_results_give(scripts):
    """No measured figure is typed: `make reports` writes what this holds them against."""
    import render_reports

    for path, text in render_reports.render(render_reports.read_results(ROOT), ROOT).items():
        assert path.read_text() == text, f"{path.name} is not what benchmarks/results gives: run `make reports`"


def test_results_lie_in_the_folder_of_the_machine_that_they_name():
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        assert folder_of(json.loads(path.read_text())["machine"]) == path.parent.name


RESULT = """
import json, pathlib, sys
pathlib.Path(sys.argv[1], sys.argv[2] + ".json").write_text(json.dumps({"machine": {"microarchitecture": "Zen 4"}}))
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def bench(scripts, tmp_path):
    """Runs steps whose scripts write a result and end with a status, or do what their code says."""
    import bench

    class Bench:
        fates: list[bench.Fate]

        def step(self, name: str, status: int = 0, code: str = RESULT) -> bench.Step:
            script = tmp_path / f"{name}.py"
            script.write_text(code)
            return bench.Step(name, str(script), ("{out}", name, str(status)))

        def run(self, *steps: bench.Step, deadline: float | None = None, sources=lambda: Sources("abc")) -> list[str]:
            end = time.monotonic() + 60 if deadline is None else deadline
            self.fates = bench.run_steps(steps, tmp_path / "results", end, sources)
            return sorted(str(path.relative_to(tmp_path / "results")) for path in (tmp_path / "results").glob("*/*"))

        refuse = staticmethod(bench.reason_to_refuse)

    return Bench()


def test_a_step_that_fails_stops_no_other_and_keeps_the_older_result(bench, tmp_path):
    older = tmp_path / "results" / "zen4" / "failing.json"
    older.parent.mkdir(parents=True)
    older.write_text("older")
    written = bench.run(bench.step("failing", code="raise SystemExit(1)"), bench.step("sound"))
    assert written == ["zen4/failing.json", "zen4/sound.json"]
    assert older.read_text() == "older"
    assert [(fate.published, fate.well) for fate in bench.fates] == [(False, False), (True, True)]


def test_a_result_with_failed_requests_is_kept_and_said_so(bench):
    assert bench.run(bench.step("demo", status=1)) == ["zen4/demo.json"]
    assert (bench.fates[0].published, bench.fates[0].well) == (True, False)
    assert "some requests failed" in bench.fates[0].what


def test_what_this_machine_lacks_is_left_out_and_no_failure(bench):
    assert bench.run(bench.step("crowd", code="raise SystemExit(3)")) == []
    assert (bench.fates[0].published, bench.fates[0].well) == (False, True)


def test_a_result_of_sources_that_changed_meanwhile_is_not_kept(bench):
    states = iter([Sources("abc"), Sources("abc", ("src/narsil/a.py",))])
    assert bench.run(bench.step("demo"), sources=lambda: next(states)) == []
    assert not bench.fates[0].well


ENDLESS = """
import signal
try:
    print("running", flush=True)
    signal.pause()
except KeyboardInterrupt:
    print("servers stopped")
"""


def test_a_step_without_time_left_is_not_run_and_one_beyond_it_is_ended(bench, tmp_path):
    assert bench.run(bench.step("late"), deadline=time.monotonic()) == []
    assert bench.run(bench.step("endless", code=ENDLESS), deadline=time.monotonic() + 0.1) == []
    assert not bench.fates[0].well


def test_a_script_is_ended_as_by_ctrl_c_so_that_it_stops_its_servers(scripts):
    import bench

    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == b"running\n"
        bench.stop(script)
        assert script.stdout.read() == b"servers stopped\n"


def test_results_of_sources_that_no_commit_has_do_not_go_into_the_repository(bench):
    assert bench.refuse(Sources("abc")) == ""
    assert "src/narsil/a.py: not committed" in bench.refuse(Sources("abc", ("src/narsil/a.py",)))
    assert "no git checkout" in bench.refuse(Sources(None))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--rounds", "0"], "argument --rounds: 0 is less than 1"),
        (["--narsil-onnx-model", "m"], "--narsil-onnx-model is for --narsil-backend onnx"),
        (["--narsil-compiled-model", "m"], "--narsil-compiled-model is for --narsil-backend compiled"),
        (["--narsil-backend", "onnx", "--narsil-no-tune-kernels"], "is for --narsil-backend torch"),
        (["--narsil-execution-mode", "worker", "--narsil-batch-size", "4"], "are for --narsil-execution-mode batch"),
        (["--narsil-backend", "compiled"], "needs --narsil-compiled-model"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(scripts, monkeypatch, capsys, arguments, problem):
    import torchrec_dlrm_compare

    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit):
        torchrec_dlrm_compare._parse()
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "rounds"), [([], None), (["--rounds", "2"], 2), (["--rounds", "1"], 1)])
def test_the_rounds_are_those_that_were_asked_for(scripts, monkeypatch, arguments, rounds):
    import torchrec_dlrm_compare

    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    assert torchrec_dlrm_compare._parse().rounds == rounds
