"""Reads a trained DLRM's weights from a checkpoint file.

Receives a `.safetensors` file, or a torch file that holds nothing but tensors (it is read with ``weights_only=True``:
nothing in it is executed), in FP32, BF16, FP16 or FP64. Produces a DlrmConfig inferred from names and shapes, and the
weights in FP32 under their canonical names. Prefixes such as ``module.`` or ``model.`` (DDP, DLRMTrain) are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from narsil.artifacts.files import check_readable
from narsil.artifacts.schema import Pooling
from narsil.dataflow import Floats
from narsil.errors import ArtifactError, first_line
from narsil.names import is_label
from narsil.packaging.dlrm import DlrmConfig, check_weights, table_key

__all__ = ["load_checkpoint"]

_TABLE = re.compile(r"(?:.*\.)?embedding_bags\.(.+)\.weight")
_LINEAR = re.compile(
    r"(?:.*\.)?((?:dense_arch\.model\._mlp\.\d+\._linear|over_arch\.model\.0\._mlp\.\d+\._linear|over_arch\.model\.1)"
    r"\.(?:weight|bias))"
)
_READ = ("float32", "bfloat16", "float16", "float64")  # torch's names
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which trainers nest the state_dict


def load_checkpoint(
    path: Path, *, features: Sequence[str] = (), pooling: Pooling = "sum"
) -> tuple[DlrmConfig, dict[str, Floats]]:
    """The architecture and the weights in a checkpoint.

    ``features`` gives the order of the sparse features where the file does not: a torch file keeps its tensors'
    order, a safetensors file does not. Names such as t_cat_0 .. t_cat_25 are put in the order of their numbers.

    Raises ArtifactError where the file is unreadable, is no DLRM, or where the order of its tables is unknown.
    """
    check_readable(path)
    ordered = path.suffix != ".safetensors"
    tensors = _canonical(_read_torch(path) if ordered else _read_safetensors(path), path)
    named = {name: _floats(tensor, f"{path.name}: {name}") for name, tensor in tensors.items()}
    tables = [name[len(table_key("")) - len(".weight") : -len(".weight")] for name in named if "embedding_bags" in name]
    if not tables:
        raise ArtifactError(f"{path.name} holds no embedding_bags.TABLE.weight: it is not a DLRM's checkpoint")
    tables = _order(tables, features, ordered, path)
    config = _infer(named, tables, pooling, path)
    weights = {name: named[name] for name in config.shapes if name in named}
    weights.update({name: array for name, array in named.items() if name not in weights})
    check_weights(config, weights, path.name)
    return config, weights


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ArtifactError(
            f"reading {path.name} needs torch and the safetensors package ({first_line(error)}): install narsil[cpu]"
        ) from None
    try:
        tensors: dict[str, Any] = load_file(str(path))
    except Exception as error:  # safetensors has errors of its own, and lets through torch's for kinds it cannot map
        raise ArtifactError(f"{path} cannot be read as safetensors: {first_line(error)}") from None
    return tensors


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ArtifactError(f"reading {path.name} needs torch ({first_line(error)}): install narsil[cpu]") from None
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
    return {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _floats(tensor: Any, what: str) -> Floats:
    """A tensor's numbers in FP32, in its own memory where it has them so. Raises ArtifactError, naming ``what``, where
    it has others: FP8 and integers mean nothing without the scales that their trainer keeps elsewhere."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _READ:
        raise ArtifactError(f"{what} is {kind}; weights are read from {', '.join(_READ)}: convert it to one of them")
    try:
        values: Floats = np.ascontiguousarray(tensor.detach().float().numpy())
    except (TypeError, RuntimeError) as error:  # sparse, nested, on no device: torch says which
        raise ArtifactError(f"{what} is no plain tensor: {first_line(error)}; save it as a dense one") from None
    return values


def _canonical(tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Tensors under TorchRec's own names, whatever wrapped the model when it was saved."""
    named: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if (match := _TABLE.fullmatch(name)) and is_label(match.group(1)):
            canonical = table_key(match.group(1))
        elif match := _LINEAR.fullmatch(name):
            canonical = match.group(1)
        else:
            raise ArtifactError(f"{path.name} holds {name[:128]!r}, which a DLRM with dot interaction has no place for")
        if canonical in named:
            raise ArtifactError(f"{path.name} holds {canonical} twice, under two prefixes")
        named[canonical] = tensor
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
    if last is None or last.ndim != 2:
        raise ArtifactError(f"{path.name} lacks the matrix over_arch.model.1.weight, the layer that scores")
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
