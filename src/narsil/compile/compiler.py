"""`narsil compile`, step by step: TorchScript in, a folder that the compiled backend runs out.

    options    what is asked for, held against this machine                    options.py, toolchain.py
    cache      whether the folder holds that already                           cache.py
    tables     the artifact taken apart; its tables written as they are mapped    core.py
    code       fused: forward.cpp built, layers' kinds chosen and packed       toolchain.py, planner.py, packing.py
               inductor: the core exported and compiled                        export.py
    gate       the result run and held against the artifact                    gate.py

OUT is either what it was or a whole new artifact that has passed the gate. The formats are artifacts/compiled_info.py's
and artifacts/packed.py's, the engines backends/fused.py and backends/inductor.py.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from narsil.artifacts import artifact as artifacts
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import CompiledInfo, processor_flags
from narsil.artifacts.copying import copy_file
from narsil.artifacts.packed import kinds_here, write_packed
from narsil.artifacts.replacing import Progress, replacing
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.fused import ForwardLibrary, Geometry
from narsil.backends.registry import load_backend
from narsil.compile.cache import cached, gpu_flags_of, key_of
from narsil.compile.calibration import Calibration
from narsil.compile.core import DlrmParts, read_parts, realigned
from narsil.compile.export import export_core
from narsil.compile.gate import DEFAULT_LIMIT, Measure, judged, limits_for, measure_of, problem_of, require
from narsil.compile.options import CompileOptions, resolved
from narsil.compile.planner import Workbench, plans
from narsil.compile.toolchain import build_forward
from narsil.errors import ArtifactError

__all__ = ["compile_artifact"]

_GPU_ALIGNMENT = 16  # bytes; of table rows, for FBGEMM's GPU operator
_TAIL = 64  # zero bytes after the tables: vector loads of the last row may reach beyond it


def compile_artifact(
    source: Artifact,
    out: str | Path,
    *,
    precision: str = "auto",
    engine: str = "auto",
    device: str = "cpu",
    limit: float | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[Artifact, bool]:
    """Compiles ``source`` to the folder ``out``; returns the new artifact and whether it was there already.

    ``limit`` bounds the largest deviation of a score, and with it what gate.limits_of says (None: gate.limits_for).
    ``calibration`` has rows to choose and to judge by, beside drawn ones. Raises ArtifactError where the model is no
    DLRM that can be compiled, deviates too far in every form that was asked for, or ``out`` holds other files;
    ConfigError where the precision, the engine or the C++ compiler is missing
    here; DeviceUnavailable where the device is. After an error ``out`` is what it was.
    """
    report = progress or (lambda stage, done, total: None)
    out = Path(out)
    options = resolved(precision, engine, device, limit)
    script = _script_of(source)
    if source.offers("onnx") and out.resolve() == source.path.resolve():
        raise ArtifactError(f"{out} is the artifact to compile, and would lose its ONNX graph; give another folder")
    key = key_of(source, script, options, calibration)
    if found := cached(out, key):
        return found, True
    with replacing(out) as staging:
        report("tables", 0, 1)
        parts = _read(source, script, options)
        _write_tables(parts, staging / artifacts.TABLES_FILE)
        copy_file(script, staging / artifacts.TORCHSCRIPT_FILE)
        report("tables", 1, 1)
        info = _described(parts, options, key)
        job = _Job(source, staging, parts, options, report, calibration, measure_of(source, calibration))
        _first_that_passes(job, info)
    return artifacts.open_artifact(out, verify=False), False


@dataclass(frozen=True)
class _Job:
    """What every attempt of one compile works with."""

    source: Artifact
    staging: Path
    parts: DlrmParts
    options: CompileOptions
    report: Progress
    calibration: Calibration | None
    measure: Measure


def _script_of(source: Artifact) -> Path:
    if source.torchscript is None:
        absent = f"{source.path} has no TorchScript file, which is what `narsil compile` reads"
        raise ArtifactError(source.damage.get("torchscript", absent))
    if source.device != "cpu":
        raise ArtifactError(
            f"{source.path} is packaged for {source.device}; package it with --device cpu to compile it"
        )
    return source.torchscript


def _read(source: Artifact, script: Path, options: CompileOptions) -> DlrmParts:
    """The artifact's parts, its tables laid out for the device."""
    parts = read_parts(load_torchscript(script, "cpu"), source.schema, script.name)
    if parts.pooling == "mixed" and options.engine != "fused":
        raise ArtifactError(
            f"{source.path} has sum and mean pooling beside each other, which the inductor engine does not run"
        )
    if options.device == "cuda":
        rows = [feature.rows for feature in source.schema.features]
        parts = replace(parts, int8=realigned(parts.int8, rows, parts.dim, _GPU_ALIGNMENT))
    return parts


