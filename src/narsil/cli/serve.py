"""``narsil serve``: its options are the fields of ServeSettings."""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from narsil.cli.options import GivenPath
from narsil.config import ENV_PREFIX, ServeSettings, load_settings
from narsil.process import end_on_signals, pass_over_hangups


def _option(name: str, field: FieldInfo) -> click.Option:
    """A settings field as a command-line option. It has no default of its own, so that what is not given is not set."""
    flag = "--" + name.replace("_", "-")
    kind: Any = str
    if get_origin(field.annotation) is Literal:
        kind = click.Choice(get_args(field.annotation))
    elif field.annotation in (int, float, bool):
        kind = field.annotation
    elif set(get_args(field.annotation)) == {int, NoneType}:
        kind = int
    elif field.annotation is Path or Path in get_args(field.annotation):
        kind = GivenPath()
    text = field.description or ""
    if field.default not in (PydanticUndefined, None, "", ()):
        text += f"  [default: {field.default}]"
    declaration = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    return click.Option([declaration, name], type=kind, default=None, help=text)


_OPTIONS = [_option(name, field) for name, field in ServeSettings.model_fields.items()]


def _serve(config: Path | None, print_config: bool, **given: Any) -> None:
    end_on_signals()
    pass_over_hangups()
    settings = load_settings({name: value for name, value in given.items() if value is not None}, config)
    if print_config:
        click.echo(settings.to_toml(), nl=False)
        return
    from narsil.server import run

    sys.exit(run(settings))


command = click.Command(
    "serve",
    callback=_serve,
    params=[
        *_OPTIONS,
        click.Option(
            ["--config"],
            type=GivenPath(),
            envvar=f"{ENV_PREFIX}CONFIG",
            help=f"TOML file with any of these settings.  [env: {ENV_PREFIX}CONFIG]",
        ),
        click.Option(["--print-config"], is_flag=True, help="Print the effective settings as TOML and exit."),
    ],
    help=f"""Serve an artifact over gRPC until SIGTERM.

Speaks TorchRec's predictor.Predictor and narsil.v1.Inference, with health and reflection. Every option can also be set
in the environment ({ENV_PREFIX}BATCH_SIZE=8) or in a TOML file (batch_size = 8); the command line wins.""",
)
