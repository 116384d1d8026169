"""Compiled folders, made once per test run, and what a test needs to damage a copy of one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.compiled_info import processor_flags
from narsil.artifacts.packed import kinds_here
from narsil.backends.base import Backend
from narsil.compile import toolchain
from narsil.dataflow import Batch
from narsil.packaging.dlrm import DlrmConfig
from tests.fixtures_models import batch_of, small, weights_of
from tests.float64 import Float64Dlrm, Rounded

HERE = kinds_here(processor_flags())
needs_fused = pytest.mark.skipif(not HERE, reason="the fused engine needs AVX-512")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
SMALL = small()
MANY = DlrmConfig(
    tables=40,
    rows=tuple(3 + 7 * number for number in range(40)),
    dim=64,
    dense_features=13,
    dense_arch=(40, 24, 64),
    over_arch=(48, 32, 16, 8, 1),
    pooling="mean",
    seed=2,
)


@pytest.fixture(scope="session", autouse=True)
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one compiler makes of the same sources with the same flags is built once, and copied wherever it is asked
    for again: most compiles of the tests want the one forward, which takes four seconds."""
    folder, made = tmp_path_factory.mktemp("built"), dict[tuple[str, ...], Path]()
    really = toolchain._run

    def run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        *asked, output = command
        if asked[-1] != "-o":
            return really(command, seconds)
        if (known := made.get(tuple(asked))) is not None:
            shutil.copy(known, output)
            return subprocess.CompletedProcess(command, 0, "", "")
        done = really(command, seconds)
        if done.returncode == 0:
            made[tuple(asked)] = Path(shutil.copy(output, folder / f"{len(made)}.so"))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "_run", run)
        yield


class Pair:
    """An artifact and what it was compiled to."""

    def __init__(self, config: DlrmConfig, precision: str, folder: Path, engine: str, limit: float | None) -> None:
        from narsil.backends.compiled import load_compiled
        from narsil.backends.torchscript import TorchScriptBackend
        from narsil.compile.compiler import compile_artifact
        from narsil.packaging.packager import package_dlrm

        self.config = config
        weights = weights_of(config)
        self.source = package_dlrm(config, weights, folder / "source", onnx=False, name="small")
        assert self.source.torchscript is not None
        self._float64 = Float64Dlrm(config, weights, self.source.torchscript)
        self.out = folder / "compiled"
        self.asked = {"precision": precision, "engine": engine, "limit": limit}
        self.compiled, self.cached = compile_artifact(self.source, self.out, **self.asked)  # type: ignore[arg-type]
        self.reference = TorchScriptBackend.load(self.source, "cpu", tune=False)
        self.backend: Backend = load_compiled(self.compiled)

    def batch(self, rows: int, longest: int | None, seed: int = 0) -> Batch:
        return batch_of(
            self.source.schema.rows.tolist(), self.source.schema.dense_dim, rows, longest=longest, seed=seed
        )

    @property
    def kinds(self) -> list[str]:
        """Of the layers but the last."""
        info = self.compiled.manifest["compiled"]
        if info["engine"] == "fused":
            return [layer["kind"] for layer in info["layers"][:-1]]
        dense, over = len(self.config.dense_arch), len(self.config.over_arch) - 1
        last = min(over - 1, 1)  # the inductor engine keeps the last hidden layer in FP32, where there are several
        return ["fp32"] * dense + [info["precision"]] * (over - last) + ["fp32"] * last

    def true(self, batch: Batch) -> Rounded:
        """What the scores are in float64, and how far the compiled ones lie from them by their rounding."""
        info = self.compiled.manifest["compiled"]
        kept = info["precision"] if info["engine"] == "inductor" else "fp32"
        return self._float64.scores(batch, self.kinds, kept)

    def scores(self, batch: Batch) -> NDArray[np.float32]:
        """By the compiled model."""
        found = self.backend.run(batch)["default"]
        assert found.shape == (batch.rows,)
        assert found.dtype == np.float32
        return found


@pytest.fixture(scope="session")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Forty tables with mean pooling, by the inductor engine in fp32."""
    return Pair(MANY, "fp32", tmp_path_factory.mktemp("inductor"), "inductor", None)


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The small DLRM by the fused engine, in the lowest kind that this processor has."""
    if not HERE:
        pytest.skip("the fused engine needs AVX-512")
    return Pair(SMALL, HERE[-1], tmp_path_factory.mktemp("fused"), "fused", 0.1)


@pytest.fixture(scope="session")
def small_inductor(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The small DLRM by the inductor engine, in bf16 where this processor has it."""
    import torch

    precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    return Pair(SMALL, precision, tmp_path_factory.mktemp("small"), "inductor", 0.1)


@pytest.fixture(params=["fused", "inductor"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """The small DLRM in low precision, by each engine."""
    found: Pair = request.getfixturevalue("fused" if request.param == "fused" else "small_inductor")
    return found


@pytest.fixture
def copy(pair: Pair, tmp_path: Path) -> Artifact:
    """A copy of the pair's compiled folder that a test may damage."""
    shutil.copytree(pair.out, tmp_path / "copy")
    return open_artifact(tmp_path / "copy")


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Changes a folder's manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage(path: Path, change: Callable[[bytearray], bytes]) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()  # it may be mapped by a backend of this test
    path.write_bytes(change(content))


def flipped(content: bytearray) -> bytes:
    content[len(content) // 2] ^= 1
    return bytes(content)


def open_artifact_unchecked(artifact: Artifact) -> Artifact:
    """Opens a folder whose manifest agrees with whatever its files hold now."""
    assert artifact.compiled is not None
    size = artifact.compiled.stat().st_size
    rewrite(artifact.path, lambda manifest: manifest["files"]["compiled"].update(bytes=size))
    return open_artifact(artifact.path, verify=False)
