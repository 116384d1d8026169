"""Two pictures of a report: bars for throughput and latency, and how latencies are distributed; and one of a profile.

Receives a report (never live measurements), writes PNG files. Needs matplotlib: the ``bench`` extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from narsil.bench.report import Report, by_concurrency, cell, label

BASELINE_COLOR = "#8d99ae"
COLORS = ("#0b6e4f", "#2a9d8f", "#e9a23b", "#c8553d", "#6d597a", "#355070", "#b56576", "#577590")


def draw(report: Report, folder: Path, title: str) -> list[Path]:
    """Writes both pictures into the folder and returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    bars, distribution = folder / "throughput_and_latency.png", folder / "latency_distribution.png"
    _draw_bars(report, title, bars)
    _draw_distribution(report, title, distribution)
    return [bars, distribution]


def draw_profile(profile: Mapping[str, Any], path: Path) -> Path:
    """Where a forward's time goes: a bar per contender, cut into its parts; beside it, how much of a large matrix
    product's speed each part reaches. ``profile`` is what benchmarks/profile_forward.py writes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    contenders = profile["contenders"]
    places = np.arange(len(contenders))[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.6 + 0.55 * len(contenders)), width_ratios=(3, 2))
    title = f"One forward of {profile['rows']} rows on one core, microseconds a row"
    figure.suptitle(title, fontsize=13, x=0.02, ha="left", weight="bold")
    start = np.zeros(len(contenders))
    for part, color in zip(profile["parts"], (*COLORS[:4], BASELINE_COLOR), strict=True):
        widths = np.array([one["parts_us_per_row"][part] for one in contenders])
        left.barh(places, widths, left=start, color=color, label=part)
        start += widths
    for place, end, one in zip(places, start, contenders, strict=True):
        left.text(end, place, f" {one['rows_per_s']:,.0f} rows/s ({one['times_torchscript']:.1f}x)", va="center")
    _frame(left, places, contenders, "time by part (shorter is better)", float(start.max()) * 1.12)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    _draw_roofline(right, contenders, places)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_roofline(axis: Any, contenders: Sequence[Mapping[str, Any]], places: Any) -> None:
    shown = {"dense": COLORS[1], "interaction": COLORS[2], "over": COLORS[3]}
    height = 0.8 / len(shown)
    for number, (part, color) in enumerate(shown.items()):
        for place, one in zip(places, contenders, strict=True):
            if "roofline" not in one:
                continue
            found = one["roofline"][part]
            share, at = found["share_of_matrix_product"] * 100, place + 0.4 - height * (number + 0.5)
            axis.barh(at, share, height=height * 0.9, color=color)
            axis.text(share, at, f" {share:.0f} %, {found['gflop_per_s']:,.0f} GFLOP/s", va="center", fontsize=7)
    _frame(axis, places, contenders, "of a large matrix product's speed, same core and run", 100)
    axis.set_xlim(0, 135)
    axis.set_xticks([0, 25, 50, 75, 100])
    axis.set_yticklabels([])


def _colors(report: Report) -> dict[str, str]:
    """One color per contender in all pictures; the first, the baseline, is grey."""
    names = list(dict.fromkeys(row["name"] for row in report["rows"]))
    baseline = "baseline" in names[0]
    palette = ([BASELINE_COLOR] if baseline else []) + list(COLORS)
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def _draw_bars(report: Report, title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    groups = by_concurrency(report)
    colors = _colors(report)
    height = 1.4 + 0.5 * len(colors)
    figure, axes = plt.subplots(len(groups), 2, figsize=(13, height * len(groups) + 0.6), squeeze=False)
    figure.suptitle(title, fontsize=13, x=0.02, ha="left", weight="bold")
    for line, (concurrency, rows) in enumerate(groups.items()):
        heading = f"concurrency {concurrency}" if concurrency else "open loop"
        _bars(axes[line][0], rows, colors, "samples_per_s", f"{heading}: samples per second (longer is better)", ",.0f")
        _latency_bars(axes[line][1], rows, colors, f"{heading}: latency p50 and p99, ms (shorter is better)")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(
    axis: Any, rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str], key: str, heading: str, style: str
) -> None:
    places = np.arange(len(rows))[::-1]
    values = [row[key] or 0 for row in rows]
    axis.barh(places, values, color=[colors[row["name"]] for row in rows])
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:{style}}", va="center", fontsize=9)
    _frame(axis, places, rows, heading, max(values, default=1))


def _latency_bars(axis: Any, rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str], heading: str) -> None:
    places = np.arange(len(rows))[::-1]
    p99 = [row["p99_ms"] or 0 for row in rows]
    axis.barh(places, p99, color=[colors[row["name"]] for row in rows], alpha=0.3)
    axis.barh(places, [row["p50_ms"] or 0 for row in rows], color=[colors[row["name"]] for row in rows])
    for place, row in zip(places, rows, strict=True):
        told = f" {cell(row, 'p50_ms', '.2f')} / {cell(row, 'p99_ms', '.2f')}"
        axis.text(row["p99_ms"] or 0, place, told, va="center", fontsize=9)
    _frame(axis, places, rows, heading, max(p99, default=1))
    axis.set_yticklabels([])


def _frame(axis: Any, places: Any, rows: Sequence[Mapping[str, Any]], heading: str, largest: float) -> None:
    axis.set_title(heading, fontsize=10, loc="left")
    axis.set_yticks(places, [label(row).replace(" (", "\n(") for row in rows], fontsize=9)
    axis.set_xlim(0, largest * 1.22 or 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _draw_distribution(report: Report, title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    groups = by_concurrency(report)
    colors = _colors(report)
    edges = np.array(report["bucket_edges_s"]) * 1e3
    figure, axes = plt.subplots(1, len(groups), figsize=(6.5 * len(groups), 4.8), squeeze=False)
    figure.suptitle(title, fontsize=13, x=0.02, ha="left", weight="bold")
    for axis, concurrency in zip(axes[0], groups, strict=True):
        for name, color in colors.items():
            counts = _histogram(report, name, concurrency, len(edges) - 1)
            if not counts.sum():
                continue
            share = 1 - np.cumsum(counts) / counts.sum()
            shown = share > 0
            axis.step(edges[1:][shown], share[shown] * 100, where="pre", color=color, label=name, linewidth=1.8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(0.05, 110)
        _range(axis, report, concurrency, edges)
        axis.set_xlabel("latency, ms")
        axis.set_ylabel("% of requests slower than this")
        axis.set_yticks([100, 50, 10, 1, 0.1], ["100", "50 (p50)", "10", "1 (p99)", "0.1"])
        heading = f"concurrency {concurrency}" if concurrency else "open loop"
        axis.set_title(f"{heading} (further left is better)", fontsize=10, loc="left")
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _range(axis: Any, report: Report, concurrency: int, edges: Any) -> None:
    """Limits the axis to where there are latencies, on round labels."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    total = sum(
        (np.array(run["histogram"]) for run in report["runs"] if run["concurrency"] == concurrency),
        np.zeros(len(edges) - 1),
    )
    used = np.flatnonzero(total)
    if len(used):
        axis.set_xlim(edges[used[0]] / 1.2, edges[used[-1] + 1] * 1.2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _histogram(report: Report, name: str, concurrency: int, buckets: int) -> Any:
    counts = np.zeros(buckets)
    for run in report["runs"]:
        if run["name"] == name and run["concurrency"] == concurrency:
            counts += np.array(run["histogram"])
    return counts
