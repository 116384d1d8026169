"""docs/architecture.md against the sources: whatever it names is there, where it says, and nothing is left out."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from narsil import errors
from narsil.cli import COMMANDS
from narsil.config import ServeSettings
from narsil.errors import RequestError, status_of
from narsil.telemetry.observer import Observer
from tests.documents import (
    NATIVE,
    PYTHON,
    ROOT,
    blocks,
    codes,
    is_path,
    names_of,
    path_of,
    prose,
    read,
    rows_of,
    sections,
    source_files,
)

TEXT = read("docs/architecture.md")
CHAPTERS = sections(TEXT, 2)
ROOMS = {name.strip("`").rstrip("/"): rows_of(text) for name, text in sections(CHAPTERS["Rooms"], 3).items()}

_SYMBOL = re.compile(r"\w+(?:(?:\.|::)~?\w+)*(?:\((?P<arguments>[\w, ]*)\))?")
_PLACED = re.compile(r"`(?P<file>[^`]+\.(?:pyi?|cpp|hpp))`:\s+(?P<symbols>`[^`]+`(?:,\s+`[^`]+`)*)")
# Words in backticks that are no names of the sources: what users write, and where.
_WORDS = frozenset({"auto", "narsil.v1"})


def stems() -> set[str]:
    """Names of rooms and of files, without what they end in."""
    found = {path.stem for path in source_files()} | {path.parent.name for path in source_files()}
    return found | {"__main__"}


@cache
def sources() -> str:
    """All of them, for what is no name in them but some text."""
    return "\n".join(path.read_text(encoding="utf-8") for path in source_files())


@cache
def parameters() -> set[str]:
    """The names of what functions are given."""
    return {name for path in source_files() for given in names_of(path).parameters.values() for name in given}


def is_option(name: str) -> bool:
    setting = name.removeprefix("--").replace("-", "_")
    return setting in ServeSettings.model_fields or f'"{name}"' in sources()


def is_command(words: str) -> bool:
    _, command, *rest = words.split()
    known = command in COMMANDS or is_option(command)
    return known and all(is_option(word) for word in rest if word.startswith("--"))


def is_defined(symbol: str, files: list[Path]) -> bool:
    """Whether one of the files defines it, with these parameters where it is written with some."""
    match = _SYMBOL.fullmatch(symbol)
    assert match is not None
    name = symbol.partition("(")[0]
    for path in files:
        names = names_of(path)
        if not names.has(name):
            continue
        arguments = match["arguments"]
        if not arguments:
            return True
        wanted = tuple(arguments.split(", "))
        known = [given for full, given in names.parameters.items() if full == name or full.endswith("." + name)]
        if wanted in known:
            return True
    return False


def is_target(words: str) -> bool:
    return re.search(rf"^{words.removeprefix('make ')}:", read("Makefile"), re.MULTILINE) is not None


def is_symbol(name: str) -> bool:
    """Of the sources, or the name of a file in an artifact, which they hold as a string."""
    known = name in _WORDS or name in stems() or name in parameters() or is_defined(name, source_files())
    return known or ("." in name and f'"{name}"' in sources())


def is_known(name: str, folder: Path) -> bool:
    """Whether what stands in backticks is there: a file, a command, an option, a make target, a symbol, or a text."""
    kinds: dict[str, Callable[[str], bool]] = {"narsil ": is_command, "--": is_option, "make ": is_target}
    if is_path(name):
        return path_of(name) is not None or (folder / name).exists()
    for beginning, is_one in kinds.items():
        if name.startswith(beginning):
            return is_one(name)
    return is_symbol(name) if _SYMBOL.fullmatch(name) else name in sources()


def named() -> Iterator[tuple[str, Path]]:
    """Everything in backticks, and the folder whose room it stands in."""
    folder = ROOT
    for line in prose(TEXT).split("\n## "):
        for part in re.split(r"^### ", line, flags=re.MULTILINE):
            heading = part.splitlines()[0].strip("`") if part.strip() else ""
            folder = ROOT / heading if heading.startswith(("src/", "csrc/")) else ROOT
            for name in codes(part):
                yield name, folder


def test_whatever_stands_in_backticks_is_there() -> None:
    unknown = sorted({name for name, folder in set(named()) if not is_known(name, folder)})
    assert unknown == [], "docs/architecture.md names what is nowhere in the sources"


def placed() -> list[tuple[str, str]]:
    """(file, symbol) wherever the page writes `file`: `symbol`, `symbol`."""
    return [(match["file"], symbol) for match in _PLACED.finditer(prose(TEXT)) for symbol in codes(match["symbols"])]


def test_every_function_is_in_the_file_that_is_named_with_it() -> None:
    assert [file for file, _ in placed() if path_of(file) is None] == [], "docs/architecture.md names no such files"
    absent = [
        f"{symbol} in {file}" for file, symbol in placed() if not is_defined(symbol, [p for p in [path_of(file)] if p])
    ]
    assert absent == [], "docs/architecture.md says of these that they are in these files"


@pytest.mark.parametrize("chapter", [name for name in CHAPTERS if re.match("The life of|.*step by step", name)])
def test_every_step_says_where_it_is_done(chapter: str) -> None:
    steps = [block for block in blocks(CHAPTERS[chapter]) if re.match(r"\d+\. ", block)]
    assert len(steps) >= 4
    for step in steps:
        assert _PLACED.search(step) or re.search(r"\bas steps? ", step), f"{step}\nnames no file with its functions"


def test_a_page_without_steps_would_be_noticed() -> None:
    assert len(placed()) > 150
    assert sum(bool(re.match(r"\d+\. ", block)) for block in blocks(TEXT)) > 50


def test_every_source_file_has_its_line_and_no_line_is_without_its_file() -> None:
    listed = [
        ROOT / room / name for room, rows in ROOMS.items() for row in rows for name in codes(row[0]) if is_path(name)
    ]
    assert len(listed) == len(set(listed)), "a file has two lines"
    needed = {path for path in source_files() if not _only_a_docstring(path)}
    missing = sorted(str(path.relative_to(ROOT)) for path in needed - set(listed))
    gone = sorted(str(path.relative_to(ROOT)) for path in set(listed) - set(source_files()))
    assert (missing, gone) == ([], []), (
        f"docs/architecture.md, Rooms: add a line for each of {missing}, and take those of {gone} away"
    )


def _only_a_docstring(path: Path) -> bool:
    return path.name == "__init__.py" and len(ast.parse(path.read_text(encoding="utf-8")).body) <= 1


def test_what_a_file_s_line_begins_with_is_defined_in_it() -> None:
    for room, rows in ROOMS.items():
        for files, about, *_ in rows:
            leading = re.match(r"(?:`[^`]+`(?:, )?)+", about)
            for symbol in codes(leading[0]) if leading else ():
                if _SYMBOL.fullmatch(symbol):
                    paths = [ROOT / room / name for name in codes(files)]
                    assert is_defined(symbol, paths), f"docs/architecture.md says that `{symbol}` is in {files}"


def test_the_layers_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    (line,) = (block for block in blocks(CHAPTERS["Rooms"]) if block.startswith("`__main__` →"))
    assert codes(line) == layers


def test_every_error_of_a_request_stands_in_the_table_with_its_code_and_where_it_is_raised() -> None:
    rows = [row for row in rows_of(CHAPTERS["How a request can end"]) if codes(row[1])]
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    wanted = {name for name, kind in kinds.items() if issubclass(kind, RequestError) and kind is not RequestError}
    told = {codes(row[1])[0] for row in rows}
    bases = {base.__name__ for name in wanted for base in kinds[name].__mro__[1:]}
    assert told == {name for name in wanted if name not in bases}
    for name in told:
        mine = [row for row in rows if codes(row[1]) == [name]]
        assert {_CODES[row[2]] for row in mine} == {status_of(kinds[name](""))}
        files = {path_of(code) for row in mine for code in codes(row[3]) if code.endswith(".py")}
        raised = {path for path in source_files() if path.suffix == ".py" and _makes(path, name)}
        # The client makes them of answers, and tools that measure have errors of their own.
        raised = {path for path in raised if path.relative_to(PYTHON).parts[0] not in ("client", "bench", "cli")}
        assert raised - {PYTHON / "errors.py"} <= files, f"{name} is raised in {raised}"
        assert files <= raised | {PYTHON / "errors.py"}, f"{name} is raised in {raised}"


_CODES = {
    "CANCELLED": 1,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "FAILED_PRECONDITION": 9,
    "RESOURCE_EXHAUSTED": 8,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
}


def _makes(path: Path, kind: str) -> bool:
    """Whether code in this file makes an error of this class."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == kind for call in calls)


