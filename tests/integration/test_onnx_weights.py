"""An ONNX graph whose weights are no finite numbers, or lie in a file of nobody's, is never served."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from narsil.artifacts.artifact import Artifact, open_artifact  # noqa: E402
from narsil.artifacts.onnx_weights import check_graph  # noqa: E402
from narsil.artifacts.schema import Feature, ModelSchema  # noqa: E402
from narsil.backends.registry import load_backend  # noqa: E402
from narsil.errors import ArtifactError  # noqa: E402

SCHEMA = ModelSchema(1, (Feature("user", "t_user", 3, 2), Feature("item", "t_item", 4, 2)))


def external(name: str = "tables", **changes: Any) -> Any:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[7, 2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": "m.data", "offset": 0, "length": 7 * 2 * 4} | changes).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def saved(folder: Path, *initializers: Any, nodes: tuple[Any, ...] = (), tables: Any = None) -> tuple[Path, Path]:
    """A graph of these tensors, and 7 rows of 2 numbers beside it."""
    values = np.zeros((7, 2), "<f4") if tables is None else tables
    (folder / "m.data").write_bytes(values.tobytes())
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=initializers)
    (folder / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return folder / "m.onnx", folder / "m.data"


@pytest.mark.parametrize(
    ("row", "named"), [(0, "row 0 of table t_user"), (2, "row 2 of table t_user"), (3, "row 0 of table t_item")]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_of_a_table_is_named(tmp_path: Path, row: int, named: str, value: float) -> None:
    tables = np.zeros((7, 2), "<f4")
    check_graph(*saved(tmp_path, external(), tables=tables), SCHEMA)
    tables[row, 1] = value
    with pytest.raises(ArtifactError, match=f"{named} is NaN or infinite"):
        check_graph(*saved(tmp_path, external(), tables=tables), SCHEMA)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
def test_a_tensor_of_the_graph_is_named(tmp_path: Path, kind: Any) -> None:
    bias = np.array([0, 1, np.inf], kind)
    with pytest.raises(ArtifactError, match=r"row 2 of last\.bias is NaN or infinite"):
        check_graph(*saved(tmp_path, onnx.numpy_helper.from_array(bias, "last.bias")), SCHEMA)
    check_graph(*saved(tmp_path, onnx.numpy_helper.from_array(bias[:2], "last.bias")), SCHEMA)


def test_branches_are_looked_into_and_constants_may_mask_with_infinity(tmp_path: Path) -> None:
    def branch(value: float, constant: bool) -> Any:
        tensor = onnx.numpy_helper.from_array(np.array([value], np.float32), "inner")
        if not constant:
            return onnx.helper.make_graph([], "b", [], [], initializer=[tensor])
        return onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["inner"], value=tensor)], "b", [], [])

    def check(value: float, constant: bool) -> None:
        node = onnx.helper.make_node("If", ["c"], ["o"], then_branch=branch(value, constant))
        check_graph(*saved(tmp_path, nodes=(node,)), SCHEMA)

    check(1, constant=False)
    check(-np.inf, constant=True)
    with pytest.raises(ArtifactError, match="row 0 of inner is NaN or infinite"):
        check(-np.inf, constant=False)
    with pytest.raises(ArtifactError, match="the constant inner is NaN or infinite"):
        check(np.nan, constant=True)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (external(location="/etc/passwd"), "lies in '/etc/passwd', which the manifest does not list"),
        (external(location="../m.data"), r"lies in '\.\./m\.data'"),
        (external(offset=8), r"would end beyond m\.data"),
        (external(offset=-8), r"would end beyond m\.data"),
        (external(offset="many"), "cannot be loaded"),
    ],
)
def test_tables_lie_in_the_file_that_the_manifest_lists(tmp_path: Path, tensor: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_graph(*saved(tmp_path, tensor), SCHEMA)


def spoil_table(folder: Path) -> None:
    with (folder / "narsil_dlrm_default.onnx.data").open("r+b") as file:
        file.seek((50 + 7 + 11) * 16 * 4)
        file.write(np.float32("nan").tobytes())


def spoil_layer(folder: Path) -> None:
    graph = folder / "narsil_dlrm_default.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    layer = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.name != "tables")
    layer.raw_data = np.full(tuple(layer.dims), np.inf, np.float32).tobytes()
    graph.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(spoil_table, "row 11 of table t_cat_2 is NaN or infinite"), (spoil_layer, "row 0 of constant_.* is NaN")],
)
def test_the_backend_refuses_it(
    small_artifact: Artifact, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_artifact.path, copy)
    assert load_backend(open_artifact(copy), "onnx").name == "onnx"
    spoil(copy)
    with pytest.raises(ArtifactError, match=message):
        load_backend(open_artifact(copy, verify=False), "onnx")
