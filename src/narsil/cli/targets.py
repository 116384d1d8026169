"""What the commands that talk to a running server share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from narsil.artifacts.schema import ModelSchema
from narsil.cli.options import GivenText

PORT = 50051  # that `narsil serve` listens on unless told otherwise


class Target(GivenText):
    """HOST:PORT, or HOST alone; unix:PATH and gRPC's other schemes as they are."""

    name = "HOST[:PORT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """With the port. Raises click.BadParameter."""
        text = super().convert(value, param, ctx).strip()
        if text.startswith("["):  # an IPv6 address
            return text if "]:" in text else f"{text}:{PORT}"
        if text.count(":") > 1 and "/" not in text:  # the same without brackets
            return f"[{text}]:{PORT}"
        return text if ":" in text else f"{text}:{PORT}"


target_option: Callable[[Any], Any] = click.option(
    "--target",
    type=Target(),
    default=f"127.0.0.1:{PORT}",
    show_default=True,
    help=f"Address of the server; without a port, {PORT}.",
)


def refuse_beside(option: str, *others: str) -> None:
    """Raises click.UsageError where one of the others, which have no effect beside this option, was given too."""
    context = click.get_current_context()
    for other in others:
        if context.get_parameter_source(other) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{other} has no effect with --{option}: leave one of them out.")


def schema_for(target: str, path: Path | None, name: str = "", version: str = "") -> ModelSchema:
    """The schema of an artifact, or of what a Narsil server says that it serves by this name and version."""
    if path is not None:
        from narsil.artifacts.artifact import open_artifact

        return open_artifact(path, verify=False).schema
    from narsil.client import Client

    with Client(target) as client:
        return client.model(timeout=10, name=name, version=version).schema
