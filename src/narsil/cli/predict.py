"""``narsil predict``: the newcomer's first call."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from narsil.artifacts.schema import ModelSchema
from narsil.cli.options import SECONDS, SEED, GivenPath, GivenText
from narsil.cli.targets import refuse_beside, schema_for, target_option
from narsil.errors import ConfigError


@click.command()
@target_option
@click.option("--model", "name", type=GivenText(), help="Which model; default: the server's default one.")
@click.option("--version", type=GivenText(), help="Which version of it, or a label; default: as served.")
@click.option("--schema", type=GivenPath(), help="Artifact to take the schema from; default: ask the server.")
@click.option("--rows", type=click.IntRange(1), default=5, show_default=True, help="Random rows to send.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random rows.")
@click.option("--example", is_flag=True, help="Print the random rows as --file takes them, and send nothing.")
@click.option(
    "--file",
    "rows_file",
    type=GivenPath(exists=True, dir_okay=False, allow_dash=True),
    help='Rows to send, one JSON object a line: {"dense": [...], "sparse": {"cat_0": [17], ...}}; - is standard input.',
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--lines", "as_lines", is_flag=True, help="Print one JSON object for each row: its scores by task.")
@click.option("--timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds to wait.")
def command(
    target: str,
    name: str | None,
    version: str | None,
    schema: Path | None,
    rows: int,
    seed: int,
    example: bool,
    rows_file: Path | None,
    as_json: bool,
    as_lines: bool,
    timeout: float,
) -> None:
    """Send rows to a running server and print their scores."""
    if rows_file is not None:
        refuse_beside("file", "rows", "seed", "example")
    if as_json and as_lines:
        raise click.UsageError("--json and --lines are two ways to print the same: leave one of them out.")
    from narsil.client import Client

    name, version = name or "", version or ""
    model = schema_for(target, schema, name, version)
    given = _random_rows(model, rows, seed) if rows_file is None else _read_rows(rows_file, model)
    if example:
        for written in _written(model, given):
            click.echo(json.dumps(written))
        return
    with Client(target) as client:
        prediction = client.predict(
            given.dense, given.ids, given.lengths, weights=given.weights, model=name, version=version, timeout=timeout
        )
    scores = {task: values.tolist() for task, values in prediction.scores.items()}
    if as_lines:
        for row in range(len(given.dense)):
            click.echo(json.dumps({task: values[row] for task, values in scores.items()}))
        return
    if as_json:
        click.echo(json.dumps({"model": prediction.model_name, "version": prediction.model_version, "scores": scores}))
        return
    for task, values in scores.items():
        for row, score in enumerate(values):
            numbers = score if isinstance(score, list) else [score]
            click.echo(f"{task}[{row}] = {' '.join(f'{number:.6f}' for number in numbers)}")
    click.echo(
        f"{prediction.model_name} version {prediction.model_version}: {len(given.dense)} rows in a batch of "
        f"{prediction.batch_rows}, {prediction.queue_us} µs queued, {prediction.execute_us} µs in the model"
    )


@dataclass(frozen=True)
class _Rows:
    """As Client.predict takes them."""

    dense: Any  # (B, D)
    ids: Any  # flat, all bags of row 0 first
    lengths: Any  # (B, T)
    weights: Any = None  # as ids


def _random_rows(schema: ModelSchema, rows: int, seed: int) -> _Rows:
    """One id in each bag."""
    import numpy as np

    random = np.random.default_rng(seed)
    dense = random.random((rows, schema.dense_dim), dtype=np.float32)
    ids = random.integers(0, schema.rows, (rows, schema.num_features))
    return _Rows(dense, ids.ravel(), np.ones(ids.shape, np.int32))


def _written(schema: ModelSchema, rows: _Rows) -> Iterator[dict[str, Any]]:
    """The rows as a file has them; dense values are short, and the same float32 when they are read."""
    import numpy as np

    ends = np.cumsum(rows.lengths).reshape(rows.lengths.shape)
    for dense, stops, lengths in zip(rows.dense, ends, rows.lengths, strict=True):
        bags = (rows.ids[stop - length : stop].tolist() for stop, length in zip(stops, lengths, strict=True))
        yield {
            "dense": [float(str(value)) for value in dense],
            "sparse": dict(zip((feature.name for feature in schema.features), bags, strict=True)),
        }


def _read_rows(path: Path, schema: ModelSchema) -> _Rows:
    """From JSON lines. Raises ConfigError naming the line."""
    import numpy as np

    from narsil.client.numbers import floats

    dense, ids, lengths, weights = [], [], [], []
    stated = "standard input" if str(path) == "-" else str(path)
    for number, line in enumerate(_lines(path, stated), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _refuse_extra(row, {"dense", "sparse", "weights"}, "key")
            _refuse_extra(row["sparse"], {feature.name for feature in schema.features}, "feature")
            dense.append(floats(row["dense"], "dense").reshape(schema.dense_dim))
            bags = [_bag(row["sparse"][feature.name], f"feature {feature.name}") for feature in schema.features]
            weights.append(_weights(row.get("weights"), schema, bags))
        except KeyError as error:
            raise ConfigError(f"{stated}, line {number}: no {error.args[0]!r}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{stated}, line {number}: {error}") from None
        ids += bags
        lengths.append([len(bag) for bag in bags])
    if not dense:
        raise ConfigError(f"{stated} holds no rows")
    values = np.concatenate(ids) if ids else np.empty(0, np.int32)
    weighed = any(each is not None for each in weights)
    ones = (np.ones(sum(counts), np.float32) for counts in lengths)
    found = [one if each is None else each for each, one in zip(weights, ones, strict=True)]
    return _Rows(np.stack(dense), values, np.array(lengths, dtype=np.int32), np.concatenate(found) if weighed else None)


def _lines(path: Path, stated: str) -> list[str]:
    try:
        read = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return read.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{stated} cannot be read as text: {error}") from None


def _weights(given: Any, schema: ModelSchema, bags: Sequence[Any]) -> Any:
    """One row's weights, 1 where a feature has none; None where the row has none at all. Raises ValueError."""
    import numpy as np

    from narsil.client.numbers import floats

    if given is None:
        return None
    _refuse_extra(given, {feature.name for feature in schema.features}, "feature")
    parts = [np.empty(0, np.float32)]
    for feature, bag in zip(schema.features, bags, strict=True):
        weights = floats(given.get(feature.name, [1.0] * len(bag)), f"weights of {feature.name}")
        if weights.shape != bag.shape:
            raise ValueError(f"feature {feature.name}: {weights.size} weights for {len(bag)} ids")
        parts.append(weights)
    return np.concatenate(parts)


def _refuse_extra(found: Any, known: set[str], what: str) -> None:
    if not isinstance(found, dict):
        raise ValueError("a row is an object with dense and sparse, and sparse and weights are objects of features")
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
