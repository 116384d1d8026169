"""``narsil inspect``: prints the requests that an artifact expects, and the state of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from narsil.artifacts.arguments import unfilled
from narsil.artifacts.artifact import Artifact, model_file, open_artifact
from narsil.artifacts.schema import ModelSchema
from narsil.cli.libraries import check_torch
from narsil.cli.options import GivenPath, dense_dim_option, ids_option
from narsil.engine.missing import shown
from narsil.errors import ArtifactError, ConfigError

__all__ = ["command", "quantization_of"]

_SHOWN_FEATURES = 40


@click.command()
@click.argument("path", type=GivenPath())
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--no-verify", is_flag=True, help="Skip reading every file for its checksum.")
@click.option(
    "--write-schema",
    is_flag=True,
    help="Draft NAME.schema.json beside the exported program, the AOTInductor package or the TorchScript of several "
    "tensors at PATH. What nothing tells is marked FILL IN; a file with such marks is refused.",
)
@click.option("--overwrite", is_flag=True, help="With --write-schema: replace a schema file that is there.")
@dense_dim_option
@ids_option
def command(
    path: Path,
    as_json: bool,
    no_verify: bool,
    write_schema: bool,
    overwrite: bool,
    dense_dim: int | dict[str, int] | None,
    ids: str,
) -> None:
    """Print the schema that the artifact at PATH expects, and check its files. Exits with 1 where one is not whole."""
    if write_schema:
        _write_schema(path, overwrite=overwrite)
        return
    if overwrite:
        raise ConfigError("--overwrite means something beside --write-schema alone; leave it out")
    artifact = open_artifact(path, verify=not no_verify, dense_dim=dense_dim, ids="" if ids == "auto" else ids)
    described = _describe(artifact, verified=not no_verify)
    if as_json:
        click.echo(json.dumps(described, indent=1))
    else:
        _print(artifact, described)
    if artifact.damage:
        raise ArtifactError("; ".join(artifact.damage.values()))


def _write_schema(path: Path, *, overwrite: bool) -> None:
    """Drafts the schema file of the model at a path, and tells what is left to fill in."""
    check_torch("drafting a schema file")
    from narsil.artifacts.drafting import draft

    model = model_file(path)
    file = model.parent / f"{model.stem}.schema.json"
    if file.exists() and not overwrite:
        raise ConfigError(f"{file} is there already; --overwrite replaces it")
    content = draft(model)
    text = json.dumps(content, indent=1) + "\n"
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"{file} cannot be written: {error.strerror}; give the model in a folder of yours"
        ) from None
    left = unfilled(content)
    click.echo(f"{file}: {len(content['features'])} features, {len(content['inputs'])} inputs")
    for where, what in left.items():
        click.echo(f"  fill in {where}: {what}")
    if not left:
        click.echo("  names of features are those of inputs and tables: change them to what clients are to send")
    click.echo(f"Next: {'fill it in, then ' if left else ''}narsil inspect {model}")


def _describe(artifact: Artifact, verified: bool) -> dict[str, Any]:
    manifest = artifact.manifest or {}
    files = [
        {
            "role": role,
            "file": entry["file"],
            "bytes": entry["bytes"],
            "checksum": _state(artifact, role, verified),
        }
        for role, entry in manifest.get("files", {}).items()
    ]
    if not files and artifact.torchscript is not None:
        size = artifact.torchscript.stat().st_size
        files = [{"role": "torchscript", "file": artifact.torchscript.name, "bytes": size, "checksum": "none known"}]
    return {
        "name": artifact.name,
        "version": artifact.version,
        "path": str(artifact.path),
        "device": artifact.device,
        "schema": artifact.schema.to_dict(),
        "files": files,
        "architecture": manifest.get("architecture"),
        "quantization": manifest.get("quantization"),
        "versions": manifest.get("versions"),
    }


def quantization_of(artifact: Artifact) -> str | None:
    """What INT8 tables do to the scores, as the manifest says; None where it does not, or not in numbers."""
    section = (artifact.manifest or {}).get("quantization")
    keys = ("rows", "max_abs", "mean_abs", "max_abs_one_id")
    values = [section.get(key) for key in keys] if isinstance(section, Mapping) else [None]
    if not all(type(value) in (int, float) for value in values):
        return None
    rows, most, mean, one_id = values
    return (
        f"INT8 tables move scores by up to {one_id:.1e} with one id a bag, {most:.1e} with up to 32 "
        f"(mean {mean:.1e}, over {rows:,} random rows)"
    )


def _state(artifact: Artifact, role: str, verified: bool) -> str:
    """Of a listed file; those of other backends than the one whose file was named are not looked at."""
    if role in artifact.damage:
        return "damaged"
    return "ok" if verified and getattr(artifact, role) is not None else "not checked"


def _outputs(schema: ModelSchema) -> list[str]:
    """The tasks, and how many numbers a row has where there are several."""
    return [task if width == 1 else f"{task} ({width} a row)" for task, width in schema.outputs.items()]


def _print(artifact: Artifact, described: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    schema = artifact.schema
    console = Console(markup=False)
    console.print(f"{artifact.name} version {artifact.version} for {artifact.device}", highlight=False)
    matrices = schema.matrices or (("float_features", schema.dense_dim),)
    columns = ", ".join(f"{key} (B, {width})" for key, width in matrices)
    console.print(
        f"{columns} float32; {schema.num_features} sparse features, key-major, in this "
        f"order; ids {schema.id_dtype}; scores: {', '.join(_outputs(schema))}",
        highlight=False,
    )
    if schema.nan_columns:
        console.print(
            f"served with --allow-nan it takes NaN, for a missing number, in columns {shown(schema.nan_columns)}",
            highlight=False,
        )
    grouped = any(feature.group for feature in schema.features)
    features = Table("#", "feature", "table", "valid ids", "dim", "pooling", *(("group",) if grouped else ()))
    for position, feature in enumerate(schema.features[:_SHOWN_FEATURES]):
        ids = f"{feature.least:,} .. {feature.rows - 1:,}"
        group = (feature.group + (", weighted" if feature.weighted else ""),) if grouped else ()
        features.add_row(str(position), feature.name, feature.table, ids, str(feature.dim), feature.pooling, *group)
    console.print(features)
    if schema.num_features > _SHOWN_FEATURES:
        console.print(f".. and {schema.num_features - _SHOWN_FEATURES} more; --json prints all")
    files = Table("file", "role", "MB", "checksum")
    for entry in described["files"]:
        files.add_row(entry["file"], entry["role"], f"{entry['bytes'] / 1e6:,.1f}", entry["checksum"])
    console.print(files)
    if quantization := quantization_of(artifact):
        console.print(quantization, highlight=False)
    if described["versions"]:
        known = (f"{name} {version}" for name, version in described["versions"].items() if version)
        console.print(f"packaged by {', '.join(known)}", highlight=False)
