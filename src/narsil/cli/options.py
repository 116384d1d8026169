"""The kinds of values that options take and click has not: what cannot be meant is refused before any work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from narsil.config import widths_in

__all__ = ["SECONDS", "SEED", "FiniteRange", "GivenPath", "GivenText", "GivenWidths", "dense_dim_option", "ids_option"]


class FiniteRange(click.FloatRange):
    """A number between bounds; click itself lets NaN pass, and infinity where there is no upper one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number. Raises click.BadParameter."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class GivenPath(click.Path):
    """A path that is not empty: an empty one, as of an unset variable of a shell, would mean the working directory."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Raises click.BadParameter."""
        if value == "":
            self.fail("it is empty: give a path, or . for the working directory.", param, ctx)
        return super().convert(value, param, ctx)


class GivenText(click.types.StringParamType):
    """A text that is not empty."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text. Raises click.BadParameter."""
        text = super().convert(value, param, ctx)
        if not text.strip():
            self.fail("it is empty.", param, ctx)
        return text


class GivenWidths(click.types.StringParamType):
    """Numbers of dense columns: N, or KEY=N,..."""

    name = "N or KEY=N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A number, or a number by key. Raises click.BadParameter."""
        try:
            return widths_in(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


SECONDS = FiniteRange(0, 86_400, min_open=True)
SEED = click.IntRange(0, 2**63 - 1)

ids_option = click.option(
    "--ids",
    type=click.Choice(["auto", "int32", "int64"]),
    default="auto",
    help="What a TorchScript file without a manifest is given as ids, where it would look others up in the other.  "
    "[default: auto, as it says]",
)

dense_dim_option = click.option(
    "--dense-dim",
    type=GivenWidths(),
    help="Number of dense columns of a TorchScript file without a manifest, where the model takes any number of them; "
    "KEY=N,... of a model that has several inputs of them.",
)
