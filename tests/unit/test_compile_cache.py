"""The key of a compile: it changes with whatever the result follows from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import processor_flags
from narsil.compile import cache
from narsil.compile.calibration import Calibration
from narsil.compile.options import CompileOptions
from tests.support import SCHEMA

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the key names the compiler")

OPTIONS = CompileOptions("fp32", "fused", "cpu", 1e-5, ("fp32",))
ROWS = Calibration(np.zeros((1, 3), np.float32), np.ones((1, 4), np.int32), np.zeros(4, np.int32))
# Of the modules that compiling imports, those that no compiled byte follows from.
WITHOUT_CONSEQUENCE = {"narsil", "narsil.errors"}


@pytest.fixture
def source(tmp_path) -> Artifact:
    script = tmp_path / "model_default.pt"
    script.write_bytes(b"a module")
    return Artifact(tmp_path, "model", "1", SCHEMA, "cpu", torchscript=script)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package whose files may be changed; the key is taken over it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "protos")
    copy = Path(shutil.copytree(cache.PACKAGE, tmp_path / "narsil", ignore=ignored))
    monkeypatch.setattr(cache, "PACKAGE", copy)
    return copy


def key(source: Artifact, options: CompileOptions = OPTIONS, calibration: Calibration | None = None) -> str:
    assert source.torchscript is not None
    return cache.key_of(source, source.torchscript, options, calibration)


def files_of(package: Path) -> list[Path]:
    """The sources that make the output, as the file system has them."""
    rooms = (package / room for room in ("compile", "artifacts", "backends"))
    return [file for room in rooms for file in room.rglob("*") if file.suffix in (".py", ".cpp", ".hpp")]


def test_touching_any_source_changes_the_key(source, package):
    before, files = key(source), files_of(package)
    names = {file.name for file in files}
    assert {"compiler.py", "core.py", "planner.py", "packing.py", "packed.py", "forward.cpp", "fused.py"} <= names
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert key(source) != before, file
        file.write_bytes(content)
    assert key(source) == before


def test_so_does_a_file_that_is_new_or_gone(source, package):
    before = key(source)
    for place in ("compile/forward/new.hpp", "compile/new.py", "artifacts/deeper/new.py"):
        file = package / place
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        assert key(source) != before, place
        file.unlink()
    assert key(source) == before
    (package / "compile" / "planner.py").unlink()
    assert key(source) != before


def test_what_makes_no_output_does_not(source, package):
    before = key(source)
    for place in ("server.py", "compile/notes.txt", "engine/lane.py"):
        (package / place).write_text("other")
    assert key(source) == before


def test_every_module_that_compiling_imports_is_among_the_sources():
    code = "import sys, narsil.compile.compiler; print(*(m for m in sys.modules if m.split('.')[0] == 'narsil'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    imported = set(done.stdout.split()) - WITHOUT_CONSEQUENCE
    names = {name for name, _ in cache.sources()}
    assert imported
    assert "compile/forward/forward.cpp" in names  # in a checkout, through a link
    for module in imported:
        path = module.removeprefix("narsil.").replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & names, module


def test_the_key_tells_inputs_options_compilers_and_processors_apart(source, monkeypatch):
    keys = [
        key(source),
        key(replace(source, name="another")),
        key(replace(source, version="2")),
        key(source, replace(OPTIONS, precision="bf16")),
        key(source, replace(OPTIONS, engine="inductor")),
        key(source, replace(OPTIONS, limit=1e-4)),
        key(source, calibration=ROWS),
        key(source, calibration=replace(ROWS, labels=np.zeros((1, 1), np.float32))),
    ]
    for name, other in {
        "FLAGS": ("-O2",),
        "require_compiler": lambda: sys.executable,
        "compiler_version": lambda compiler: "another version of it",
        "processor_flags": lambda: (*processor_flags(), "avx1024"),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, other)
            keys.append(key(source))
    source.torchscript.write_bytes(b"another module")
    keys.append(key(source))
    assert len(set(keys)) == len(keys)
