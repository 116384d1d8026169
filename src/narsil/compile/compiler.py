"""Compiles a DLRM artifact: TorchScript in, a folder that the compiled backend runs out.

Receives an opened Artifact; writes the code (see compiled.py for the two engines), tables.bin and the manifest. Owns
the cache key and the order of steps; OUT is either what it was or a whole new artifact that has passed the gate. Models
are run by a Judge, which is handed in by whoever may import backends. A C++ compiler is needed here, and never when
serving.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from narsil.artifacts import artifact as artifacts
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import CompiledInfo, Deviation, processor_flags
from narsil.artifacts.packed import Packed, kinds_here, write_packed
from narsil.artifacts.replacing import Progress, replacing
from narsil.artifacts.torchrec import load_torchscript
from narsil.backends.compiled import gpu_flags
from narsil.compile.calibration import Calibration
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable, first_line

__all__ = ["DEFAULT_LIMITS", "ENGINE_CHOICES", "Chosen", "Judge", "compile_artifact"]

# Largest absolute deviation of a score that a compile may show, by precision.
DEFAULT_LIMITS = {"fp32": 1e-5, "bf16": 2e-3, "int8": 2e-3, "auto": 2e-3}
ENGINE_CHOICES = ("auto", "fused", "inductor")

_REVISION = 6  # of what this file generates: an older one's output is no answer from the cache
_EXAMPLE_ROWS = 128  # of the inputs that torch.export traces; any number of rows runs
_GPU_ALIGNMENT = 16  # bytes; of table rows, for FBGEMM's GPU operator
_TAIL = 64  # zero bytes after the tables: vector loads of the last row may reach beyond it
_FORWARD = Path(__file__).with_name("forward") / "forward.cpp"
# Sums keep the order in which they are written, which makes a row's score the same in every block.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=default", "-w")
_BUILD_SECONDS = 300


class Chosen(Protocol):
    """What a Judge chose for the fused engine."""

    @property
    def precision(self) -> str:
        """The one asked for, or the one that auto became."""

    @property
    def layers(self) -> tuple[Packed, ...]:
        """Packed, in the order in which they run."""

    @property
    def note(self) -> str:
        """What was chosen and why, for people."""


class Judge(Protocol):
    """Runs models to choose and to check."""

    def choose(self, source: Artifact, info: CompiledInfo, parts: Any, library: Path, kinds: Sequence[str]) -> Chosen:
        """The layers' kinds, out of ``kinds``, for the precision and the limit in ``info``."""

    def replay(self, source: Artifact, compiled: Artifact) -> Deviation:
        """How far the compiled scores lie from the artifact's."""


