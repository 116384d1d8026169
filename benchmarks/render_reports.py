"""Renders REPORTS.md, BENCHMARKS.md and the README's table from benchmarks/results/*.json. Nothing in them is typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from narsil.bench.pictures import draw
from narsil.bench.report import COLUMNS, Report, by_concurrency, cell, loaded_by, ratio_lines

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ROOT / "benchmarks" / "texts"
TITLES = {
    "module_as_saved": "The module as it was saved",
    "transport": "Transports alone: no model behind them",
    "crowd": "A crowd: 200 connections, as many requests in flight, and then 1000 on Narsil",
}
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def main() -> None:
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    measured = reports.pop("profile", None)
    if "demo" not in reports:
        sys.exit("benchmarks/results/demo.json is missing: run `make bench`")
    demo = reports["demo"]
    title = f"DLRM, {demo['machine']['cores']} cores ({demo['machine']['cpu']})"
    draw(demo, RESULTS, title)
    summary = (TEXTS / "benchmarks.md").read_text()
    blocks = {"table": tables(demo), "ratios": bullets(ratio_lines(demo)), "machine": machine(demo)}
    blocks["load"] = f"In the table above: {loaded_by(demo).removeprefix('load: ')}."
    blocks["profile"] = profile(measured) if measured else "Not measured here: it needs AVX-512."
    blocks["others"] = "\n\n".join(
        f"### {TITLES.get(name, name)}\n\n{tables(report)}\n{bullets(ratio_lines(report))}\n\n{loaded_by(report)}"
        for name, report in reports.items()
        if name != "demo"
    )
    (ROOT / "BENCHMARKS.md").write_text(fill(summary, blocks))
    runs = "\n\n".join(
        f"## {name}\n\n{machine(report)}\n\n{loaded_by(report)}\n\n{every_run(report)}"
        for name, report in reports.items()
    )
    (ROOT / "REPORTS.md").write_text(fill((TEXTS / "reports.md").read_text(), {"runs": runs}))
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    readme.write_text(f"{head}{BEGIN}\n\n{tables(demo)}\n{bullets(ratio_lines(demo))}\n\n{END}{tail}")


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """The text with each {{name}} replaced by its block."""
    for name, block in blocks.items():
        text = text.replace("{{" + name + "}}", block)
    return text


def tables(report: Report) -> str:
    """One Markdown table per concurrency."""
    parts = []
    for concurrency, rows in by_concurrency(report).items():
        heading = f"**Concurrency {concurrency}**" if concurrency else "**Open loop**"
        body = [[row["name"], *(cell(row, key, style) for key, style in COLUMNS.values())] for row in rows]
        parts.append(f"{heading}, {rows[0]['batch_size']} rows a request:\n\n{markdown(['', *COLUMNS], body)}")
    return "\n\n".join(parts) + "\n"


def profile(measured: Mapping[str, Any]) -> str:
    """The profile of a forward as a table, and what its roofline stands on."""
    parts = measured["parts"]
    header = [
        "",
        "rows/s",
        "times",
        *(f"{part}, µs" for part in parts),
        "of a matrix product: dense",
        "over",
        "max dev",
    ]
    body = []
    for one in measured["contenders"]:
        roof = one.get("roofline")
        shares = [f"{roof[part]['share_of_matrix_product']:.0%}" if roof else "-" for part in ("dense", "over")]
        deviation = one.get("max_abs_deviation")
        body.append(
            [
                one["name"],
                f"{one['rows_per_s']:,.0f}",
                f"{one['times_torchscript']:.2f}",
                *(f"{one['parts_us_per_row'][part]:.2f}" for part in parts),
                *shares,
                f"{deviation:.0e}" if deviation is not None else "-",
            ]
        )
    product = measured["matrix_product"]
    speeds = ", ".join(f"{kind} {speed:,.0f}" for kind, speed in product["gflop_per_s"].items())
    return (
        f"{markdown(header, body)}\n\nMicroseconds a row, {measured['rows']} rows a forward, medians of "
        f"{measured['rounds']} interleaved rounds. A matrix product of {product['size']} x {product['size']}, by "
        f"torch's fastest kernel, reaches, on the same core in the same run, GFLOP/s: {speeds}. `make bench` measures "
        "it, with `benchmarks/profile_forward.py`."
    )


def every_run(report: Report) -> str:
    """Every measurement behind the medians, in the order in which the rounds ran."""
    columns = {
        **COLUMNS,
        "p90 ms": ("p90_ms", ".2f"),
        "p99.9 ms": ("p999_ms", ".2f"),
        "client µs/req": ("client_cpu_us_per_req", ",.0f"),
        "client busy": ("client_busy", ".2f"),
    }
    body = [
        [run["name"], str(run["concurrency"] or "open"), *(cell(run, key, style) for key, style in columns.values())]
        for run in report["runs"]
    ]
    notes = bullets(f"{key}: `{json.dumps(value)}`" for key, value in report["notes"].items())
    return f"{notes}\n\n{markdown(['run', 'concurrency', *columns], body)}"


def machine(report: Report) -> str:
    """What the figures depend on, in one paragraph."""
    about: dict[str, Any] = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['cores']} cores of {about['cpu']}, {about['memory_gib']} GiB, {about['system']}, "
        f"Python {about['python']}; {versions}; commit {about['commit']}."
    )


def markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    names = list(header)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    main()
