"""Reports as Markdown: the tables of README.md, BENCHMARKS.md and REPORTS.md.

Receives reports as they were written, of one machine or of several. Each table says itself where and from which commit
it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from narsil.bench.machine import in_words, peaks_in_words
from narsil.bench.report import COLUMNS, Report, by_concurrency, cell, label, loaded_by, spread

__all__ = ["bullets", "every_run", "machine_name", "markdown", "profile", "provenance", "summary", "tables"]

SHOWN = 3  # uncommitted files that are named


def machine_name(about: Mapping[str, Any]) -> str:
    """What a machine is called among others: its microarchitecture, else its processor's own name."""
    return str(about.get("microarchitecture") or about.get("cpu") or "unnamed processor")


def provenance(report: Mapping[str, Any]) -> str:
    """The commit that a report was measured at, and what no commit has of what was measured."""
    about = report["machine"]
    commit, changed = about.get("commit"), about.get("uncommitted")
    if not commit:
        return "from no commit"
    if changed:
        names = ", ".join(f"`{path}`" for path in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        return f"commit {commit} with uncommitted changes in {names}{more}"
    bare = str(commit).removesuffix("-dirty")
    return f"commit {bare}" + ("" if bare == commit else ", with uncommitted changes that were not recorded")


def where(report: Mapping[str, Any]) -> str:
    """Machine, versions and commit in one paragraph."""
    note = report["machine"].get("note")
    return f"{in_words(report['machine'])}. Measured at {provenance(report)}." + (f" {note}" if note else "")


def tables(report: Report) -> str:
    """One Markdown table per concurrency."""
    parts = []
    for concurrency, rows in by_concurrency(report).items():
        body = [[label(row), *(cell(row, key, style) for key, style in COLUMNS.values())] for row in rows]
        parts.append(f"{_heading(concurrency, rows)}\n\n{markdown(['', *COLUMNS], body)}")
    return "\n\n".join(parts) + "\n"


def summary(reports: Sequence[Report], baseline: str) -> str:
    """The same benchmark on several machines side by side: a table per concurrency, with each contender's throughput
    over the baseline's, and what that spans over all rounds on all of them."""
    concurrencies = dict.fromkeys(concurrency for report in reports for concurrency in by_concurrency(report))
    return "\n\n".join(_side_by_side(reports, baseline, concurrency) for concurrency in concurrencies)


def _side_by_side(reports: Sequence[Report], baseline: str, concurrency: int) -> str:
    found = [{row["name"]: row for row in by_concurrency(report).get(concurrency, ())} for report in reports]
    names = dict.fromkeys(name for rows in found for name in rows)
    header = [""]
    for report in reports:
        header += [f"{machine_name(report['machine'])}: samples/s", "p50 ms", "times the baseline"]
    body = []
    for name in names:
        ratios = [_throughput_ratio(report, name, baseline, concurrency) for report in reports]
        line = [" or ".join(dict.fromkeys(label(rows[name]) for rows in found if name in rows))]
        for rows, one in zip(found, ratios, strict=True):
            figures = (
                [cell(rows[name], *COLUMNS[key]) for key in ("samples/s", "p50 ms")] if name in rows else ["-"] * 2
            )
            line += [*figures, f"{one['median']:.2f} ({spread(one)})" if one else "-"]
        compared = [one for one in ratios if one]
        low, high = (
            min((one["min"] for one in compared), default=None),
            max((one["max"] for one in compared), default=None),
        )
        body.append([*line, "-" if low is None else f"{low:.1f} to {high:.1f}"])
    some = next(row for rows in found for row in rows.values())
    return f"{_heading(concurrency, [some])}\n\n{markdown([*header, 'to expect'], body)}"


def _throughput_ratio(report: Report, name: str, over: str, concurrency: int) -> Mapping[str, Any] | None:
    """The report's ratio of two contenders' throughput; None where it has none or no round could be compared."""
    asked = {"name": name, "over": over, "concurrency": concurrency, "metric": "samples_per_s"}
    found = (one for one in report["ratios"] if asked.items() <= one.items() and one["median"] is not None)
    return next(found, None)


def _heading(concurrency: int, rows: Sequence[Mapping[str, Any]]) -> str:
    loop = f"**Concurrency {concurrency}**" if concurrency else "**Open loop**"
    return f"{loop}, {rows[0]['batch_size']} rows a request:"


def profile(measured: Mapping[str, Any]) -> str:
    """The profile of a forward as a table, and what its roofline stands on."""
    parts = measured["parts"]
    columns = (f"{part}, µs" for part in parts)
    header = ["", "rows/s", "times", *columns, "of a matrix product: dense", "over", "max dev"]
    body = []
    for one in measured["contenders"]:
        roof = one.get("roofline")
        shares = [f"{roof[part]['share_of_matrix_product']:.0%}" if roof else "-" for part in ("dense", "over")]
        deviation = one.get("max_abs_deviation")
        body.append(
            [
                label(one),
                f"{one['rows_per_s']:,.0f}",
                f"{one['times_torchscript']:.2f}",
                *(f"{one['parts_us_per_row'][part]:.2f}" for part in parts),
                *shares,
                f"{deviation:.0e}" if deviation is not None else "-",
            ]
        )
    product = measured["matrix_product"]
    return (
        f"{markdown(header, body)}\n\nMicroseconds a row, {measured['rows']} rows a forward, medians of "
        f"{measured['rounds']} interleaved rounds. {peaks_in_words(product['gflop_per_s'])} ({product['size']} x "
        f"{product['size']}, torch's fastest kernel), on the same core in the same run. Measured with "
        f"`benchmarks/profile_forward.py` at {provenance(measured)}."
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
    notes = [f"{key}: `{json.dumps(value)}`" for key, value in report["notes"].items()]
    table = markdown(["run", "concurrency", *columns], body)
    return "\n\n".join([where(report), loaded_by(report), *([bullets(notes)] if notes else []), table])


def markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    names = list(header)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
