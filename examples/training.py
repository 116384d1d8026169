"""What the examples share of training: the loop, its progress bar and the measures of scores. N rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Floats = NDArray[np.float32]
Report = Callable[[int, int, float], None]  # steps done, steps in all, running loss


def fit(
    parameters: Iterable[tuple[str, nn.Parameter]],
    loss_of: Callable[[Tensor], Tensor],
    rows: int,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    rates: tuple[float, float] = (0.02, 1e-3),
    report: Report | None = None,
) -> None:
    """Minimise ``loss_of(row numbers)`` over N = ``rows`` rows, in an order that depends on `seed` alone.

    ``parameters`` are a module's named ones; those of TorchRec's tables are told by their names. ``rates``: learning
    rates of tables and of layers.
    """
    tables: list[nn.Parameter] = []
    layers: list[nn.Parameter] = []
    for name, parameter in parameters:
        (tables if ".embedding_bags." in name else layers).append(parameter)
    # Adagrad gives rare ids large steps, and only to the rows that a batch touches.
    optimizers = [torch.optim.Adagrad(tables, lr=rates[0]), torch.optim.Adam(layers, lr=rates[1])]
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-rows // batch_size)
    done, running_loss = 0, float("nan")
    # Adagrad builds its own sparse tensors, from gradients that torch made: nothing to check, and torch warns of the
    # choice being left open.
    with torch.sparse.check_sparse_tensor_invariants(False):
        for _ in range(epochs):
            for chosen in torch.randperm(rows, generator=order).split(batch_size):
                loss = loss_of(chosen)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                done += 1
                running_loss = loss.item() if done == 1 else 0.98 * running_loss + 0.02 * loss.item()
                if report is not None:
                    report(done, steps, running_loss)


@contextmanager
def training_bar(console: Console) -> Iterator[Report]:
    """A progress bar with the running loss, to be given to `fit`."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None, loss=float("nan"))
        yield lambda done, steps, loss: progress.update(task, completed=done, total=steps, loss=loss)


def auc(labels: Floats, scores: Floats) -> float:
    """The probability that a clicked row outscores an unclicked one, ties counting half; NaN with one class only.

    Exact, by the rank sum of Mann and Whitney with tied scores at their mean rank.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_ranks = last - (counts - 1) / 2
    clicked = labels > 0.5
    positives = int(clicked.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    rank_sum = float(mean_ranks[inverse[clicked]].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def normalized_entropy(labels: Floats, scores: Floats) -> float:
    """The log loss over that of the base rate for every row: 1 says nothing, less is better; NaN with one class only.

    The measure of He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook" (2014).
    """
    rate = float(labels.mean(dtype=np.float64))
    if rate in (0, 1):
        return float("nan")
    sure = np.clip(scores.astype(np.float64), 1e-15, 1 - 1e-15)
    loss = -np.where(labels > 0.5, np.log(sure), np.log1p(-sure)).mean()
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))
