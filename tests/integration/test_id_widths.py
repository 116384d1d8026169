"""A model that takes int32 and int64 ids alike, and looks up other rows with the one than with the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.registry import load_backend
from narsil.cli import cli
from narsil.compile.compiler import compile_artifact
from narsil.config import ServeSettings
from narsil.dataflow import Batch
from narsil.errors import ArtifactError
from tests.fixtures_compiled import needs_compiler
from tests.integration import test_torchrec_models as torchrec_models  # which is skipped where there is no TorchRec

Kind, packaged, pytestmark = torchrec_models.Kind, torchrec_models.packaged, torchrec_models.pytestmark


def drawn(rows: int = 40) -> Batch:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 4, 3 * rows).astype(np.int32)
    values = random.integers(0, 2**31 - 1, int(lengths.sum())).astype(np.int32)
    return Batch(rows, random.standard_normal((rows, 5)).astype(np.float32), lengths, values, one_hot=False)


def direct(path: Path, batch: Batch, kind: Any) -> Any:
    module = load_torchscript(path, "cpu")
    lengths, values = (torch.from_numpy(part).to(kind) for part in (batch.lengths, batch.values))
    given = {"id_list_features.lengths": lengths, "id_list_features.values": values}
    with torch.inference_mode():
        return module({"float_features": torch.from_numpy(batch.dense), **given})["default"].numpy()


@pytest.fixture
def hashing(tmp_path: Path) -> Path:
    packaged(Kind(change="hash"), tmp_path / "model_default.pt")
    return tmp_path / "model_default.pt"


def test_it_is_given_what_is_said(hashing: Path) -> None:
    dense = open_dim(hashing)
    batch, found = drawn(), {}
    batch = Batch(batch.rows, batch.dense[:, :1].repeat(dense, 1), batch.lengths, batch.values, one_hot=False)
    for ids, kind in (("int32", torch.int32), ("int64", torch.int64)):
        backend = load_backend(open_artifact(hashing, ids=ids))
        found[ids] = backend.run(batch)["default"]
        np.testing.assert_allclose(found[ids], direct(hashing, batch, kind), rtol=1e-6)
        assert backend.share().run(batch)["default"].tolist() == found[ids].tolist()
    assert not np.allclose(found["int32"], found["int64"])


def open_dim(path: Path) -> int:
    return open_artifact(path, ids="int64").schema.dense_dim


@needs_compiler
def test_a_compiled_folder_keeps_it(hashing: Path) -> None:
    batch, out = drawn(), hashing.parent / "out"
    dense = np.resize(batch.dense, (batch.rows, open_dim(hashing)))
    batch = Batch(batch.rows, dense, batch.lengths, batch.values, one_hot=False)
    for ids, kind in (("int64", torch.int64), ("int32", torch.int32)):
        compile_artifact(open_artifact(hashing, ids=ids), out, precision="fp32")
        assert open_artifact(out).schema.ids == ids
        for name in ("compiled", "torch"):
            scores = load_backend(open_artifact(out), name).run(batch)["default"]
            np.testing.assert_allclose(scores, direct(hashing, batch, kind), rtol=2e-5, atol=2e-6)


def test_what_is_not_said_is_refused_with_the_way_out(hashing: Path) -> None:
    with pytest.raises(ArtifactError, match="say it with --ids int32 or int64"):
        open_artifact(hashing)
    assert CliRunner().invoke(cli, ["inspect", str(hashing)]).exit_code != 0
    assert CliRunner().invoke(cli, ["inspect", str(hashing), "--ids", "int32"]).exit_code == 0
    assert ServeSettings.model_validate({"model": hashing, "ids": "int64"}).ids == "int64"


def test_a_manifest_says_nothing_else() -> None:
    from narsil.artifacts.schema import ModelSchema

    plain = {"dense_dim": 1, "features": [], "tasks": ["a"], "ids": "int32"}
    assert ModelSchema.from_dict(plain).to_dict() == plain
    for odd in ("int16", 32, None):
        with pytest.raises(ArtifactError, match="ids must be int32 or int64"):
            ModelSchema.from_dict({**plain, "ids": odd})
