"""The command line: ``narsil package | compile | inspect | serve | predict | verify | bench``.

Each command lives in a module of its own, imported only when it is called, so that ``narsil --help`` needs neither
torch nor onnxruntime.
"""

from __future__ import annotations

import importlib
import sys

import click

from narsil import __version__
from narsil.errors import NarsilError

# name -> one line for `narsil --help`; narsil.cli.NAME holds the click command `command`.
COMMANDS = {
    "package": "Build a servable artifact from options or trained weights.",
    "compile": "Compile an artifact for this machine's processor.",
    "inspect": "Print the schema that an artifact expects.",
    "serve": "Serve an artifact over gRPC.",
    "predict": "Send rows to a running server and print their scores.",
    "verify": "Hold a running server's scores against the artifact's own.",
    "bench": "Measure a running server: throughput, latency, CPU and errors.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"narsil.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="narsil")
def cli() -> None:
    """Narsil serves recommendation models: continuous batching for TorchRec's artifacts."""


def main() -> None:
    """Entry point. Errors that Narsil raises on purpose become one line and exit status 1."""
    try:
        cli(prog_name="narsil")
    except NarsilError as error:
        click.echo(f"narsil: {error}", err=True)
        sys.exit(1)
