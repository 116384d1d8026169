"""``narsil models``: what a running server serves, and how that is changed."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from narsil.cli.options import SECONDS, GivenText
from narsil.cli.targets import target_option

_timeout = click.option("--timeout", type=SECONDS, default=600.0, show_default=True, help="Seconds to wait.")
_name = click.argument("name", type=GivenText())


@click.group("models")
def command() -> None:
    """List, load and unload the models of a running server.

    Loading and unloading take a server that was started with --repository and --model-control explicit.
    """


@command.command("list")
@target_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array instead of a table.")
@click.option("--timeout", type=SECONDS, default=10.0, show_default=True, help="Seconds to wait.")
def list_(target: str, as_json: bool, timeout: float) -> None:
    """Every version that is served or should be, and why it is not."""
    from narsil.client import Client

    with Client(target) as client:
        models = client.models(timeout=timeout)
    if as_json:
        click.echo(json.dumps([asdict(model) for model in models]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "version", "state", "reason", box=None)
    for model in models:
        table.add_row(model.name, model.version, model.state, model.reason)
    Console().print(table)


@command.command()
@_name
@target_option
@_timeout
def load(name: str, target: str, timeout: float) -> None:
    """Serve what the repository holds of a model now; versions that its policy does not want go."""
    from narsil.client import Client

    with Client(target) as client:
        client.load(name, timeout=timeout)
        versions = [model.version for model in client.models(timeout=timeout) if model.name == name]
    click.echo(f"{name} is served in version {', '.join(versions)}")


@command.command()
@_name
@target_option
@_timeout
def unload(name: str, target: str, timeout: float) -> None:
    """Serve no version of a model any more. Requests that have come for it are answered."""
    from narsil.client import Client

    with Client(target) as client:
        client.unload(name, timeout=timeout)
    click.echo(f"{name} is no longer served")
