"""Reads a request's schema out of a TorchScript artifact, as TorchRec's inference packager (or Narsil's) writes it.

Receives a file; produces a ModelSchema and the device that is baked in. Nothing in the file is unpickled by
Python: only ``torch.jit.load`` reads it. Everything that Narsil does not understand is an ArtifactError, since a
wrong guess would score wrong features or let ids read outside of a table.

What is read, and where from:

    order of the features   the key list that forward's own graph gives to KeyedJaggedTensor
    tables, rows, dims      attributes of every IntNBitTableBatchedEmbeddingBagsCodegen (FBGEMM's inference operator)
    dense columns           the weight of the linear layer that float_features enters
    tasks                   the keys of the dict that forward returns

Weights that are NaN or infinite are refused here too: a model that holds them scores NaN.
"""

from __future__ import annotations

import itertools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.files import check_readable, unreadable
from narsil.artifacts.finite import bad_weights, first_bad_row, first_bad_scale
from narsil.artifacts.schema import Feature, ModelSchema, Pooling
from narsil.errors import ArtifactError, first_line

__all__ = ["check_tables", "derive_schema", "load_torchscript", "schema_of"]

DENSE = "float_features"
LENGTHS = "id_list_features.lengths"
VALUES = "id_list_features.values"

_TBE = "IntNBitTableBatchedEmbeddingBagsCodegen"
_POOLING: dict[int, Pooling] = {0: "sum", 1: "mean"}
_PLACEMENTS = {0: "weights_dev", 1: "weights_uvm", 2: "weights_uvm", 3: "weights_host"}  # fbgemm EmbeddingLocation
_FLOATING = {0: np.float32, 1: np.float16}  # of FBGEMM's SparseType numbers, those whose rows are plain values
_SCALES = {4: np.float16, 8: np.float32}  # by the bytes of a row's scale and bias together
_PASS_THROUGH = {"aten::to", "aten::contiguous", "aten::detach", "aten::float", "prim::unchecked_cast"}


def derive_schema(path: Path) -> tuple[ModelSchema, str]:
    """The schema of a TorchScript file, and its device (cpu or cuda:N). Raises ArtifactError."""
    return schema_of(load_torchscript(path, "cpu"), path.name)


