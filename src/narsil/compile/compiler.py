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
from narsil.compile.gate import replay, require
from narsil.compile.options import CompileOptions, resolved
from narsil.compile.planner import Workbench, choose
from narsil.compile.toolchain import build_forward
from narsil.errors import ArtifactError

__all__ = ["compile_artifact"]

_GPU_ALIGNMENT = 16  # bytes; of table rows, for FBGEMM's GPU operator
_TAIL = 64  # zero bytes after the tables: vector loads of the last row may reach beyond it


def compile_artifact(
    source: Artifact,
    out: str | Path,
    *,
    precision: str = "fp32",
    engine: str = "auto",
    device: str = "cpu",
    limit: float | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[Artifact, bool]:
    """Compiles ``source`` to the folder ``out``; returns the new artifact and whether it was there already.

    ``limit`` bounds the largest deviation of a score (None: options.DEFAULT_LIMITS). ``calibration`` has rows to choose
    and to judge by, beside random ones. Raises ArtifactError where the model is no DLRM that can be compiled, deviates
    too far, or ``out`` holds other files; ConfigError where the precision, the engine or the C++ compiler is missing
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
        job = _Job(source, staging, parts, calibration, report)
        *first, last = options.precisions
        if not any(_attempt(job, replace(info, precision=name)) for name in first):
            _attempt(job, replace(info, precision=last), must=True)
    return artifacts.open_artifact(out, verify=False), False


@dataclass(frozen=True)
class _Job:
    """What every attempt of one compile works with."""

    source: Artifact
    staging: Path
    parts: DlrmParts
    calibration: Calibration | None
    report: Progress


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
        limit=options.limit,
        note="",
        dense_layers=len(parts.dense),
        layers=(),
    )


def _attempt(job: _Job, info: CompiledInfo, *, must: bool = False) -> bool:
    """Makes and judges one precision. Where it deviates too far: ArtifactError if it ``must`` not, else False."""
    job.report("compile", 0, 1)
    info = _fused(job, info) if info.engine == "fused" else _inductor(job, info)
    job.report("compile", 1, 1)
    _write_manifest(job, info)
    job.report("replay", 0, 1)
    # A DLRM that can be compiled scores one task: core.read_parts has looked.
    (deviation,) = replay(job.source, artifacts.open_artifact(job.staging, verify=False), job.calibration).values()
    job.report("replay", 1, 1)
    if not must and not deviation.max_abs <= info.limit:
        return False
    require(deviation, info.limit, info.precision)
    _write_manifest(job, info.with_deviation(deviation))
    return True


def _fused(job: _Job, info: CompiledInfo) -> CompiledInfo:
    """Writes forward.so and weights.bin."""
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
    plan = choose(bench, info.precision, kinds_here(processor_flags()), info.limit)
    job.report("precision", 1, 1)
    with (job.staging / artifacts.WEIGHTS_FILE).open("wb") as file:
        write_packed(plan.layers, file)
    shapes = tuple(layer.shape for layer in plan.layers)
    return replace(info, precision=plan.precision, note=plan.note, layers=shapes)


def _inductor(job: _Job, info: CompiledInfo) -> CompiledInfo:
    """Writes model.pt2."""
    export_core(job.parts, info, job.staging / artifacts.COMPILED_FILE)
    return replace(info, note=f"AOTInductor, {info.precision}")


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
