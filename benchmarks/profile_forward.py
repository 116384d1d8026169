"""Where the time of one forward goes, part by part and precision by precision, and how near the processor's own limit
it comes: JSON and a picture.

One lane on one core. Contenders take turns within each round; every forward has ids of its own, so that tables are read
from memory as when serving. A part's GFLOP/s stand beside what a large matrix product of the same kind of number
reaches on the same core in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler writes to standard error

import torch
from contenders import LEFT_OUT, compiled_info, package_demo, positive
from rich.console import Console
from rich.table import Table

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.schema import ModelSchema
from narsil.backends.compiled import load_compiled
from narsil.backends.fused import PARTS, FusedBackend
from narsil.backends.registry import load_backend
from narsil.bench.machine import machine
from narsil.bench.peak import SIZE, MatrixProducts
from narsil.bench.pictures import draw_profile
from narsil.bench.report import write_report
from narsil.compile.compiler import compile_artifact
from narsil.dataflow import Batch

TORCHSCRIPT = "TorchScript, as saved"
# name -> (--precision, --max-deviation): the last allows what it takes to have every layer in int8.
COMPILED = {"fp32": ("fp32", None), "bf16": ("bf16", None), "int8": ("int8", None), "int8, every layer": ("int8", 1.0)}
BATCHES = 40  # of different ids
# A product of int16 takes as many instructions as one of bf16, and torch has none.
PEAK_OF = {"fp32": "fp32", "bf16": "bf16", "int16": "bf16", "int8": "int8"}


def main() -> int:
    arguments = _parse()
    console = Console(width=max(Console().width, 110))
    about = machine(peak=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    source = package_demo(arguments.model, "cpu", console)
    compiled = {}
    for name, (precision, limit) in COMPILED.items():
        folder = arguments.model.with_name(f"{arguments.model.name}-{name.replace(', ', '-').replace(' ', '-')}")
        with console.status(f"compiling {folder.name}"):
            compiled[name], _ = compile_artifact(source, folder, precision=precision, limit=limit)
    backends = {name: load_compiled(artifact) for name, artifact in compiled.items()}
    fused = {name: backend for name, backend in backends.items() if isinstance(backend, FusedBackend)}
    if fused.keys() != backends.keys():
        console.print("there is no profile: the fused engine, which counts its parts' time, needs AVX-512")
        return LEFT_OUT
    with console.status("measuring"):
        profile = {"machine": about, **measure(source, compiled, fused, arguments.rows, arguments.rounds)}
    write_report(profile, arguments.out / "profile.json")
    picture = draw_profile(profile, arguments.out / "profile.png")
    _print(profile, console)
    console.print(f"numbers: {arguments.out / 'profile.json'}\npicture: {picture}")
    return 0


def measure(
    source: Artifact, compiled: dict[str, Artifact], backends: dict[str, FusedBackend], rows: int, rounds: int
) -> dict[str, Any]:
    """The profile: see _described for a contender's fields."""
    batches = list(_batches(source.schema, rows))
    torchscript = load_backend(source, "torch", tune_kernels=False)
    products = MatrixProducts()
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in (TORCHSCRIPT, *backends)}
    totals: dict[str, list[float]] = {name: [] for name in seconds}
    peaks: dict[str, list[float]] = {}
    for _ in range(rounds):
        for kind, speed in products.measure().items():
            peaks.setdefault(kind, []).append(speed)
        totals[TORCHSCRIPT].append(_total(torchscript.run, batches))
        seconds[TORCHSCRIPT].append(_torchscript_parts(torchscript.run, batches, _shapes(compiled)))
        for name, backend in backends.items():
            totals[name].append(_total(backend.run, batches))
            parts = np.zeros(len(PARTS))
            for batch in batches:
                backend.score(batch, parts)
            seconds[name].append(parts / (len(batches) * rows))
    peak = {kind: round(float(np.median(found)), 1) for kind, found in peaks.items()}
    described = [_described(TORCHSCRIPT, totals, seconds, None, peak, rows)]
    described += [_described(name, totals, seconds, artifact, peak, rows) for name, artifact in compiled.items()]
    for one in described:
        one["times_torchscript"] = one["rows_per_s"] / described[0]["rows_per_s"]
    return {
        "rows": rows,
        "rounds": rounds,
        "parts": list(PARTS),
        "matrix_product": {"size": SIZE, "gflop_per_s": peak},
        "contenders": described,
    }


def _described(
    name: str,
    totals: dict[str, list[float]],
    seconds: dict[str, list[np.ndarray]],
    artifact: Artifact | None,
    peak: dict[str, float],
    rows: int,
) -> dict[str, Any]:
    total = float(np.median(totals[name]))
    parts = np.median(seconds[name], axis=0)
    found: dict[str, Any] = {
        "name": name,
        "rows_per_s": rows / total,
        "us_per_row": total / rows * 1e6,
        # The clock between the parts takes time itself: shares are of the forward without it.
        "parts_us_per_row": dict(zip(PARTS, (parts / parts.sum() * total / rows * 1e6).tolist(), strict=True)),
        "runs_rows_per_s": [rows / one for one in totals[name]],
    }
    if artifact is not None:
        found |= _roofline(artifact, found["parts_us_per_row"], peak)
    return found


