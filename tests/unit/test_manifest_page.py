"""docs/artifacts.md has every key of a manifest, and no other: the page is held against the classes that write them."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from narsil.artifacts import artifact
from narsil.artifacts.compiled_info import CompiledInfo, Deviation
from narsil.artifacts.packed import LayerShape
from narsil.artifacts.schema import Feature, ModelSchema
from tests.documents import codes, read, rows_of, sections

PAGE = read("docs/artifacts.md")
MANIFEST, FOLDER = sections(PAGE, 2)["manifest.json"], sections(PAGE, 2)["A compiled folder"]
JUDGED = sections(PAGE, 3)["How a compiled model is judged"]


def keys_of(text: str) -> set[str]:
    """The keys in the first column of a text's tables; those of roles and files are none."""
    return {key for row in rows_of(text) for key in codes(row[0]) if re.fullmatch(r"[a-z_.]+", key)}


def names(kind: type) -> set[str]:
    return {each.name for each in fields(kind)}


def row_of(text: str, key: str) -> str:
    (row,) = [row for row in rows_of(text) if key in codes(row[0])]
    return row[1]


def test_every_key_of_a_manifest_has_its_row() -> None:
    schema = {f"schema.{name}" for name in names(ModelSchema)}
    written = artifact._KEYS - {"schema"} | {"architecture", "quantization", "versions"} | schema
    assert keys_of(MANIFEST.partition("| Role |")[0]) == written


def test_every_key_of_a_compiled_section_has_its_row() -> None:
    assert keys_of(FOLDER.partition("### ")[0]) == names(CompiledInfo)


def test_every_figure_of_a_deviation_has_its_row() -> None:
    assert keys_of(JUDGED) - {"deviation"} == names(Deviation)


@pytest.mark.parametrize(
    ("text", "key", "kind"), [(MANIFEST, "schema.features", Feature), (FOLDER, "layers", LayerShape)]
)
def test_what_each_of_a_list_holds_is_told(text: str, key: str, kind: type) -> None:
    assert names(kind) <= set(codes(row_of(text, key)))
