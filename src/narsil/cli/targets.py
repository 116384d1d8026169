"""What the commands that talk to a running server share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from narsil.artifacts.schema import ModelSchema
from narsil.cli.options import GivenText

target_option: Callable[[Any], Any] = click.option(
    "--target", type=GivenText(), default="127.0.0.1:50051", show_default=True, help="HOST:PORT of the server."
)


def refuse_beside(option: str, *others: str) -> None:
    """Raises click.UsageError where one of the others, which have no effect beside this option, was given too."""
    context = click.get_current_context()
    for other in others:
        if context.get_parameter_source(other) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{other} has no effect with --{option}: leave one of them out.")


def schema_for(target: str, path: Path | None) -> ModelSchema:
    """The schema of an artifact, or of what a Narsil server says that it serves."""
    if path is not None:
        from narsil.artifacts.artifact import open_artifact

        return open_artifact(path, verify=False).schema
    from narsil.client import Client

    with Client(target) as client:
        return client.model(timeout=10).schema
