"""A compiled model of the fused engine is served by a process that imports neither torch nor what made the model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

from narsil.bench.servers import ServerProcess
from narsil.client import Client
from tests.fixtures_compiled import needs_compiler, needs_fused

pytestmark = [needs_fused, needs_compiler, pytest.mark.filterwarnings("ignore")]

# Packages of the makers; a module of theirs in a process that serves would be a fault.
MAKERS = ("torch", "fbgemm_gpu", "onnxruntime", "narsil.compile", "narsil.packaging")

# Makes torch and fbgemm as good as not installed.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "fbgemm_gpu"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
INSTALLED = pytest.mark.parametrize("before", ["", WITHOUT], ids=["torch installed", "torch missing"])

RUN_A_BATCH = """
import json, sys
import numpy as np
from narsil.artifacts.artifact import open_artifact
from narsil.backends.registry import load_backend
from narsil.dataflow import Batch

backend = load_backend(open_artifact(sys.argv[1]), "auto", "cpu")
given = np.load(sys.argv[2])
batch = Batch(len(given["dense"]), given["dense"], given["lengths"], given["values"], one_hot=False)
scores = backend.share().run(batch)["default"]
print(json.dumps([backend.name, scores.tolist(), sorted(sys.modules)]))
"""

SERVE = """
import atexit, json, pathlib, sys
told = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: told.write_text(json.dumps(sorted(sys.modules))))
from narsil.cli import main
main()
"""

LOOK = "; import sys; print('MODULES', *sys.modules)"


def makers_in(modules: list[str]) -> list[str]:
    return [name for name in modules if name.startswith(tuple(f"{maker}." for maker in MAKERS)) or name in MAKERS]


def python(code: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@INSTALLED
def test_loading_and_running(fused, tmp_path, before):
    batch = fused.batch(20, 3)
    np.savez(tmp_path / "batch.npz", dense=batch.dense, lengths=batch.lengths, values=batch.values)
    name, scores, modules = json.loads(python(before + RUN_A_BATCH, fused.out, tmp_path / "batch.npz"))
    assert name == "compiled"
    np.testing.assert_array_equal(np.array(scores, np.float32), fused.backend.run(batch)["default"])
    assert makers_in(modules) == []


@INSTALLED
@pytest.mark.parametrize("backend", ["auto", "compiled"])
def test_serving(fused, tmp_path, before, backend):
    told = tmp_path / "modules.json"
    options = ["--model", str(fused.out), "--backend", backend, "--lanes", "2", "--port", "0"]
    server = ServerProcess(
        [sys.executable, "-c", before + SERVE, str(told), "serve", *options], r"^narsil: serving .* on (\S+)"
    )
    batch = fused.batch(5, None)
    try:
        server.start()
        with Client(server.address) as client:
            assert client.model(timeout=30).backend == "compiled"
            found = client.predict(batch.dense, batch.values.reshape(-1, 5).T, timeout=30)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0, server.log_tail()
    finally:
        server.stop()
    np.testing.assert_array_equal(found.scores["default"], fused.backend.run(batch)["default"])
    modules = json.loads(told.read_text())
    assert "narsil.server" in modules
    assert makers_in(modules) == []


@pytest.mark.parametrize(
    "code",
    [
        "import narsil",
        "import narsil.client",
        "import narsil.server",
        "from narsil.cli import cli; cli(['--help'], standalone_mode=False)",
        "from narsil.cli import cli; cli(['serve', '--help'], standalone_mode=False)",
        "from narsil.cli import cli; cli(['compile', '--help'], standalone_mode=False)",
    ],
)
def test_help_and_imports(code):
    modules = python(code + LOOK).rpartition("MODULES")[2].split()
    assert [name for name in makers_in(modules) if not name.startswith("narsil.")] == []


def test_torch_that_is_imported_would_be_seen(fused):
    """Of this file's own looking: the torch backend beside it does import torch."""
    code = RUN_A_BATCH.partition("given =")[0].replace('"auto"', '"torch"') + "print(*sys.modules)"
    assert {"torch", "fbgemm_gpu"} <= set(makers_in(python(code, fused.out).split()))