def load_torchscript(path: Path, device: str) -> Any:
    """The ScriptModule in a file, its tensors on ``device``. Raises ArtifactError saying what the file is instead."""
    _check_archive(path)
    try:
        import fbgemm_gpu  # noqa: F401 - registers the operators that the archive names
        import torch
    except ImportError as error:
        raise ArtifactError(
            f"reading {path.name} needs torch and fbgemm ({error}); install narsil[cpu] or narsil[cuda]"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is TorchRec's format all the same
            return torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # torch raises RuntimeError, ValueError and its own kinds for damaged archives
        raise ArtifactError(f"{path} is a TorchScript archive that torch cannot load: {first_line(error)}") from None


def table_operators(module: Any) -> list[Any]:
    """FBGEMM's operators over quantized tables in a ScriptModule, wherever they stand."""
    return [part for _, part in module.named_modules() if getattr(part, "original_name", "") == _TBE]


def schema_of(module: Any, name: str = "the module") -> tuple[ModelSchema, str]:
    """The schema and the device of a loaded ScriptModule. Raises ArtifactError."""
    try:
        return _read_schema(module, name)
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        # Built as no TorchRec builds it.
        raise ArtifactError(f"{name} is not built as TorchRec's packager builds it: {first_line(error)}") from None


def _read_schema(module: Any, name: str) -> tuple[ModelSchema, str]:
    tbes = table_operators(module)
    if not tbes:
        raise ArtifactError(
            f"{name} holds no quantized embedding tables ({_TBE}): it is no DLRM from TorchRec's inference packager"
        )
    tables: dict[str, Feature] = {}
    for tbe in tbes:
        check_tables(tbe, name)
        _check_table_values(tbe, name)
        for feature in _features_of(tbe, name):
            if feature.name in tables:
                raise ArtifactError(
                    f"{name}: feature {feature.name} is looked up in two tables; "
                    "package the model without splitting tables by column or row"
                )
            tables[feature.name] = feature
    _check_dense_values(module, name)
    graph = _Graph(module, name)
    keys = graph.keys()
    if sorted(keys) != sorted(tables):
        odd = sorted(set(keys) ^ set(tables))
        raise ArtifactError(f"{name}: forward's features and the tables' differ, first in {odd[0] if odd else keys[0]}")
    schema = ModelSchema(dense_dim=graph.dense_dim(), features=tuple(tables[key] for key in keys), tasks=graph.tasks())
    return schema, _device_of(tbes, name)


def check_tables(tbe: Any, name: str) -> None:
    """Raises ArtifactError unless every row 0 .. rows - 1 of every table lies inside the weights.

    FBGEMM's CPU operator checks ids only against the table's padded size, and trusts offsets, dims and types.
    """
    rows, dims = tbe.rows_per_table.tolist(), _dims(tbe)
    offsets, types, places = tbe.weights_offsets.tolist(), tbe.weights_tys.tolist(), tbe.weights_placements.tolist()
    count = len(tbe.feature_table_map)
    if any(len(column) != count for column in (rows, dims, offsets, types, places)):
        raise ArtifactError(f"{name}: the tables' attributes differ in length; package the model again")
    if tbe.index_remappings_array.numel() or tbe.index_remapping_hash_table.numel():
        raise ArtifactError(f"{name}: tables are pruned (index remapping), which Narsil does not serve")
    if min(dims) < 1 or sum(dims) != tbe.total_D:
        raise ArtifactError(f"{name}: the tables' dims do not add up to {tbe.total_D}; package the model again")
    for position, (start, place) in enumerate(zip(offsets, places, strict=True)):
        weights = getattr(tbe, _PLACEMENTS.get(place, ""), None)
        if weights is None:
            raise ArtifactError(f"{name}: table {position} lies in an unknown place ({place})")
        end = start + rows[position] * _row_bytes(tbe, dims[position], types[position], name)
        later = (
            other for other, its_place in zip(offsets, places, strict=True) if its_place == place and other > start
        )
        limit = min(later, default=weights.numel())
        if start < 0 or rows[position] < 1 or end > min(limit, weights.numel()):
            raise ArtifactError(
                f"{name}: table {position} lies from byte {start} to {end} where it may end at {limit}: ids would be "
                "read out of bounds; package the model again"
            )


def _check_table_values(tbe: Any, name: str) -> None:
    """Raises ArtifactError, naming the table and the row, where a lookup would give NaN or infinity. The tables lie
    inside the weights, as check_tables has found."""
    rows, dims = tbe.rows_per_table.tolist(), _dims(tbe)
    offsets, types, places = tbe.weights_offsets.tolist(), tbe.weights_tys.tolist(), tbe.weights_placements.tolist()
    columns = zip(offsets, rows, dims, types, places, strict=True)
    for table, (start, count, dim, kind, place) in enumerate(columns):
        width = _row_bytes(tbe, dim, kind, name)
        stored = getattr(tbe, _PLACEMENTS[place])[start : start + count * width].view(count, width)
        if kind in _FLOATING:
            values = np.dtype(_FLOATING[kind])
            bad = first_bad_row(_leading_bytes(stored, dim * values.itemsize).view(values))
        else:
            size = int(tbe.scale_bias_size_in_bytes)
            if size not in _SCALES:
                raise ArtifactError(f"{name}: scale and bias of {size} bytes are unknown; package with INT8 rows")
            bad = first_bad_scale(_leading_bytes(stored, size), _SCALES[size])
        if bad is not None:
            raise ArtifactError(bad_weights(name, f"row {bad} of table {_label(tbe, table)}"))


def _leading_bytes(stored: Any, size: int) -> NDArray[np.uint8]:
    """(rows, size) the first bytes of each row, in host memory: a view where they lie there."""
    leading = stored[:, :size]
    found: NDArray[np.uint8] = (leading if leading.device.type == "cpu" else leading.contiguous().cpu()).numpy()
    return found


def _check_dense_values(module: Any, name: str) -> None:
    """Raises ArtifactError where a parameter is NaN or infinite, or a buffer NaN: infinity in one may mask."""
    for key, tensor in module.named_parameters():
        bad = first_bad_row(tensor.detach().float().cpu().numpy()) if tensor.is_floating_point() else None
        if bad is not None:
            raise ArtifactError(bad_weights(name, f"row {bad} of {key}"))
    for key, tensor in module.named_buffers():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ArtifactError(bad_weights(name, key))


def _features_of(tbe: Any, name: str) -> Iterator[Feature]:
    """The features of one operator, in its own order."""
    pooling = _POOLING.get(int(tbe.pooling_mode))
    if pooling is None:
        raise ArtifactError(f"{name}: tables are not pooled (sequence embeddings), which Narsil does not serve")
    per_table = getattr(tbe, "feature_names_per_table", None)
    if not per_table:
        raise ArtifactError(f"{name}: the tables do not name their features; package with TorchRec 1.0 or later")
    owners = [(feature, table) for table, features in enumerate(per_table) for feature in features]
    if [table for _, table in owners] != list(tbe.feature_table_map):
        raise ArtifactError(f"{name}: the tables' features and feature_table_map differ; package the model again")
    rows, dims = tbe.rows_per_table.tolist(), _dims(tbe)
    for position, (feature, table) in enumerate(owners):
        yield Feature(feature, _label(tbe, table), int(rows[position]), int(dims[position]), pooling)


def _label(tbe: Any, table: int) -> str:
    """A table's name."""
    names = list(getattr(tbe, "feature_names", []))  # despite its name: the tables' names
    if table < len(names) and names[table]:
        return str(names[table])
    per_table = getattr(tbe, "feature_names_per_table", None)
    return f"t_{per_table[table][0]}" if per_table else f"number {table}"


def _dims(tbe: Any) -> list[int]:
    bounds = tbe.D_offsets.tolist()
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def _row_bytes(tbe: Any, dim: int, kind: int, name: str) -> int:
    """Bytes of one row by FBGEMM's SparseType number; integer rows begin with their scale and bias."""
    scale_bias = int(tbe.scale_bias_size_in_bytes)
    sizes = {0: dim * 4, 1: dim * 2, 2: dim + scale_bias, 3: dim // 2 + scale_bias, 4: dim // 4 + scale_bias}
    if kind not in sizes:
        raise ArtifactError(f"{name}: tables of FBGEMM's type {kind} are unknown; package with INT8 rows")
    alignment = max(int(tbe.row_alignment), 1)
    return -(-sizes[kind] // alignment) * alignment


def _device_of(tbes: list[Any], name: str) -> str:
    devices = {str(tbe.current_device) for tbe in tbes}
    if len(devices) != 1:
        raise ArtifactError(f"{name}: tables lie on several devices ({', '.join(sorted(devices))}); package for one")
    return devices.pop()


class _Graph:
    """The parts of forward's graph that say how a request is read."""

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name
        self.graph = module.graph
        inputs = list(self.graph.inputs())
        if len(inputs) != 2 or inputs[1].type().annotation_str != "Dict[str, Tensor]":
            raise ArtifactError(f"{name}: forward does not take one Dict[str, Tensor], so it is no TorchRec predictor")
        read = {_constant(node.inputsAt(1)) for node in _getitems(inputs[1])}
        if read != {DENSE, LENGTHS, VALUES}:
            odd = sorted(str(key) for key in read ^ {DENSE, LENGTHS, VALUES})
            raise ArtifactError(
                f"{name}: forward must read exactly {DENSE}, {LENGTHS} and {VALUES}, but differs in {odd[0]}"
            )

    def keys(self) -> list[str]:
        """The features in key-major order."""
        built = [node for node in self.graph.nodes() if _builds_kjt(node)]
        if len(built) == 1:
            keys = _strings(built[0].inputsAt(1))
        elif not built and hasattr(self.module, "id_list_features_keys"):
            keys = [str(key) for key in self.module.id_list_features_keys]
        else:
            keys = []
        if not keys:
            raise ArtifactError(
                f"{self.name}: forward builds {len(built)} KeyedJaggedTensors with a constant key list where one is "
                "expected, so the order of the features is unknown"
            )
        return keys

    def tasks(self) -> tuple[str, ...]:
        """The keys of the returned dict."""
        value = next(self.graph.outputs())
        while value.node().kind() in _PASS_THROUGH:
            value = value.node().inputsAt(0)
        if value.node().kind() != "prim::DictConstruct":
            raise ArtifactError(f"{self.name}: forward does not return a dict of named scores")
        names = [_constant(item) for item in list(value.node().inputs())[::2]]
        if not names or not all(isinstance(name, str) for name in names):
            raise ArtifactError(f"{self.name}: forward's scores have no constant names")
        return tuple(names)

    def dense_dim(self) -> int:
        """Columns of the linear layer that float_features enters."""
        graph = self.module.inlined_graph
        batch = list(graph.inputs())[1]
        for node in _getitems(batch):
            if _constant(node.inputsAt(1)) != DENSE:
                continue
            waiting = [node.output()]
            while waiting:
                for use in waiting.pop().uses():
                    kind = use.user.kind()
                    if kind == "aten::linear" and use.offset == 0:
                        return int(_attribute(self.module, use.user.inputsAt(1)).shape[1])
                    if kind in _PASS_THROUGH and use.offset == 0:
                        waiting.append(use.user.output())
        raise ArtifactError(f"{self.name}: {DENSE} enters no linear layer, so the number of dense features is unknown")


def _getitems(batch: Any) -> Iterator[Any]:
    for use in batch.uses():
        if use.user.kind() == "aten::__getitem__" and use.offset == 0:
            yield use.user


def _builds_kjt(node: Any) -> bool:
    return (
        node.kind() == "prim::CallMethod"
        and node.s("name") == "__init__"
        and str(node.inputsAt(0).type()).endswith("KeyedJaggedTensor")
    )


def _strings(value: Any) -> list[str]:
    """A constant list of strings; empty where it is not constant."""
    if value.node().kind() == "prim::ListConstruct":
        items = [_constant(item) for item in value.node().inputs()]
    else:
        items = _constant(value) or []
    return items if all(isinstance(item, str) for item in items) else []


def _constant(value: Any) -> Any:
    return value.toIValue() if value.node().kind() == "prim::Constant" else None


def _attribute(module: Any, value: Any) -> Any:
    """The tensor that a chain of prim::GetAttr leads to from the module."""
    names: list[str] = []
    while value.node().kind() == "prim::GetAttr":
        names.append(value.node().s("name"))
        value = value.node().inputsAt(0)
    for name in reversed(names):
        module = getattr(module, name)
    return module


def _check_archive(path: Path) -> None:
    """Tells what a file is from its first bytes and its table of contents, before torch sees it."""
    check_readable(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head != b"PK\x03\x04":
            pickled = head[:1] == b"\x80"
            kind = "a legacy torch.save pickle" if pickled else "empty" if not head else "not a TorchScript archive"
            raise ArtifactError(f"{path} is {kind}; give the model_default.pt that torch.jit.save wrote")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except ArtifactError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception:  # zipfile's own error, and those of struct, codecs and arithmetic that it lets through
        raise ArtifactError(f"{path} is truncated or damaged; copy it again") from None
    if any("/code/" in name for name in names):
        return
    if any(name.endswith("/data.pkl") for name in names):
        raise ArtifactError(
            f"{path} is a torch.save pickle, not TorchScript; Narsil never unpickles models: "
            "package the weights with `narsil package dlrm --checkpoint`"
        )
    raise ArtifactError(f"{path} is a zip archive without TorchScript code; give the model_default.pt of a packager")
