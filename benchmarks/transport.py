"""What a request costs before and after its forward: Narsil's transports and C++ gRPC, none of them with a model.

Interleaved rounds, the same client for all. Narsil is asked over TorchRec's wire and over the Open Inference Protocol,
the same rows; the latter's ids are INT64, as ModelMetadata lists them, the former's INT32. The C++ server is the
baseline's, without its model: it parses the same message and answers with as many floats.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from contenders import build_baseline, positive
from rich.console import Console
from rich.progress import Progress

from narsil.bench.machine import machine
from narsil.bench.measure import Ratio, ratio
from narsil.bench.report import TABLE_WIDTH, make_report, ratio_lines, render_table, write_report
from narsil.bench.rounds import Contender, Runs, Trial, ratios, run_rounds
from narsil.bench.servers import ServerProcess
from narsil.bench.workload import Workload
from narsil.errors import NarsilError
from narsil.extension import AVAILABLE
from narsil.packaging.dlrm import DlrmConfig

HERE = Path(__file__).parent
CPP = "C++ gRPC"
OIP = ", OIP"
READY = r"^listening on (\S+)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=positive, default=5000)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--rows", type=positive, default=100, help="rows a request")
    parser.add_argument("--concurrency", type=positive, nargs="+", default=[16, 1])
    parser.add_argument("--connections", type=positive, default=1)
    parser.add_argument("--lanes", type=positive, default=2)
    parser.add_argument("--json", type=Path, help="write the report here")
    arguments = parser.parse_args()
    console = Console(width=max(Console().width, TABLE_WIDTH))
    contenders = []
    binary = build_baseline(console.print)
    if binary is not None:
        argv = [str(binary), "--model", "none"]
        contenders.append(Contender(CPP, lambda concurrency: ServerProcess(argv, READY)))
    for transport in ("grpcio", "native") if AVAILABLE else ("grpcio",):
        start = _narsil(transport, arguments.lanes)
        contenders.append(Contender(f"Narsil, {transport}", start))
        contenders.append(Contender(f"Narsil, {transport}{OIP}", start, protocol="oip"))
    trial = Trial(
        Workload(DlrmConfig().schema, arguments.rows),
        arguments.concurrency,
        arguments.requests,
        rounds=arguments.rounds,
        connections=arguments.connections,
    )
    about = machine(peak=True)
    steps = arguments.rounds * len(contenders) * len(arguments.concurrency) * arguments.requests
    with Progress(console=console) as progress:
        task = progress.add_task("", total=steps)
        runs = run_rounds(
            contenders, trial, on_event=lambda what, done: progress.update(task, description=what, advance=done)
        )
    compared = _oip_ratios(runs) if binary is None else [*ratios(runs, CPP), *_cpu_ratios(runs), *_oip_ratios(runs)]
    report = make_report(list(runs.values()), compared, {"rounds": arguments.rounds}, about=about)
    console.print(render_table(report, "no model: what surrounds a forward, medians of interleaved rounds"))
    for line in ratio_lines(report):
        console.print(f"  {line}")
    if arguments.json is not None:
        write_report(report, arguments.json)
    return 1 if any(row["errors"] for row in report["rows"]) else 0


def _cpu_ratios(runs: Runs) -> list[Ratio]:
    return [
        ratio(found, runs[CPP, concurrency], "server_cpu_us_per_req")
        for (name, concurrency), found in runs.items()
        if name != CPP
    ]


def _oip_ratios(runs: Runs) -> list[Ratio]:
    """Of each transport, the Open Inference Protocol over TorchRec's wire."""
    return [
        ratio(found, runs[name.removesuffix(OIP), concurrency], "server_cpu_us_per_req")
        for (name, concurrency), found in runs.items()
        if name.endswith(OIP)
    ]


def _narsil(transport: str, lanes: int) -> Callable[[int], ServerProcess]:
    argv = [sys.executable, str(HERE / "no_model_server.py"), "--transport", transport, "--lanes", str(lanes)]
    return lambda concurrency: ServerProcess(argv, READY)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NarsilError as error:
        sys.exit(f"transport: {error}")
