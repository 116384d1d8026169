"""``narsil compile``: turns a DLRM artifact into one that runs at the speed of this machine's processor."""

from __future__ import annotations

from pathlib import Path

import click

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.replacing import check_out
from narsil.cli.options import FiniteRange, GivenPath
from narsil.cli.package import check_torch, show_progress
from narsil.compile.options import DEFAULT_LIMITS, ENGINE_CHOICES

__all__ = ["command"]


@click.command()
@click.argument("model", type=GivenPath())
@click.option("--out", required=True, type=GivenPath(), help="Folder to write the artifact to.")
@click.option(
    "--precision",
    type=click.Choice(list(DEFAULT_LIMITS)),
    default="fp32",
    show_default=True,
    help="Lowest precision of a layer; layers that would deviate too far are kept higher. auto: what is fastest here.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--engine",
    type=click.Choice(ENGINE_CHOICES),
    default="auto",
    show_default=True,
    help="fused: Narsil's own forward (x86 with AVX-512). inductor: FBGEMM and AOTInductor. auto: fused where it runs.",
)
@click.option(
    "--calibration",
    type=GivenPath(exists=True, dir_okay=False),
    help="Rows to choose precision and judge the result by: .npz with dense, ids and, for the AUC, labels.",
)
@click.option(
    "--max-deviation",
    type=FiniteRange(0),
    help="Largest absolute deviation of a score that is let pass.  [default: 1e-5 for fp32, else 2e-3]",
)
def command(
    model: Path,
    out: Path,
    precision: str,
    device: str,
    engine: str,
    calibration: Path | None,
    max_deviation: float | None,
) -> None:
    """Compile the DLRM at MODEL for this machine.

    MODEL is what `narsil package dlrm` or TorchRec's own packager wrote. The result is served by `narsil serve` with no
    other option. It runs on this processor or a newer one of its kind; where it cannot, `narsil serve` says why and
    runs the artifact that lies beside it. The fused engine is served without torch, the inductor engine with this
    version alone.
    """
    check_torch("compiling")
    check_out(out)  # before minutes of work
    from narsil.compile.calibration import load_calibration
    from narsil.compile.compiler import compile_artifact

    source = open_artifact(model)
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
    click.echo(
        f"  deviation from the artifact over {deviation['rows']:,} rows: max {deviation['max_abs']:.2e} "
        f"(limit {compiled['limit']:.0e}), mean {deviation['mean_abs']:.1e}, "
        f"rank correlation {deviation['rank_correlation']:.6f}"
    )
    if deviation["auc"] is not None:
        click.echo(
            f"  AUC on {deviation['labelled_rows']:,} labelled rows: {deviation['auc']:.5f}, "
            f"changed by {deviation['auc_change']:+.1e}"
        )
    click.echo(f"Next: narsil serve --model {artifact.path}")
