"""Writes a DLRM as an ONNX graph, without torch.

Receives a DlrmConfig and its FP32 weights; writes narsil_dlrm_default.onnx and, beside it, the tables as external
data, page-aligned so that ONNX Runtime maps the file and every process shares the pages. The inputs and the output
are those of model_default.pt.

The graph has two ways to the embeddings. Where every bag holds one id, a Gather of the ids in sample-major
order gives (B, T, dim) at once. Else each id finds its bag by counting the bags that ended before it, and its row
is added there. Ids are transposed, never embeddings: they are dim times smaller.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from narsil.artifacts import artifact as artifacts
from narsil.artifacts.onnx_weights import TABLES
from narsil.packaging.dlrm import DlrmConfig, DlrmWeights, check_weights, table_key

__all__ = ["export_onnx"]

OPSET = 18  # ScatterND and ScatterElements with reduction, ReduceMax with axes as an input
IR_VERSION = 10
_PAGE = 1 << 16  # the largest page or allocation granularity that ONNX Runtime's mapping meets


def export_onnx(
    config: DlrmConfig, weights: DlrmWeights, folder: Path, report: Callable[[int, int], None]
) -> dict[str, Path]:
    """Writes the graph and its tables into the folder. Returns role -> path, as the manifest lists them."""
    check_weights(config, weights)
    graph_path, data_path = folder / artifacts.ONNX_FILE, folder / artifacts.ONNX_DATA_FILE
    _write_tables(config, weights, data_path, report)
    graph = _dlrm(config, weights, data_path)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="narsil"
    )
    helper.set_model_props(model, {artifacts.ONNX_SCHEMA: json.dumps(config.schema.to_dict())})
    graph_path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(graph_path))  # by path, so that it finds the external data
    return {"onnx": graph_path, "onnx_data": data_path}


def _write_tables(config: DlrmConfig, weights: DlrmWeights, path: Path, report: Callable[[int, int], None]) -> None:
    """All tables one after the other, as one (sum of rows, dim) float32 array from byte 0 on."""
    with path.open("wb") as file:
        for number, table in enumerate(config.names_of_tables):
            report(number, config.tables)
            file.write(np.ascontiguousarray(weights[table_key(table)], dtype="<f4").data)
        file.write(b"\0" * (-file.tell() % _PAGE))
    report(config.tables, config.tables)


class _Builder:
    """Collects a graph's nodes; every method returns the name of its output."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{self.prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"{self.prefix}constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name


def _dlrm(config: DlrmConfig, weights: DlrmWeights, data: Path) -> Any:
    id_dtype = config.schema.id_dtype
    ids = TensorProto.INT64 if id_dtype == np.int64 else TensorProto.INT32
    build = _Builder()
    lengths, dense = "id_list_features.lengths", "float_features"
    bags = build.op("Reshape", lengths, build.constant([config.tables, -1]))  # (T, B) whatever shape came
    flat = build.op("Reshape", lengths, build.constant([-1]))
    one = build.constant(1, np.int32)
    one_hot = build.op(
        "And",
        build.op("Equal", build.op("ReduceMin", flat, keepdims=0), one),
        build.op("Equal", build.op("ReduceMax", flat, keepdims=0), one),
    )
    sparse = build.op(
        "If",
        one_hot,
        then_branch=_one_hot_branch(config),
        else_branch=_jagged_branch(config, bags, flat),
    )
    embedded = _mlp(build, weights, dense, _prefixes("dense_arch.model._mlp.{}._linear", len(config.dense_arch)))
    over = build.op("Concat", embedded, *_interactions(build, config, embedded, sparse), axis=1)
    hidden = _mlp(build, weights, over, _prefixes("over_arch.model.0._mlp.{}._linear", len(config.over_arch) - 1))
    score = build.op("Sigmoid", _linear(build, weights, hidden, "over_arch.model.1"))
    build.nodes.append(helper.make_node("Reshape", [score, build.constant([-1])], ["default"], name="default"))
    return helper.make_graph(
        build.nodes,
        "narsil_dlrm",
        [
            helper.make_tensor_value_info(dense, TensorProto.FLOAT, ["B", config.dense_features]),
            helper.make_tensor_value_info(lengths, TensorProto.INT32, ["bags"]),
            helper.make_tensor_value_info("id_list_features.values", ids, ["N"]),
        ],
        [helper.make_tensor_value_info("default", TensorProto.FLOAT, ["B"])],
        initializer=[*build.initializers, *_tables(config, data)],
    )


def _tables(config: DlrmConfig, data: Path) -> list[Any]:
    """The tables (external) and the row at which each one starts, as values' own type."""
    rows = np.array(config.rows_per_table, dtype=np.int64)
    tables = TensorProto(name=TABLES, data_type=TensorProto.FLOAT, dims=[int(rows.sum()), config.dim])
    tables.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data.name), ("offset", 0), ("length", int(rows.sum()) * config.dim * 4)):
        tables.external_data.add(key=key, value=str(value))
    starts = np.concatenate([[0], rows[:-1].cumsum()])
    return [tables, numpy_helper.from_array(starts.astype(_index_dtype(config)), "starts")]


