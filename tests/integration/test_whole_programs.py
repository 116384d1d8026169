"""What the fused engine has no step for is compiled by the inductor engine as a whole: operations as they were
recorded, tables of every kind, several tasks. Each is held against the artifact, and manifests that lie are refused."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.rows import extreme, usual
from narsil.backends.compiled import load_compiled
from narsil.backends.inductor import WholeBackend
from narsil.backends.registry import load_backend
from narsil.compile.compiler import compile_artifact
from narsil.errors import ArtifactError, ConfigError
from tests.fixtures_compiled import needs_compiler, rewrite
from tests.integration import test_torchrec_models as models
from tests.integration.test_program_readers import check, readings_of, refused

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_compiler]

KERNEL = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(4))

ENDS = torch.linspace(-2, 2, 8)
VECTORS = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))

BY_ROW = {
    "cumprod": lambda x: x.cumprod(1),
    "conv1d": lambda x: F.conv1d(x[:, None], KERNEL),
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "topk": lambda x: x.topk(3, 1)[0],
    "normalize": F.normalize,
    "sub-rows": lambda x: x.view(-1, 3).cumprod(1).view(-1, 6),
    "bits of whole numbers": lambda x: (~x.long()).float(),
    "and of whole numbers": lambda x: (x.long() & 2).float(),
    "truth values added": lambda x: ((x > 0) + (x < 1)).float(),
    "32 bits": lambda x: (x.int() * 1_000_003).float(),
    "rounded quotients": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "clamp between tensors": lambda x: x.clamp(-KERNEL.abs().max(), KERNEL[0, 0, 0].abs()),
    "the norm of order 3": lambda x: x.norm(p=3, dim=1),
    "gathered": lambda x: x.gather(1, (x[:, :3].abs() * 2).long().clamp(0, 5)),
    "gathered by their order": lambda x: x.gather(1, x.argsort(1)),
    "an embedding of a bucket": lambda x: F.embedding(torch.bucketize(x[:, :2].contiguous(), ENDS), VECTORS),
    "a constant's rows": lambda x: VECTORS[torch.searchsorted(ENDS, x[:, 0].contiguous())],
    "one hot": lambda x: F.one_hot(torch.bucketize(x[:, :2].contiguous(), ENDS), 9).float(),
    "experts by their rank": lambda x: torch.zeros_like(x).scatter(1, x.topk(2, 1)[1], x.topk(2, 1)[0].softmax(1)),
    "any and all": lambda x: torch.stack([(x > 1).any(1), (x > -1).all(1)], 1).float() + x.count_nonzero(1)[:, None],
    "a constant made each time": lambda x: x * (KERNEL.norm() * 2),
}
ACROSS_ROWS = {
    "rows by numbers of the rows": lambda x: x[(x[:, 0].abs() * 2).long().clamp(0, 1)],
    "rows gathered": lambda x: x.gather(0, (x.abs() * 2).long().clamp(0, 1)),
    "rows scattered": lambda x: torch.zeros_like(x).scatter(0, (x.abs() * 2).long().clamp(0, 1), 1.0),
    "those that are true": lambda x: x[x[:, 0] > -1e9],
    "cumprod": lambda x: x.cumprod(0),
    "sort": lambda x: x.sort(0)[0],
    "the largest of all": lambda x: x / x.abs().max(),
    "standard deviation": lambda x: x / x.std(0),
    "moved by what both recordings are divided by": lambda x: x.roll(35, 0),
    "rows from the thousandth on": lambda x: x.triu(-1000),
    "the first hundred rows": lambda x: x[:100] * 1,
    "the bits of numbers": lambda x: x.view(torch.int32).float(),
    "dropout": lambda x: F.dropout(x, 0.5, True),
}


@pytest.mark.parametrize("name", BY_ROW)
def test_an_operation_without_a_reader_is_kept_where_rows_are_independent(name):
    check(BY_ROW[name])


@pytest.mark.parametrize("name", ACROSS_ROWS)
def test_an_operation_that_mixes_rows_is_refused(name):
    refused(ACROSS_ROWS[name], "output default: ")


def test_what_is_refused_names_the_first_operation():
    assert "aten.cumprod" in readings_of(lambda x: x.cumprod(0).sin()).problem


class Predict(models.Predict):
    """Two tasks, of numbers that no step of the fused engine makes."""

    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        made = super().predict_forward(batch)["default"]
        moved = torch.stack([made, 1 - made, made * 0.5], dim=1).cumprod(1)
        return {"click": made, "chain": moved}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the artifact, what `narsil compile` makes of it when nothing is said): INT4 tables, sum and mean, two tasks."""
    folder = tmp_path_factory.mktemp("whole")
    models.packaged(models.KINDS["INT4"], folder / "model.pt", Predict)
    source = open_artifact(folder / "model.pt")
    return source, compile_artifact(source, folder / "out")[0]


