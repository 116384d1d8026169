"""The page on leaving TorchScript: what it tells to run is run, and serves what the model scores."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from narsil.artifacts.artifact import open_artifact
from narsil.backends.registry import load_backend
from narsil.cli import cli
from narsil.dataflow import Batch
from narsil.engine.independence import dependence
from tests.documents import read, sections
from tests.fixtures_compiled import needs_compiler, needs_fused

pytest.importorskip("torchrec")
pytestmark = [needs_compiler, needs_fused]


def typed(line: str) -> None:
    result = CliRunner().invoke(cli, line.split()[1:])
    assert result.exit_code == 0, (line, result.output, result.exception)


def scores(path: Path, batch: Batch) -> Any:
    backend = load_backend(open_artifact(path))
    assert dependence(backend) is None
    return backend.run(batch)["click"]


def test_what_the_page_tells_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = sections(read("docs/models.md"), 2)["Leaving TorchScript"]
    export, package = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    draft, serve, compiling = re.findall(r"^    (narsil .*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        exec(export, names)  # noqa: S102 - the page's own
        typed(draft)
        exec(package, names)  # noqa: S102 - the page's own
    assert [each["name"] for each in json.loads(Path("clicks.schema.json").read_text())["features"]] == ["user", "item"]
    assert serve == "narsil serve --model clicks.pt2"
    typed(compiling)
    random = np.random.default_rng(0)
    lengths = random.integers(0, 4, 2 * 9).astype(np.int32)
    values = random.integers(0, 500, int(lengths.sum()))
    batch = Batch(9, random.random((9, 4), np.float32), lengths, values.astype(np.int32), one_hot=False)
    with torch.inference_mode():
        given = (batch.dense, values, lengths)
        wanted = names["model"](*map(torch.from_numpy, given))["click"].numpy()
    for path, near in (("clicks.pt2", 1e-7), ("clicks_native.pt2", 1e-6), ("clicks-fast", 2e-3)):
        np.testing.assert_allclose(scores(Path(path), batch), wanted, atol=near)
