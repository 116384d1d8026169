"""A model of large layers, DCNv2 in the shape of MLPerf's DLRM-v2: its compiled forwards against TorchScript's, and how
near they come to what the core can multiply.

One lane on one core, the same artifact, rows of their own in every round. Times are the process's CPU clock, so that
what others take of the core meanwhile does not count. The tables are small (1,000 to 2,000 rows): it is the layers that
are held against the processor here, and `profile_forward.py` shows lookups.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from contenders import LEFT_OUT, compiled_info, positive
from lifecycle import Predict, package, tables
from rich.console import Console
from rich.table import Table
from torchrec.models.dlrm import DLRM_DCN

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.packed import LayerShape
from narsil.backends.base import Backend
from narsil.backends.compiled import load_compiled
from narsil.backends.registry import load_backend
from narsil.bench.machine import machine
from narsil.bench.peak import SIZE, MatrixProducts
from narsil.bench.report import write_report
from narsil.compile.compiler import compile_artifact
from narsil.dataflow import Batch

TORCHSCRIPT = "TorchScript, as saved"
DENSE, DIM = 13, 128
ROWS = [1000 + 37 * number for number in range(26)]  # of each table
BAGS = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]  # MLPerf's ids a bag
WARMUP = 4  # rounds: TorchScript optimizes in its first runs
KEYS = [f"cat_{number}" for number in range(len(ROWS))]


def main() -> int:
    arguments = _parse()
    console = Console(width=max(Console().width, 100))
    about = machine(peak=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with console.status("packaging"):
        source = packaged(arguments.model)
    compiled = {}
    for precision in ("fp32", "bf16", "auto"):
        with console.status(f"compiling in {precision}"):
            out = arguments.model.with_name(f"{arguments.model.name}-{precision}")
            compiled[precision], _ = compile_artifact(source, out, precision=precision)
    if any(compiled_info(artifact).engine != "fused" for artifact in compiled.values()):
        console.print("nothing was measured: the fused engine, which is held against the processor here, needs AVX-512")
        return LEFT_OUT
    with console.status("measuring"):
        report = {"machine": about, **measure(source, compiled, arguments.rows, arguments.rounds)}
    _print(report, console)
    if arguments.json is not None:
        write_report(report, arguments.json)
    return 0


def packaged(folder: Path) -> Artifact:
    """The model with random weights, as TorchRec packages it; made where it is missing."""
    path = folder / "model_default.pt"
    if not path.exists():
        torch.manual_seed(0)
        model = DLRM_DCN(
            tables({f"t_{key}": [key] for key in KEYS}, ROWS, DIM, spread=0.5),
            dense_in_features=DENSE,
            dense_arch_layer_sizes=[512, 256, DIM],
            over_arch_layer_sizes=[1024, 1024, 512, 256, 1],
            dcn_num_layers=3,
            dcn_low_rank_dim=512,
            dense_device=torch.device("cpu"),
        )
        some = _batch(np.random.default_rng(0), 2)
        sample = {
            "float_features": torch.from_numpy(some.dense),
            "id_list_features.lengths": torch.from_numpy(some.lengths),
            "id_list_features.values": torch.from_numpy(some.values),
        }
        package(Predict(model.eval(), KEYS, ["default"]), sample, path)
    return open_artifact(path)


def measure(source: Artifact, compiled: dict[str, Artifact], rows: int, rounds: int) -> dict[str, Any]:
    """Medians over interleaved rounds of what each contender scores and multiplies in a second, and of the peak."""
    backends: dict[str, Backend] = {TORCHSCRIPT: load_backend(source, "torch", tune_kernels=False)}
    backends |= {name: load_compiled(artifact) for name, artifact in compiled.items()}
    products, random = MatrixProducts(), np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    peaks: list[dict[str, float]] = []
    for number in range(WARMUP + rounds):
        batch = _batch(random, rows)
        for name, backend in backends.items():
            began = process_time()
            backend.run(batch)
            if number >= WARMUP:
                seconds[name].append(process_time() - began)
        peaks.append(products.measure(process_time))
    peak = {kind: round(float(np.median([one[kind] for one in peaks])), 1) for kind in peaks[0]}
    flops = sum(2 * layer.inputs * layer.outputs for layer in _layers(compiled["fp32"]))
    return {
        "rows": rows,
        "rounds": rounds,
        "flop_per_row": flops,
        "matrix_product": {"size": SIZE, "gflop_per_s": peak},
        "contenders": [_described(name, seconds, compiled.get(name), rows, flops, peak) for name in backends],
    }


def _described(
    name: str,
    seconds: dict[str, list[float]],
    artifact: Artifact | None,
    rows: int,
    flops: int,
    peak: dict[str, float],
) -> dict[str, Any]:
    """One contender. Its share of the peak is that of the whole forward's time, lookups and all."""
    typical = float(np.median(seconds[name]))
    ratios = np.array(seconds[TORCHSCRIPT]) / np.array(seconds[name])
    layers = _layers(artifact) if artifact else ()
    deviation = compiled_info(artifact).deviation if artifact else None
    ideal = _ideal_seconds(layers, peak) if artifact else flops / (peak["fp32"] * 1e9)
    return {
        "name": name,
        "layers": [layer.kind for layer in layers],
        "rows_per_s": rows / typical,
        "gflop_per_s": flops * rows / typical / 1e9,
        "share_of_matrix_product": ideal * rows / typical,
        "times_torchscript": {
            "median": float(np.median(ratios)),
            "min": float(ratios.min()),
            "max": float(ratios.max()),
        },
        "max_abs_deviation": deviation.max_abs if deviation else None,
        "rank_correlation": deviation.rank_correlation if deviation else None,
    }


def _layers(artifact: Artifact) -> Sequence[LayerShape]:
    """The linear layers of a compiled model."""
    info = compiled_info(artifact)
    return info.layers if info.plan is None else info.plan.layers


def _ideal_seconds(layers: Sequence[LayerShape], peak: dict[str, float]) -> float:
    """Of a row's layers, were each as fast as a large product of its kind; int16 takes as many instructions as bf16."""
    speeds = {**peak, "int16": peak["bf16"]}
    return float(sum(2 * layer.inputs * layer.outputs / (speeds[layer.kind] * 1e9) for layer in layers))


def _batch(random: np.random.Generator, rows: int) -> Batch:
    lengths = np.repeat(np.array(BAGS, np.int32), rows)
    values = random.integers(0, np.repeat(np.repeat(ROWS, rows), lengths)).astype(np.int32)
    dense = random.standard_normal((rows, DENSE), dtype=np.float32)
    return Batch(rows, dense, lengths, values, one_hot=False)


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table("", "rows/s", "x", "GFLOP/s", "of peak", "max dev")
    for one in report["contenders"]:
        times, deviation = one["times_torchscript"], one["max_abs_deviation"]
        table.add_row(
            one["name"],
            f"{one['rows_per_s']:,.0f}",
            f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})",
            f"{one['gflop_per_s']:.0f}",
            f"{one['share_of_matrix_product']:.0%}",
            "-" if deviation is None else f"{deviation:.0e}",
        )
    console.print(table)
    peaks = ", ".join(f"{kind} {value:,.0f}" for kind, value in report["matrix_product"]["gflop_per_s"].items())
    console.print(f"matrix product of {SIZE} x {SIZE}, GFLOP/s: {peaks}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/dcnv2-mlperf"), help="packaged when missing")
    parser.add_argument("--rows", type=positive, default=256, help="of a forward")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
