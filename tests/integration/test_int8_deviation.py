"""What INT8 tables do to the scores is measured, printed and kept; weights that give no scores are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fbgemm_gpu")

from click.testing import CliRunner  # noqa: E402

from narsil.artifacts.artifact import open_artifact  # noqa: E402
from narsil.cli import cli  # noqa: E402
from narsil.errors import ArtifactError  # noqa: E402
from narsil.packaging.deviation import _batches, deviation_of_int8  # noqa: E402
from narsil.packaging.dlrm import DlrmConfig, random_weights, table_key  # noqa: E402
from narsil.packaging.packager import package_dlrm, quantized_module  # noqa: E402
from tests.fixtures_models import small  # noqa: E402

TBE = "_module.sparse_arch.embedding_bag_collection.tbes.0"


def measured(config: DlrmConfig, weights: Any, change: Any = None) -> Any:
    module = quantized_module(config, weights, "cpu")
    if change is not None:
        change(dict(module.named_modules())[TBE])
    return deviation_of_int8(config, weights, module)


def flip(tbe: Any, table: int, row: int) -> None:
    """All numbers of one row, to what lies as far on the other side."""
    at = int(tbe.weights_offsets[table]) + row * (16 + 4) + 4
    tbe.weights_host[at : at + 16] = 255 - tbe.weights_host[at : at + 16]


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_the_deviation_is_that_of_int8(pooling: str) -> None:
    config = small(pooling)
    found = measured(config, random_weights(config))
    assert found.rows > 1000
    assert 1e-4 < found.mean_abs < found.max_abs_one_id < 0.01
    assert found.max_abs_one_id <= found.max_abs < 0.3


def test_weights_that_int8_holds_exactly_do_not_deviate() -> None:
    config, weights = small(), random_weights(small())
    for name, array in weights.items():
        if "embedding_bags" in name:
            array[:] = np.round(array * 128) / 1024
            array[:, 0], array[:, 1] = -1 / 8, 255 / 1024 - 1 / 8  # whose step is 1/1024
    assert measured(config, weights).max_abs < 1e-5


@pytest.mark.parametrize("table", range(4))
def test_one_wrong_row_shows(table: int) -> None:
    config = small()
    weights = random_weights(config)
    right = measured(config, weights)
    wrong = measured(config, weights, lambda tbe: flip(tbe, table, config.rows_per_table[table] - 1))
    assert wrong.max_abs_one_id > right.max_abs_one_id + 0.03


def test_the_first_and_the_last_row_of_every_table_are_looked_up_however_large_it_is() -> None:
    schema = small(rows=(10**11, 10**10, 10**9, 10**11)).schema
    met: list[set[int]] = [set() for _ in schema.features]
    for batch in _batches(schema):
        ends = batch.lengths.reshape(schema.num_features, batch.rows).sum(axis=1).cumsum()
        for found, ids in zip(met, np.split(batch.values, ends[:-1]), strict=True):
            found.update(ids.tolist())
    for feature, found in zip(schema.features, met, strict=True):
        assert {0, feature.rows - 1} <= found


def test_bags_of_many_lengths_are_among_the_rows() -> None:
    lengths = np.concatenate([batch.lengths for batch in _batches(small().schema)])
    assert {0, 1, 2, 3, 4, 16, 32} <= set(lengths.tolist())


@pytest.mark.parametrize("layer", ["dense_arch.model._mlp.0._linear.weight", "over_arch.model.0._mlp.0._linear.weight"])
def test_finite_weights_that_multiply_to_no_number_are_refused(tmp_path: Path, layer: str) -> None:
    config, weights = small(), random_weights(small())
    weights[layer] *= np.float32(1e38)
    with pytest.raises(ArtifactError, match=r"the FP32 weights score row .* as NaN"):
        package_dlrm(config, weights, tmp_path / "model", onnx=False)


def test_tables_whose_scores_are_no_numbers_are_refused() -> None:
    def spoil(tbe: Any) -> None:
        tbe.weights_host[: 50 * 20].view(50, 20)[:, 1] = 0x7E  # the scale's upper byte: NaN

    with pytest.raises(ArtifactError, match=r"INT8 tables score row .* as NaN"):
        measured(small(), random_weights(small()), spoil)


def test_it_is_printed_and_kept_also_by_what_is_compiled_from_it(tmp_path: Path) -> None:
    out = str(tmp_path / "model")
    sizes = ["--rows", "10,20,30", "--dim", "8", "--dense-arch", "16,8", "--over-arch", "16,1", "--dense-features", "3"]
    done = CliRunner().invoke(cli, ["package", "dlrm", "--out", out, *sizes, "--no-onnx"])
    assert done.exit_code == 0, done.output
    kept = (open_artifact(out).manifest or {})["quantization"]
    said = f"scores by up to {kept['max_abs_one_id']:.1e} with one id a bag, {kept['max_abs']:.1e} with up to 32 (mean"
    assert said in done.output
    assert said in " ".join(CliRunner().invoke(cli, ["inspect", out]).output.split())
    done = CliRunner().invoke(cli, ["compile", out, "--out", str(tmp_path / "compiled")])
    assert done.exit_code == 0, done.output
    assert (open_artifact(tmp_path / "compiled").manifest or {})["quantization"] == kept


def test_read_only_weights_are_packaged_too(tmp_path: Path) -> None:
    config, weights = replace(small(), rows=9), random_weights(replace(small(), rows=9))
    for array in weights.values():
        array.flags.writeable = False
    package_dlrm(config, weights, tmp_path / "model", onnx=False)
    assert not weights[table_key("t_cat_0")].flags.writeable
