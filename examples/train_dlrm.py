"""Train a small DLRM to predict clicks, and leave a checkpoint that `narsil package dlrm` takes.

    python examples/train_dlrm.py --out dlrm.safetensors                      # a synthetic click log
    python examples/train_dlrm.py --criteo day_0.tsv --out dlrm.safetensors   # your own, in Criteo's format

The synthetic log is drawn from a planted model: every id has a click bias and a latent vector, and a click's
log-odds are a sum of biases, dot products of a few features' vectors and a linear part of the dense features. So the
best AUC that any model could reach is known, and training is held against it.

Beside the checkpoint it writes the held-out rows with their labels and FP32 scores (`.npz`), for checking what a
served, quantized model keeps of the accuracy.

N rows, D = 13 dense features, T = 26 sparse features of one id each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from training import Floats, Report, auc, fit, training_bar

from narsil.packaging.dlrm import DlrmConfig
from narsil.packaging.modules import Dlrm

DENSE_FEATURES = 13
SPARSE_FEATURES = 26
CRITEO_COLUMNS = 1 + DENSE_FEATURES + SPARSE_FEATURES
MISSING_ROW = 0  # of every table: the id of an empty category

Ids = NDArray[np.int32]


class MalformedLineError(ValueError):
    """A line is not in Criteo's format; the message names the file, the line and the column."""


@dataclass(frozen=True)
class ClickLog:
    """Impressions and whether they were clicked."""

    dense: Floats  # (N, D)
    ids: Ids  # (N, T), sample-major
    labels: Floats  # (N,) 0 or 1
    planted: Floats | None = None  # (N,) the true click probabilities, where they are known

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice) -> ClickLog:
        """The log of these rows alone, without copying them."""
        planted = None if self.planted is None else self.planted[rows]
        return ClickLog(self.dense[rows], self.ids[rows], self.labels[rows], planted)


def synthetic_log(samples: int, rows: int, seed: int) -> ClickLog:
    """Draw `samples` impressions from the planted model.

    Ids are skewed as real ones are (one per cent of a table's ids make nearly half of the impressions), so that the
    head can be learned well and the tail cannot. The scales below put the ceiling near an AUC of 0.9.
    """
    latent_dim = 4
    bias_scale, pair_scale, dense_scale, intercept = 0.4, 0.3, 0.4, -1.0
    interacting = ((0, 1), (2, 3), (4, 5), (6, 7))  # features whose ids' vectors are multiplied

    rng = np.random.default_rng(seed)
    dense = rng.random((samples, DENSE_FEATURES), dtype=np.float32)
    ids = (rows * rng.random((samples, SPARSE_FEATURES)) ** 6).astype(np.int32)

    biases = rng.normal(0, bias_scale, (SPARSE_FEATURES, rows))
    features = np.arange(SPARSE_FEATURES)
    log_odds = intercept + biases[features, ids].sum(axis=1)
    log_odds += (dense - 0.5) @ rng.normal(0, dense_scale / np.sqrt(1 / 12), DENSE_FEATURES)
    for first, second in interacting:
        left = rng.normal(0, pair_scale**0.5, (rows, latent_dim))[ids[:, first]]
        right = rng.normal(0, pair_scale**0.5, (rows, latent_dim))[ids[:, second]]
        log_odds += (left * right).sum(axis=1)
    planted = 1 / (1 + np.exp(-log_odds))
    labels = rng.random(samples) < planted
    return ClickLog(dense, ids, labels.astype(np.float32), planted.astype(np.float32))


