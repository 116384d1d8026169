"""What the examples with TorchRec's models share: a model's way from its training to a client's scores.

    train -> package (TorchRec's own library) -> narsil compile -> narsil serve -> narsil.Client -> compare

A Log holds rows as a client sends them; its `inputs` are what TorchRec's packaged module takes. The scores that come
back are held against a direct call of the packaged module over the same rows. N rows, D dense columns, T features.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.fx.tracer import Tracer
from torchrec.inference.modules import (
    PredictModule,
    assign_weights_to_tbe,
    get_table_to_weights_from_tbe,
    quantize_inference_model,
    shard_quant_model,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from training import Floats, auc, fit, normalized_entropy, training_bar

import narsil
from narsil.artifacts.rows import of_bags
from narsil.bench.servers import narsil_server

PLAIN, WEIGHTED = "id_list_features", "id_score_list_features"  # TorchRec's names of the two kinds of features
logging.getLogger("torch.fx").setLevel(logging.ERROR)  # TorchRec's modules ask it what it warns of
LARGEST_DEVIATION = 2e-3  # of a served score; what `narsil compile` lets pass unless told otherwise

Scores = Mapping[str, Floats]  # task -> (N,)


@dataclass(frozen=True)
class Log:
    """Impressions and what became of them."""

    tasks: tuple[str, ...]
    dense: Floats  # (N, D)
    lengths: NDArray[np.int32]  # (N, T)
    values: NDArray[np.int32]  # (sum of lengths,): all bags of row 0 first
    labels: Floats  # (N, tasks) 0 or 1
    planted: Floats  # (N, tasks) the rule's probabilities
    weights: Floats | None = None  # beside values

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Log:
        """The log of these rows, in this order."""
        features = self.lengths.shape[1]
        place = of_bags(self.lengths.ravel(), (rows[:, None] * features + np.arange(features)).ravel())
        return replace(
            self,
            dense=self.dense[rows],
            lengths=self.lengths[rows],
            values=self.values[place],
            labels=self.labels[rows],
            planted=self.planted[rows],
            weights=None if self.weights is None else self.weights[place],
        )

    def split(self, held_out: float = 0.15) -> tuple[Log, Log]:
        """(training, held-out) rows; the last ones are held out, as a log runs forward in time."""
        boundary = len(self) - max(1, round(len(self) * held_out))
        return self.take(np.arange(boundary)), self.take(np.arange(boundary, len(self)))

    def inputs(self) -> dict[str, Tensor]:
        """The rows as TorchRec's packaged modules take them: bags key-major, all rows of the first feature first."""
        place = of_bags(self.lengths.ravel(), np.arange(self.lengths.size).reshape(self.lengths.shape).T.ravel())
        group = PLAIN if self.weights is None else WEIGHTED
        found = {
            "float_features": torch.from_numpy(self.dense),
            f"{group}.lengths": torch.from_numpy(np.ascontiguousarray(self.lengths.T).ravel()),
            f"{group}.values": torch.from_numpy(self.values[place]),
        }
        if self.weights is not None:
            found[f"{group}.weights"] = torch.from_numpy(self.weights[place])
        return found


