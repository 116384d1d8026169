"""Narsil beside TorchRec's C++ server on one artifact: the same client, interleaved rounds, median ratios with spread.

With --skip-torchrec, Narsil alone. The baseline serves the file given as --narsil-torch-model (or packaged for the
occasion), so that both run the very same TorchScript.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from contenders import (
    BASELINE,
    LEFT_OUT,
    baseline,
    baseline_threads,
    build_baseline,
    compiled_info,
    layers_of,
    narsil,
    positive,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.backends.registry import load_backend
from narsil.bench.machine import machine
from narsil.bench.measure import reference_scores
from narsil.bench.report import TABLE_WIDTH, Report, make_report, ratio_lines, render_table, write_report
from narsil.bench.rounds import KEEP, Contender, Trial, ratios, run_rounds
from narsil.bench.workload import Workload
from narsil.errors import NarsilError
from narsil.packaging.dlrm import DlrmConfig, random_weights
from narsil.packaging.packager import package_dlrm


def main() -> int:
    arguments = _parse()
    console = Console(width=max(Console().width, TABLE_WIDTH))
    with tempfile.TemporaryDirectory() as scratch:
        artifact = _artifact(arguments, Path(scratch), console)
        contenders = [_narsil(arguments, artifact)]
        if not arguments.skip_torchrec:
            with console.status("building the C++ baseline"):
                binary = build_baseline(console.print)
            if binary is None:
                return LEFT_OUT
            if artifact.torchscript is None:
                raise NarsilError(f"{artifact.path} has no TorchScript for the baseline to serve")
            contenders.insert(0, baseline(binary, artifact.torchscript))
        report = _measure(arguments, artifact, contenders, console)
    console.print(render_table(report, f"{artifact.name}, {len(report['runs'])} runs in interleaved rounds, medians"))
    for line in ratio_lines(report):
        console.print(f"  {line}")
    if arguments.json is not None:
        write_report(report, arguments.json)
        console.print(f"written to {arguments.json}")
    return 1 if any(row["errors"] for row in report["rows"]) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--narsil-backend", choices=["torch", "onnx", "compiled"], default="torch")
    parser.add_argument("--narsil-torch-model", type=Path, help="model_default.pt or an artifact folder")
    parser.add_argument("--narsil-onnx-model", type=Path, help="artifact folder or .onnx, for --narsil-backend onnx")
    parser.add_argument("--narsil-compiled-model", type=Path, help="compiled folder, for --narsil-backend compiled")
    parser.add_argument("--narsil-transport", choices=["auto", "native", "grpcio"], default="auto")
    parser.add_argument("--narsil-execution-mode", choices=["batch", "worker"], default="batch")
    parser.add_argument("--narsil-batch-size", type=positive, help="requests a batch; default: the server's")
    parser.add_argument("--narsil-batch-timeout-ms", type=float, help="default: the server's")
    parser.add_argument("--narsil-lanes", type=int, help="default: one per core in batch mode, one in worker mode")
    parser.add_argument("--narsil-no-tune-kernels", action="store_true", help="run the module as it was saved")
    parser.add_argument("--skip-torchrec", action="store_true", help="measure Narsil alone")
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--concurrency", type=positive, default=16)
    parser.add_argument("--connections", type=positive, default=1, help="that the requests in flight are spread over")
    parser.add_argument("--batch-size", type=positive, default=100, help="rows a request")
    parser.add_argument("--rounds", type=positive, help="default: 3, or 1 where Narsil is measured alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the report here")
    arguments = parser.parse_args()
    for option, backend in {"narsil_onnx_model": "onnx", "narsil_compiled_model": "compiled"}.items():
        if getattr(arguments, option) is not None and arguments.narsil_backend != backend:
            parser.error(f"--{option.replace('_', '-')} is for --narsil-backend {backend}")
    if arguments.narsil_no_tune_kernels and arguments.narsil_backend != "torch":
        parser.error("--narsil-no-tune-kernels is for --narsil-backend torch")
    batching = (arguments.narsil_batch_size, arguments.narsil_batch_timeout_ms)
    if arguments.narsil_execution_mode == "worker" and batching != (None, None):
        parser.error("--narsil-batch-size and --narsil-batch-timeout-ms are for --narsil-execution-mode batch")
    if arguments.narsil_backend == "compiled" and arguments.narsil_compiled_model is None:
        parser.error("--narsil-backend compiled needs --narsil-compiled-model; see `narsil compile`")
    return arguments


def _artifact(arguments: argparse.Namespace, scratch: Path, console: Console) -> Artifact:
    path = arguments.narsil_torch_model or arguments.narsil_onnx_model
    if path is None:
        with console.status("packaging a DLRM of the default size"):
            config = DlrmConfig()
            package_dlrm(config, random_weights(config), scratch / "dlrm", device=arguments.device)
        path = scratch / "dlrm"
    return open_artifact(path)


def _narsil(arguments: argparse.Namespace, artifact: Artifact) -> Contender:
    mode = arguments.narsil_execution_mode
    lanes = arguments.narsil_lanes if arguments.narsil_lanes is not None else (1 if mode == "worker" else 0)
    model = arguments.narsil_compiled_model or arguments.narsil_onnx_model or artifact.path
    compiled = arguments.narsil_compiled_model and compiled_info(open_artifact(arguments.narsil_compiled_model))
    return narsil(
        f"Narsil {arguments.narsil_backend} backend, {mode} mode"
        + (", 1 lane" if lanes == 1 else f", {lanes} lanes" if lanes else "")
        + (", module as saved" if arguments.narsil_no_tune_kernels else "")
        + ("" if arguments.narsil_transport == "auto" else f", over {arguments.narsil_transport}"),
        model,
        [layer.kind for layer in compiled.layers] if compiled else (),
        backend=arguments.narsil_backend,
        transport=arguments.narsil_transport,
        execution_mode=mode,
        lanes=lanes,
        device=arguments.device,
        **_given(
            batch_size=arguments.narsil_batch_size,
            batch_timeout_ms=arguments.narsil_batch_timeout_ms,
            tune_kernels=False if arguments.narsil_no_tune_kernels else None,
        ),
    )


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None: what is left out is the server's to choose."""
    return {name: value for name, value in options.items() if value is not None}


