"""Schema files: what they say of a model's arguments, and what in them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from narsil.artifacts.arguments import Argument, arguments_of, read_schema_file, schema_file_of
from narsil.errors import ArtifactError


def content(**changes: Any) -> dict[str, Any]:
    plain = {
        "format": "narsil.schema/1",
        "dense_dim": 4,
        "features": [
            {"name": "a", "table": "t_a", "rows": 5, "dim": 2},
            {"name": "b", "table": "t_b", "rows": 6, "dim": 2},
        ],
        "tasks": ["default"],
        "inputs": [
            {"name": "x", "holds": "dense"},
            {"name": "ids", "holds": "ids", "type": "int32"},
            {"name": "of_b", "holds": "offsets", "features": ["b"], "last": True},
            {"name": "of_a", "holds": "lengths", "features": ["a"], "layout": "by_feature"},
        ],
    }
    return {key: value for key, value in {**plain, **changes}.items() if value is not None}


def written(folder: Path, data: Any) -> Path:
    file = folder / "model.schema.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def inputs(**change: Any) -> list[dict[str, Any]]:
    """The inputs, the ids' one with a change."""
    every = content()["inputs"]
    every[1] = {**every[1], **change}
    return list(every)


def test_what_a_file_says(tmp_path: Path) -> None:
    found = read_schema_file(written(tmp_path, content()))
    assert found.schema.dense_dim == 4
    assert found.inputs == (
        Argument("x", "dense", (0, 1)),
        Argument("ids", "ids", (0, 1), "flat", wide=False),
        Argument("of_b", "offsets", (1,), "flat", wide=True, last=True),
        Argument("of_a", "lengths", (0,), "by_feature"),
    )


def test_features_without_lengths_have_one_id_a_row(tmp_path: Path) -> None:
    found = read_schema_file(written(tmp_path, content(inputs=content()["inputs"][:3])))
    assert [feature.single for feature in found.schema.features] == [True, False]


def test_a_manifest_lists_inputs_as_a_file_does(tmp_path: Path) -> None:
    found = read_schema_file(written(tmp_path, content()))
    assert arguments_of(tmp_path, found.schema, found.to_list()) == found


def test_the_models_own_file_comes_before_the_folders(tmp_path: Path) -> None:
    model = tmp_path / "model.pt2"
    assert schema_file_of(model) is None
    (tmp_path / "schema.json").touch()
    assert schema_file_of(model) == tmp_path / "schema.json"
    (tmp_path / "model.schema.json").touch()
    assert schema_file_of(model) == tmp_path / "model.schema.json"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is no schema file"),
        (content(format="narsil.schema/2"), "is no schema file"),
        (content(tasks=None), "not 'tasks' or without it"),
        (content(more=1), "not 'more' or without it"),
        (content(dense_dim=-1), "dense_dim must be an integer"),
        (content(features=7), "the schema is damaged"),
        (content(features=[{**content()["features"][0], "least": -1}]), "begin at 0; leave least out"),
        (content(inputs=[]), "inputs must be a list"),
        (content(inputs={}), "inputs must be a list"),
        (content(inputs=["x"]), "an input has name and holds"),
        (content(inputs=inputs(other=1)), "an input has name and holds"),
        (content(inputs=inputs(name="")), "is no printable text"),
        (content(inputs=inputs(name=["x"])), "is no printable text"),
        (content(inputs=inputs(name="x")), "two inputs share one name"),
        (content(inputs=inputs(holds="embeddings")), "holds 'embeddings'; it must be one of"),
        (content(inputs=inputs(holds=["ids"])), "it must be one of"),
        (content(inputs=inputs(layout="by_feature")), "ids .*lengths or offsets beside them; leave these out"),
        (content(inputs=inputs(type="int8")), "type is int32 or int64"),
        (content(inputs=inputs(last=1)), "last is true or false"),
        (content(inputs=inputs(features=[])), "must be a list of their names"),
        (content(inputs=inputs(features=["a", "c"])), "has the feature 'c' twice, or it is none"),
        (content(inputs=inputs(features=["a", "a"])), "twice, or it is none"),
        (content(inputs=inputs(features=["a"])), "the ids of feature b are in 0 inputs where one is expected"),
        (content(inputs=inputs(layout="by_row")), "of feature a are laid out by_row, one a row, and have lengths"),
        (content(inputs=inputs(layout="rows")), "ids are flat or list or by_row or by_feature"),
        (
            content(inputs=[*content()["inputs"], {"name": "more", "holds": "lengths", "features": ["b"]}]),
            "the lengths or offsets of feature b are in 2 inputs",
        ),
        (
            content(inputs=[*content()["inputs"][:2], {"name": "w", "holds": "weights", "features": ["a"]}]),
            "feature a has weights, and neither lengths nor offsets",
        ),
        (content(inputs=content()["inputs"][1:]), "4 dense columns has one input that holds them"),
        (content(inputs=[*content()["inputs"], {"name": "w", "holds": "weights"}]), "that are weighted .* differ"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: Any, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        read_schema_file(written(tmp_path, data))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    with file.open("wb") as large:
        large.truncate((16 << 20) + 1)
    with pytest.raises(ArtifactError, match="a schema file has at most"):
        read_schema_file(file)
