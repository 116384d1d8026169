"""What the gate makes of real compiles: faults that it refuses, and sound forms that it lets pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.torchrec import ModuleReading
from narsil.backends.compiled import load_compiled
from narsil.compile import compiler
from narsil.compile.compiler import compile_artifact
from narsil.compile.core import DlrmParts, Linear
from narsil.compile.gate import limits_for, measure_of, problem_of
from narsil.compile.options import CompileOptions
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError
from narsil.packaging.packager import package_dlrm
from tests.fixtures_compiled import needs_compiler, needs_fused
from tests.fixtures_models import small, weights_of

pytestmark = [needs_compiler, needs_fused]
SMALL = small()


def packaged(
    folder: Path, *, last_weight: float = 1.0, last_bias: float | None = None, pooling: str = "sum"
) -> Artifact:
    """A small DLRM whose last layer is multiplied and moved."""
    config = small(pooling)
    weights, (last, _, _) = weights_of(config), config.linears[-1]
    weights[f"{last}.weight"] = weights[f"{last}.weight"] * np.float32(last_weight)
    if last_bias is not None:
        weights[f"{last}.bias"] = np.full(1, last_bias, np.float32)
    return package_dlrm(config, weights, folder, onnx=False)


def test_scores_of_rare_events_that_are_twenty_times_too_high_are_refused(tmp_path, monkeypatch):
    """As calibrating after the sigmoid makes them, where a compile leaves it out: 1e-3 at most, where 2e-3 may pass."""
    source = packaged(tmp_path / "source", last_weight=0.02, last_bias=-10)

    def moved(source: Artifact, script: Path, options: CompileOptions, reading: ModuleReading) -> DlrmParts:
        parts = read(source, script, options, reading)
        assert isinstance(parts, DlrmParts)
        *over, last = parts.over
        return replace(parts, over=(*over, Linear(last.weight, last.bias + 3)))

    read = compiler._read
    compiled, _ = compile_artifact(source, tmp_path / "sound")
    deviation = compiled.manifest["compiled"]["deviation"]
    assert 0 < deviation["max_abs"] < 1e-5
    assert abs(deviation["bias"]) < 0.008
    monkeypatch.setattr(compiler, "_read", moved)
    for precision in ("auto", "int8", "fp32"):
        with pytest.raises(ArtifactError, match=r"scores deviate by up to|the log-odds of scores deviate by up to"):
            compile_artifact(source, tmp_path / "faulty", precision=precision)
    with pytest.raises(ArtifactError, match=r"the log-odds of scores deviate by up to 2\.9\de\+00"):
        compile_artifact(source, tmp_path / "faulty", precision="bf16")


def test_an_artifact_whose_scores_are_easily_moved_compiles_in_fp32(tmp_path):
    source = packaged(tmp_path / "source", last_weight=3000)
    compiled, _ = compile_artifact(source, tmp_path / "out", precision="fp32")
    info = compiled.manifest["compiled"]
    assert info["deviation"]["max_abs"] > 1e-5  # what every fp32 compile was held to
    assert info["limit"] == pytest.approx(2e-6 + 2 * info["deviation"]["own_max_abs"])
    compile_artifact(source, tmp_path / "auto")
    with pytest.raises(ArtifactError, match=r"where at most 1\.0e-05 is allowed"):
        compile_artifact(source, tmp_path / "strict", precision="fp32", limit=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_is_wrong_with_long_bags_alone_is_refused(tmp_path, precision):
    source = packaged(tmp_path / "source", pooling="mean")
    backend = load_compiled(compile_artifact(source, tmp_path / "out", precision=precision)[0])
    measure = measure_of(source)

    def judge(subject) -> str | None:
        (found,) = measure.deviations(subject).values()
        return problem_of(found, limits_for(precision, None, found))

    def first_eight(batch: Batch) -> Scores:
        """Scores of bags that are cut: a mean over 8 ids where there are more."""
        place = np.arange(len(batch.values)) - np.repeat(np.cumsum(batch.lengths) - batch.lengths, batch.lengths)
        return backend.run(replace(batch, lengths=np.minimum(batch.lengths, 8), values=batch.values[place < 8]))

    assert judge(backend.run) is None
    assert "rows of long bags" in (judge(first_eight) or "")
