"""``narsil bench``: one load against one running server."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from narsil.bench.load import CLIENT_CHOICES, Arrivals, ClientChoice, Load
from narsil.bench.workload import PROTOCOLS, Protocol, Workload
from narsil.cli.options import SECONDS, SEED, FiniteRange, GivenPath
from narsil.cli.targets import schema_for, target_option


@click.command()
@target_option
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="predictor", show_default=True)
@click.option("--schema", type=GivenPath(), help="Artifact to take the schema from; default: ask the server.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 10_000),
    default=16,
    show_default=True,
    help="Requests in flight; with --rate: of the warmup.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="HTTP/2 connections that the requests are spread over.",
)
@click.option("--requests", type=click.IntRange(1), default=1000, show_default=True, help="Requests to measure.")
@click.option("--warmup", type=click.IntRange(0), default=50, show_default=True, help="Requests sent before.")
@click.option("--batch-size", type=click.IntRange(1), default=100, show_default=True, help="Rows a request.")
@click.option(
    "--rate",
    type=FiniteRange(0, 1e6, min_open=True),
    help="Requests per second: an open loop instead of a closed one.",
)
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "uniform"]),
    help="With --rate: gaps between requests; default: poisson.",
)
@click.option("--max-ids", type=click.IntRange(1), default=1, show_default=True, help="1: one id a bag; N: 0 to N ids.")
@click.option("--bodies", type=click.IntRange(1), default=2000, show_default=True, help="Distinct requests.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option(
    "--timeout",
    type=SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds until a request counts as failed.",
)
@click.option(
    "--client",
    type=click.Choice(CLIENT_CHOICES),
    default="auto",
    show_default=True,
    help="What makes the load; auto: the native client where it is built.",
)
@click.option("--verify", type=GivenPath(), help="Artifact to hold the scores against (a direct call).")
@click.option("--server-pid", type=int, help="Process id of the server, to report its CPU and memory.")
@click.option("--json", "json_path", type=GivenPath(), help="Write the measurement here.")
def command(
    target: str,
    protocol: Protocol,
    schema: Path | None,
    concurrency: int,
    connections: int,
    requests: int,
    warmup: int,
    batch_size: int,
    rate: float | None,
    arrivals: Arrivals | None,
    max_ids: int,
    bodies: int,
    seed: int,
    timeout: float,
    client: ClientChoice,
    verify: Path | None,
    server_pid: int | None,
    json_path: Path | None,
) -> None:
    """Measure a running server: throughput, latency percentiles, CPU, errors.

    A closed loop keeps --concurrency requests in flight. --rate makes it an open loop, whose latencies count from the
    time at which each request was due. Exits with 1 when any request failed.
    """
    if arrivals is not None and rate is None:
        raise click.UsageError("--arrivals is for an open loop: give --rate too.")
    from rich.console import Console
    from rich.progress import Progress

    from narsil.bench.measure import measure, reference_scores
    from narsil.bench.report import make_report, render_one, write_report
    from narsil.bench.rounds import KEEP
    from narsil.bench.servers import AttachedServer

    console = Console()
    workload = Workload(schema_for(target, schema), batch_size, min(bodies, requests + warmup), max_ids, seed)
    expected = []
    if verify is not None:
        from narsil.artifacts.artifact import open_artifact
        from narsil.backends.registry import load_backend

        expected = reference_scores(load_backend(open_artifact(verify), tune_kernels=False), workload, KEEP)
    load = Load(
        target,
        workload,
        protocol,
        requests,
        warmup,
        concurrency,
        rate,
        arrivals or "poisson",
        timeout,
        keep=KEEP if expected else 0,
        connections=connections,
        client=client,
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{requests} requests to {target}", total=requests)
        found = measure(
            f"{target} ({protocol})",
            load,
            AttachedServer(server_pid) if server_pid else None,
            expected,
            lambda done: progress.update(task, completed=done),
        )
    report = make_report([[found]], notes={"target": target})
    console.print(render_one(report["rows"][0]))
    if found.client_bound:
        console.print("[yellow]client-bound: the load generator, not the server, may have set the pace[/yellow]")
    for kind, count in found.errors.items():
        console.print(f"[red]{count} requests failed: {kind}[/red]")
    if json_path is not None:
        write_report(report, json_path)
        console.print(f"written to {json_path}")
    sys.exit(1 if found.errors else 0)