def _roofline(artifact: Artifact, parts: dict[str, float], peak: dict[str, float]) -> dict[str, Any]:
    info = compiled_info(artifact)
    work = {"dense": info.layers[: info.dense_layers], "over": info.layers[info.dense_layers :]}
    flops = {
        part: [(2.0 * layer.inputs * layer.outputs, PEAK_OF[layer.kind]) for layer in layers]
        for part, layers in work.items()
    }
    flops["interaction"] = [(float(info.tables * (info.tables + 1) * info.dim), "fp32")]
    roofline = {}
    for part, pieces in flops.items():
        ideal = sum(count / (peak[kind] * 1e3) for count, kind in pieces)  # microseconds
        roofline[part] = {
            "flop_per_row": sum(count for count, _ in pieces),
            "gflop_per_s": sum(count for count, _ in pieces) / parts[part] / 1e3,
            "share_of_matrix_product": ideal / parts[part],
        }
    read = info.tables * info.row_bytes
    return {
        "precision": info.precision,
        "note": info.note,
        "layers": [layer.kind for layer in info.layers],
        "max_abs_deviation": info.deviation.max_abs if info.deviation else None,
        "roofline": roofline,
        "lookup": {"bytes_per_row": read, "gb_per_s": read / parts["lookup"] / 1e3},
    }


def _shapes(compiled: dict[str, Artifact]) -> set[tuple[int, int]]:
    """(out, in) of the dense arch's layers."""
    info = compiled_info(next(iter(compiled.values())))
    return {(layer.outputs, layer.inputs) for layer in info.layers[: info.dense_layers]}


def _torchscript_parts(run: Callable[[Batch], Any], batches: Sequence[Batch], dense: set[tuple[int, int]]) -> Any:
    """(5,) seconds a row as torch's profiler tells them: by operator, and linear layers by their weight's shape."""
    some = batches[:10]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for batch in some:
            run(batch)
    seconds = np.zeros(len(PARTS))
    part = "rest"
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        name = event.name
        if not _is_operator(name) or _is_inside_operator(event):
            continue
        if name == "aten::linear":
            part = "dense" if tuple(event.input_shapes[1]) in dense else "over"
        elif name.startswith("fbgemm::int_nbit"):
            part = "lookup"
        elif name == "aten::bmm" or (name not in ("aten::relu", "aten::sigmoid") and part in ("lookup", "interaction")):
            part = "interaction"
        elif name not in ("aten::relu", "aten::sigmoid"):  # these belong to the layer before them
            part = "rest"
        seconds[PARTS.index(part)] += event.cpu_time_total * 1e-6
    return seconds / (len(some) * some[0].rows)


def _is_operator(name: str) -> bool:
    return name.startswith(("aten::", "fbgemm::"))


def _is_inside_operator(event: Any) -> bool:
    while (event := event.cpu_parent) is not None:
        if _is_operator(event.name):
            return True
    return False


def _total(run: Callable[[Batch], Any], batches: Sequence[Batch]) -> float:
    """Seconds of one forward, the median over all batches."""
    for batch in batches[:3]:
        run(batch)
    times = []
    for batch in batches:
        began = perf_counter()
        run(batch)
        times.append(perf_counter() - began)
    return float(np.median(times))


def _batches(schema: ModelSchema, rows: int) -> Any:
    random = np.random.default_rng(0)
    shape = (schema.num_features, rows)
    for _ in range(BATCHES):
        values = random.integers(0, schema.rows[:, None], shape).astype(schema.id_dtype).ravel()
        dense = random.random((rows, schema.dense_dim), dtype=np.float32)
        yield Batch(rows, dense, np.ones(values.size, np.int32), values, one_hot=True)


def _print(profile: dict[str, Any], console: Console) -> None:
    table = Table("", "rows/s", "x", *(f"{part} µs" for part in PARTS), "over, of peak")
    for one in profile["contenders"]:
        share = one.get("roofline", {}).get("over", {}).get("share_of_matrix_product")
        parts = (f"{one['parts_us_per_row'][part]:.2f}" for part in PARTS)
        last = "-" if share is None else f"{share:.0%}"
        table.add_row(one["name"], f"{one['rows_per_s']:,.0f}", f"{one['times_torchscript']:.2f}", *parts, last)
    console.print(table)
    peaks = ", ".join(f"{kind} {value:,.0f}" for kind, value in profile["matrix_product"]["gflop_per_s"].items())
    console.print(f"matrix product of {SIZE} x {SIZE}, GFLOP/s: {peaks}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the numbers and the picture")
    parser.add_argument("--model", type=Path, default=Path("models/demo"), help="the demo model, packaged when missing")
    parser.add_argument("--rows", type=positive, default=400, help="of a forward")
    parser.add_argument("--rounds", type=positive, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