def _write_tables(parts: DlrmParts, path: Path) -> None:
    with path.open("wb") as file:
        file.write(memoryview(parts.int8.data.numpy()))
        file.write(bytes(_TAIL))


def _described(parts: DlrmParts, options: CompileOptions, key: str) -> CompiledInfo:
    """What does not depend on the precision."""
    return CompiledInfo(
        engine=options.engine,
        device=options.device,
        precision="",
        machine=platform.machine(),
        instructions=(*processor_flags(), *gpu_flags_of(options.device)),
        torch=str(torch.__version__),
        key=key,
        dense_dim=parts.dense_dim,
        tables=parts.tables,
        dim=parts.dim,
        offsets=parts.int8.offsets,
        row_alignment=parts.int8.row_alignment,
        pooling=parts.pooling,
        limit=DEFAULT_LIMIT,
        note="",
        dense_layers=len(parts.dense),
        layers=(),
    )


def _first_that_passes(job: _Job, info: CompiledInfo) -> None:
    """Makes one form after the other until the gate lets one pass. Raises ArtifactError where it lets none: the last is
    the most precise of what was asked for."""
    job.report("compile", 0, 1)
    for made in _fused(job, info) if info.engine == "fused" else _inductor(job, info):
        job.report("compile", 1, 1)
        _write_manifest(job, made)
        job.report("replay", 0, 1)
        # A DLRM that can be compiled scores one task: core.read_parts has looked.
        (found,) = judged(job.measure, artifacts.open_artifact(job.staging, verify=False)).values()
        job.report("replay", 1, 1)
        limits = limits_for(made.precision, job.options.limit, found)
        if problem_of(found, limits) is None:
            _write_manifest(job, made.passed(found, limits.score))
            return
        job.report("compile", 0, 1)
    require(found, limits, made.precision)


def _fused(job: _Job, info: CompiledInfo) -> Iterator[CompiledInfo]:
    """Writes forward.so, and for each of the planner's choices weights.bin."""
    library = job.staging / artifacts.FUSED_FILE
    build_forward(library)
    job.report("precision", 0, 1)
    reference, (task,) = load_backend(job.source, "torch", tune_kernels=False), job.source.schema.tasks
    bench = Workbench(
        ForwardLibrary(library),
        Geometry.of(info, job.source.schema),
        job.source.schema,
        job.parts,
        np.asarray(job.parts.int8.data),
        lambda batch: reference.run(batch)[task],
        job.calibration,
    )
    limit = DEFAULT_LIMIT if job.options.limit is None else job.options.limit
    for plan in plans(bench, job.options.precision, kinds_here(processor_flags()), limit):
        job.report("precision", 1, 1)
        weights = job.staging / artifacts.WEIGHTS_FILE
        weights.unlink(missing_ok=True)  # an earlier plan's may still be mapped, and must not shrink
        with weights.open("wb") as file:
            write_packed(plan.layers, file)
        shapes = tuple(layer.shape for layer in plan.layers)
        yield replace(info, precision=plan.precision, note=plan.note, layers=shapes)


def _inductor(job: _Job, info: CompiledInfo) -> Iterator[CompiledInfo]:
    """Writes model.pt2, for each precision in turn."""
    for precision in job.options.precisions:
        made = replace(info, precision=precision, note=f"AOTInductor, {precision}")
        export_core(job.parts, made, job.staging / artifacts.COMPILED_FILE)
        yield made


def _write_manifest(job: _Job, info: CompiledInfo) -> None:
    fused = info.engine == "fused"
    roles = {
        "compiled": artifacts.FUSED_FILE if fused else artifacts.COMPILED_FILE,
        "tables": artifacts.TABLES_FILE,
        "torchscript": artifacts.TORCHSCRIPT_FILE,
    }
    if fused:
        roles["weights"] = artifacts.WEIGHTS_FILE
    artifacts.write_manifest(
        job.staging,
        name=job.source.name,
        version=job.source.version,
        schema=job.source.schema,
        device="cpu",
        files={role: job.staging / name for role, name in roles.items()},
        architecture=(job.source.manifest or {}).get("architecture") or {},
        quantization=(job.source.manifest or {}).get("quantization"),
        compiled=info.to_dict(),
    )
