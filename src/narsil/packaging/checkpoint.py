"""Reads a trained DLRM's FP32 weights from a checkpoint file.

Receives a `.safetensors` file, or a torch file that holds nothing but tensors (it is read with
``weights_only=True``: nothing in it is executed); produces a DlrmConfig inferred from names and shapes, and the
weights under their canonical names. Prefixes such as ``module.`` or ``model.`` (DDP, DLRMTrain) are dropped.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from narsil.artifacts.schema import Pooling
from narsil.dataflow import Floats
from narsil.errors import ArtifactError, first_line
from narsil.packaging.dlrm import DlrmConfig, check_weights, table_key

__all__ = ["load_checkpoint"]

_TABLE = re.compile(r"(?:.*\.)?embedding_bags\.(.+)\.weight")
_LINEAR = re.compile(
    r"(?:.*\.)?((?:dense_arch\.model\._mlp\.\d+\._linear|over_arch\.model\.0\._mlp\.\d+\._linear|over_arch\.model\.1)"
    r"\.(?:weight|bias))"
)
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which trainers nest the state_dict


def load_checkpoint(
    path: Path, *, features: Sequence[str] = (), pooling: Pooling = "sum"
) -> tuple[DlrmConfig, dict[str, Floats]]:
    """The architecture and the weights in a checkpoint.

    ``features`` gives the order of the sparse features where the file does not: a torch file keeps its tensors'
    order, a safetensors file does not. Names such as t_cat_0 .. t_cat_25 are put in the order of their numbers.

    Raises ArtifactError where the file is unreadable, is no DLRM, or where the order of its tables is unknown.
    """
    ordered = path.suffix != ".safetensors"
    tensors = _read_torch(path) if ordered else _read_safetensors(path)
    named = _canonical(tensors, path)
    tables = [name[len(table_key("")) - len(".weight") : -len(".weight")] for name in named if "embedding_bags" in name]
    if not tables:
        raise ArtifactError(f"{path.name} holds no embedding_bags.TABLE.weight: it is not a DLRM's checkpoint")
    tables = _order(tables, features, ordered, path)
    config = _infer(named, tables, pooling, path)
    weights = {name: named[name] for name in config.shapes if name in named}
    weights.update({name: array for name, array in named.items() if name not in weights})
    check_weights(config, weights, path.name)
    return config, weights


def _read_safetensors(path: Path) -> dict[str, Floats]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise ArtifactError(f"reading {path.name} needs the safetensors package: pip install safetensors") from None
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError, KeyError, json.JSONDecodeError, struct.error) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: {first_line(error)}") from None
    for name, array in tensors.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise ArtifactError(f"{path.name}: {name} is {array.dtype}; weights must be floating point")
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}


def _read_torch(path: Path) -> dict[str, Floats]:
    try:
        import torch
    except ImportError:
        raise ArtifactError(
            f"reading {path.name} needs torch: install narsil[cpu], or save the checkpoint as safetensors"
        ) from None
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own, pickle's and zip's errors for damaged files
        raise ArtifactError(
            f"{path} is not a torch file of plain tensors: {first_line(error)}; "
            "save it with torch.save(model.state_dict(), FILE)"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ArtifactError(f"{path} holds a {type(state).__name__}, not a state_dict")
    tensors: dict[str, Floats] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        if not value.is_floating_point():
            raise ArtifactError(f"{path.name}: {name} is {value.dtype}; weights must be floating point")
        tensors[str(name)] = np.ascontiguousarray(value.detach().float().numpy())
    return tensors


def _canonical(tensors: Mapping[str, Floats], path: Path) -> dict[str, Floats]:
    """Tensors under TorchRec's own names, whatever wrapped the model when it was saved."""
    named: dict[str, Floats] = {}
    for name, array in tensors.items():
        if match := _TABLE.fullmatch(name):
            canonical = table_key(match.group(1))
        elif match := _LINEAR.fullmatch(name):
            canonical = match.group(1)
        else:
            raise ArtifactError(f"{path.name} holds {name}, which a DLRM with dot interaction has no place for")
        if canonical in named:
            raise ArtifactError(f"{path.name} holds {canonical} twice, under two prefixes")
        named[canonical] = array
    return named


def _order(tables: list[str], features: Sequence[str], ordered: bool, path: Path) -> list[str]:
    """The tables in the order of their features."""
    if features:
        by_feature = {_feature_of(table): table for table in tables} | {table: table for table in tables}
        unknown = [name for name in features if name not in by_feature]
        if unknown or len(features) != len(tables):
            raise ArtifactError(
                f"{path.name} holds {len(tables)} tables ({', '.join(sorted(tables)[:3])}, ..); the given order "
                + (f"names {unknown[0]}, which is not among them" if unknown else f"has {len(features)} names")
            )
        return [by_feature[name] for name in features]
    if ordered:
        return tables
    numbered = {re.sub(r"\d+$", "", table) for table in tables}
    if len(numbered) == 1 and all(re.search(r"\d+$", table) for table in tables):
        return sorted(tables, key=lambda table: int(re.findall(r"\d+$", table)[0]))
    if len(tables) == 1:
        return tables
    raise ArtifactError(
        f"{path.name}: a safetensors file does not keep its tables' order, and the scores depend on it; "
        "give it with --features NAME,NAME,.."
    )


def _infer(named: Mapping[str, Floats], tables: list[str], pooling: Pooling, path: Path) -> DlrmConfig:
    dense = _outputs(named, "dense_arch.model._mlp.{}._linear.weight", path)
    over = _outputs(named, "over_arch.model.0._mlp.{}._linear.weight", path)
    last = named.get("over_arch.model.1.weight")
    if last is None:
        raise ArtifactError(f"{path.name} lacks over_arch.model.1.weight, the layer that scores")
    for table in tables:
        if named[table_key(table)].ndim != 2:
            raise ArtifactError(f"{path.name}: table {table} is not a matrix of rows x dim")
    return DlrmConfig(
        tables=len(tables),
        rows=tuple(int(named[table_key(table)].shape[0]) for table in tables),
        dim=int(named[table_key(tables[0])].shape[1]),
        dense_features=int(named["dense_arch.model._mlp.0._linear.weight"].shape[1]),
        dense_arch=dense,
        over_arch=(*over, int(last.shape[0])),
        pooling=pooling,
        feature_names=tuple(_feature_of(table) for table in tables),
        table_names=tuple(tables),
    )


def _outputs(named: Mapping[str, Floats], pattern: str, path: Path) -> tuple[int, ...]:
    """Output sizes of the numbered layers of one MLP."""
    sizes: list[int] = []
    while (array := named.get(pattern.format(len(sizes)))) is not None:
        if array.ndim != 2:
            raise ArtifactError(f"{path.name}: {pattern.format(len(sizes))} is not a matrix")
        sizes.append(int(array.shape[0]))
    if not sizes:
        raise ArtifactError(f"{path.name} lacks {pattern.format(0)}: it is not a DLRM's checkpoint")
    return tuple(sizes)


def _feature_of(table: str) -> str:
    """TorchRec's convention: table t_NAME serves feature NAME."""
    return table.removeprefix("t_")
