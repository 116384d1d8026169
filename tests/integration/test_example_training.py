"""The training example learns a planted signal, repeats itself under a seed and refuses malformed click logs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("click")

from click.testing import CliRunner  # noqa: E402

from narsil.packaging.checkpoint import load_checkpoint  # noqa: E402
from narsil.packaging.dlrm import DlrmConfig  # noqa: E402
from narsil.packaging.modules import fp32_model, fp32_scores  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 200
SMALL = DlrmConfig(rows=ROWS, dim=8, dense_arch=(16, 8), over_arch=(16, 1))


@pytest.fixture(scope="module")
def example() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))  # as `python examples/train_dlrm.py` has it
        yield importlib.import_module("train_dlrm")


def criteo_line(label: str = "1", integers: str = "5", categories: str = "68fd1e64") -> str:
    return "\t".join([label, *[integers] * 13, *[categories] * 26]) + "\n"


def test_auc_is_the_share_of_pairs_in_order_with_ties_counting_half(example: Any) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200).astype(np.float32)
    scores = rng.integers(0, 20, 200).astype(np.float32)  # few values: many ties
    clicked, other = scores[labels == 1][:, None], scores[labels == 0][None, :]
    by_pairs = ((clicked > other) + 0.5 * (clicked == other)).mean()
    assert example.auc(labels, scores) == pytest.approx(by_pairs, abs=1e-12)


def test_auc_of_one_class_is_nan(example: Any) -> None:
    assert np.isnan(example.auc(np.ones(3, np.float32), np.arange(3, dtype=np.float32)))


def test_learns_the_planted_signal_and_not_more(example: Any) -> None:
    training, held_out = example.split(example.synthetic_log(20_000, ROWS, seed=0), 0.2)
    model = example.build_model(SMALL)
    example.train(model, training, epochs=1, batch_size=256, seed=0)
    learned = example.auc(held_out.labels, example.predict(model, held_out))
    ceiling = example.auc(held_out.labels, held_out.planted)
    assert 0.6 < learned < ceiling


def test_same_seed_same_weights_other_seed_other_weights(example: Any) -> None:
    def weights(seed: int) -> dict[str, Any]:
        log = example.synthetic_log(2000, ROWS, seed)
        model = example.build_model(SMALL)
        example.train(model, log, epochs=1, batch_size=256, seed=seed)
        return dict(model.state_dict())

    first, second, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_criteo_values_are_transformed_and_missing_ones_get_their_defaults(example: Any, tmp_path: Path) -> None:
    path = tmp_path / "clicks.tsv"
    lines = [criteo_line(), criteo_line("0", "", ""), criteo_line("0", "-2", "00000000")]
    path.write_text("".join(lines))
    log = example.read_criteo(path, rows=100)
    assert log.labels.tolist() == [1, 0, 0]
    np.testing.assert_allclose(log.dense[:, 0], [np.log(6), 0, 0], rtol=1e-6)
    hashed = 1 + 0x68FD1E64 % 99
    assert log.ids[:, 0].tolist() == [hashed, example.MISSING_ROW, 1]
    assert log.dense.shape == (3, 13)
    assert log.ids.shape == (3, 26)


def test_criteo_limit_stops_reading(example: Any, tmp_path: Path) -> None:
    path = tmp_path / "clicks.tsv"
    path.write_text(criteo_line() * 5 + "not a click\n")
    assert len(example.read_criteo(path, rows=100, limit=5)) == 5


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("1\t2\t3\n", "line 2: 3 tab-separated columns, not 40"),
        ("\n", "line 2: 1 tab-separated columns, not 40"),
        (criteo_line(label="2"), "line 2: label '2' is neither 0 nor 1"),
        (criteo_line(label=""), "line 2: label '' is neither 0 nor 1"),
        (criteo_line(integers="1.5"), "line 2: column 2 holds '1.5', not an integer"),
        (criteo_line(categories="xyz"), "line 2: column 15 holds 'xyz', not a hexadecimal category"),
    ],
)
def test_malformed_criteo_line_is_named(example: Any, tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "clicks.tsv"
    path.write_text(criteo_line() + line)
    with pytest.raises(example.MalformedLineError) as error:
        example.read_criteo(path, rows=100)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)


def test_empty_criteo_file_is_refused(example: Any, tmp_path: Path) -> None:
    path = tmp_path / "clicks.tsv"
    path.write_text("")
    with pytest.raises(example.MalformedLineError, match="the file is empty"):
        example.read_criteo(path, rows=100)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_command_leaves_a_loadable_checkpoint_and_its_held_out_scores(
    example: Any, tmp_path: Path, suffix: str
) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    clicks, out = tmp_path / "clicks.tsv", tmp_path / f"dlrm{suffix}"
    clicks.write_text("".join(criteo_line(str(n % 2), str(n), f"{n:08x}") for n in range(40)))
    options = ["--criteo", str(clicks), "--out", str(out), "--rows", "50", "--dim", "8", "--batch-size", "16"]
    result = CliRunner().invoke(example.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"narsil package dlrm --checkpoint {out} --out" in result.output

    config, weights = load_checkpoint(out)
    held_out = np.load(out.with_suffix(".heldout.npz"))
    assert held_out["dense"].shape == (6, 13)
    values = held_out["ids"].T.reshape(-1)
    scores = fp32_scores(fp32_model(config, weights), held_out["dense"], np.ones_like(values), values)
    np.testing.assert_allclose(scores, held_out["scores"], rtol=1e-5)


def test_command_refuses_a_checkpoint_name_before_training(example: Any, tmp_path: Path) -> None:
    result = CliRunner().invoke(example.main, ["--out", str(tmp_path / "dlrm.bin")])
    assert result.exit_code == 2
    assert "must end in .safetensors or .pt" in result.output


def test_command_names_the_malformed_line_without_a_traceback(example: Any, tmp_path: Path) -> None:
    clicks = tmp_path / "clicks.tsv"
    clicks.write_text(criteo_line() * 20 + "oops\n")
    result = CliRunner().invoke(example.main, ["--criteo", str(clicks), "--out", str(tmp_path / "dlrm.pt")])
    assert result.exit_code == 1
    assert "line 21" in result.output
    assert isinstance(result.exception, SystemExit)
