"""Code that cannot be loaded, or does not score, is found by trying, and auto serves the artifact beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

from narsil.artifacts.artifact import Artifact
from narsil.backends import kernels
from narsil.backends.registry import load_backend
from narsil.backends.torchscript import TorchScriptBackend
from narsil.errors import ArtifactError, ConfigError
from tests.fixtures_compiled import needs_compiler, needs_fused, open_artifact_unchecked
from tests.fixtures_models import batch_of

pytestmark = [needs_compiler, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

# A library as a machine with older ones sees it: it asks for a symbol that nothing here has.
OF_NEWER_LIBRARIES = """
extern "C" void symbol_of_a_newer_libstdcxx();
void* use = (void*)symbol_of_a_newer_libstdcxx;
"""

FORWARD = """
#include <cmath>
#include <cstdint>
extern "C" {
int64_t narsil_forward_version() { return 2; }
int64_t narsil_plan_bytes(const void*, int64_t) { return 64; }
int narsil_plan(const void*, const void*, void*, float*) { return 3; }
int64_t narsil_scratch_bytes(const void*, int64_t) { return 64; }
int narsil_forward(const void*, const void*, void*, float* scores, double*) { %s }
}
"""


def library(source: str, folder: Path) -> bytes:
    (folder / "code.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", "-w", "-Wl,-z,now", str(folder / "code.cpp"), "-o", str(folder / "code.so")]
    subprocess.run(command, check=True, timeout=120)
    return (folder / "code.so").read_bytes()


def with_code(artifact: Artifact, code: bytes) -> Artifact:
    """The artifact with another library in the place of its own."""
    assert artifact.compiled is not None
    if artifact.compiled.suffix == ".so":
        artifact.compiled.write_bytes(code)
    else:
        with zipfile.ZipFile(artifact.compiled) as package:
            content = {name: package.read(name) for name in package.namelist()}
        with zipfile.ZipFile(artifact.compiled, "w") as package:
            for name, data in content.items():
                package.writestr(name, code if name.endswith(".so") else data)
    return open_artifact_unchecked(artifact)


def assert_falls_back(artifact: Artifact, says: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ArtifactError, match=says):
        load_backend(artifact, "compiled")
    with pytest.raises(ArtifactError, match=says):  # what was asked for is not to be had from torch
        load_backend(artifact, "auto", batch_invariant=True)
    backend = load_backend(artifact, "auto", "cpu")
    assert backend.name == "torch"
    (warning,) = [record.message for record in caplog.records if "Falling back to the torch backend" in record.message]
    assert says.replace("\\", "") in warning
    batch = batch_of(backend.schema.rows.tolist(), backend.schema.dense_dim, 7)
    assert np.isfinite(backend.run(batch)["default"]).all()


def test_libraries_older_than_those_it_was_built_with(copy, tmp_path, caplog):
    artifact = with_code(copy, library(OF_NEWER_LIBRARIES, tmp_path))
    assert_falls_back(artifact, "undefined symbol: symbol_of_a_newer_libstdcxx", caplog)


@needs_fused
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 1;", "an id lies outside of its feature's table"),
        ("*scores = NAN; return 0;", "it scores a row of zeros as nan"),
        ("*scores = INFINITY; return 0;", "it scores a row of zeros as inf"),
    ],
    ids=["fails", "no number", "infinity"],
)
@pytest.mark.parametrize("pair", ["fused"], indirect=True)
def test_code_that_loads_and_does_not_score(copy, tmp_path, caplog, body, says):
    assert_falls_back(with_code(copy, library(FORWARD % body, tmp_path)), says, caplog)


def test_a_volume_that_is_mounted_noexec(copy, tmp_path):
    """In a mount namespace of its own; the inductor engine's code is unpacked to the temporary folder, so that one is
    on the volume as well."""
    place = tmp_path / "volume"
    place.mkdir()
    namespace = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    mount = f"mount -t tmpfs -o noexec tmpfs {place}"
    if subprocess.run([*namespace, "sh", "-c", mount], check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("no namespaces to mount in")
    code = (
        "import logging, sys; logging.basicConfig(); from narsil.artifacts.artifact import open_artifact; "
        "from narsil.backends.registry import load_backend; "
        f"print(load_backend(open_artifact({str(place / copy.path.name)!r}), 'auto', 'cpu').name)"
    )
    script = f'{mount} && cp -r {copy.path} {place} && TMPDIR={place} exec "$@"'
    command = [*namespace, "sh", "-c", script, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch"
    assert "failed to map segment from shared object" in done.stderr
    assert "Falling back to the torch backend" in done.stderr


@needs_fused
@pytest.mark.parametrize("pair", ["fused"], indirect=True)
def test_options_that_the_fused_engine_does_not_have_are_refused(copy):
    for backend in ("auto", "compiled"):
        with pytest.raises(ConfigError, match=r"intra_op_threads is 2, and the fused engine .* one thread"):
            load_backend(copy, backend, "cpu", 2)


def test_a_speed_up_that_cannot_be_measured_is_gone_without(small_artifact, monkeypatch, caplog):
    def fail(layers: object) -> float:
        raise RuntimeError("could not create a primitive\nand more")

    batch = batch_of(small_artifact.schema.rows.tolist(), small_artifact.schema.dense_dim, 9)
    expected = TorchScriptBackend.load(small_artifact, "cpu", tune=False).run(batch)["default"]
    monkeypatch.setattr(kernels, "_gain", fail)
    backend = load_backend(small_artifact, "torch", "cpu")
    np.testing.assert_array_equal(backend.run(batch)["default"], expected)
    assert backend.bucket(9) == 9
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "linear layers stay with torch's own kernels: oneDNN's failed (could not create a primitive)"
