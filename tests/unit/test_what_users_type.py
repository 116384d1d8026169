"""What the documents tell users to type is there: commands and their options, settings and their defaults, Python."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner
from pydantic_core import PydanticUndefined

from narsil.cli import COMMANDS
from narsil.config import ServeSettings
from narsil.packaging.dlrm import DlrmConfig
from tests.documents import codes, prose, read, rows_of, sections
from tests.support import engine_with, grpc_server

PAGES = ("README.md", "CONTRIBUTING.md", "docs/operations.md", "docs/artifacts.md", "docs/protocol.md")
SETTINGS = sections(read("docs/operations.md"), 2)["Settings"]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The click command that `narsil WORDS` calls, and the words behind its name."""
    name, *rest = words
    assert name in COMMANDS, f"there is no command `narsil {name}`"
    command: click.Command = importlib.import_module(f"narsil.cli.{name}").command
    if isinstance(command, click.Group) and rest and rest[0] in command.commands:
        return command.commands[rest[0]], rest[1:]
    return command, rest


def lines(page: str) -> Iterator[list[str]]:
    """The words of each `narsil ..` that the page has, in a block or in backticks."""
    text = read(page)
    blocks = re.findall(r"^ {4,}((?:\w+=\S+ )*narsil .*)$", text, re.MULTILINE)
    spans = [code for code in codes(prose(text)) if re.match(r"narsil \w", code)]
    units = re.findall(r"^ExecStart=\S*/(narsil .*)$", text, re.MULTILINE)
    for line in (*blocks, *spans, *units):
        words = shlex.split(line, comments=True)
        yield words[words.index("narsil") + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_shown_is_there_with_its_options(page: str) -> None:
    for words in lines(page):
        if words[0].startswith("--"):
            continue
        command, rest = command_of(words)
        options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
        unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in options]
        assert unknown == [], f"{page} shows `narsil {' '.join(words)}`, and there is no {unknown[0]}"


def test_the_pages_show_commands() -> None:
    assert sum(1 for page in PAGES for _ in lines(page)) > 40


def test_every_setting_has_its_row_with_its_default() -> None:
    told = {name: row[1] for row in rows_of(SETTINGS) for name in codes(row[0])}
    assert set(told) == set(ServeSettings.model_fields)
    for name, field in ServeSettings.model_fields.items():
        shown = told[name].strip("`")
        default = field.default
        if default is PydanticUndefined:
            assert shown == "(required)"
        elif isinstance(default, bool):
            assert shown == ("on" if default else "off"), name
        elif default is None:
            assert shown == "none", name
        elif isinstance(default, int | float):
            assert float(shown) == default, name
        elif default:
            assert shown == default, name


def test_every_settings_file_that_is_shown_would_be_taken() -> None:
    for page in PAGES:
        for block in re.findall(r"^```toml\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
            ServeSettings(**tomllib.loads(block))


def test_the_readme_s_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    schema = DlrmConfig().schema
    with engine_with(schema=schema) as engine, grpc_server(engine) as address:
        names: dict[str, object] = {}
        for snippet in snippets:
            assert "127.0.0.1:50051" in snippet
            exec(snippet.replace("127.0.0.1:50051", address), names)  # noqa: S102 - it is what users are told to run
        assert engine.statistics().answered == len(snippets) == 2
    assert capsys.readouterr().out.startswith("[")


def test_the_readme_s_rows_are_taken_by_the_demo_model(tmp_path, monkeypatch) -> None:
    first, second = re.findall(r"^    narsil predict (--.*)$", read("README.md"), re.MULTILINE)
    arguments, _, file = first.partition(" > ")
    monkeypatch.chdir(tmp_path)
    predict = importlib.import_module("narsil.cli.predict").command
    with engine_with(schema=DlrmConfig().schema) as engine, grpc_server(engine) as address:
        printed = CliRunner().invoke(predict, ["--target", address, *shlex.split(arguments)])
        assert printed.exit_code == 0, printed.output
        (tmp_path / file).write_text(printed.stdout)
        scored = CliRunner().invoke(predict, ["--target", address, *shlex.split(second)])
    assert scored.exit_code == 0, scored.output
    assert [set(json.loads(line)) for line in scored.stdout.splitlines()] == [{"default"}] * 2