class Predict(PredictModule):  # type: ignore[misc]
    """What TorchRec packages: the inputs' dict -> task -> (B,) probabilities. ``model`` gives (B, tasks) logits."""

    def __init__(self, model: nn.Module, keys: Sequence[str], tasks: Sequence[str], *, weighted: bool = False) -> None:
        super().__init__(model, "cpu")
        self.keys, self.tasks, self.weighted = list(keys), list(tasks), weighted

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, tasks), with gradients: what is trained."""
        group = WEIGHTED if self.weighted else PLAIN
        sparse = KeyedJaggedTensor(
            keys=self.keys,
            lengths=batch[f"{group}.lengths"],
            values=batch[f"{group}.values"],
            weights=batch[f"{group}.weights"] if self.weighted else None,
        )
        return self.predict_module(batch["float_features"], sparse)

    def predict_forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = torch.sigmoid(self.logits(batch))
        return {task: scores[:, column] for column, task in enumerate(self.tasks)}


def tables(
    features: Mapping[str, Sequence[str]],
    rows: Sequence[int],
    dim: int,
    *,
    weighted: bool = False,
    spread: float = 0.01,
) -> Any:
    """TorchRec's tables, ready for training: name -> the features that are looked up in it; ``rows`` of each table."""
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=count, embedding_dim=dim, feature_names=list(keys))
        for (name, keys), count in zip(features.items(), rows, strict=True)
    ]
    collection = EmbeddingBagCollection(tables=configs, is_weighted=weighted, device=torch.device("cpu"))
    for table in collection.embedding_bags.values():
        nn.init.uniform_(table.weight, -spread, spread)
    return collection


def train(predict: Predict, log: Log, console: Console, *, epochs: int, seed: int, batch_size: int = 512) -> None:
    """Minimise the mean log loss of all tasks, in place."""
    labels = torch.from_numpy(log.labels)

    def loss_of(rows: Tensor) -> Tensor:
        given = predict.logits(log.take(rows.numpy()).inputs())
        return nn.functional.binary_cross_entropy_with_logits(given, labels[rows])

    predict.train()
    with training_bar(console) as report:
        fit(
            predict.named_parameters(),
            loss_of,
            len(log),
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            rates=(0.1, 5e-3),
            report=report,
        )
    predict.eval()


