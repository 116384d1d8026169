"""What the commands that talk to a running server share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from narsil.artifacts.schema import ModelSchema

target_option: Callable[[Any], Any] = click.option(
    "--target", default="127.0.0.1:50051", show_default=True, help="HOST:PORT of the server."
)


def schema_for(target: str, path: Path | None) -> ModelSchema:
    """The schema of an artifact, or of what a Narsil server says that it serves."""
    if path is not None:
        from narsil.artifacts.artifact import open_artifact

        return open_artifact(path, verify=False).schema
    from narsil.client import Client

    with Client(target) as client:
        return client.model(timeout=10).schema
