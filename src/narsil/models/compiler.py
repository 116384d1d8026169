"""Compiles a DLRM artifact: TorchScript in, a folder that the compiled backend runs out.

Receives an opened Artifact; writes model.pt2 (AOTInductor), tables.bin and the manifest. Owns the cache key and the
order of steps; OUT is either what it was or a whole new artifact that has passed the gate. The gate runs both
models, so it is handed in by whoever may import backends. A C++ compiler is needed here, and never when serving.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from narsil.errors import ArtifactError, ConfigError, first_line
from narsil.models import artifact as artifacts
from narsil.models.artifact import Artifact
from narsil.models.calibration import Calibration
from narsil.models.compiled import CompiledInfo, Deviation, processor_flags
from narsil.models.packager import Progress, check_out, replace_folder
from narsil.models.torchrec import load_torchscript

__all__ = ["DEFAULT_LIMITS", "Gate", "compile_artifact"]

# Largest absolute deviation of a score that a compile may show, by precision.
DEFAULT_LIMITS = {"fp32": 1e-5, "bf16": 2e-3}

Gate = Callable[[Artifact, Artifact], Deviation]  # the artifact, the compiled one -> how far their scores differ

_REVISION = 5  # of what this file generates: an older one's output is no answer from the cache
_EXAMPLE_ROWS = 128  # of the inputs that torch.export traces; any number of rows runs
_TAIL = 64  # zero bytes after the tables: vector loads of the last row may reach beyond it


def compile_artifact(
    source: Artifact,
    out: str | Path,
    gate: Gate,
    *,
    precision: str = "fp32",
    limit: float | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[Artifact, bool]:
    """Compiles ``source`` to the folder ``out``; returns the new artifact and whether it was there already.

    ``limit`` bounds the largest deviation of a score (None: DEFAULT_LIMITS). Raises ArtifactError where the model is
    no DLRM that can be compiled, deviates too far, or ``out`` holds other files; ConfigError where the precision or
    the C++ compiler is missing here. After an error ``out`` is what it was.
    """
    report = progress or (lambda stage, done, total: None)
    out = Path(out)
    limit = _limit(precision, limit)
    script = _script_of(source)
    key = _key(source, script, precision, limit, calibration)
    if cached := _cached(out, key):
        return cached, True
    check_out(out)
    _check_machine(precision)
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        info = _write_parts(source, script, staging, precision, limit, key, report)
        _write_manifest(source, staging, info)
        report("replay", 0, 1)
        deviation = gate(source, artifacts.open_artifact(staging, verify=False))
        report("replay", 1, 1)
        _judge(deviation, limit, precision)
        _write_manifest(source, staging, CompiledInfo(**{**vars(info), "deviation": deviation}))
        replace_folder(staging, out)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return artifacts.open_artifact(out, verify=False), False


def _limit(precision: str, limit: float | None) -> float:
    if precision not in DEFAULT_LIMITS:
        raise ConfigError(f"precision must be {' or '.join(DEFAULT_LIMITS)}, not {precision!r}")
    if limit is None:
        return DEFAULT_LIMITS[precision]
    if not 0 <= limit <= 1:
        raise ConfigError(f"the largest deviation of a score must lie between 0 and 1, not {limit}")
    return limit


def _script_of(source: Artifact) -> Path:
    if source.torchscript is None:
        raise ArtifactError(f"{source.path} has no TorchScript file, which is what `narsil compile` reads")
    if source.device != "cpu":
        raise ArtifactError(
            f"{source.path} is packaged for {source.device}; package it with --device cpu to compile it"
        )
    return source.torchscript


def _key(source: Artifact, script: Path, precision: str, limit: float, calibration: Calibration | None) -> str:
    """Digest of everything that the result follows from."""
    import torch

    digest = hashlib.sha256()
    described = {
        "revision": _REVISION,
        "source": artifacts.sha256(script),
        "name": [source.name, source.version],
        "precision": precision,
        "limit": limit,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": processor_flags(),
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    if calibration is not None:
        for array in (calibration.dense, calibration.ids, calibration.labels):
            digest.update(b"none" if array is None else array.tobytes())
    return digest.hexdigest()


def _cached(out: Path, key: str) -> Artifact | None:
    """The artifact at ``out`` if it is whole and was compiled from the same inputs."""
    try:
        found = artifacts.open_artifact(out, verify=True)
        manifest = found.manifest or {}
        return found if found.compiled is not None and manifest["compiled"]["key"] == key else None
    except (ArtifactError, KeyError, TypeError):
        return None


def _check_machine(precision: str) -> None:
    import torch

    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise ConfigError("compiling needs a C++ compiler: install g++, or name one with CXX (serving needs none)")
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigError("this processor has no vector instructions for bf16; use --precision fp32")


def _write_parts(
    source: Artifact, script: Path, staging: Path, precision: str, limit: float, key: str, report: Progress
) -> CompiledInfo:
    """Writes tables.bin, model.pt2 and the TorchScript file."""
    import torch

    from narsil.models.core import read_parts

    report("tables", 0, 1)
    parts = read_parts(load_torchscript(script, "cpu"), source.schema, script.name)
    with (staging / artifacts.TABLES_FILE).open("wb") as file:
        file.write(memoryview(parts.lookup.weights.numpy()))
        file.write(bytes(_TAIL))
    _link(script, staging / artifacts.TORCHSCRIPT_FILE)
    report("tables", 1, 1)
    info = CompiledInfo(
        precision=precision,
        machine=platform.machine(),
        instructions=processor_flags(),
        torch=str(torch.__version__),
        key=key,
        dense_dim=parts.dense_dim,
        tables=parts.tables,
        dim=parts.dim,
        offsets=parts.lookup.offsets,
        row_alignment=parts.lookup.row_alignment,
        pooling=parts.pooling,
        limit=limit,
    )
    report("compile", 0, 1)
    _compile(parts, info, staging / artifacts.COMPILED_FILE)
    report("compile", 1, 1)
    return info


def _compile(parts: Any, info: CompiledInfo, path: Path) -> None:
    """Exports the core with any number of rows and compiles it; weights are packed for oneDNN as it does so."""
    import torch

    from narsil.models.core import Core

    core = Core(parts, "bf16" if info.precision == "bf16" else "fp32").eval()
    dense = torch.rand(_EXAMPLE_ROWS, info.dense_dim)
    pooled = torch.rand(_EXAMPLE_ROWS, info.tables * info.dim)
    rows = torch.export.Dim("rows", min=2, max=1 << 24)
    options = {"freezing": True, "aot_inductor.metadata": {"narsil": info.signature}}
    with torch.no_grad(), _quiet(), _one_thread():
        try:
            exported = torch.export.export(core, (dense, pooled), dynamic_shapes=({0: rows}, {0: rows}))
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
        except Exception as error:  # Inductor raises its own kinds, and the C++ compiler's
            raise ArtifactError(f"AOTInductor could not compile the model: {first_line(error)}") from error


def _judge(deviation: Deviation, limit: float, precision: str) -> None:
    # Written so that NaN is refused too.
    if not deviation.max_abs <= limit:
        raise ArtifactError(
            f"{precision} scores deviate from the artifact's by up to {deviation.max_abs:.2e} (mean "
            f"{deviation.mean_abs:.1e}) over {deviation.rows} rows, where at most {limit:.0e} is allowed; nothing was "
            "written. Choose a higher precision, or allow more with --max-deviation"
        )


def _write_manifest(source: Artifact, staging: Path, info: CompiledInfo) -> None:
    roles = {
        "compiled": artifacts.COMPILED_FILE,
        "tables": artifacts.TABLES_FILE,
        "torchscript": artifacts.TORCHSCRIPT_FILE,
    }
    artifacts.write_manifest(
        staging,
        name=source.name,
        version=source.version,
        schema=source.schema,
        device="cpu",
        files={role: staging / name for role, name in roles.items()},
        architecture=(source.manifest or {}).get("architecture") or {},
        compiled=info.to_dict(),
    )


def _link(source: Path, target: Path) -> None:
    """A second name for the file where the file system has such, else a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the deprecations that torch's own compiler steps on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lanes run forwards on one thread; weights are packed and loops cut for that."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
