"""Models with a schema file, compiled: scores equal to a direct call, and what is served where the code cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from narsil.artifacts.artifact import MANIFEST, open_artifact
from narsil.artifacts.exported import Exported
from narsil.backends.registry import load_backend
from narsil.compile.compiler import compile_artifact
from narsil.engine.independence import dependence
from narsil.errors import ArtifactError
from tests.fixtures_compiled import needs_compiler, needs_fused
from tests.integration import test_layouts as layouts
from tests.integration.test_exports import AUTO, batch_of, exported_dlrm, flat, flat_inputs, flat_of, write_schema

pytestmark = needs_compiler


def assert_equal_scores(file: Path, direct: Any, draw: Any, engine: str) -> None:
    out = file.parent / "out"
    compile_artifact(open_artifact(file), out, engine=engine, precision="fp32")
    for name in ("compiled", "torch"):
        backend = load_backend(open_artifact(out), name)
        assert backend.name == name
        for instance in (backend, backend.share()):
            for rows in (1, 2, 7, 130):
                batch = draw(rows)
                with torch.inference_mode():
                    wanted = direct(batch).numpy()
                np.testing.assert_allclose(instance.run(batch)[backend.schema.tasks[0]], wanted, rtol=2e-5, atol=2e-6)
        assert dependence(backend) is None
        backend.close()


@needs_fused
@pytest.mark.parametrize("make", [flat, exported_dlrm])
def test_programs_on_the_fused_engine(tmp_path: Path, make: Any) -> None:
    file, direct = make(tmp_path)
    assert_equal_scores(file, direct, batch_of, "fused")


@needs_fused
def test_single_ids_of_a_script_on_the_fused_engine(tmp_path: Path) -> None:
    kind = layouts.OneTable
    file, model = layouts.written(kind, tmp_path, exported=False)
    assert_equal_scores(
        file,
        lambda batch: model(*layouts.arguments_of(kind, batch)),
        lambda rows: layouts.batch_of(kind, rows),
        "fused",
    )


class Topped(nn.Module):
    """With an operation that the fused engine has no step for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.over = nn.Linear(4 + 3, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        best = torch.topk(self.table(ids).sum(dim=1), 3).values
        return self.over(torch.cat([dense, best], 1)).squeeze(1)


def test_what_has_no_step_on_the_inductor_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, file = Topped().eval(), tmp_path / "topped.pt2"
    given = layouts.arguments_of(layouts.OneTable, layouts.batch_of(layouts.OneTable, 6))
    torch.export.save(torch.export.export(model, given, dynamic_shapes=({0: AUTO}, {0: AUTO}), strict=False), file)
    layouts.written(layouts.OneTable, tmp_path, exported=False)
    (tmp_path / "model.schema.json").rename(file.with_suffix(".schema.json"))
    assert_equal_scores(
        file,
        lambda batch: model(*layouts.arguments_of(layouts.OneTable, batch)),
        lambda rows: layouts.batch_of(layouts.OneTable, rows),
        "auto",
    )
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["compiled"]["engine"] == "inductor"


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.over = nn.Linear(4, 1)
        self.bag = nn.EmbeddingBag(70, 8, mode="sum", include_last_offset=True)

    def forward(self, float_features: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ends = torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0))
        scores = self.over(float_features).squeeze(1) + self.bag(values, ends).sum(1)[: float_features.shape[0]]
        return scores - scores.mean()


def test_what_cannot_be_compiled_is_told_by_its_operation(tmp_path: Path) -> None:
    model, file = Centred().eval(), tmp_path / "centred.pt2"
    batch = batch_of(6)
    every = ({0: AUTO}, {0: AUTO}, {0: AUTO})
    torch.export.save(torch.export.export(model, flat_of(batch), dynamic_shapes=every, strict=False), file)
    write_schema(file, flat_inputs())
    with pytest.raises(ArtifactError, match=r"cannot be compiled \(.*aten\."):
        compile_artifact(open_artifact(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_cut_off_is_told() -> None:
    graph = torch.fx.Graph()
    rows = graph.call_function(torch.ops.aten.sym_size.int, (graph.placeholder("dense"), 0))
    plain = Exported(SimpleNamespace(graph=graph), (), {})
    assert plain.branch() == ""
    graph.call_function(torch.sym_min, (rows, 100))
    assert plain.branch() == "forward takes the sym_min of a number that follows from the rows"


def test_a_branch_of_a_script_is_told(tmp_path: Path) -> None:
    class Branching(layouts.ByRow):
        def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            found = self.tables[0](ids[:, 0]).sum(1)
            if dense.shape[0] > 100:
                found = found * 2
            return found

    file, _ = layouts.written(layouts.ByRow, tmp_path, exported=False)
    torch.jit.script(Branching()).save(str(file))
    with pytest.raises(ArtifactError, match="branches on a number that follows from the rows"):
        compile_artifact(open_artifact(file), tmp_path / "out")
