"""The C++ compiler of this machine, and what it makes of csrc/forward.

Needed when a model is compiled, never when one is served.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from narsil.errors import ArtifactError, ConfigError

__all__ = ["FLAGS", "FORWARD", "STRICT", "build_forward", "compiler_version", "require_compiler"]

FORWARD = Path(__file__).with_name("forward")  # csrc/forward, which a wheel carries here
# Sums keep the order in which they are written, which makes a row's score the same in every block.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=default")
STRICT = ("-Wall", "-Wextra", "-Werror")
_SILENT = ("-w",)

_BUILD_SECONDS = 300
_ASK_SECONDS = 30


def require_compiler() -> str:
    """The path of the C++ compiler. Raises ConfigError where there is none, or not the one that CXX names."""
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")
    if named and found is None:
        raise ConfigError(
            f"CXX is {named!r}, which is no program here: give the name or the path of a compiler, without options, or "
            "unset CXX"
        )
    if found is None:
        raise ConfigError("compiling needs a C++ compiler: install g++, or name one with CXX (serving needs none)")
    return found


def compiler_version(compiler: str) -> str:
    """What the compiler says of itself."""
    return _run([compiler, "--version"], _ASK_SECONDS).stdout


def build_forward(path: Path, warnings: Sequence[str] = _SILENT, *, source: str = "forward.cpp") -> None:
    """Builds the forward, or another ``source`` beside it, for this processor as a shared library.

    ``warnings``: flags about them. By default there are none, since a newer compiler than Narsil's own may warn of
    more, which is nothing to a user's compile; the tests build with STRICT. Raises ArtifactError where it fails.
    """
    compiler = require_compiler()
    done = _run([compiler, *FLAGS, *warnings, str(FORWARD / source), "-o", str(path)], _BUILD_SECONDS)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
        raise ArtifactError(
            f"{compiler} could not build the forward: {said}; use --engine inductor, or a newer compiler"
        )


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"{command[0]} could not be run: {error}") from None
