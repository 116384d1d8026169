"""Renders REPORTS.md, BENCHMARKS.md and the README's tables from benchmarks/results/MACHINE/*.json, and each machine's
pictures beside them. No measured figure in them is typed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contenders import BASELINE

from narsil.bench.markdown import (
    bullets,
    every_run,
    machine_name,
    profile,
    provenance,
    summary,
    tables,
    where,
)
from narsil.bench.pictures import draw, draw_profile
from narsil.bench.report import Report, loaded_by, ratio_lines

ROOT = Path(__file__).parent.parent
TITLES = {
    "crowd": "A crowd: many connections, as many requests in flight, and then more on Narsil",
    "module_as_saved": "The module as it was saved",
    "transport": "Transports alone: no model behind them",
}
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"

Reports = Mapping[str, Report]  # what was measured -> its report, of one machine


def main() -> None:
    results = read_results(ROOT)
    for path, text in render(results, ROOT).items():
        path.write_text(text)
    for folder, reports in results.items():
        draw_pictures(reports, ROOT / "benchmarks" / "results" / folder)


def read_results(root: Path) -> dict[str, Reports]:
    """The reports of each machine's folder. Leaves, with what to do, where one has no main comparison."""
    found: dict[str, Reports] = {}
    for folder in sorted(path for path in (root / "benchmarks" / "results").iterdir() if path.is_dir()):
        found[folder.name] = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        if "demo" not in found[folder.name]:
            sys.exit(f"{folder / 'demo.json'} is missing: run `make bench` on that machine, or remove the folder")
    return found or sys.exit("benchmarks/results holds no machine's results: run `make bench`")


def render(results: Mapping[str, Reports], root: Path) -> dict[Path, str]:
    """Every rendered document's text by its path."""
    texts = root / "benchmarks" / "texts"
    table = summary([reports["demo"] for reports in results.values()], BASELINE)
    machines = bullets(
        f"**{machine_name(reports['demo']['machine'])}**: {_place(reports)}" for reports in results.values()
    )
    sections = "\n\n".join(_section(folder, reports) for folder, reports in results.items())
    runs = "\n\n".join(
        f"## {machine_name(report['machine'])}: {name}\n\n{every_run(report)}"
        for reports in results.values()
        for name, report in reports.items()
        if name != "profile"
    )
    readme = root / "README.md"
    head, _, rest = readme.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    blocks = {"summary": table, "machines": machines, "sections": sections, "runs": runs}
    return {
        readme: f"{head}{BEGIN}\n\n{table}\n\n{machines}\n\n{END}{tail}",
        root / "BENCHMARKS.md": fill((texts / "benchmarks.md").read_text(), blocks),
        root / "REPORTS.md": fill((texts / "reports.md").read_text(), blocks),
    }


def draw_pictures(reports: Reports, folder: Path) -> None:
    """The pictures of one machine's reports, into its folder."""
    demo = reports["demo"]
    draw(demo, folder, f"DLRM, {demo['machine']['cores']} cores, {machine_name(demo['machine'])}")
    if measured := reports.get("profile"):
        draw_profile(measured, folder / "profile.png")


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """The text with each {{name}} replaced by its block."""
    for name, block in blocks.items():
        text = text.replace("{{" + name + "}}", block)
    return text


def _place(reports: Reports) -> str:
    """Where the main comparison was measured, with the processor's peak from whichever report of the machine has it."""
    about: dict[str, Any] = dict(reports["demo"]["machine"])
    peaks = [report["machine"].get("peak_gflop_per_s") for report in reports.values()]
    about["peak_gflop_per_s"] = about.get("peak_gflop_per_s") or next((peak for peak in peaks if peak), {})
    return where({"machine": about})


def _section(folder: str, reports: Reports) -> str:
    """One machine's part of BENCHMARKS.md."""
    demo, measured = reports["demo"], reports.get("profile")
    pictures = f"benchmarks/results/{folder}"
    parts = [
        f"## {machine_name(demo['machine'])}",
        _place(reports),
        tables(demo),
        bullets(ratio_lines(demo)),
        f"{loaded_by(demo)}; {provenance(demo)}",
        f"![Throughput and latency]({pictures}/throughput_and_latency.png)",
        f"![Latency distribution]({pictures}/latency_distribution.png)",
        "### Where a forward's time goes",
        "One lane, no server around it.",
        *(
            [f"![Profile of a forward]({pictures}/profile.png)", profile(measured)]
            if measured
            else ["Not measured here."]
        ),
    ]
    for name, title in TITLES.items():
        if report := reports.get(name):
            parts += [
                f"### {title}",
                tables(report),
                bullets(ratio_lines(report)),
                f"{loaded_by(report)}; {provenance(report)}",
            ]
    return "\n\n".join(part.strip("\n") for part in parts)


if __name__ == "__main__":
    main()
