"""What documents say, read so that tests can hold it against the sources: names in backticks, tables, quoted texts.

Names of the sources are found by parsing Python, and in C++, which nothing here parses, by how this project writes it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON, NATIVE = ROOT / "src" / "narsil", ROOT / "csrc"
PLACES = (ROOT, PYTHON, NATIVE, ROOT / "docs")  # that paths in documents begin at

_CODE = re.compile(r"`([^`]+)`")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|pyi|cpp|hpp|md|toml|proto|json)|(?:[\w.-]+/)+")
_ITEM = re.compile(r"\s*(?:\d+\.|[-*]) ")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without its fenced and indented blocks, which hold commands and bytes rather than names."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?: {4,}.*\n+)+", "", text)


def codes(text: str) -> list[str]:
    """What stands in backticks, joined over line ends."""
    return [re.sub(r"\s+", " ", found) for found in _CODE.findall(text)]


def blocks(text: str) -> Iterator[str]:
    """Table rows, list items with their continuation lines, and paragraphs."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        begins = not line.strip() or line.startswith(("|", "#")) or _ITEM.match(line)
        if begins and block:
            yield "\n".join(block)
            block = []
        if line.strip():
            block.append(line)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def sections(text: str, level: int) -> dict[str, str]:
    """Heading of this level -> what stands below it, up to the next of its level or above."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        heading = re.match(r"(#+) (.*)", line)
        if heading and len(heading[1]) <= level:
            name = heading[2] if len(heading[1]) == level else ""
        elif name:
            found[name] = found.get(name, "") + line + "\n"
    return found


def rows_of(text: str) -> list[list[str]]:
    """The cells of every table row but the headings and the lines below them."""
    lines = text.splitlines()
    rules = {at for at, line in enumerate(lines) if re.fullmatch(r"\|[-:| ]+\|", line)}
    return [
        cells(line) for at, line in enumerate(lines) if line.startswith("|") and at not in rules and at + 1 not in rules
    ]


def is_path(name: str) -> bool:
    return _PATH.fullmatch(name) is not None


def path_of(name: str) -> Path | None:
    """The file or folder that a document means; None where there is none."""
    found = [place / name for place in PLACES if (place / name).exists()]
    return found[0] if found else None


@dataclass
class Names:
    """What a file defines: functions, classes, constants, and ``Class.member``."""

    all: set[str] = field(default_factory=set)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of functions, by the same names

    def has(self, name: str) -> bool:
        """Whether it is defined, alone or as the last part of something longer."""
        wanted = name.replace("::", ".")
        return wanted in self.all or any(known.endswith("." + wanted) for known in self.all)


@cache
def names_of(path: Path) -> Names:
    found = Names()
    if path.suffix in (".py", ".pyi"):
        _python_names(ast.parse(path.read_text(encoding="utf-8")), "", found)
    else:
        _native_names(path.read_text(encoding="utf-8"), found)
    return found


@cache
def source_files() -> list[Path]:
    """Every source file of the package and of the native code, but what earlier versions of Narsil generated."""
    python = [path for path in PYTHON.rglob("*.py*") if path.suffix in (".py", ".pyi") and "forward" not in path.parts]
    native = [path for path in NATIVE.rglob("*") if path.suffix in (".cpp", ".hpp", ".py")]
    return sorted(path for path in python + native if not path.stem.endswith("_pb2"))


def _python_names(node: ast.AST, scope: str, found: Names, *, local: bool = False) -> None:
    """``local``: inside a function, whose variables nobody else can name; what it assigns to self counts."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            found.all.add(scope + child.name)
            _python_names(child, f"{scope}{child.name}.", found)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found.all.add(scope + child.name)
            given = (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs)
            names = tuple(each.arg for each in given if each.arg not in ("self", "cls"))
            found.parameters[scope + child.name] = names
            _python_names(child, f"{scope}{child.name}.", found, local=True)
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                _assigned(target, scope, found, local)
        else:
            _python_names(child, scope, found, local=local)


def _assigned(target: ast.AST, scope: str, found: Names, local: bool) -> None:
    if isinstance(target, ast.Tuple):
        for each in target.elts:
            _assigned(each, scope, found, local)
    elif isinstance(target, ast.Name) and not local:
        found.all.add(scope + target.id)
    elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
        owner = scope.rstrip(".").rpartition(".")[0]  # of the method that assigns it
        found.all.add(f"{owner}.{target.attr}")


def _native_names(text: str, found: Names) -> None:
    """Classes with their members, functions as they are defined, constants: by where clang-format puts them."""
    text = re.sub(r",\s*\n\s+", ", ", re.sub(r"//.*", "", text))
    for match in re.finditer(
        r"^(?:class|struct|enum class|enum) ([\w:]+)[^;{]*\{(?:([^\n]*)\};$|(.*?)^\})", text, re.M | re.S
    ):
        name = match[1].replace("::", ".")
        found.all.add(name)
        for line in re.findall(r"^  (?=\w)(.*)", "  " + (match[2] or match[3]), re.MULTILINE):
            head, bracket, _ = line.partition("(")
            members = re.findall(r"(\w+)$", head) if bracket else re.findall(r"\b([A-Za-z]\w*)\b(?=\s*[=;{,]|$)", line)
            found.all |= {f"{name}.{member}" for member in members}
    for match in re.finditer(r"^(?=[\w:])(?!return|using|namespace)[^\n;=(]*?\b((?:\w+::)*\w+)\(", text, re.MULTILINE):
        found.all.add(match[1].replace("::", "."))
    found.all |= set(re.findall(r"^(?:static )?constexpr [^=]*?\b(\w+) = ", text, re.MULTILINE))