def _index_dtype(config: DlrmConfig) -> Any:
    """The type of a row's index over all tables together, which may need int64 where no single table does."""
    return np.int32 if sum(config.rows_per_table) < 2**31 else np.int64


def _indices(build: _Builder, config: DlrmConfig) -> str:
    """The ids in the type of an index over all tables."""
    if config.schema.id_dtype == _index_dtype(config):
        return "id_list_features.values"
    return build.op("Cast", "id_list_features.values", to=TensorProto.INT64)


def _one_hot_branch(config: DlrmConfig) -> Any:
    build = _Builder("one_hot/")
    keyed = build.op("Reshape", _indices(build, config), build.constant([config.tables, -1]))  # (T, B)
    sample_major = build.op("Transpose", keyed, perm=[1, 0])  # (B, T)
    rows = build.op("Add", sample_major, "starts")
    return _subgraph(build, "one_hot", build.op("Gather", TABLES, rows, axis=0))


def _jagged_branch(config: DlrmConfig, bags: str, flat: str) -> Any:
    """Pools by bag: key-major lengths (T * B,), values (N,) -> (B, T, dim)."""
    build = _Builder("jagged/")
    zero, one = build.constant(0, np.int32), build.constant([1], np.int32)
    values = _indices(build, config)
    total = build.op("Shape", values)  # (1,) N
    rows = build.op("Slice", build.op("Shape", bags), build.constant([1]), build.constant([2]))  # (1,) B
    ends = build.op("CumSum", flat, zero)
    # An id's bag is the number of bags that end at or before it: count ends, then sum the counts up.
    marks = build.op(
        "ConstantOfShape", build.op("Add", total, build.constant([1])), value=helper.make_tensor("v", 6, [1], [0])
    )
    ended = build.op("ScatterElements", marks, ends, build.op("Expand", one, build.op("Shape", ends)), reduction="add")
    counted = build.op("CumSum", build.op("Slice", ended, build.constant([0]), total), zero)
    bag = build.op("Cast", counted, to=TensorProto.INT64)  # (N,) t * B + b
    table = build.op("Div", bag, rows)
    row = build.op("Sub", bag, build.op("Mul", table, rows))
    target = build.op("Add", build.op("Mul", row, build.constant([config.tables])), table)  # sample-major
    looked_up = build.op("Gather", TABLES, build.op("Add", values, build.op("Gather", "starts", table)), axis=0)
    empty = build.op(
        "ConstantOfShape",
        build.op(
            "Concat", build.op("Mul", rows, build.constant([config.tables])), build.constant([config.dim]), axis=0
        ),
        value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0]),
    )
    indices = build.op("Unsqueeze", target, build.constant([1]))
    pooled = build.op("ScatterND", empty, indices, looked_up, reduction="add")
    shaped = build.op("Reshape", pooled, build.constant([-1, config.tables, config.dim]))
    if config.pooling == "mean":
        counts = build.op("Cast", build.op("Transpose", bags, perm=[1, 0]), to=TensorProto.FLOAT)  # (B, T)
        at_least_one = build.op("Max", counts, build.constant(1.0, np.float32))
        shaped = build.op("Div", shaped, build.op("Unsqueeze", at_least_one, build.constant([2])))
    return _subgraph(build, "jagged", shaped)


def _subgraph(build: _Builder, name: str, output: str) -> Any:
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(build.nodes, name, [], [result], initializer=build.initializers)


def _interactions(build: _Builder, config: DlrmConfig, embedded: str, sparse: str) -> list[str]:
    """(B, dim), (B, T, dim) -> one (B, T - i) for each i: dot products of the pairs i < j, in row-major order.

    Row i of the matrix of products keeps what is right of its diagonal. A Split into these runs copies them whole,
    where a Gather would copy each product by itself.
    """
    count = config.tables + 1
    combined = build.op("Concat", build.op("Unsqueeze", embedded, build.constant([1])), sparse, axis=1)
    products = build.op("MatMul", combined, build.op("Transpose", combined, perm=[0, 2, 1]))
    flat = build.op("Reshape", products, build.constant([-1, count * count]))
    sizes = [size for row in range(count - 1) for size in (row + 1, count - 1 - row)] + [count]
    runs = [f"run_{number}" for number in range(len(sizes))]
    build.nodes.append(helper.make_node("Split", [flat, build.constant(sizes)], runs, name="runs", axis=1))
    return runs[1::2]


def _mlp(build: _Builder, weights: DlrmWeights, inputs: str, prefixes: list[str]) -> str:
    for prefix in prefixes:
        inputs = build.op("Relu", _linear(build, weights, inputs, prefix))
    return inputs


def _linear(build: _Builder, weights: DlrmWeights, inputs: str, prefix: str) -> str:
    weight = build.constant(weights[f"{prefix}.weight"], np.float32)
    bias = build.constant(weights[f"{prefix}.bias"], np.float32)
    return build.op("Gemm", inputs, weight, bias, transB=1)


def _prefixes(pattern: str, count: int) -> list[str]:
    return [pattern.format(number) for number in range(count)]