def compile_artifact(
    source: Artifact,
    out: str | Path,
    judge: Judge,
    *,
    precision: str = "fp32",
    engine: str = "auto",
    device: str = "cpu",
    limit: float | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[Artifact, bool]:
    """Compiles ``source`` to the folder ``out``; returns the new artifact and whether it was there already.

    ``limit`` bounds the largest deviation of a score (None: DEFAULT_LIMITS). ``calibration`` is what the judge judges
    by, so that the cache knows of it. Raises ArtifactError where the model is no DLRM that can be compiled, deviates
    too far, or ``out`` holds other files; ConfigError where the precision, the engine or the C++ compiler is missing
    here; DeviceUnavailable where the device is. After an error ``out`` is what it was.
    """
    report = progress or (lambda stage, done, total: None)
    out = Path(out)
    limit = _limit(precision, limit)
    script = _script_of(source)
    _check_device(device)
    if source.offers("onnx") and out.resolve() == source.path.resolve():
        raise ArtifactError(f"{out} is the artifact to compile, and would lose its ONNX graph; give another folder")
    engine = _engine(engine, device)
    key = _key(source, script, [precision, engine, device, limit], calibration)
    if cached := _cached(out, key):
        return cached, True
    candidates = _candidates(precision, engine, device)
    with replacing(out) as staging:
        info, parts = _write_tables(source, script, staging, device, report)
        if info.pooling == "mixed" and engine != "fused":
            raise ArtifactError(
                f"{source.path} has sum and mean pooling beside each other, which the inductor engine does not run"
            )
        info = replace(info, engine=engine, limit=limit, key=key)
        for number, candidate in enumerate(candidates):
            last = number == len(candidates) - 1
            if _attempt(source, staging, replace(info, precision=candidate), parts, judge, report, must=last):
                break
    return artifacts.open_artifact(out, verify=False), False


def _attempt(
    source: Artifact, staging: Path, info: CompiledInfo, parts: Any, judge: Judge, report: Progress, *, must: bool
) -> bool:
    """Writes and judges one precision. False where it deviates too far, which raises if it ``must`` not."""
    report("compile", 0, 1)
    if info.engine == "fused":
        info = _write_fused(source, info, parts, judge, staging, report)
    else:
        info = replace(info, note=info.note or f"AOTInductor, {info.precision}")
        _compile(parts, info, staging / artifacts.COMPILED_FILE)
    report("compile", 1, 1)
    _write_manifest(source, staging, info)
    report("replay", 0, 1)
    deviation = judge.replay(source, artifacts.open_artifact(staging, verify=False))
    report("replay", 1, 1)
    if not must and not deviation.max_abs <= info.limit:
        return False
    _judge(deviation, info.limit, info.precision)
    _write_manifest(source, staging, info.with_deviation(deviation))
    return True


def _limit(precision: str, limit: float | None) -> float:
    if precision not in DEFAULT_LIMITS:
        raise ConfigError(f"precision must be one of {', '.join(DEFAULT_LIMITS)}, not {precision!r}")
    if limit is None:
        return DEFAULT_LIMITS[precision]
    if not 0 <= limit <= 1:
        raise ConfigError(f"the largest deviation of a score must lie between 0 and 1, not {limit}")
    return limit


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, not {device!r}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                "compiling for cuda needs a GPU and a torch that is built for it, and there is none on this machine; "
                "use --device cpu, or compile where the model will be served"
            )


def _engine(engine: str, device: str) -> str:
    """The engine to compile for: the fused one wherever it runs."""
    if engine not in ENGINE_CHOICES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINE_CHOICES)}, not {engine!r}")
    possible = device == "cpu" and bool(kinds_here(processor_flags()))
    if engine == "fused" and not possible:
        raise ConfigError("the fused engine runs on x86 processors with AVX-512; use --engine inductor")
    _check_compiler()
    return ("fused" if possible else "inductor") if engine == "auto" else engine


def _check_compiler() -> None:
    if _compiler() is None:
        raise ConfigError("compiling needs a C++ compiler: install g++, or name one with CXX (serving needs none)")


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _candidates(precision: str, engine: str, device: str) -> tuple[str, ...]:
    """The precisions to try in turn. Raises ConfigError where this processor lacks the one asked for."""
    instead = "; use another precision, or auto for what pays here"
    if engine == "fused":
        if precision not in ("auto", *kinds_here(processor_flags())):
            raise ConfigError(f"this processor has no vector instructions for {precision}" + instead)
        return (precision,)
    import torch

    if precision == "int8":
        raise ConfigError("int8 needs the fused engine, and with it an x86 processor with AVX-512 and VNNI" + instead)
    has_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "auto":
        return ("bf16", "fp32") if has_bf16 else ("fp32",)
    if precision == "bf16" and not has_bf16:
        raise ConfigError("this device has no vector instructions for bf16" + instead)
    return (precision,)


def _script_of(source: Artifact) -> Path:
    if source.torchscript is None:
        absent = f"{source.path} has no TorchScript file, which is what `narsil compile` reads"
        raise ArtifactError(source.damage.get("torchscript", absent))
    if source.device != "cpu":
        raise ArtifactError(
            f"{source.path} is packaged for {source.device}; package it with --device cpu to compile it"
        )
    return source.torchscript


