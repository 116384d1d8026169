"""The examples with TorchRec's models: what they learn and serve is what they say; a wrong score ends them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchrec")

from narsil.artifacts.artifact import open_artifact  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLES = {"train_dcnv2": ("click",), "train_multitask": ("click", "like", "share"), "train_weighted": ("watched",)}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def lifecycle(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("lifecycle")


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_packages_compiles_and_serves(name: str, tmp_path: Path, lifecycle: Any) -> None:
    out, tasks = tmp_path / "made", EXAMPLES[name]
    options = ["--samples", "12000", "--precision", "fp32", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"narsil serve --model {out / 'compiled'}" in done.stdout
    assert open_artifact(out / "compiled").schema.tasks == tasks

    rows = {(row["task"], row["scores"]): row for row in json.loads((out / "scores.json").read_text())}
    for task in tasks:
        served, rule = rows[task, "compiled, served"], rows[task, "the rule itself"]
        assert 0.55 < served["auc"] < rule["auc"], f"{task} is not learned, or more than can be"
        assert f"{served['auc']:.4f}" in done.stdout

    held_out = np.load(out / "held_out.npz")
    log = lifecycle.Log(
        tasks,
        *(held_out[array] for array in ("dense", "lengths", "values", "labels", "labels")),
        held_out.get("weights"),
    )
    expected = torch.jit.load(str(out / "model_default.pt"))(log.inputs())
    scores = np.stack([expected[task].detach().numpy() for task in tasks], axis=1)
    np.testing.assert_allclose(held_out["served"], scores, atol=2e-6)
    assert len(np.unique(scores[:, 0])) > len(scores) // 2


def test_a_log_s_rows_are_taken_with_their_bags_and_weights(lifecycle: Any) -> None:
    lengths = np.array([[2, 1], [0, 1], [1, 3]], np.int32)
    values = np.array([1, 2, 10, 11, 3, 12, 13, 14], np.int32)
    column = np.arange(3, dtype=np.float32)[:, None]
    log = lifecycle.Log(("default",), column, lengths, values, column, column, values / np.float32(2))
    taken = log.take(np.array([2, 0]))
    assert taken.values.tolist() == [3, 12, 13, 14, 1, 2, 10]
    assert taken.dense.ravel().tolist() == [2, 0]
    given = taken.inputs()
    assert given["id_score_list_features.lengths"].tolist() == [1, 2, 3, 1]
    assert given["id_score_list_features.values"].tolist() == [3, 1, 2, 12, 13, 14, 10]
    assert given["id_score_list_features.weights"].tolist() == [1.5, 0.5, 1, 6, 6.5, 7, 5]


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_a_served_score_that_is_not_the_direct_call_s_ends_an_example(lifecycle: Any, wrong: float) -> None:
    labels = np.array([[0], [1], [1]], np.float32)
    log = lifecycle.Log(("click",), labels, np.zeros((3, 1), np.int32), np.zeros(0, np.int32), labels, labels)
    direct = {"click": np.array([0.2, 0.6, 0.7], np.float32)}
    rows = lifecycle.compare(log, {"direct": direct, "served": direct}, "direct")
    lifecycle.check(rows, "served")
    moved = {"click": direct["click"] + np.array([0, 0, wrong], np.float32)}
    with pytest.raises(lifecycle.click.ClickException, match="served scores of click deviate by up to"):
        lifecycle.check(lifecycle.compare(log, {"direct": direct, "served": moved}, "direct"), "served")


def test_normalized_entropy_is_1_for_the_base_rate_and_less_for_better(lifecycle: Any) -> None:
    labels = np.array([1, 0, 0, 0], np.float32)
    assert lifecycle.normalized_entropy(labels, np.full(4, 0.25, np.float32)) == pytest.approx(1)
    by_hand = -(np.log(0.5) + 3 * np.log(0.9)) / 4 / -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert lifecycle.normalized_entropy(labels, np.array([0.5, 0.1, 0.1, 0.1])) == pytest.approx(by_hand)
    assert np.isnan(lifecycle.normalized_entropy(np.ones(3, np.float32), np.full(3, 0.5, np.float32)))
