"""``narsil verify``: holds a running server's scores against the artifact's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from narsil.artifacts.artifact import open_artifact
from narsil.cli.deviations import deviation_lines
from narsil.cli.options import SECONDS, FiniteRange, GivenPath
from narsil.cli.targets import target_option
from narsil.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from narsil.artifacts.artifact import Artifact
    from narsil.artifacts.compiled_info import Deviation
    from narsil.artifacts.rows import Vocabularies
    from narsil.client import ModelInfo
    from narsil.dataflow import Batch, Scores

__all__ = ["command"]


@click.command()
@target_option
@click.option("--model", required=True, type=GivenPath(), help="Artifact whose own scores are the measure.")
@click.option(
    "--calibration",
    type=GivenPath(exists=True, dir_okay=False),
    help="Rows to send too: .npz with dense, ids (or lengths and values) and, for the AUC, labels.",
)
@click.option(
    "--max-deviation",
    type=FiniteRange(0),
    default=2e-3,
    show_default=True,
    help="Largest deviation of a score; 10 times as much in log-odds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds to wait for one request.")
def command(
    target: str, model: Path, calibration: Path | None, max_deviation: float, as_json: bool, timeout: float
) -> None:
    """Send 10,000 usual rows and some thousand extreme ones to a running server and hold its scores against the
    artifact's, task by task: those tasks that the server serves.

    The artifact's TorchScript runs here as it was saved, also where MODEL is a compiled folder. Exits with 1 where, of
    any task, a score or its log-odds, the mean score, or the scores of extreme rows on average deviate by more than
    --max-deviation allows.
    """
    from narsil.backends.registry import load_backend
    from narsil.client import Client
    from narsil.compile.calibration import load_calibration
    from narsil.compile.gate import compare, limits_of, problem_of

    artifact = open_artifact(model)
    schema = artifact.schema
    name = "torch" if artifact.offers("torch") else "onnx"
    reference = load_backend(artifact, name, tune_kernels=False)
    rows = None if calibration is None else load_calibration(calibration, schema)
    with Client(target) as client:
        served = client.model(timeout=timeout)
        tasks = [task for task in served.schema.tasks if task in schema.outputs]
        # NaN is sent where the server takes it.
        if not tasks or served.schema != schema.picking(tasks).taking_nan(served.schema.nan_columns):
            raise ConfigError(
                f"{target} serves {served.name}, whose schema is not that of {model}; give its own artifact"
            )
        if rows is not None:
            rows = rows.of_tasks([schema.tasks.index(task) for task in tasks])

        def ask(batch: Batch) -> Scores:
            place, lengths = sample_major(batch, schema.num_features)
            weights = None if batch.weights is None else batch.weights[place]
            return client.predict(batch.dense, batch.values[place], lengths, weights=weights, timeout=timeout).scores

        found = compare(served.schema, reference.run, ask, rows, known=_known(artifact))
    _tell(target, served, found, as_json)
    for task, deviation in found.items():
        if (problem := problem_of(deviation, limits_of(max_deviation))) is not None:
            raise ArtifactError(
                f"served, of {task}, {problem}: serve a higher precision, or allow more with --max-deviation"
            )


def _known(artifact: Artifact) -> Vocabularies | None:
    """The ids that a model searches for, of one whose ids are wider than its tables: few others would be among them."""
    if artifact.schema.id_dtype.itemsize < 8 or not artifact.offers("torch"):
        return None
    from narsil.compile.exact import exact_scorer

    exact = exact_scorer(artifact)
    return None if exact is None else exact.known_ids()


def _tell(target: str, served: ModelInfo, found: Mapping[str, Deviation], as_json: bool) -> None:
    if as_json:
        tasks = {task: asdict(deviation) for task, deviation in found.items()}
        click.echo(json.dumps({"model": served.name, "backend": served.backend, "tasks": tasks}))
        return
    rows = max(deviation.rows for deviation in found.values())
    counted = "1 task" if len(found) == 1 else f"{len(found)} tasks"
    click.echo(
        f"{served.name} version {served.version} on {target} ({served.backend} backend), {rows:,} rows, {counted}:"
    )
    for task, one in found.items():
        click.echo(
            f"  {task}: max deviation {one.max_abs:.2e}, mean {one.mean_abs:.1e}, "
            f"rank correlation {one.rank_correlation:.6f}"
        )
        for line in deviation_lines(one):
            click.echo(f"  {task}: {line}")


def sample_major(batch: Batch, features: int) -> tuple[Any, Any]:
    """((N,) positions of ids, (B, T) lengths) with all bags of row 0 first, of a key-major batch."""
    import numpy as np

    from narsil.artifacts.rows import of_bags

    order = np.arange(features * batch.rows).reshape(features, batch.rows).T.ravel()
    return of_bags(batch.lengths, order), batch.lengths[order].reshape(batch.rows, features)