def _key(source: Artifact, script: Path, asked: Sequence[Any], calibration: Calibration | None) -> str:
    """Digest of everything that the result follows from."""
    import torch

    digest = hashlib.sha256()
    described = {
        "revision": [_REVISION, artifacts.sha256(_FORWARD), _FLAGS],
        "compiler": _compiler(),
        "source": artifacts.sha256(script),
        "name": [source.name, source.version],
        "asked": list(asked),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": [*processor_flags(), *gpu_flags()],
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
        if found.damage or found.compiled is None or found.tables is None:
            return None
        info = CompiledInfo.from_manifest(found.manifest or {}, found.schema, found.tables.stat().st_size)
    except (ArtifactError, OSError):
        return None
    judged = info.deviation is not None and info.deviation.max_abs <= info.limit
    return found if judged and info.key == key else None


def _write_tables(
    source: Artifact, script: Path, staging: Path, device: str, report: Progress
) -> tuple[CompiledInfo, Any]:
    """Writes tables.bin and the TorchScript file. What is described is not yet compiled for anything."""
    import torch

    from narsil.compile.core import read_parts, realigned

    report("tables", 0, 1)
    parts = read_parts(load_torchscript(script, "cpu"), source.schema, script.name)
    instructions = processor_flags()
    if device == "cuda":
        rows = [feature.rows for feature in source.schema.features]
        parts = replace(parts, lookup=realigned(parts.lookup, rows, parts.dim, _GPU_ALIGNMENT))
        instructions += gpu_flags()
    with (staging / artifacts.TABLES_FILE).open("wb") as file:
        file.write(memoryview(parts.lookup.weights.numpy()))
        file.write(bytes(_TAIL))
    _link(script, staging / artifacts.TORCHSCRIPT_FILE)
    report("tables", 1, 1)
    info = CompiledInfo(
        engine="",
        device=device,
        precision="",
        machine=platform.machine(),
        instructions=instructions,
        torch=str(torch.__version__),
        key="",
        dense_dim=parts.dense_dim,
        tables=parts.tables,
        dim=parts.dim,
        offsets=parts.lookup.offsets,
        row_alignment=parts.lookup.row_alignment,
        pooling=parts.pooling,
        limit=0.0,
        note="",
        dense_layers=len(parts.dense),
        layers=(),
    )
    return info, parts


def _write_fused(
    source: Artifact, info: CompiledInfo, parts: Any, judge: Judge, staging: Path, report: Progress
) -> CompiledInfo:
    """Writes forward.so and weights.bin."""
    library = staging / artifacts.FUSED_FILE
    _build(library)
    report("precision", 0, 1)
    chosen = judge.choose(source, info, parts, library, kinds_here(processor_flags()))
    report("precision", 1, 1)
    with (staging / artifacts.WEIGHTS_FILE).open("wb") as file:
        write_packed(chosen.layers, file)
    shapes = tuple(layer.shape for layer in chosen.layers)
    return replace(info, precision=chosen.precision, note=chosen.note, layers=shapes)


def _build(path: Path) -> None:
    """Builds forward.cpp for this processor."""
    compiler = _compiler()
    command = [str(compiler), *_FLAGS, str(_FORWARD), "-o", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"{compiler} could not be run: {error}") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
        raise ArtifactError(
            f"{compiler} could not build the forward: {said}; use --engine inductor, or a newer compiler"
        )


def _compile(parts: Any, info: CompiledInfo, path: Path) -> None:
    """Exports the core with any number of rows and compiles it; weights are packed for oneDNN as it does so."""
    import torch

    from narsil.compile.core import Core

    core = Core(parts, "bf16" if info.precision == "bf16" else "fp32").eval().to(info.device)
    dense = torch.rand(_EXAMPLE_ROWS, info.dense_dim, device=info.device)
    pooled = torch.rand(_EXAMPLE_ROWS, info.tables * info.dim, device=info.device)
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
    fused = info.engine == "fused"
    roles = {
        "compiled": artifacts.FUSED_FILE if fused else artifacts.COMPILED_FILE,
        "tables": artifacts.TABLES_FILE,
        "torchscript": artifacts.TORCHSCRIPT_FILE,
    }
    if fused:
        roles["weights"] = artifacts.WEIGHTS_FILE
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
