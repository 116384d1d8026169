"""Train a small DCNv2 (TorchRec's DLRM_DCN) to predict clicks, package it with TorchRec, compile and serve it.

    python examples/train_dcnv2.py --out models/dcnv2

The click log is that of train_dlrm.py: biases of ids, dot products of a few features' latent vectors and a linear part
of the dense features. Low-rank cross layers take the place of the DLRM's dot products.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lifecycle import Log, Predict, options, tables, to_clients, train
from rich.console import Console
from torchrec.models.dlrm import DLRM_DCN
from train_dlrm import DENSE_FEATURES, SPARSE_FEATURES, synthetic_log

KEYS = [f"cat_{number}" for number in range(SPARSE_FEATURES)]
ROWS, DIM = 500, 16  # of each table


def draw(samples: int, seed: int) -> Log:
    """train_dlrm.py's log, one id a bag."""
    clicks = synthetic_log(samples, ROWS, seed)
    return Log(
        tasks=("click",),
        dense=clicks.dense,
        lengths=np.ones_like(clicks.ids),
        values=clicks.ids.ravel(),
        labels=clicks.labels[:, None],
        planted=np.asarray(clicks.planted)[:, None],
    )


def build(seed: int) -> Predict:
    """A DLRM_DCN of two cross layers of rank 16."""
    torch.manual_seed(seed)
    model = DLRM_DCN(
        tables({f"t_{key}": [key] for key in KEYS}, [ROWS] * len(KEYS), DIM),
        dense_in_features=DENSE_FEATURES,
        dense_arch_layer_sizes=[32, DIM],
        over_arch_layer_sizes=[32, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=16,
        dense_device=torch.device("cpu"),
    )
    return Predict(model, KEYS, ["click"])


@options(samples=100_000)
def main(out: Path, samples: int, epochs: int, seed: int, precision: str) -> None:
    """Train a small DCNv2, package it with TorchRec, compile and serve it, and compare its scores."""
    console = Console()
    training, held_out = draw(samples, seed).split()
    predict = build(seed)
    train(predict, training, console, epochs=epochs, seed=seed)
    to_clients(predict, held_out, out, precision, console)


if __name__ == "__main__":
    main()
