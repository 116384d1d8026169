"""Train a multi-task model with MMoE gates, package it with TorchRec, compile and serve it.

    python examples/train_multitask.py --out models/multitask

Experts are small layers over the same features. Each task has a gate, a softmax over the experts, and a head over the
mixture that its gate makes (Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", 2018).

The log: users and items have a bias for each task, drawn from two hidden tendencies that the tasks share in different
parts; an item has up to four tags, with biases of their own; dense columns count linearly. A share is rarer than a
like, and a like than a click.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lifecycle import Log, Predict, options, tables, to_clients, train
from rich.console import Console
from torch import Tensor, nn

TASKS = ("click", "like", "share")
KEYS, ROWS, DIM = ["user", "item", "tags"], [800, 400, 50], 16
DENSE, LONGEST = 5, 4
EXPERTS, WIDTH = 4, 32


def draw(samples: int, seed: int) -> Log:
    """``samples`` impressions of the rule above."""
    random = np.random.default_rng(seed)
    mix = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])  # (tasks, tendencies)
    dense = random.normal(0, 1, (samples, DENSE)).astype(np.float32)
    lengths = np.stack([np.ones(samples), np.ones(samples), random.integers(0, LONGEST + 1, samples)], 1).astype(
        np.int32
    )
    values = (np.tile(ROWS, samples).repeat(lengths.ravel()) * random.random(lengths.sum()) ** 2).astype(np.int32)
    log_odds = np.array([-0.5, -1.5, -2.5]) + dense @ random.normal(0, 0.4, (DENSE, len(TASKS)))
    owner = np.arange(samples).repeat(lengths.sum(axis=1))
    feature = np.tile(np.arange(len(KEYS)), samples).repeat(lengths.ravel())
    for number, rows in enumerate(ROWS):
        biases = random.normal(0, 1.2 if number < 2 else 0.6, (rows, 2)) @ mix.T  # (rows, tasks)
        mine = feature == number
        np.add.at(log_odds, owner[mine], biases[values[mine]])
    planted = 1 / (1 + np.exp(-log_odds))
    labels = random.random(planted.shape) < planted
    return Log(TASKS, dense, lengths, values, labels.astype(np.float32), planted.astype(np.float32))


class Mmoe(nn.Module):  # type: ignore[misc]
    """(B, D) dense and a KeyedJaggedTensor -> (B, tasks) logits."""

    def __init__(self, bags: Any) -> None:
        super().__init__()
        self.bags = bags
        width = DENSE + DIM * len(KEYS)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU()) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(width, EXPERTS) for _ in TASKS)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in TASKS)

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        features = torch.cat([dense, self.bags(sparse).values()], dim=1)
        experts = torch.stack([expert(features) for expert in self.experts], dim=1)  # (B, experts, width)
        logits = []
        for gate, head in zip(self.gates, self.heads, strict=True):
            shares = torch.softmax(gate(features), dim=1)  # (B, experts)
            logits.append(head((shares.unsqueeze(2) * experts).sum(dim=1)))
        return torch.cat(logits, dim=1)


def build(seed: int) -> Predict:
    """The model over tables of its own."""
    torch.manual_seed(seed)
    return Predict(Mmoe(tables({f"t_{key}": [key] for key in KEYS}, ROWS, DIM)), KEYS, TASKS)


@options(samples=100_000)
def main(out: Path, samples: int, epochs: int, seed: int, precision: str) -> None:
    """Train a multi-task model, package it with TorchRec, compile and serve it, and compare its scores."""
    console = Console()
    training, held_out = draw(samples, seed).split()
    predict = build(seed)
    train(predict, training, console, epochs=epochs, seed=seed)
    to_clients(predict, held_out, out, precision, console)


if __name__ == "__main__":
    main()
