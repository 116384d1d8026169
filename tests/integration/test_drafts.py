"""Drafted schema files: what a model's graph tells is enough to serve it; what nothing tells is marked, and refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.drafting import draft
from narsil.backends.registry import load_backend
from narsil.cli import cli
from narsil.errors import ArtifactError
from tests.integration import test_exports as exports
from tests.integration import test_layouts as layouts


def inspected(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)])


def told(*arguments: Any) -> str:
    """What it says, and what it raises."""
    result = inspected(*arguments)
    return f"{result.output} {result.exception}"


def drafted(file: Path) -> dict[str, Any]:
    schema = file.with_suffix(".schema.json")
    schema.unlink()
    result = inspected(file, "--write-schema")
    assert result.exit_code == 0, result.output
    return dict(json.loads(schema.read_text()))


@pytest.mark.parametrize("make", [exports.flat, exports.named, exports.exported_dlrm, exports.scripted_dlrm])
def test_a_draft_of_bags_serves(tmp_path: Path, make: Any) -> None:
    file, direct = make(tmp_path)
    by_hand = json.loads(file.with_suffix(".schema.json").read_text())
    content = drafted(file)
    assert [item["rows"] for item in content["features"]] == [50, 60, 70]
    assert content["dense_dim"] == 4
    assert content["tasks"] == by_hand["tasks"]
    assert [item["holds"] for item in content["inputs"]] == [item["holds"] for item in by_hand["inputs"]]
    backend = load_backend(open_artifact(file))
    batch = exports.batch_of(33)
    with torch.inference_mode():
        assert np.array_equal(backend.run(batch)[content["tasks"][0]], direct(batch).numpy())


KNOWN = [form for form in layouts.FORMS if form != (layouts.OneTable, False)]


@pytest.mark.parametrize(("kind", "exported"), KNOWN)
def test_a_draft_of_any_layout_serves(tmp_path: Path, kind: type[nn.Module], exported: bool) -> None:
    file, model = layouts.written(kind, tmp_path, exported=exported)
    content = drafted(file)
    assert [item.get("layout") for item in content["inputs"]] == [item.get("layout") for item in layouts.INPUTS[kind]]
    assert [item.get("last") for item in content["inputs"]] == [item.get("last") for item in layouts.INPUTS[kind]]
    backend = load_backend(open_artifact(file))
    batch = layouts.batch_of(kind, 33)
    with torch.inference_mode():
        wanted = model(*layouts.arguments_of(kind, batch)).numpy()
    np.testing.assert_allclose(backend.run(batch)["default"], wanted, rtol=1e-6, atol=1e-6)


def test_what_nothing_tells_is_marked_and_refused(tmp_path: Path) -> None:
    file, _ = layouts.written(layouts.OneTable, tmp_path, exported=False)
    content = drafted(file)
    assert content["features"][1]["name"].startswith("FILL IN: the other features: the model runs with 1")
    with pytest.raises(ArtifactError, match=r"features\[1\]\.name is still to be filled in: the other features"):
        open_artifact(file)


class Opaque(nn.Module):
    """With no lookup that is known."""

    def forward(self, dense: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return dense.sum(1) + table.sum(1)


def test_inputs_that_are_not_understood_are_marked(tmp_path: Path) -> None:
    file = tmp_path / "opaque.pt"
    torch.jit.script(Opaque()).save(str(file))
    result = inspected(file, "--write-schema")
    assert result.exit_code == 0
    assert "fill in inputs[1].holds: dense, ids, weights, lengths or offsets (it looks like dense)" in result.output
    assert "still to be filled in" in told(file)


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    file, _ = layouts.written(layouts.ByRow, tmp_path, exported=False)
    schema = file.with_suffix(".schema.json")
    schema.write_text("mine")
    assert "is there already; --overwrite replaces it" in told(file, "--write-schema")
    assert schema.read_text() == "mine"
    assert inspected(tmp_path, "--write-schema", "--overwrite").exit_code == 0
    assert json.loads(schema.read_text())["dense_dim"] == 4
    assert "--overwrite means something beside --write-schema" in told(file, "--overwrite")


def test_what_needs_no_schema_file_is_told(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return inputs["x"]

    file = tmp_path / "plain.pt"
    torch.jit.script(Plain()).save(str(file))
    assert "takes a dict of tensors and needs no schema file" in told(file, "--write-schema")
    (tmp_path / "manifest.json").write_text("{}")
    assert "needs no schema file" in told(file, "--write-schema")


CHECK = """
AOTI_NOINLINE static void check_input_{number}(
    AtenTensorHandle* input_handles
) {{
        << "expected: " << arg_expected_dtype << "(at::k{kind}), "
{axes}
}}
"""
SIZED = """        ss << "input_handles[0]: unmatched dim value at {axis}, "
           << "expected: {size}, " << "but got: "