def read_criteo(path: Path, rows: int, limit: int | None = None) -> ClickLog:
    """Read at most `limit` lines of a Criteo TSV: a label, 13 integers, 26 hexadecimal categories.

    Integers become log(1 + max(x, 0)); a missing one becomes 0. A category is hashed into rows 1 .. rows - 1; a
    missing one is row 0. Raises `MalformedLineError`, naming the line, for anything else.
    """
    if rows < 2:
        raise ValueError("a table needs at least 2 rows: one for missing categories and one for the rest")
    with path.open(encoding="ascii", errors="replace") as file:
        lines = list(_parse_lines(file, path, rows, limit))
    if not lines:
        raise MalformedLineError(f"{path}: the file is empty")
    dense = np.array([line[1] for line in lines], dtype=np.float32)
    return ClickLog(
        dense=np.log1p(np.maximum(dense, 0)),
        ids=np.array([line[2] for line in lines], dtype=np.int32),
        labels=np.array([line[0] for line in lines], dtype=np.float32),
    )


def _parse_lines(file: TextIO, path: Path, rows: int, limit: int | None) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield (label, integers, ids) for every line."""
    for number, line in enumerate(islice(file, limit), start=1):
        columns = line.rstrip("\r\n").split("\t")
        if len(columns) != CRITEO_COLUMNS:
            raise MalformedLineError(
                f"{path}, line {number}: {len(columns)} tab-separated columns, not {CRITEO_COLUMNS}"
            )
        if columns[0] not in ("0", "1"):
            raise MalformedLineError(f"{path}, line {number}: label '{columns[0]}' is neither 0 nor 1")
        position = 1
        integers: list[int] = []
        ids: list[int] = []
        try:
            for position in range(1, 1 + DENSE_FEATURES):
                text = columns[position]
                integers.append(int(text) if text else 0)
            for position in range(1 + DENSE_FEATURES, CRITEO_COLUMNS):
                text = columns[position]
                ids.append(1 + int(text, 16) % (rows - 1) if text else MISSING_ROW)
        except ValueError:
            kind = "an integer" if position <= DENSE_FEATURES else "a hexadecimal category"
            raise MalformedLineError(
                f"{path}, line {number}: column {position + 1} holds '{columns[position]}', not {kind}"
            ) from None
        yield int(columns[0]), integers, ids


def split(log: ClickLog, held_out: float) -> tuple[ClickLog, ClickLog]:
    """Return (training, held-out) rows; the last ones are held out, as a click log runs forward in time."""
    boundary = len(log) - max(1, round(len(log) * held_out))
    if boundary < 1:
        raise ValueError(f"{len(log)} rows are too few to hold a part of them out")
    return log.take(slice(0, boundary)), log.take(slice(boundary, len(log)))


def build_model(config: DlrmConfig) -> Dlrm:
    """A DLRM ready for training: small initial embeddings, and gradients of the touched rows alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Dlrm(config)
        for table in model.sparse_arch.embedding_bag_collection.embedding_bags.values():
            # A dense gradient would be as large as the table, for each step.
            table.sparse = True
            # From torch's N(0, 1), noise in the interactions would drown the signal for most of an epoch.
            nn.init.uniform_(table.weight, -0.01, 0.01)
    return model


def logits(model: Dlrm, dense: Tensor, ids: Tensor) -> Tensor:
    """(B, D) float32 and (B, T) ids -> (B,): the model takes ids key-major, with the bags' lengths."""
    values = ids.t().reshape(-1)
    return model(dense, torch.ones_like(values), values)


def train(model: Dlrm, log: ClickLog, *, epochs: int, batch_size: int, seed: int, report: Report | None = None) -> None:
    """Minimise the log loss over `log` in place; the order of rows depends on `seed` alone."""
    dense, ids, labels = (torch.from_numpy(array) for array in (log.dense, log.ids, log.labels))

    def loss_of(rows: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits(model, dense[rows], ids[rows]), labels[rows])

    model.train()
    fit(model.named_parameters(), loss_of, len(log), epochs=epochs, batch_size=batch_size, seed=seed, report=report)


def predict(model: Dlrm, log: ClickLog, batch_size: int = 8192) -> Floats:
    """(N,) click probabilities in FP32."""
    model.eval()
    dense, ids = torch.from_numpy(log.dense), torch.from_numpy(log.ids)
    with torch.inference_mode():
        parts = [logits(model, d, i) for d, i in zip(dense.split(batch_size), ids.split(batch_size), strict=True)]
        scores: Floats = torch.sigmoid(torch.cat(parts)).numpy()
    return scores


