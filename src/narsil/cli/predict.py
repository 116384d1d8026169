"""``narsil predict``: the newcomer's first call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from narsil.cli.options import SECONDS, SEED, GivenPath
from narsil.cli.targets import refuse_beside, schema_for, target_option
from narsil.errors import ConfigError


@click.command()
@target_option
@click.option("--schema", type=GivenPath(), help="Artifact to take the schema from; default: ask the server.")
@click.option("--rows", type=click.IntRange(1), default=5, show_default=True, help="Random rows to send.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random rows.")
@click.option(
    "--file",
    "rows_file",
    type=GivenPath(exists=True, dir_okay=False),
    help='Rows to send, one JSON object a line: {"dense": [...], "sparse": {"cat_0": [17], ...}}.',
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds to wait.")
def command(
    target: str, schema: Path | None, rows: int, seed: int, rows_file: Path | None, as_json: bool, timeout: float
) -> None:
    """Send rows to a running server and print their scores."""
    if rows_file is not None:
        refuse_beside("file", "rows", "seed")
    import numpy as np

    from narsil.client import Client

    model = schema_for(target, schema)
    if rows_file is not None:
        dense, ids, lengths = _read_rows(rows_file, model)
    else:
        random = np.random.default_rng(seed)
        dense = random.random((rows, model.dense_dim), dtype=np.float32)
        ids, lengths = random.integers(0, model.rows, (rows, model.num_features)), None
    with Client(target) as client:
        prediction = client.predict(dense, ids, lengths, timeout=timeout)
    scores = {task: values.tolist() for task, values in prediction.scores.items()}
    if as_json:
        click.echo(json.dumps({"model": prediction.model_name, "version": prediction.model_version, "scores": scores}))
        return
    for task, values in scores.items():
        for row, score in enumerate(values):
            numbers = score if isinstance(score, list) else [score]
            click.echo(f"{task}[{row}] = {' '.join(f'{number:.6f}' for number in numbers)}")
    click.echo(
        f"{prediction.model_name} version {prediction.model_version}: {len(dense)} rows in a batch of "
        f"{prediction.batch_rows}, {prediction.queue_us} µs queued, {prediction.execute_us} µs in the model"
    )


def _read_rows(path: Path, schema: Any) -> tuple[Any, Any, Any]:
    """(dense (B, D), flat ids, lengths (B, T)) from JSON lines. Raises ConfigError naming the line."""
    import numpy as np

    from narsil.client.numbers import floats

    dense, ids, lengths = [], [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _refuse_extra(row, {"dense", "sparse"}, "key")
            _refuse_extra(row["sparse"], {feature.name for feature in schema.features}, "feature")
            dense.append(floats(row["dense"], "dense").reshape(schema.dense_dim))
            bags = [_bag(row["sparse"][feature.name], f"feature {feature.name}") for feature in schema.features]
        except KeyError as error:
            raise ConfigError(f"{path}, line {number}: no {error.args[0]!r}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        ids += bags
        lengths.append([len(bag) for bag in bags])
    if not dense:
        raise ConfigError(f"{path} holds no rows")
    values = np.concatenate(ids) if ids else np.empty(0, np.int32)
    return np.stack(dense), values, np.array(lengths, dtype=np.int32)


def _refuse_extra(found: Any, known: set[str], what: str) -> None:
    if not isinstance(found, dict):
        raise ValueError("a row is an object with dense and sparse, and sparse an object of features")
    extra = sorted(set(found) - known)
    if extra:
        raise ValueError(f"unknown {what} {extra[0]!r}")


def _bag(ids: Any, what: str) -> Any:
    """One feature's ids as an array."""
    from narsil.client.numbers import whole

    bag = whole(ids, what)
    if bag.ndim != 1:
        raise ValueError(f"{what}: {ids!r} is not a list of ids")
    return bag
