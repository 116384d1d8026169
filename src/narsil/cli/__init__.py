"""The command line: ``narsil package | compile | inspect | serve | predict | verify | models | bench``.

Each command lives in a module of its own, imported only when it is called, so that ``narsil --help`` needs neither
torch nor onnxruntime.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import click

from narsil import __version__
from narsil.cli.failures import explain
from narsil.process import end_by, fill_standard_files, raise_on_signals, writing

# name -> one line for `narsil --help`; narsil.cli.NAME holds the click command `command`.
COMMANDS = {
    "package": "Build a servable artifact from options or trained weights.",
    "compile": "Compile an artifact for this machine's processor.",
    "inspect": "Print the schema that an artifact expects.",
    "serve": "Serve an artifact over gRPC.",
    "predict": "Send rows to a running server and print their scores.",
    "verify": "Hold a running server's scores against the artifact's own.",
    "models": "List, load and unload the models of a running server.",
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


@dataclass
class _Session:
    """What holds for whichever command is called."""

    debug: bool = False


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if isinstance(ctx.obj, _Session):
        ctx.obj.debug = value


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="narsil")
@click.option(
    "--debug",
    is_flag=True,
    is_eager=True,  # before the command's module is imported, which may fail
    expose_value=False,
    callback=_set_debug,
    envvar="NARSIL_DEBUG",
    help="Show the traceback of an error.  [env: NARSIL_DEBUG]",
)
def cli() -> None:
    """Narsil serves recommendation models: continuous batching for TorchRec's artifacts."""


def main() -> None:
    """Entry point. Whatever a command raises becomes one sentence and an exit status: see failures."""
    if "_NARSIL_COMPLETE" in os.environ:
        cli.main(prog_name="narsil")  # completes a shell's line, and exits
    fill_standard_files()
    raise_on_signals()
    session = _Session()
    status: Any
    try:
        status = _run(session)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except BaseException as error:
        status = _fail(error, session.debug)
    sys.exit(status)


def _run(session: _Session) -> Any:
    """The command's exit status, once all that it printed has been written."""
    try:
        with cli.make_context("narsil", sys.argv[1:], obj=session) as context:
            status = cli.invoke(context)
    except click.exceptions.Exit as leaving:
        status = leaving.exit_code
    except SystemExit as leaving:
        status = leaving.code
    except click.Abort as error:  # somebody was asked, and pressed Ctrl-C or Ctrl-D
        raise KeyboardInterrupt from error
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


def _fail(error: BaseException, debug: bool) -> int:
    """Tells of a failure, and ends the process where a signal is the reason; returns the exit status otherwise."""
    failure = explain(error)
    with writing(1):
        if sys.stdout is not None:
            sys.stdout.flush()
    with writing(2):
        if debug and failure.signal is None:
            traceback.print_exception(error)
        if failure.sentence:
            click.echo(f"narsil: {failure.sentence}", err=True)
    if failure.signal is not None:
        end_by(failure.signal)
    return failure.status
