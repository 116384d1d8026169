"""``make bench``: every measurement that the reports are rendered from, one after another, into
benchmarks/results/MACHINE/ of the machine that it runs on; then the reports.

Each is a script of its own. Its result takes its place only when the script has ended by itself and the sources are
still those that it began with. One that fails, or finds no time left, leaves the older result where it is, and the
others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import render_reports
from contenders import HERE, LEFT_OUT, positive

from narsil.bench.machine import Sources, folder_of, read_sources

ROOT = HERE.parent
RESULTS = HERE / "results"
GRACE_S = 60  # for a script that was told to end to stop its servers


@dataclass(frozen=True)
class Step:
    """One measurement: NAME.json is what its script writes into the folder that stands for {out}."""

    name: str
    script: str
    options: tuple[str, ...] = ()


STEPS = (
    Step("demo", "demo.py", ("--out", "{out}", "--requests", "3000", "--rounds", "5")),
    Step("profile", "profile_forward.py", ("--out", "{out}")),
    Step(
        "module_as_saved",
        "torchrec_dlrm_compare.py",
        (
            *("--narsil-torch-model", "models/demo", "--narsil-no-tune-kernels"),
            *("--requests", "3000", "--json", "{out}/module_as_saved.json"),
        ),
    ),
    Step("transport", "transport.py", ("--json", "{out}/transport.json")),
    Step("crowd", "crowd.py", ("--requests", "4000", "--json", "{out}/crowd.json")),
)


def main() -> int:
    arguments = _parse()
    sources = read_sources()
    ours = arguments.out == RESULTS
    if ours and (problem := reason_to_refuse(sources)):
        sys.exit(f"bench: {problem}")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"bench: {busy:.1f} processes ran on this machine lately; what they take will be missing in the figures")
    steps = [step for step in STEPS if not arguments.only or step.name in arguments.only]
    fates = run_steps(steps, arguments.out, time.monotonic() + arguments.minutes * 60)
    if ours and any(fate.published for fate in fates):
        render_reports.main()
    for fate in fates:
        print(f"bench: {fate.step.name}: {fate.what} ({fate.seconds:.0f} s)")
    return 0 if all(fate.well for fate in fates) else 1


def reason_to_refuse(sources: Sources) -> str:
    """Why results of these sources cannot go into the repository; empty where they can."""
    elsewhere = "or measure into another folder with --out"
    if sources.commit is None:
        return f"this is no git checkout, and results in the repository name their commit; measure in one, {elsewhere}"
    if sources.uncommitted:
        return (
            f"{', '.join(sources.uncommitted[:3])}: not committed, and results in the repository name the commit that "
            f"they are of; commit first, {elsewhere}"
        )
    return ""


@dataclass(frozen=True)
class Fate:
    """How a step ended."""

    step: Step
    what: str
    seconds: float
    published: bool = False
    well: bool = False  # everything was measured that this machine has


def run_steps(
    steps: Sequence[Step], out: Path, deadline: float, sources: Callable[[], Sources] = read_sources
) -> list[Fate]:
    """Runs the steps in turn until the deadline (monotonic clock, seconds). Results go to OUT/MACHINE/NAME.json."""
    fates = []
    for step in steps:
        began = time.monotonic()
        print(f"bench: {step.name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="narsil-bench-") as folder:
            before = sources()
            status = _run(step, Path(folder), deadline)
            what, published = _publish(step, Path(folder), out, status, before == sources())
        well = status == LEFT_OUT or (published and status == 0)
        fates.append(Fate(step, what, time.monotonic() - began, published, well))
    return fates


def _run(step: Step, folder: Path, deadline: float) -> int | None:
    """The script's exit status; None where the deadline ended it or came before it."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    options = [option.replace("{out}", str(folder)) for option in step.options]
    script = subprocess.Popen([sys.executable, str(HERE / step.script), *options], cwd=ROOT)
    try:
        return script.wait(left)
    except subprocess.TimeoutExpired:
        stop(script)
        return None


def stop(script: subprocess.Popen[bytes]) -> None:
    """Ends a script as Ctrl-C does, so that it stops its servers; by force where it does not end."""
    script.send_signal(signal.SIGINT)
    try:
        script.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        script.kill()
        script.wait()


def _publish(step: Step, folder: Path, out: Path, status: int | None, unchanged: bool) -> tuple[str, bool]:
    """Puts a result where it belongs if it is whole: what became of it, and whether it is there."""
    result = folder / f"{step.name}.json"
    if status is None:
        return "no time left; nothing written", False
    if status == LEFT_OUT:
        return "left out: this machine lacks what it needs", False
    if not result.exists():
        return f"failed with exit status {status}; nothing written", False
    if not unchanged:
        return "the sources changed while it ran; nothing written", False
    place = out / folder_of(json.loads(result.read_text())["machine"]) / result.name
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(".partial")
    partial.write_bytes(result.read_bytes())
    partial.replace(place)
    told = "" if status == 0 else f", of a script that ended with status {status}: some requests failed"
    return f"written to {place}{told}", True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that gets one folder a machine")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these measurements alone")
    parser.add_argument(
        "--minutes", type=positive, default=20, help="for all of them; what has no time left is not run"
    )
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    return arguments


if __name__ == "__main__":
    sys.exit(main())
