"""``narsil compile``: turns an artifact into one that runs at the speed of this machine's processor."""

from __future__ import annotations

from pathlib import Path

import click

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.compiled_info import Deviation
from narsil.artifacts.replacing import check_out
from narsil.cli.deviations import deviation_lines
from narsil.cli.libraries import check_torch
from narsil.cli.options import FiniteRange, GivenPath, dense_dim_option, ids_option
from narsil.cli.package import show_progress
from narsil.compile.options import ENGINE_CHOICES, PRECISIONS

__all__ = ["command"]


@click.command()
@click.argument("model", type=GivenPath())
@click.option("--out", required=True, type=GivenPath(), help="Folder to write the artifact to.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Lowest precision of a layer; layers that would deviate too far are kept higher. auto: what is fastest here "
    "and deviates little enough, fp32 at worst.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--engine",
    type=click.Choice(ENGINE_CHOICES),
    default="auto",
    show_default=True,
    help="fused: Narsil's own forward (x86 with AVX-512). inductor: FBGEMM and AOTInductor, any model. "
    "auto: fused where it runs and has every step, else inductor.",
)
@click.option(
    "--calibration",
    type=GivenPath(exists=True, dir_okay=False),
    help="Rows to choose precision and judge the result by: .npz with dense, ids (or lengths and values) and, for the "
    "AUC, labels.",
)
@click.option(
    "--max-deviation",
    type=FiniteRange(0),
    help="Largest deviation of a score that is let pass; 10 times as much in log-odds.  [default: 2e-3; for fp32, "
    "twice what the artifact itself deviates from float64]",
)
@dense_dim_option
@ids_option
def command(
    model: Path,
    out: Path,
    precision: str,
    device: str,
    engine: str,
    calibration: Path | None,
    max_deviation: float | None,
    dense_dim: int | dict[str, int] | None,
    ids: str,
) -> None:
    """Compile the model at MODEL for this machine.

    MODEL is what `narsil package dlrm` or TorchRec's own packager wrote. The result is served by `narsil serve` with no
    other option. It runs on this processor or a newer one of its kind; where it cannot, `narsil serve` says why and
    runs the artifact that lies beside it. The fused engine is served without torch, the inductor engine with this
    version alone.
    """
    check_torch("compiling")
    check_out(out)  # before minutes of work
    from narsil.compile.calibration import load_calibration
    from narsil.compile.compiler import compile_artifact

    source = open_artifact(model, dense_dim=dense_dim, ids="" if ids == "auto" else ids)
    rows = None if calibration is None else load_calibration(calibration, source.schema)
    with show_progress() as report:
        artifact, cached = compile_artifact(
            source,
            out,
            precision=precision,
            engine=engine,
            device=device,
            limit=max_deviation,
            calibration=rows,
            progress=report,
        )
    _summary(artifact, cached)


def _summary(artifact: Artifact, cached: bool) -> None:
    compiled = (artifact.manifest or {})["compiled"]
    deviation = compiled["deviation"]
    state = "already compiled from these inputs" if cached else "compiled"
    click.echo(
        f"{artifact.name} version {artifact.version}: {state}, {compiled['precision']}, for "
        f"{compiled['machine'] if compiled['device'] == 'cpu' else compiled['device']} ({compiled['engine']} engine)"
    )
    click.echo(f"  {compiled['note']}")
    source = "artifact" if deviation["own_max_abs"] is None else "artifact in float64"
    click.echo(
        f"  deviation from the {source} over {deviation['rows']:,} rows: max {deviation['max_abs']:.2e} "
        f"(limit {compiled['limit']:.1e}), mean {deviation['mean_abs']:.1e}, "
        f"rank correlation {deviation['rank_correlation']:.6f}"
    )
    for line in deviation_lines(Deviation(**deviation)):
        click.echo(f"  {line}")
    for task, one in compiled["deviations"].items():
        click.echo(f"  {task}: max {one['max_abs']:.2e}, mean {one['mean_abs']:.1e}")
    click.echo(f"Next: narsil serve --model {artifact.path}")
