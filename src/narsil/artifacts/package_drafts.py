"""Drafts a schema file for an AOTInductor package, of the source that lies in it beside the code.

A package holds no program that could be read and tried: its source tells the kinds and the axes of the inputs, the
tables and how they are looked up. Which input is what, and which feature comes first, is for a person to say. No code
is loaded.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narsil.artifacts.arguments import fill_in, unknown_content
from narsil.artifacts.pt2 import check_layout, keys_of

__all__ = ["draft_package"]

_MAX_SOURCE_BYTES = 64 << 20
_CHECK = re.compile(r"static void check_input_(\d+)\(.*?\) \{(.*?)\n\}", re.DOTALL)
_KIND = re.compile(r"_expected_dtype << \"\(at::k(\w+)\)")
_SIZE = re.compile(r'unmatched dim value at (\d+), "\s*<< "expected: (\d+)')
_AXIS = re.compile(r"(?:dim value|stride value)[a-z ]* at (\d+)")
_CONSTANT = re.compile(
    r"constants_info_\[(\d+)\]\.name = \"(\w+)\";.*?constants_info_\[\1\]\.shape = \{([\d, ]*)\};"
    r".*?constants_info_\[\1\]\.original_fqn = \"([^\"]*)\";",
    re.DOTALL,
)
_BAGS = re.compile(r"_embedding_bag\w*\((\w+), .*?, 0, (\d)L?, 0, (nullptr|&?\w+), ([01]), ")
_SPECIFICATION = re.compile(r'(in|out)_spec_ = R"\((.*?)\)";', re.DOTALL)
_BY_NAME = (("length", "lengths"), ("offset", "offsets"), ("weight", "weights"), ("value", "ids"), ("id", "ids"))


@dataclass(frozen=True)
class _Table:
    name: str
    rows: int
    dim: int
    pooling: str


def draft_package(path: Path) -> dict[str, Any]:
    """The content of a schema file. Raises ArtifactError where the archive is none of torch's."""
    source = _source(path, check_layout(path))
    specifications = {kind: _keys(text) for kind, text in _SPECIFICATION.findall(source)}
    keys = specifications.get("in", ())
    inputs, columns = [], []
    for number, (_, check) in enumerate(_CHECK.findall(source)):
        key = keys[number] if number < len(keys) else ""
        item, width = _input(key or f"input_{number}", check)
        inputs.append(item)
        columns += [width] if item["holds"] == "dense" and width else []
    content = unknown_content(inputs or [{"name": fill_in("of the first input"), "holds": fill_in("what it holds")}])
    if len(columns) == 1:
        content["dense_dim"] = columns[0]
    elif inputs and not any(item["holds"] == "dense" for item in inputs):
        content["dense_dim"] = 0
    if tables := _tables(source):
        content["features"] = [
            {
                "name": fill_in("its name; put the features in the order of the ids, which the package does not tell"),
                "table": table.name,
                "rows": table.rows,
                "dim": table.dim,
                "pooling": table.pooling,
            }
            for table in tables
        ]
    outputs = specifications.get("out", ())
    if outputs:
        alone = len(outputs) == 1 and not outputs[0]
        content["tasks"] = ["default"] if alone else [key or str(at) for at, key in enumerate(outputs)]
    return content


def _source(path: Path, names: list[str]) -> str:
    """The source of what calls the kernels; empty where it is not in the package."""
    found = [name for name in names if name.endswith(".wrapper.cpp")]
    if len(found) != 1:
        return ""
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(found[0]).file_size > _MAX_SOURCE_BYTES:
            return ""
        return archive.read(found[0]).decode("utf-8", "replace")


def _keys(text: str) -> tuple[str, ...]:
    try:
        return keys_of(json.loads(text)[1])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return ()


def _input(name: str, check: str) -> tuple[dict[str, Any], int | None]:
    """(an input, its second axis where that has one size) by what its check says."""
    kind = next(iter(_KIND.findall(check)), "")
    sizes = {int(axis): int(size) for axis, size in _SIZE.findall(check)}
    axes = 1 + max((int(axis) for axis in _AXIS.findall(check)), default=0)
    if kind == "Float" and axes == 2:
        return {"name": name, "holds": "dense"}, sizes.get(1)
    likely = next((holds for part, holds in _BY_NAME if part in name.lower()), "")
    shown = f"{kind or 'unknown'} of {axes} {'axis' if axes == 1 else 'axes'}"
    item = {"name": name, "holds": likely or fill_in(f"ids, weights, lengths or offsets; it is {shown}")}
    if axes == 2:
        layout = "by_row" if 1 in sizes and 0 not in sizes else "by_feature" if 0 in sizes else ""
        item["layout"] = layout or fill_in("by_row or by_feature")
    if kind in ("Int", "Long"):
        item["type"] = "int32" if kind == "Int" else "int64"
    return item, None


def _tables(source: str) -> list[_Table]:
    """The tables in which bags are looked up, in the order in which that is done; else what is named as one."""
    shapes = {
        name: (fqn, [int(size) for size in shape.split(",") if size.strip()])
        for _, name, shape, fqn in _CONSTANT.findall(source)
    }
    matrices = {name: found for name, found in shapes.items() if len(found[1]) == 2}
    bags = {name: "mean" if mode == "1" else "sum" for name, mode, _, _ in _BAGS.findall(source)}
    chosen = {name: pooling for name, pooling in bags.items() if name in matrices}
    chosen = chosen or {name: "sum" for name in matrices if "emb" in name or "table" in name}
    return [
        _Table(short_name(matrices[name][0]), matrices[name][1][0], matrices[name][1][1], pooling)
        for name, pooling in chosen.items()
    ]


def short_name(key: str) -> str:
    """The name of a table, by that of its weight."""
    parts = key.removesuffix(".weight").split(".")
    return "_".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