def test_the_observer_is_told_what_the_table_says() -> None:
    told, counted = re.split(r"^What the plane counts", CHAPTERS["Who watches"], flags=re.MULTILINE)
    methods = {name for name in vars(Observer) if not name.startswith("_")}
    assert {codes(row[0])[0] for row in rows_of(told)} == methods
    counts = set(re.findall(r'"(\w+)"_a', read("csrc/native/bindings.cpp")))
    assert {code for row in rows_of(counted) for code in codes(row[0])} == counts


def test_every_thread_with_a_name_stands_among_the_threads() -> None:
    """Of those that serve; the benchmark's are its own."""
    table = CHAPTERS["Threads, and who owns what"]
    for path in source_files():
        if path.suffix != ".py" or NATIVE in path.parents or (PYTHON / "bench") in path.parents:
            continue
        for name in re.findall(r'(?:Thread|__init__)\([^)]*?\bname=f?"([\w-]+)', path.read_text(encoding="utf-8")):
            assert name in table, f"the thread {name} of {path.name} is not in docs/architecture.md"


@pytest.mark.parametrize("chapter", ["Where things go", "A new backend", "A new wire"])
def test_what_contributors_are_sent_to_is_there(chapter: str) -> None:
    names = codes(sections(read("CONTRIBUTING.md"), 2)[chapter])
    assert [name for name in names if not is_known(name, ROOT)] == [], f"CONTRIBUTING.md, {chapter}"