def package(predict: Predict, sample: dict[str, Tensor], path: Path) -> Any:
    """INT8 tables, sharded, traced and scripted as TorchRec's packager does; written to ``path`` and returned."""
    logging.disable(logging.WARNING)  # its planner's advice
    set_propogate_device(True)
    quantized = quantize_inference_model(predict)
    quantized(sample)  # makes the quantized tables
    # Sharding allocates the tables anew and leaves them zero: their rows are carried over.
    rows = {
        name: tuple(part.clone() for part in parts) for name, parts in get_table_to_weights_from_tbe(quantized).items()
    }
    sharded, _ = shard_quant_model(quantized, compute_device="cpu", sharding_device="cpu")
    sharded(sample)
    assign_weights_to_tbe(sharded, rows)
    graph = Tracer(leaf_modules=["IntNBitTableBatchedEmbeddingBagsCodegen"]).trace(sharded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchRec's own annotations
        scripted = torch.jit.script(torch.fx.GraphModule(sharded, graph))
    path.parent.mkdir(parents=True, exist_ok=True)
    scripted.save(str(path))
    logging.disable(logging.NOTSET)
    return scripted


def direct(module: Any, log: Log, batch_size: int = 4096) -> Scores:
    """Task -> (N,) scores of a module that is called here."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(log), batch_size):
            some = log.take(np.arange(start, min(start + batch_size, len(log))))
            parts.append({task: scores.numpy() for task, scores in module(some.inputs()).items()})
    return {task: np.concatenate([part[task] for part in parts]) for task in log.tasks}


def compile_for_here(artifact: Path, out: Path, precision: str, console: Console) -> None:
    """`narsil compile`, whose progress and summary go to the terminal."""
    command = ["narsil", "compile", str(artifact), "--out", str(out), "--precision", precision]
    console.print(f"$ {' '.join(command)}", soft_wrap=True, highlight=False)
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        raise click.ClickException("narsil compile failed")


def served(model: Path, log: Log, console: Console) -> Scores:
    """`narsil serve` and the scores that a client gets of it, task -> (N,)."""
    console.print(f"$ narsil serve --model {model} --port 0", soft_wrap=True, highlight=False)
    with narsil_server(model) as server, narsil.Client(server.address) as client:
        answer = client.predict(log.dense, log.values, log.lengths, weights=log.weights, timeout=60)
    return answer.scores


def compare(log: Log, found: Mapping[str, Scores], reference: str) -> list[dict[str, Any]]:
    """A row for each task and each of ``found``: its AUC, its NE, and how far its scores lie from the reference's."""
    rows = []
    for column, task in enumerate(log.tasks):
        labels = log.labels[:, column]
        for name, scores in {**found, "the rule itself": {task: log.planted[:, column]}}.items():
            rows.append(
                {
                    "task": task,
                    "scores": name,
                    "auc": auc(labels, scores[task]),
                    "ne": normalized_entropy(labels, scores[task]),
                    "deviation": float(np.abs(scores[task] - found[reference][task]).max()) if name in found else None,
                }
            )
    return rows


def render(rows: Sequence[Mapping[str, Any]], count: int) -> Table:
    """What `compare` found, as a table."""
    table = Table(title=f"{count:,} held-out rows; deviation from the direct call")
    for heading in ("task", "scores of"):
        table.add_column(heading)
    for heading in ("AUC", "NE", "deviation"):
        table.add_column(heading, justify="right")
    for row in rows:
        deviation = "" if row["deviation"] is None else f"{row['deviation']:.1e}"
        table.add_row(row["task"], row["scores"], f"{row['auc']:.4f}", f"{row['ne']:.4f}", deviation)
    return table


def check(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises click.ClickException where a served score deviates from the direct call's by more than may be."""
    for row in rows:
        if row["scores"] == name and not row["deviation"] <= LARGEST_DEVIATION:
            raise click.ClickException(
                f"served scores of {row['task']} deviate by up to {row['deviation']:.1e} from a direct call, more than "
                f"{LARGEST_DEVIATION:.0e}: compile with --precision fp32"
            )


def to_clients(predict: Predict, held_out: Log, out: Path, precision: str, console: Console) -> None:
    """Package a trained model, compile and serve it, and print what a client's scores are worth.

    Leaves model_default.pt, the folder compiled, and held_out.npz (rows, labels, direct and served scores) in ``out``.
    """
    trained = direct(predict, held_out)
    artifact, folder = out / "model_default.pt", out / "compiled"
    with console.status("packaging with TorchRec: quantize, shard, trace, script"):
        packaged = package(predict, held_out.take(np.arange(2)).inputs(), artifact)
    console.print(f"packaged {artifact}", soft_wrap=True, highlight=False)
    compile_for_here(artifact, folder, precision, console)
    names = "trained, fp32", "packaged, direct call", "compiled, served"
    found = dict(zip(names, (trained, direct(packaged, held_out), served(folder, held_out, console)), strict=True))
    rows = compare(held_out, found, names[1])
    console.print(render(rows, len(held_out)))
    (out / "scores.json").write_text(json.dumps(rows, indent=1))
    np.savez_compressed(
        out / "held_out.npz",
        dense=held_out.dense,
        lengths=held_out.lengths,
        values=held_out.values,
        labels=held_out.labels,
        direct=np.stack([found[names[1]][task] for task in held_out.tasks], axis=1),
        served=np.stack([found[names[2]][task] for task in held_out.tasks], axis=1),
        **cast(Any, {} if held_out.weights is None else {"weights": held_out.weights}),
    )
    check(rows, names[2])
    console.print(f"Next:\n  narsil serve --model {folder}", soft_wrap=True, highlight=False)


def options(samples: int, epochs: int = 1) -> Callable[[Callable[..., None]], click.Command]:
    """The options that the examples' commands share."""

    def decorate(function: Callable[..., None]) -> click.Command:
        for option in (
            click.option("--seed", type=click.IntRange(0), default=0),
            click.option("--epochs", type=click.IntRange(1), default=epochs),
            click.option("--samples", type=click.IntRange(100), default=samples, help="Rows to draw."),
            click.option(
                "--precision",
                type=click.Choice(["auto", "fp32", "bf16", "int8"]),
                default="auto",
                help="To compile in.",
            ),
            click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for what is made."),
        ):
            function = option(function)
        return click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})(function)

    return decorate