"""
FREE = """        ss << "input_handles[0]: dim value is too small at {axis}, "
"""


def source(inputs: list[tuple[str, list[int | None]]], keys: str, tables: str) -> str:
    """What AOTInductor writes of a model's inputs and weights, as far as it is read."""
    checks = ""
    for number, (kind, sizes) in enumerate(inputs):
        parts = [(FREE if size is None else SIZED).format(axis=axis, size=size) for axis, size in enumerate(sizes)]
        checks += CHECK.format(number=number, kind=kind, axes="".join(parts))
    leaf = '{"type": null, "context": null, "children_spec": []}'
    leaves = ", ".join([leaf] * len(inputs))
    taken = f'[1, {{"type": "builtins.dict", "context": {json.dumps(keys)}, "children_spec": [{leaves}]}}]'
    return checks + tables + f'in_spec_ = R"({taken})";\n out_spec_ = R"([1, {leaf}])";'


def test_a_draft_of_a_package_loads_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda path: pytest.fail("its code was loaded"))
    tables = """
    constants_info_[0].name = "emb_a";
    constants_info_[0].shape = {50, 8};
    constants_info_[0].original_fqn = "emb.a.weight";
    constants_info_[1].name = "over";
    constants_info_[1].shape = {8};
    constants_info_[1].original_fqn = "over.bias";
    aoti_torch_cpu__embedding_bag(emb_a, arg6_1, buf25, 0, 1L, 0, nullptr, 1, -1L, &buf27_handle)
    """
    inputs: list[tuple[str, list[int | None]]] = [("Float", [None, 4]), ("Int", [None]), ("Long", [3, None])]
    text = source(inputs, '["dense", "values", "x"]', tables)
    file = tmp_path / "model.pt2"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("p/archive_format", "pt2")
        archive.writestr("p/data/aotinductor/model/x.wrapper.cpp", text)
        archive.writestr("p/data/aotinductor/model/x.wrapper.so", b"")
    content = draft(file)
    assert content["dense_dim"] == 4
    assert content["tasks"] == ["default"]
    assert [(item["table"], item["rows"], item["dim"], item["pooling"]) for item in content["features"]] == [
        ("a", 50, 8, "mean")
    ]
    told = "FILL IN: ids, weights, lengths or offsets; it is Long of 2 axes"
    assert content["inputs"] == [
        {"name": "dense", "holds": "dense"},
        {"name": "values", "holds": "ids", "type": "int32"},
        {"name": "x", "holds": told, "layout": "by_feature", "type": "int64"},
    ]


def test_a_draft_of_a_real_package(tmp_path: Path) -> None:
    packages = pytest.importorskip("tests.integration.test_packages")
    model = layouts.EachOne().eval()
    given = layouts.arguments_of(layouts.EachOne, layouts.batch_of(layouts.EachOne, 6))
    file = packages.packaged(model, given, layouts.SIZES[layouts.EachOne], tmp_path / "each.pt2")
    content = draft(file)
    assert [item["rows"] for item in content["features"]] == [50, 60, 70]
    assert [item["holds"][:7] for item in content["inputs"]] == ["dense", "FILL IN", "FILL IN", "FILL IN"]
    for item, name in zip(content["features"], "abc", strict=True):
        item["name"] = name
    for item, name in zip(content["inputs"][1:], "abc", strict=True):
        item |= {"holds": "ids", "features": [name]}
    file.with_suffix(".schema.json").write_text(json.dumps(content))
    backend = load_backend(open_artifact(file))
    for rows in (1, 5):
        batch = layouts.batch_of(layouts.EachOne, rows)
        with torch.inference_mode():
            wanted = model(*layouts.arguments_of(layouts.EachOne, batch)).numpy()
        np.testing.assert_allclose(backend.run(batch)["default"], wanted, rtol=2e-6, atol=1e-6)
