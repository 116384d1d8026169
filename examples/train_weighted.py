"""Train a model over weighted features, package it with TorchRec, compile and serve it.

    python examples/train_weighted.py --out models/weighted

A user's history is a bag of videos, each weighted by the share of it that the user watched: TorchRec's
id_score_list_features. History and candidate are looked up in one table; the model sees both and their product, which
it also adds up as a factorization machine does.

The log: every video is of a few hidden genres. What a user likes is the watched share times the genres, summed over
the history; a candidate of such genres is watched to its end more often. Videos that were left at once weigh next to
nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lifecycle import Log, Predict, options, tables, to_clients, train
from rich.console import Console
from torch import Tensor, nn

KEYS = ["history", "candidate", "country"]
VIDEOS, COUNTRIES, DIM = 500, 20, 16
DENSE, LONGEST, GENRES = 3, 12, 4


def draw(samples: int, seed: int) -> Log:
    """``samples`` impressions of the rule above."""
    random = np.random.default_rng(seed)
    genres = random.normal(0, 1, (VIDEOS, GENRES))
    popularity, countries = random.normal(0, 0.5, VIDEOS), random.normal(0, 0.5, COUNTRIES)
    dense = random.normal(0, 1, (samples, DENSE)).astype(np.float32)
    lengths = np.ones((samples, len(KEYS)), np.int32)
    lengths[:, 0] = random.integers(0, LONGEST + 1, samples)
    feature = np.tile(np.arange(len(KEYS)), samples).repeat(lengths.ravel())
    owner = np.arange(samples).repeat(lengths.sum(axis=1))
    rows = np.array([VIDEOS, VIDEOS, COUNTRIES])[feature]
    values = (rows * random.random(len(rows))).astype(np.int32)
    watched = feature == 0
    # Most videos are left early: u^3 is below 1/8 for half of them.
    weights = np.where(watched, random.random(len(values)) ** 3, 1).astype(np.float32)

    taste = np.zeros((samples, GENRES))
    np.add.at(taste, owner[watched], weights[watched, None] * genres[values[watched]])
    candidate, country = values[feature == 1], values[feature == 2]
    log_odds = -0.5 + (taste * genres[candidate]).sum(axis=1) + popularity[candidate] + countries[country]
    log_odds += dense @ random.normal(0, 0.3, DENSE)
    planted = (1 / (1 + np.exp(-log_odds)))[:, None]
    labels = random.random(planted.shape) < planted
    return Log(("watched",), dense, lengths, values, labels.astype(np.float32), planted.astype(np.float32), weights)


class History(nn.Module):  # type: ignore[misc]
    """(B, D) dense and a weighted KeyedJaggedTensor -> (B, 1) logits."""

    def __init__(self, bags: Any) -> None:
        super().__init__()
        self.bags = bags
        self.over = nn.Sequential(nn.Linear(DENSE + DIM * 4, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        pooled = self.bags(sparse)
        history, candidate = pooled["history"], pooled["candidate"]
        both = history * candidate
        features = torch.cat([dense, history, candidate, pooled["country"], both], dim=1)
        return self.over(features) + both.sum(dim=1, keepdim=True)


def build(seed: int) -> Predict:
    """The model over a table of videos that two features share."""
    torch.manual_seed(seed)
    features = {"t_video": ["history", "candidate"], "t_country": ["country"]}
    # Products of two small numbers would teach neither.
    bags = tables(features, [VIDEOS, COUNTRIES], DIM, weighted=True, spread=0.3)
    return Predict(History(bags), KEYS, ["watched"], weighted=True)


@options(samples=100_000, epochs=2)
def main(out: Path, samples: int, epochs: int, seed: int, precision: str) -> None:
    """Train a model over weighted features, package it with TorchRec, compile and serve it, and compare its scores."""
    console = Console()
    training, held_out = draw(samples, seed).split()
    predict = build(seed)
    train(predict, training, console, epochs=epochs, seed=seed)
    to_clients(predict, held_out, out, precision, console)


if __name__ == "__main__":
    main()
