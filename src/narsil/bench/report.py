"""Measurements as JSON and as a table. The JSON is the source; every table and picture is made from it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from narsil.bench.machine import machine
from narsil.bench.measure import BUCKET_EDGES_S, Measurement, Ratio, summarize

Report = dict[str, Any]


def make_report(
    runs: Sequence[Sequence[Measurement]],
    ratios: Sequence[Ratio] = (),
    notes: Mapping[str, Any] | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    layers: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """The report of one benchmark: a row per contender and concurrency, with every round behind it.

    ``rows`` holds medians over rounds; ``runs`` every single measurement with its latency histogram. ``about`` is the
    machine's section, made now where it was not made before; ``layers`` the kind of number of each linear layer that a
    contender's model really has, by the contender's name.
    """
    kinds = layers or {}
    return {
        "machine": dict(about or machine()),
        "rows": [_row(summarize(rounds)) | {"layers": list(kinds.get(rounds[0].name, ()))} for rounds in runs],
        "ratios": [asdict(one) for one in ratios],
        "runs": [_row(one) | {"histogram": list(one.histogram)} for rounds in runs for one in rounds],
        "bucket_edges_s": [float(f"{edge:.6g}") for edge in BUCKET_EDGES_S],
        "notes": dict(notes or {}),
    }


def write_report(report: Report, path: Path) -> None:
    """Writes the report where it was asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


# column title -> (row key, format)
TABLE_WIDTH = 114  # the narrowest terminal in which no figure is cut
COLUMNS = {
    "req/s": ("req_per_s", ",.0f"),
    "samples/s": ("samples_per_s", ",.0f"),
    "p50 ms": ("p50_ms", ".2f"),
    "p99 ms": ("p99_ms", ".2f"),
    "peak MiB": ("peak_mib", ",.0f"),
    "CPU µs/req": ("server_cpu_us_per_req", ",.0f"),
    "max dev": ("max_abs_deviation", ".0e"),
    "errors": ("errors", ",d"),
}

_DETAILS = {
    "requests per second": ("req_per_s", ",.1f"),
    "samples per second": ("samples_per_s", ",.0f"),
    "asked for, req/s": ("rate", ",.1f"),
    "client behind its schedule, at most ms": ("late_ms", ".1f"),
    "latency p50 ms": ("p50_ms", ".3f"),
    "latency p90 ms": ("p90_ms", ".3f"),
    "latency p99 ms": ("p99_ms", ".3f"),
    "latency p99.9 ms": ("p999_ms", ".3f"),
    "errors": ("errors", ",d"),
    "largest deviation of a score": ("max_abs_deviation", ".2e"),
    "server CPU per request, µs": ("server_cpu_us_per_req", ",.0f"),
    "server peak memory, MiB": ("peak_mib", ",.0f"),
    "client": ("client", "s"),
    "client's connections": ("connections", ",d"),
    "client CPU per request, µs": ("client_cpu_us_per_req", ",.0f"),
    "client busy, share of a core": ("client_busy", ".2f"),
}


def cell(row: Mapping[str, Any], key: str, style: str) -> str:
    """A row's figure as text; a dash where it was not measured."""
    value = row[key]
    return "-" if value is None else format(value, "s" if isinstance(value, str) else style)


def label(row: Mapping[str, Any]) -> str:
    """A row's name and, where it was recorded, of which kinds its layers are: its precision is but the lowest that a
    layer may have."""
    kinds = Counter(row.get("layers") or ()).most_common()
    if not kinds:
        return str(row["name"])
    return f"{row['name']} ({' + '.join(f'{count} {kind}' for kind, count in kinds)} layers)"


def by_concurrency(report: Report) -> dict[int, list[Mapping[str, Any]]]:
    """The report's rows under their concurrency, in the report's order; 0 is the open loop."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault(row["concurrency"], []).append(row)
    return groups


def render_table(report: Report, title: str) -> Table:
    """The report as a table for the terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.caption, table.caption_justify = loaded_by(report), "left"
    table.add_column("", min_width=30)  # the one that wraps where the terminal is narrow
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for concurrency, rows in by_concurrency(report).items():
        heading = f"concurrency {concurrency}" if concurrency else "open loop"
        table.add_row(f"[bold]{heading}, {rows[0]['batch_size']} rows a request[/bold]")
        for row in rows:
            table.add_row(label(row), *(cell(row, key, style) for key, style in COLUMNS.values()))
        table.add_section()
    return table


def loaded_by(report: Report) -> str:
    """Who made the load, in words; reports from before there was a choice were made by grpcio."""
    clients = sorted({(row.get("client", "grpcio"), row.get("connections", 1)) for row in report["rows"]})
    return "load: " + "; ".join(
        f"{name} client, {count} connection{'' if count == 1 else 's'}" for name, count in clients
    )


def render_one(row: Mapping[str, Any]) -> Table:
    """One row in full, a figure a line."""
    table = Table(title=row["name"], title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for label, (key, style) in _DETAILS.items():
        if row[key] is not None and (row["rate"] is not None or key != "late_ms"):
            table.add_row(label, cell(row, key, style))
    return table


METRICS = {
    "samples_per_s": "throughput",
    "p50_ms": "median latency",
    "p99_ms": "99th percentile of latency",
    "server_cpu_us_per_req": "server's processor time a request",
}


def ratio_lines(report: Report) -> list[str]:
    """The report's ratios in words, a line per contender and concurrency."""
    lines: dict[tuple[int, str, str], list[str]] = {}
    for one in report["ratios"]:
        lines.setdefault((one["concurrency"], one["name"], one["over"]), []).append(_ratio_in_words(one))
    return [
        f"concurrency {concurrency}: {name}: {', '.join(figures)} of {over}"
        for (concurrency, name, over), figures in sorted(lines.items(), key=lambda line: -line[0][0])
    ]


def spread(one: Mapping[str, Any]) -> str:
    """A ratio's smallest and largest round."""
    return "one round" if one.get("rounds") == 1 else f"{one['min']:.2f} to {one['max']:.2f}"


def _ratio_in_words(one: Mapping[str, Any]) -> str:
    metric = METRICS[one["metric"]]
    if one["median"] is None:
        return f"no {metric} to compare, as no round had both answered,"
    left_out = f"; rounds without an answer left out: {one['left_out']}" if one.get("left_out") else ""
    return f"{one['median']:.2f}x the {metric} ({spread(one)}{left_out})"


def _row(measurement: Measurement) -> dict[str, Any]:
    row = asdict(measurement)
    del row["histogram"]
    row["error_kinds"] = dict(measurement.errors)
    row["errors"] = sum(measurement.errors.values())
    row["client_bound"] = measurement.client_bound
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    """A value as JSON has it: nine digits are more than any of them means, and there is neither NaN nor infinity."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 9)
    return value