def test_a_model_without_every_step_is_compiled_as_a_whole(compiled):
    source, made = compiled
    info = made.manifest["compiled"]
    assert (info["engine"], info["precision"]) == ("inductor", "fp32")
    assert info["deviation"]["own_max_abs"] is not None  # it was judged in float64
    assert list(info["deviations"]) == ["click", "chain"]
    assert info["deviation"] == max(info["deviations"].values(), key=lambda told: told["max_abs"])
    assert info["deviations"]["click"] != info["deviations"]["chain"]
    reference, backend = load_backend(source, "torch"), load_compiled(made)
    assert isinstance(backend, WholeBackend)
    random = np.random.default_rng(3)
    for batch in (*usual(source.schema, random), *extreme(source.schema, random)):
        expected, found = reference.run(batch), backend.share().run(batch)
        assert {task: scores.shape for task, scores in found.items()} == {
            "click": (batch.rows,),
            "chain": (batch.rows, 3),
        }
        for task, scores in found.items():
            np.testing.assert_allclose(scores, expected[task], atol=2e-5)


@pytest.mark.parametrize("tasks", [("chain", "click"), ("chain",), ("click",)])
def test_tasks_are_picked_by_name(compiled, tasks):
    source, made = compiled
    backend = load_compiled(made)
    (batch, *_) = usual(source.schema, np.random.default_rng(3))
    expected = backend.run(batch)
    backend.schema = backend.schema.picking(tasks)
    for lane in (backend, backend.share()):
        found = lane.run(batch)
        assert tuple(found) == tasks
        for task in tasks:
            np.testing.assert_array_equal(found[task], expected[task])


def test_the_fused_engine_names_what_it_has_no_step_for(compiled, tmp_path):
    with pytest.raises(ArtifactError, match=r"the fused engine has no step for aten\.cumprod"):
        compile_artifact(compiled[0], tmp_path / "out", engine="fused")
    with pytest.raises(ConfigError, match="the inductor engine compiles in fp32 what is no DLRM, not in bf16"):
        compile_artifact(compiled[0], tmp_path / "out", engine="inductor", precision="bf16")


def first_call(manifest: dict[str, Any]) -> Any:
    return manifest["compiled"]["whole"]["calls"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["compiled"]["whole"].pop("dense"), "lookups are damaged"),
        (lambda m: m["compiled"]["whole"].update(dense=1), "schema and lookups differ"),
        (lambda m: first_call(m).update(stream=7), "impossible lookup"),
        (lambda m: first_call(m).update(row_alignment=0), "impossible lookup"),
        (lambda m: first_call(m)["tables"][0].update(start=1 << 40), "would end beyond tables.bin"),
        (lambda m: first_call(m)["tables"][0].update(start=-1), "impossible table"),
        (lambda m: first_call(m)["tables"][0].update(kind=5), "impossible table"),
        (lambda m: first_call(m)["tables"][0].update(feature=99), "impossible table"),
        (lambda m: first_call(m)["tables"][0].update(rows=2), "would lead outside of its table of 2 rows"),
        (lambda m: m["compiled"]["whole"]["streams"][0].update(ids=["add", "ids", 1]), "would lead outside"),
        (lambda m: m["compiled"]["whole"]["streams"][0].update(ids=["system", "ids"]), "is no expression"),
        (lambda m: m["compiled"]["whole"]["streams"][0].update(ids=["take", 3, "ids"]), "is no expression"),
        (lambda m: m["compiled"]["whole"]["streams"][0].update(ids=["remainder", "ids"]), "is no expression"),
        (lambda m: m["compiled"].update(engine="fused"), "lookups beside a DLRM's"),
        (lambda m: m["compiled"]["whole"]["calls"].reverse(), "was compiled for another model"),
    ],
)
def test_a_manifest_that_lies_is_refused(compiled, tmp_path, change, says):
    shutil.copytree(compiled[1].path, tmp_path / "copy")
    rewrite(tmp_path / "copy", change)
    with pytest.raises(ArtifactError, match=says):
        load_compiled(open_artifact(tmp_path / "copy"))
