"""Whether a folder already holds what a compile would make: its key is a digest of all that the result follows from.

Narsil's own part of it is every source file of the rooms that take part, found by walking them: a list kept by hand
would one day lack a file, and an old folder would be answered for a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from narsil.artifacts import artifact as artifacts
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import processor_flags
from narsil.backends.compiled import info_of
from narsil.compile.calibration import Calibration
from narsil.compile.options import CompileOptions
from narsil.compile.toolchain import FLAGS, compiler_version, require_compiler
from narsil.errors import ArtifactError

__all__ = ["ROOMS", "cached", "gpu_flags_of", "key_of", "sources"]

PACKAGE = Path(__file__).parent.parent  # narsil
ROOMS = (
    "artifacts",
    "backends",
    "compile",
    "dataflow.py",
    "names.py",
    "program",
)  # of the package: all that compiling imports, but errors.py
_SUFFIXES = frozenset({".py", ".hpp", ".cpp"})


def key_of(source: Artifact, script: Path, options: CompileOptions, calibration: Calibration | None) -> str:
    """Digest of the artifact, the options, the calibration's rows, Narsil's sources, compilers and processor."""
    compiler = require_compiler()
    described: dict[str, Any] = {
        "sources": {name: artifacts.sha256(path) for name, path in sources()},
        "flags": FLAGS,
        "compiler": [compiler, compiler_version(compiler)],
        "source": artifacts.sha256(script),
        "inputs": None if source.arguments is None else source.arguments.to_list(),
        "schema": source.schema.to_dict(),
        "name": [source.name, source.version],
        "asked": [options.precision, options.engine, options.device, options.limit, options.may_fall_back],
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "instructions": [*processor_flags(), *gpu_flags_of(options.device)],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    if calibration is not None:
        given = (calibration.dense, calibration.lengths, calibration.values, calibration.weights, calibration.labels)
        for array in given:
            digest.update(b"none" if array is None else array.tobytes())
    return digest.hexdigest()


def sources() -> Iterator[tuple[str, Path]]:
    """(name, path) of every source file of the ROOMS, the C++ ones of compile/forward included, by name."""
    found: dict[str, Path] = {}
    for room in ROOMS:
        place = PACKAGE / room
        # Links are followed: compile/forward is one, to csrc/forward, in a checkout.
        walked = os.walk(place, followlinks=True) if place.is_dir() else [(PACKAGE, (), (room,))]
        files = [Path(folder, name) for folder, _, names in walked for name in names]
        found |= {file.relative_to(PACKAGE).as_posix(): file for file in files if file.suffix in _SUFFIXES}
    yield from sorted(found.items())


def cached(out: Path, key: str) -> Artifact | None:
    """The artifact at ``out`` if it is whole, was judged, and has this key."""
    try:
        found = artifacts.open_artifact(out, verify=True)
        if found.damage:
            return None
        info = info_of(found)
    except (ArtifactError, OSError):
        return None
    judged = info.deviation is not None and info.deviation.max_abs <= info.limit
    return found if judged and info.key == key else None


def gpu_flags_of(device: str) -> tuple[str, ...]:
    """The GPU's flags where ``device`` is one."""
    if device == "cpu":
        return ()
    from narsil.backends.inductor import gpu_flags

    return gpu_flags()