def save_checkpoint(model: Dlrm, path: Path) -> None:
    """Write the state_dict, under TorchRec's names, as `.safetensors` or `.pt`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)


def save_held_out(log: ClickLog, scores: Floats, path: Path) -> None:
    """Write dense (N, D), ids (N, T), labels (N,) and the FP32 model's scores (N,) as `.npz`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, dense=log.dense, ids=log.ids, labels=log.labels, scores=scores)


def _checked_out(_context: click.Context, _option: click.Parameter, path: Path) -> Path:
    """Refuse a checkpoint's name that nothing could read back, before the training rather than after it."""
    if path.suffix not in (".safetensors", ".pt"):
        raise click.BadParameter(f"'{path}' must end in .safetensors or .pt")
    if path.suffix == ".safetensors":
        try:
            import safetensors  # noqa: F401
        except ImportError:
            raise click.BadParameter("writing .safetensors needs the safetensors package; or use .pt") from None
    return path


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, callback=_checked_out, help="Checkpoint.")
@click.option("--held-out-file", type=click.Path(path_type=Path), help="Held-out rows [default: beside --out].")
@click.option("--criteo", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TSV to train on.")
@click.option("--samples", type=click.IntRange(10), help="Rows to read or draw [default: all; 300000 if drawn].")
@click.option("--held-out", type=click.FloatRange(0.01, 0.9), default=0.15, help="Fraction held out.")
@click.option("--rows", type=click.IntRange(2), default=2000, help="Rows of each embedding table.")
@click.option("--dim", type=click.IntRange(4), default=16, help="Embedding dimension, a multiple of 4.")
@click.option("--epochs", type=click.IntRange(1), default=1, help="More than one overfits rare ids.")
@click.option("--batch-size", type=click.IntRange(1), default=512)
@click.option("--seed", type=click.IntRange(0), default=0)
def main(
    out: Path,
    held_out_file: Path | None,
    criteo: Path | None,
    samples: int | None,
    held_out: float,
    rows: int,
    dim: int,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train a small DLRM on clicks and write a checkpoint for `narsil package dlrm`."""
    console = Console()
    try:
        log = read_criteo(criteo, rows, samples) if criteo else synthetic_log(samples or 300_000, rows, seed)
        training, validation = split(log, held_out)
        # Small beside the architecture that `narsil package dlrm` takes by default: it trains in seconds on a CPU.
        config = DlrmConfig(rows=rows, dim=dim, dense_arch=(64, dim), over_arch=(64, 32, 1), seed=seed)
    except Exception as error:
        raise click.ClickException(str(error)) from None
    console.print(f"{len(training)} rows to train on, {len(validation)} held out, {log.labels.mean():.1%} clicked")

    model = build_model(config)
    with training_bar(console) as report:
        train(model, training, epochs=epochs, batch_size=batch_size, seed=seed, report=report)

    scores = predict(model, validation)
    console.print(f"AUC in training   {auc(training.labels, predict(model, training)):.4f}")
    console.print(f"AUC held out      {auc(validation.labels, scores):.4f}")
    if validation.planted is not None:
        console.print(f"AUC at most       {auc(validation.labels, validation.planted):.4f}  (the planted model's own)")

    held_out_file = held_out_file or out.with_suffix(".heldout.npz")
    save_checkpoint(model, out)
    save_held_out(validation, scores, held_out_file)
    console.print(f"\nwrote {out} and {held_out_file}\n\nNext:", soft_wrap=True)
    artifact = out.with_suffix("")
    console.print(f"  narsil package dlrm --checkpoint {out} --out {artifact}", soft_wrap=True)
    console.print(f"  narsil serve --model {artifact}", soft_wrap=True)


if __name__ == "__main__":
    main()
