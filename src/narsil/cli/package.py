"""``narsil package``: builds a servable artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.schema import Pooling
from narsil.cli.inspect import quantization_of
from narsil.cli.libraries import check_torch
from narsil.cli.options import SEED, GivenPath
from narsil.errors import ConfigError
from narsil.packaging.dlrm import DlrmConfig, DlrmWeights, random_weights

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["command", "show_progress"]

_DEFAULT = DlrmConfig()


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Comma-separated whole numbers."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not whole numbers separated by commas") from None


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(part.strip() for part in value.split(",")) if value else ()


def _shown(sizes: tuple[int, ...]) -> str:
    return ",".join(map(str, sizes))


@click.group()
def command() -> None:
    """Build a servable artifact from options or trained weights."""


@command.command()
@click.option("--out", required=True, type=GivenPath(), help="Folder to write the artifact to.")
@click.option(
    "--rows", callback=_sizes, metavar="N,N,..", help=f"Rows of every table, or of each.  [default: {_DEFAULT.rows}]"
)
@click.option("--tables", type=int, help=f"Sparse features, one table each.  [default: {_DEFAULT.tables}]")
@click.option("--dim", type=int, help=f"Columns of a table.  [default: {_DEFAULT.dim}]")
@click.option("--dense-features", type=int, help=f"Dense columns of a row.  [default: {_DEFAULT.dense_features}]")
@click.option(
    "--dense-arch",
    callback=_sizes,
    metavar="N,N,..",
    help=f"Layers; ends in dim.  [default: {_shown(_DEFAULT.dense_arch)}]",
)
@click.option(
    "--over-arch",
    callback=_sizes,
    metavar="N,N,..",
    help=f"Layers; ends in 1.  [default: {_shown(_DEFAULT.over_arch)}]",
)
@click.option("--seed", type=SEED, help=f"Seed of the random weights.  [default: {_DEFAULT.seed}]")
@click.option(
    "--features",
    callback=_names,
    metavar="NAME,NAME,..",
    help="Names of the sparse features in order.  [default: cat_0,cat_1,..]",
)
@click.option("--pooling", type=click.Choice(["sum", "mean"]), default=_DEFAULT.pooling, show_default=True)
@click.option(
    "--checkpoint",
    type=GivenPath(exists=True, dir_okay=False),
    help="Trained weights (.safetensors, or a torch state_dict); the architecture is read from their shapes.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N; baked into model_default.pt.")
@click.option("--name", default="dlrm", show_default=True, help="Name that requests call the model by.")
@click.option("--version", default="1", show_default=True)
@click.option("--onnx/--no-onnx", default=None, help="Write the ONNX graph too.  [default: if onnx is installed]")
def dlrm(
    out: Path,
    rows: tuple[int, ...] | None,
    tables: int | None,
    dim: int | None,
    dense_features: int | None,
    dense_arch: tuple[int, ...] | None,
    over_arch: tuple[int, ...] | None,
    seed: int | None,
    features: tuple[str, ...],
    pooling: str,
    checkpoint: Path | None,
    device: str,
    name: str,
    version: str,
    onnx: bool | None,
) -> None:
    """Package a DLRM: INT8 tables for TorchScript, FP32 for ONNX."""
    check_torch("packaging")
    from narsil.packaging.packager import check_request, package_dlrm

    check_request(out, device=device, name=name, version=version, onnx=onnx)  # before minutes of work
    given = {
        "rows": rows[0] if rows is not None and len(rows) == 1 else rows,
        "tables": len(rows) if tables is None and rows is not None and len(rows) > 1 else tables,
        "dim": dim,
        "dense_features": dense_features,
        "dense_arch": dense_arch,
        "over_arch": over_arch,
        "seed": seed,
    }
    options = {key: value for key, value in given.items() if value is not None}
    pool: Pooling = "mean" if pooling == "mean" else "sum"
    with show_progress() as report:
        report("weights", 0, 1)
        config, weights = _weights(checkpoint, options, features, pool)
        report("weights", 1, 1)
        artifact = package_dlrm(
            config,
            weights,
            out,
            device=device,
            name=name,
            version=version,
            origin=checkpoint.name if checkpoint else None,
            onnx=onnx,
            progress=report,
        )
    _summary(artifact)


def _weights(
    checkpoint: Path | None, options: dict[str, Any], features: tuple[str, ...], pooling: Pooling
) -> tuple[DlrmConfig, DlrmWeights]:
    """Those of the checkpoint, or random ones of the architecture that the options describe."""
    if checkpoint is None:
        if features and "tables" not in options:
            options = {**options, "tables": len(features)}
        config = DlrmConfig(**options, feature_names=features, pooling=pooling)
        return config, random_weights(config)
    if options:
        raise ConfigError(f"--{next(iter(options)).replace('_', '-')} contradicts --checkpoint, whose shapes say it")
    from narsil.packaging.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint, features=features, pooling=pooling)


@contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows one bar per stage on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _summary(artifact: Artifact) -> None:
    schema = artifact.schema
    manifest = artifact.manifest or {}
    click.echo(
        f"{artifact.name} version {artifact.version}: {schema.num_features} sparse features, "
        f"{schema.dense_dim} dense columns, {int(schema.rows.sum()):,} table rows, for {artifact.device}"
    )
    for entry in manifest.get("files", {}).values():
        click.echo(f"  {artifact.path / entry['file']}  {entry['bytes'] / 1e6:,.1f} MB")
    click.echo(f"  {quantization_of(artifact)}")
    if artifact.onnx is None:
        click.echo("  no ONNX graph: the onnx package is not installed, or --no-onnx was given")
    click.echo(f"Next: narsil serve --model {artifact.path}")
