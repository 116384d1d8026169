"""A crowd: many connections on Narsil and on the C++ baseline, then five times as many requests in flight on Narsil.

The baseline has a thread for every request that it works on; 200 at once is what it can be asked for. In a closed loop
latency is requests in flight over throughput, for any server. Interleaved rounds, one client.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from contenders import LEFT_OUT, baseline, build_baseline, compiled, layers_of, positive
from rich.console import Console

from narsil.artifacts.artifact import open_artifact
from narsil.bench.generator import choose_client
from narsil.bench.load import Load
from narsil.bench.machine import machine
from narsil.bench.measure import Measurement, measure, ratio
from narsil.bench.report import TABLE_WIDTH, make_report, ratio_lines, render_table, write_report
from narsil.bench.workload import Workload
from narsil.errors import NarsilError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/demo"), help="artifact folder; see `make demo`")
    parser.add_argument("--precision", default="bf16", help="that Narsil's model is compiled in")
    parser.add_argument("--requests", type=positive, default=6000)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--connections", type=positive, default=200)
    parser.add_argument("--streams", type=positive, default=1000, help="in flight on Narsil, besides one a connection")
    parser.add_argument("--json", type=Path, help="write the report here")
    arguments = parser.parse_args()
    console = Console(width=max(Console().width, TABLE_WIDTH))
    artifact = open_artifact(arguments.model)
    binary = build_baseline(console.print)
    if binary is None or artifact.torchscript is None:
        return LEFT_OUT
    contenders = [
        (baseline(binary, artifact.torchscript), arguments.connections),
        *(
            (one, in_flight)
            for one in compiled(arguments.model, (arguments.precision,), console.print)
            for in_flight in (arguments.connections, arguments.streams)
        ),
    ]
    workload = Workload(artifact.schema, bodies=500)
    client = choose_client("auto")
    with console.status("measuring what one core can do"):
        about = machine(peak=True)
    runs: dict[tuple[str, int], list[Measurement]] = {}
    for number in range(arguments.rounds):
        for contender, in_flight in contenders:
            load = Load(
                "",
                workload,
                requests=arguments.requests,
                warmup=in_flight,
                concurrency=in_flight,
                connections=arguments.connections,
                client=client,
            )
            with (
                console.status(f"round {number + 1}/{arguments.rounds}: {contender.name}, {in_flight} in flight"),
                contender.start(in_flight) as server,
            ):
                found = measure(contender.name, replace(load, target=server.address), server)
            runs.setdefault((contender.name, in_flight), []).append(found)
    theirs, *others = runs.values()
    compared = [ratio(ours, theirs, metric) for ours in others for metric in ("samples_per_s", "p50_ms", "p99_ms")]
    report = make_report(
        list(runs.values()),
        compared,
        {"connections": arguments.connections, "rounds": arguments.rounds},
        about=about,
        layers=layers_of([one for one, _ in contenders]),
    )
    console.print(render_table(report, f"{arguments.connections} connections"))
    for line in ratio_lines(report):
        console.print(f"  {line}")
    if arguments.json is not None:
        write_report(report, arguments.json)
    return 1 if any(row["errors"] for row in report["rows"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NarsilError as error:
        sys.exit(f"crowd: {error}")
