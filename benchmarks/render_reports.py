"""Renders REPORTS.md, BENCHMARKS.md and the README's table from benchmarks/results/*.json. Nothing in them is typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from narsil.bench.pictures import draw
from narsil.bench.report import COLUMNS, Report, by_concurrency, cell, ratio_lines

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ROOT / "benchmarks" / "texts"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def main() -> None:
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    if "demo" not in reports:
        sys.exit("benchmarks/results/demo.json is missing: run `make bench`")
    demo = reports["demo"]
    title = f"DLRM, {demo['machine']['cores']} cores ({demo['machine']['cpu']})"
    draw(demo, RESULTS, title)
    summary = (TEXTS / "benchmarks.md").read_text()
    blocks = {"table": tables(demo), "ratios": bullets(ratio_lines(demo)), "machine": machine(demo)}
    blocks["others"] = "\n\n".join(
        f"### {name}\n\n{tables(report)}\n{bullets(ratio_lines(report))}"
        for name, report in reports.items()
        if name != "demo"
    )
    (ROOT / "BENCHMARKS.md").write_text(fill(summary, blocks))
    runs = "\n\n".join(f"## {name}\n\n{machine(report)}\n\n{every_run(report)}" for name, report in reports.items())
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
