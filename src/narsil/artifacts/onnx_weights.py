"""Holds the weights of an ONNX graph, and of the file of tables beside it, to being finite numbers.

Receives the paths of an artifact's graph and tables; raises ArtifactError naming the table and the row, or the tensor.
Tables are looked at through a mapping, a piece at a time. ONNX Runtime shows nobody the weights it has loaded, so the
graph is read once more here, with the onnx package.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.finite import bad_weights, first_bad_row
from narsil.artifacts.schema import ModelSchema
from narsil.errors import ArtifactError, ConfigError, first_line

__all__ = ["TABLES", "check_graph"]

TABLES = "tables"  # the initializer that holds all tables, one after the other in the schema's order


def check_graph(graph: Path, data: Path | None, schema: ModelSchema) -> None:
    """Raises ArtifactError where an initializer holds NaN or infinity, a constant NaN (infinity in one may mask), or a
    tensor lies elsewhere than in the graph and ``data``; ConfigError where the onnx package is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise ConfigError(f"the onnx backend needs onnx beside onnxruntime ({error}): install narsil[onnx]") from None
    try:
        model = onnx.load(str(graph), load_external_data=False)
        floating = {
            getattr(onnx.TensorProto, name): onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, name))
            for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
        }
        for tensor, constant in _tensors(model.graph):
            if tensor.data_type not in floating:
                continue
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                values = _mapped(tensor, floating[tensor.data_type], graph, data)
            else:
                values = onnx.numpy_helper.to_array(tensor)
            _check(tensor.name, values, constant, graph, schema)
    except ArtifactError:
        raise
    except Exception as error:  # protobuf's errors, and the onnx package's own for what it cannot decode
        raise ArtifactError(f"{graph} cannot be loaded: {first_line(error)}; package the model again") from None


def _check(name: str, values: NDArray[Any], constant: bool, graph: Path, schema: ModelSchema) -> None:
    if constant:
        if np.isnan(values).any():
            raise ArtifactError(bad_weights(graph.name, f"the constant {name}"))
        return
    bad = first_bad_row(values)
    if bad is None:
        return
    if name == TABLES and len(values) == int(schema.rows.sum()):
        ends = schema.rows.cumsum()
        table = int(np.searchsorted(ends, bad, side="right"))
        bad -= int(ends[table] - schema.rows[table])
        raise ArtifactError(bad_weights(graph.name, f"row {bad} of table {schema.features[table].table}"))
    raise ArtifactError(bad_weights(graph.name, f"row {bad} of {name}"))


def _tensors(graph: Any) -> Iterator[tuple[Any, bool]]:
    """Every tensor of a graph and of the graphs inside it, and whether it is a node's constant."""
    yield from ((tensor, False) for tensor in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ((tensor, True) for tensor in (attribute.t, *attribute.tensors))
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _mapped(tensor: Any, kind: np.dtype[Any], graph: Path, data: Path | None) -> NDArray[Any]:
    """A tensor that lies in the file beside the graph. Raises ArtifactError where it claims to lie elsewhere."""
    described = {entry.key: entry.value for entry in tensor.external_data}
    if data is None or described.get("location") != data.name:
        raise ArtifactError(
            f"{graph}: {tensor.name[:64]} lies in {described.get('location', 'no file')[:64]!r}, which the manifest "
            "does not list for it; package the model again"
        )
    start, count = int(described.get("offset", 0)), int(np.prod(list(tensor.dims), dtype=object))
    if start < 0 or count < 0 or start + count * kind.itemsize > data.stat().st_size:
        raise ArtifactError(f"{graph}: {tensor.name[:64]} would end beyond {data.name}; package the model again")
    if count == 0:
        return np.zeros(tuple(tensor.dims), kind)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    with data.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), start + count * kind.itemsize - page, access=mmap.ACCESS_READ, offset=page)
    return np.frombuffer(mapping, kind, count, start - page).reshape(tuple(tensor.dims))
