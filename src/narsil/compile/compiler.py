"""`narsil compile`, step by step: TorchScript in, a folder that the compiled backend runs out.

    options    what is asked for, held against this machine                    options.py, toolchain.py
    cache      whether the folder holds that already                           cache.py
    tables     the artifact taken apart; its tables written as they are mapped    core.py, lowering.py
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
from numpy.typing import NDArray

from narsil.artifacts import artifact as artifacts
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import CompiledInfo, processor_flags
from narsil.artifacts.copying import copy_file
from narsil.artifacts.packed import kinds_here, write_arrays, write_packed
from narsil.artifacts.replacing import Progress, replacing
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.signatures import reading_of
from narsil.artifacts.torchrec import ModuleReading
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.fused import ForwardLibrary, Geometry
from narsil.backends.registry import load_backend
from narsil.compile.cache import cached, gpu_flags_of, key_of
from narsil.compile.calibration import Calibration
from narsil.compile.core import DlrmParts, NoDlrm, program_of, read_model, read_parts, realigned
from narsil.compile.export import export_core, export_whole
from narsil.compile.forms import DlrmForm, PlanForm, plan_of
from narsil.compile.gate import DEFAULT_LIMIT, Measure, judged, limits_for, measure_of, problem_of, require
from narsil.compile.lowering import Lowered, lowered
from narsil.compile.options import CompileOptions, resolved
from narsil.compile.planner import Workbench, plans
from narsil.compile.toolchain import build_forward
from narsil.compile.whole import WholeModel, whole_model
from narsil.errors import ArtifactError, ConfigError

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
    ``calibration`` has rows to choose and to judge by, beside drawn ones. Raises ArtifactError where the model does
    what no engine has a step for, deviates too far in every form that was asked for, or ``out`` holds other files;
    ConfigError where the precision, the engine or the C++ compiler is missing here; DeviceUnavailable where the device
    is. After an error ``out`` is what it was.
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
        if source.arguments is not None:
            reading = reading_of(script, source.arguments)
        else:
            reading = read_model(load_torchscript(script, "cpu"), source.schema, script.name)
        model = _read(source, script, options, reading)
        if isinstance(model, WholeModel):
            options = _by_inductor(options)
        _write_tables(model, staging / artifacts.TABLES_FILE)
        copy_file(script, staging / artifacts.TORCHSCRIPT_FILE)
        report("tables", 1, 1)
        info = _described(model, source.schema, options, key)
        job = _Job(source, staging, model, options, report, calibration, measure_of(source, calibration, reading))
        _first_that_passes(job, info)
    return artifacts.open_artifact(out, verify=False), False


Model = DlrmParts | Lowered | WholeModel


@dataclass(frozen=True)
class _Job:
    """What every attempt of one compile works with."""

    source: Artifact
    staging: Path
    model: Model
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


def _read(source: Artifact, script: Path, options: CompileOptions, reading: ModuleReading) -> Model:
    """A DLRM's parts, its tables laid out for the device; of another model, where the fused engine is to run it, the
    plan of its program."""
    try:
        parts = read_parts(reading, script.name)
    except NoDlrm as problem:
        program = program_of(reading, script.name)
        if options.device == "cuda":
            raise ArtifactError(f"{problem}: on a GPU none other is compiled; use --device cpu") from None
        if options.engine == "fused":
            try:
                return lowered(program, source.schema.tasks, script.name)
            except ArtifactError:
                if not options.may_fall_back:
                    raise
        return _whole(reading, source, script)
    if parts.pooling == "mixed" and options.engine != "fused":
        if options.device == "cuda":
            raise ArtifactError(
                f"{source.path} has sum and mean pooling beside each other, which is not compiled for a GPU; use "
                "--device cpu"
            )
        return _whole(reading, source, script)
    if options.device == "cuda":
        rows = [feature.rows for feature in source.schema.features]
        parts = replace(parts, int8=realigned(parts.int8, rows, parts.dim, _GPU_ALIGNMENT))
    return parts


def _whole(reading: ModuleReading, source: Artifact, script: Path) -> WholeModel:
    assert reading.readings is not None  # noqa: S101 - program_of has looked
    return whole_model(reading.readings, source.schema.tasks, script.name)


def _by_inductor(options: CompileOptions) -> CompileOptions:
    """The same for the inductor engine, which runs programs in fp32. Raises ConfigError where another precision was
    asked for."""
    if options.precision not in ("auto", "fp32"):
        raise ConfigError(
            f"the inductor engine compiles in fp32 what is no DLRM, not in {options.precision}; use --precision auto"
        )
    return replace(options, engine="inductor", precisions=("fp32",))


def _stored(model: Model) -> tuple[NDArray[np.uint8], ...]:
    """What tables.bin holds, one after the other."""
    return (np.asarray(model.int8.data),) if isinstance(model, DlrmParts) else model.stored


def _write_tables(model: Model, path: Path) -> None:
    with path.open("wb") as file:
        for part in _stored(model):
            file.write(np.ascontiguousarray(part).data)
        file.write(bytes(_TAIL))


def _described(model: Model, schema: ModelSchema, options: CompileOptions, key: str) -> CompiledInfo:
    """What does not depend on the precision."""
    info = CompiledInfo(
        engine=options.engine,
        device=options.device,
        precision="",
        machine=platform.machine(),
        instructions=(*processor_flags(), *gpu_flags_of(options.device)),
        torch=str(torch.__version__),
        key=key,
        dense_dim=schema.dense_dim,
        tables=schema.num_features,
        dim=1,
        offsets=(),
        row_alignment=1,
        pooling="planned",
        limit=DEFAULT_LIMIT,
        note="",
        dense_layers=0,
        layers=(),
    )
    if isinstance(model, WholeModel):
        return replace(info, whole=model.whole)
    if isinstance(model, Lowered):
        return info
    return replace(
        info,
        dim=model.dim,
        offsets=model.int8.offsets,
        row_alignment=model.int8.row_alignment,
        pooling=model.pooling,
        dense_layers=len(model.dense),
    )


def _first_that_passes(job: _Job, info: CompiledInfo) -> None:
    """Makes one form after the other until the gate lets one pass. Raises ArtifactError where it lets none: the last is
    the most precise of what was asked for."""
    job.report("compile", 0, 1)
    for made in _fused(job, info) if info.engine == "fused" else _inductor(job, info):
        job.report("compile", 1, 1)
        _write_manifest(job, made)
        job.report("replay", 0, 1)
        found = judged(job.measure, artifacts.open_artifact(job.staging, verify=False))
        job.report("replay", 1, 1)
        limits = {task: limits_for(made.precision, job.options.limit, found[task]) for task in found}
        failed = [task for task in found if problem_of(found[task], limits[task]) is not None]
        if not failed:
            _write_manifest(job, made.passed(found, max(limit.score for limit in limits.values())))
            return
        job.report("compile", 0, 1)
    require(found[failed[0]], limits[failed[0]], made.precision)


def _fused(job: _Job, info: CompiledInfo) -> Iterator[CompiledInfo]:
    """Writes forward.so, and for each of the planner's choices weights.bin."""
    library = job.staging / artifacts.FUSED_FILE
    build_forward(library)
    job.report("precision", 0, 1)
    reference = load_backend(job.source, "torch", tune_kernels=False)
    form = _form(job, info, ForwardLibrary(library))
    bench = Workbench(form, job.source.schema, reference.run, job.calibration)
    limit = DEFAULT_LIMIT if job.options.limit is None else job.options.limit
    for plan in plans(bench, job.options.precision, kinds_here(processor_flags()), limit):
        job.report("precision", 1, 1)
        weights = job.staging / artifacts.WEIGHTS_FILE
        weights.unlink(missing_ok=True)  # an earlier plan's may still be mapped, and must not shrink
        with weights.open("wb") as file:
            write_packed(plan.layers, file)
            if isinstance(job.model, Lowered):
                write_arrays(job.model.data, file)
        made = replace(info, precision=plan.precision, note=plan.note)
        if isinstance(job.model, Lowered):
            yield replace(made, plan=plan_of(job.model, job.source.schema, plan.layers))
        else:
            yield replace(made, layers=tuple(layer.shape for layer in plan.layers))


def _form(job: _Job, info: CompiledInfo, library: ForwardLibrary) -> DlrmForm | PlanForm:
    if isinstance(job.model, DlrmParts):
        geometry = Geometry.of(info, job.source.schema)
        return DlrmForm(library, geometry, job.source.schema, job.model, np.asarray(job.model.int8.data))
    assert isinstance(job.model, Lowered)  # noqa: S101 - _read has looked
    # As they will be mapped: tables that features share lie there once.
    tables = np.memmap(job.staging / artifacts.TABLES_FILE, np.uint8, mode="r")
    return PlanForm(library, job.source.schema, job.model, tables)


def _inductor(job: _Job, info: CompiledInfo) -> Iterator[CompiledInfo]:
    """Writes model.pt2, for each precision in turn."""
    for precision in job.options.precisions:
        made = replace(info, precision=precision, note=f"AOTInductor, {precision}")
        if isinstance(job.model, WholeModel):
            export_whole(job.model, made, job.staging / artifacts.COMPILED_FILE)
        else:
            assert isinstance(job.model, DlrmParts)  # noqa: S101 - _read has looked
            export_core(job.model, made, job.staging / artifacts.COMPILED_FILE)
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
        arguments=job.source.arguments,
    )
