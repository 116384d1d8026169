"""``make demo``: package a model, serve it in every way, load each alike, print one table and draw two pictures."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from contenders import (
    BASELINE,
    baseline,
    baseline_threads,
    build_baseline,
    compiled,
    layers_of,
    narsil,
    package_demo,
    positive,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from narsil.artifacts.artifact import Artifact
from narsil.backends.registry import load_backend
from narsil.bench.machine import machine
from narsil.bench.measure import reference_scores
from narsil.bench.pictures import draw
from narsil.bench.report import TABLE_WIDTH, make_report, ratio_lines, render_table, write_report
from narsil.bench.rounds import KEEP, Contender, Trial, ratios, run_rounds
from narsil.bench.workload import Workload
from narsil.errors import NarsilError
from narsil.extension import AVAILABLE

TITLE = "DLRM, 26 tables x 100,000 rows x dim 64, 100 rows a request"


def main() -> int:
    arguments = _parse()
    console = Console(width=max(Console().width, TABLE_WIDTH))
    began = time.monotonic()
    artifact = package_demo(arguments.model, arguments.device, console)
    contenders = _contenders(artifact, arguments.device, console)
    workload = Workload(artifact.schema)
    with console.status("scoring the reference rows with direct calls of the artifact"):
        backend = load_backend(artifact, "torch", arguments.device, tune_kernels=False)
        expected = reference_scores(backend, workload, KEEP)
        backend.close()
    with console.status("measuring what one core can do"):
        about = machine(peak=True)
    trial = Trial(
        workload, (16, 1), {16: arguments.requests, 1: max(1, arguments.requests // 5)}, rounds=arguments.rounds
    )
    total = trial.rounds * len(contenders) * sum(trial.requests_at(c) for c in trial.concurrencies)
    with _progress(console) as progress:
        task = progress.add_task("starting", total=total)
        runs = run_rounds(
            contenders,
            trial,
            expected,
            lambda what, sent: progress.update(task, description=what, advance=sent),
        )
    found = [runs[contender.name, concurrency] for concurrency in trial.concurrencies for contender in contenders]
    report = make_report(
        found,
        ratios(runs, BASELINE),
        _notes(trial, workload),
        about=about,
        layers=layers_of(contenders),
    )
    write_report(report, arguments.out / "demo.json")
    pictures = draw(report, arguments.out, TITLE)

    console.print(render_table(report, f"{TITLE} (medians of {trial.rounds} interleaved rounds)"))
    for line in ratio_lines(report):
        console.print(f"  {line}")
    console.print(
        "\nmax dev: largest difference of a score from a direct call of the INT8 artifact. ONNX differs by the tables' "
        "quantization; a compiled model by what its precision rounds, which `narsil compile` bounds.\n"
        f"numbers: {arguments.out / 'demo.json'}\npictures: {', '.join(str(picture) for picture in pictures)}\n"
        f"next: narsil serve --model {artifact.path}   and then: narsil predict\n"
        f"({time.monotonic() - began:.0f} s)"
    )
    return 1 if any(row["errors"] for row in report["rows"]) else 0


def _contenders(artifact: Artifact, device: str, console: Console) -> list[Contender]:
    """Every way to serve the model, the baseline first where it can be built."""
    torch: dict[str, Any] = {"backend": "torch", "device": device}
    contenders = [narsil("Narsil torch backend, batch mode", artifact.path, **torch)]
    if AVAILABLE:
        contenders.append(
            narsil("Narsil torch backend, batch mode, over grpcio", artifact.path, **torch, transport="grpcio")
        )
    worker: dict[str, Any] = {"execution_mode": "worker", "lanes": 1}
    contenders += [
        narsil("Narsil torch backend, worker mode (1 lane)", artifact.path, **torch, **worker),
        narsil("Narsil ONNX Runtime FP32 backend, batch mode", artifact.path, backend="onnx"),
    ]
    if device == "cpu":
        with console.status("compiling the model in three precisions (once, about half a minute)"):
            contenders += compiled(artifact.path, ("fp32", "bf16", "int8"), console.print)
    with console.status("building the C++ baseline (once, about a minute)"):
        binary = build_baseline(console.print)
    if binary is not None and artifact.torchscript is not None:
        contenders.insert(0, baseline(binary, artifact.torchscript))
    return contenders


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the numbers and pictures")
    parser.add_argument("--model", type=Path, default=Path("models/demo"), help="the demo model, packaged when missing")
    parser.add_argument("--requests", type=positive, default=1500, help="requests a measurement at concurrency 16")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _notes(trial: Trial, workload: Workload) -> dict[str, object]:
    return {
        "rounds": trial.rounds,
        "warmup": trial.warmup,
        "bodies": workload.bodies,
        "seed": workload.seed,
        "baseline_intra_op_threads": {str(c): baseline_threads(c) for c in trial.concurrencies},
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NarsilError as error:
        sys.exit(f"demo: {error}")
