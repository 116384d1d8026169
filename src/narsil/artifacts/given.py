"""A batch as the arguments that a schema file names: tensors, or lists of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.artifacts.arguments import Argument
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.dataflow import Batch
from narsil.errors import ForwardFailed

__all__ = ["given"]


def given(item: Argument, batch: Batch, schema: ModelSchema) -> Any:
    """An argument: a tensor, or a list of them. Copies are made where the batch's own memory does not serve."""
    if item.holds == "dense":
        return torch.from_numpy(np.array(batch.dense))
    lengths = batch.lengths.reshape(schema.num_features, batch.rows)[list(item.features)]
    if item.holds in ("lengths", "offsets"):
        parts = [_structure(item, lengths)] if item.layout != "list" else [_structure(item, one) for one in lengths]
        kind: Any = np.int64 if item.wide else np.int32
    else:
        parts = _per_id(item, batch, schema)
        kind = np.float32 if item.holds == "weights" else np.int64 if item.wide else np.int32
    tensors = [torch.from_numpy(np.array(part, kind)) for part in parts]
    return tensors if item.layout == "list" else tensors[0]


def _structure(item: Argument, lengths: NDArray[Any]) -> NDArray[Any]:
    """Lengths or offsets of (T, B), or of one feature's (B,)."""
    if item.layout == "flat":
        lengths = lengths.reshape(-1)
    if item.holds == "lengths":
        return lengths
    ends = np.cumsum(lengths, axis=-1, dtype=np.int64)
    starts: NDArray[Any] = np.concatenate([np.zeros((*ends.shape[:-1], 1), np.int64), ends], axis=-1)
    return starts if item.last else starts[..., :-1]


def _per_id(item: Argument, batch: Batch, schema: ModelSchema) -> list[NDArray[Any]]:
    """Ids or weights: of each feature, or of all in one array. Raises ForwardFailed where a bag that must hold one id
    holds several."""
    weights = np.ones(len(batch.values), np.float32) if batch.weights is None else batch.weights
    numbers = weights if item.holds == "weights" else batch.values
    singles = schema.singles[list(item.features)]
    if item.layout == "flat" and item.features == tuple(range(schema.num_features)) and not singles.any():
        return [numbers]
    lengths = batch.lengths.reshape(schema.num_features, batch.rows)
    stops = np.cumsum(lengths.sum(axis=1))
    found = [numbers[0 if at == 0 else stops[at - 1] : stops[at]] for at in item.features]
    for place in np.flatnonzero(singles):
        found[place] = _one_a_row(found[place], lengths[item.features[place]], schema.features[item.features[place]])
    if item.layout == "list":
        return found
    if item.layout == "flat":
        return [np.concatenate(found)]
    return [np.stack(found, axis=1 if item.layout == "by_row" else 0)]


def _one_a_row(ids: NDArray[Any], lengths: NDArray[Any], feature: Feature) -> NDArray[Any]:
    """(B,) the only id of each bag. Padding rows hold none: their ids are 0."""
    if len(ids) == len(lengths) and bool((lengths == 1).all()):
        return ids
    if bool((lengths > 1).any()):
        row = int(np.argmax(lengths > 1))
        raise ForwardFailed(f"feature {feature.name}, row {row}: {lengths[row]} ids, where the model takes exactly one")
    made = np.zeros(len(lengths), ids.dtype)
    made[lengths == 1] = ids
    return made