def _measure(
    arguments: argparse.Namespace, artifact: Artifact, contenders: list[Contender], console: Console
) -> Report:
    workload = Workload(artifact.schema, arguments.batch_size, seed=arguments.seed)
    with console.status("scoring the reference rows with direct calls of the artifact"):
        expected = reference_scores(load_backend(artifact, tune_kernels=False), workload, KEEP)
    with console.status("measuring what one core can do"):
        about = machine(peak=True)
    rounds = arguments.rounds or (1 if arguments.skip_torchrec else 3)
    trial = Trial(
        workload,
        (arguments.concurrency,),
        arguments.requests,
        arguments.warmup,
        rounds,
        connections=arguments.connections,
    )
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True)
    with bar as progress:
        task = progress.add_task("starting", total=rounds * len(contenders) * arguments.requests)
        runs = run_rounds(
            contenders, trial, expected, lambda what, sent: progress.update(task, description=what, advance=sent)
        )
    notes: dict[str, object] = {
        "rounds": rounds,
        "arguments": {name: str(value) for name, value in vars(arguments).items() if value is not None},
    }
    compared = [] if arguments.skip_torchrec else ratios(runs, BASELINE)
    if compared:
        notes["baseline_intra_op_threads"] = {"all": str(baseline_threads(arguments.concurrency))}
    found = [runs[one.name, arguments.concurrency] for one in contenders]
    return make_report(found, compared, notes, about=about, layers=layers_of(contenders))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NarsilError as error:
        sys.exit(f"torchrec_dlrm_compare: {error}")
