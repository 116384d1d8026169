"""Runs models whose arguments a schema file names (backend name "torch"): exported programs, and TorchScript that
takes several tensors, as facebookresearch/dlrm's ``(dense_x, lS_o, lS_i)``.

Receives an Artifact with Arguments; owns the loaded model, which all instances from ``share`` use together. What the
schema file says is held against the model when it is loaded: rows of first and of last ids are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.artifacts.arguments import Argument, Arguments
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.exported import Exported, is_pt2, load_exported
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.tbe import table_operators
from narsil.artifacts.torchscript import load_torchscript
from narsil.backends.base import Backend
from narsil.backends.outputs import scores_of
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError, ForwardFailed, last_line
from narsil.program.recording import named_outputs

__all__ = ["ArgumentsBackend"]

_PROBED = 4  # rows of a trial
_MOST_TRIED = 8  # rows of an export's smallest batch, below which fewer are tried

Forward = Callable[[list[Any]], Any]  # arguments in the schema file's order


class ArgumentsBackend(Backend):
    """A model that takes what a schema file says."""

    name = "torch"
    device = "cpu"

    def __init__(self, forward: Forward, arguments: Arguments, least: int = 1, intra_op_threads: int = 1) -> None:
        """``least``: rows of the smallest batch that the model was exported for."""
        self.schema = arguments.schema
        self._forward = forward
        self._arguments = arguments
        self._least = least
        self._threads = intra_op_threads

    @classmethod
    def load(cls, artifact: Artifact, intra_op_threads: int = 1) -> ArgumentsBackend:
        """Loads the artifact's model. Raises ArtifactError where it does other things than its schema file says."""
        path, arguments = artifact.files_for("torch")["torchscript"], artifact.arguments
        if arguments is None:
            raise ArtifactError(f"{path} has no schema file beside it; write {path.stem}.schema.json")
        least = 1
        if is_pt2(path):
            exported = load_exported(path)
            least = _least_rows(exported, arguments, path.name)
            forward: Forward = exported
        else:
            forward = _scripted(load_torchscript(path, "cpu"), arguments.inputs, path.name)
        backend = cls(forward, arguments, least, intra_op_threads)
        backend._check(path.name)
        backend._least = backend._settled_least()
        return backend

    def bucket(self, rows: int) -> int:
        """See Backend.bucket."""
        return max(rows, self._least)

    def run(self, batch: Batch) -> Scores:
        """See Backend.run."""
        if batch.rows < self._least:
            raise ForwardFailed(f"the program was exported for batches of at least {self._least} rows")
        with torch.inference_mode():
            outputs = self._forward([_given(item, batch, self.schema) for item in self._arguments.inputs])
        return scores_of(outputs, self.schema.outputs, batch)

    def share(self) -> ArgumentsBackend:
        """Another instance over the same model."""
        shared = ArgumentsBackend(self._forward, self._arguments, self._least, self._threads)
        shared.schema = self.schema  # which may be of some of the tasks alone
        return shared

    def thread_setup(self) -> None:
        """Sets this thread's intra-op thread count: torch keeps it per thread."""
        torch.set_num_threads(self._threads)

    def _settled_least(self) -> int:
        """The fewest rows of a batch: 1 where fewer than the program was exported for score as they do in company.

        torch.export gives every axis at least two entries unless it is told otherwise, which says nothing of the model.
        """
        least, self._least = self._least, 1
        for rows in range(1, least if least <= _MOST_TRIED else 1):
            whole, part = (_drawn(self.schema, count) for count in (least, rows))
            try:
                found, alone = self.run(whole), self.run(part)
            except Exception:  # whatever a model raises
                return least
            if not all(np.allclose(alone[task], found[task][:rows], rtol=1e-5, atol=1e-7) for task in found):
                return least
        return 1 if least <= _MOST_TRIED else least

    def _check(self, name: str) -> None:
        """Holds the model against its schema: names and widths of outputs, first and last ids, bags that are empty."""
        last = [feature.rows - 1 for feature in self.schema.features]
        for ids, length, told in ((0, 2, "first ids"), (1, 1, "last ids"), (0, 0, "empty bags")):
            batch = _rows(self.schema, max(_PROBED, self._least), np.array(last) * ids, length)
            try:
                with torch.inference_mode():
                    result = self._forward([_given(item, batch, self.schema) for item in self._arguments.inputs])
                    found = {task: tuple(scores.shape) for task, scores in named_outputs(result).items()}
                if set(found) != set(self.schema.tasks):
                    raise ArtifactError(
                        f"it returns {', '.join(found)} where the schema file has the tasks "
                        f"{', '.join(self.schema.tasks)}"
                    )
                scores_of(result, self.schema.outputs, batch)
            except Exception as error:  # whatever a model raises
                raise ArtifactError(
                    f"{name} and its schema file differ: on rows of {told}, {last_line(error)}; mend the schema file"
                ) from None


def _rows(schema: ModelSchema, rows: int, ids: NDArray[np.int64], length: int) -> Batch:
    """Rows of zeros, whose bags hold one id of each feature ``length`` times."""
    values = np.repeat(ids, rows * length).astype(schema.id_dtype)
    lengths = np.full(rows * schema.num_features, length, np.int32)
    weights = np.ones(len(values), np.float32) if schema.weighted else None
    return Batch(rows, np.zeros((rows, schema.dense_dim), np.float32), lengths, values, length == 1, weights)


def _drawn(schema: ModelSchema, rows: int) -> Batch:
    """Rows by chance, bags of two: row i is the same whatever their number."""
    random = np.random.default_rng(1)
    dense = random.standard_normal((_MOST_TRIED, schema.dense_dim)).astype(np.float32)[:rows]
    ids = random.integers(0, schema.rows[:, None], (schema.num_features, 2 * _MOST_TRIED))[:, : 2 * rows]
    values = np.ascontiguousarray(ids).reshape(-1).astype(schema.id_dtype)
    weights = np.ones(len(values), np.float32) if schema.weighted else None
    return Batch(rows, dense, np.full(rows * schema.num_features, 2, np.int32), values, False, weights)


def _given(item: Argument, batch: Batch, schema: ModelSchema) -> Any:
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
    """Ids or weights: of each feature, or of all end to end."""
    weights = np.ones(len(batch.values), np.float32) if batch.weights is None else batch.weights
    numbers = weights if item.holds == "weights" else batch.values
    if item.layout == "flat" and item.features == tuple(range(schema.num_features)):
        return [numbers]
    stops = np.cumsum(batch.lengths.reshape(schema.num_features, batch.rows).sum(axis=1))
    found = [numbers[0 if at == 0 else stops[at - 1] : stops[at]] for at in item.features]
    return found if item.layout == "list" else [np.concatenate(found)]


def _scripted(module: Any, inputs: Sequence[Argument], name: str) -> Forward:
    """A ScriptModule's forward over arguments in the schema file's order."""
    if table_operators(module):
        raise ArtifactError(
            f"{name} looks up FBGEMM's quantized tables, which trust the ids that they are given: Narsil serves such "
            "models where forward takes one Dict[str, Tensor], and without a schema file"
        )
    taken = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    if len(taken) == 1 and str(taken[0].type).replace(" ", "") == "Dict[str,Tensor]":
        return lambda given: module(dict(zip((item.name for item in inputs), given, strict=True)))
    types = {argument.name: str(argument.type) for argument in taken}
    _check_names(types, inputs, name)
    for item in inputs:
        wanted = "List[Tensor]" if item.layout == "list" else "Tensor"
        if types[item.name] != wanted:
            raise ArtifactError(
                f"{name}: forward takes {item.name} as {types[item.name]} where its schema file has the layout "
                f"{item.layout}, a {wanted}"
            )
    places = [[item.name for item in inputs].index(argument) for argument in types]
    return lambda given: module(*(given[place] for place in places))


def _check_names(taken: Mapping[str, Any] | Sequence[str], inputs: Sequence[Argument], name: str) -> None:
    told = [item.name for item in inputs]
    if sorted(told) != sorted(taken):
        odd = sorted(set(told) ^ set(taken))
        raise ArtifactError(
            f"{name} takes {', '.join(taken)}, its schema file has {', '.join(told)}: they differ in {odd[0]}"
        )


def _least_rows(exported: Exported, arguments: Arguments, name: str) -> int:
    """The fewest rows that a program was exported for. Raises ArtifactError where it was for some numbers alone."""
    _check_names(exported.names, arguments.inputs, name)
    if [item.name for item in arguments.inputs] != list(exported.names):
        raise ArtifactError(f"{name} takes {', '.join(exported.names)}: give the inputs in this order")
    least = 1
    for item in arguments.inputs:
        axes = exported.sizes[item.name]
        if item.layout == "list" or len(axes) != (2 if item.holds == "dense" or item.layout == "by_feature" else 1):
            raise ArtifactError(
                f"{name}: {item.name} has {len(axes)} axes, where its schema file says {item.holds}, {item.layout}"
            )
        low, high = axes[-1 if item.layout == "by_feature" else 0]
        if high is not None:
            raise ArtifactError(
                f"{name} was exported for {low} to {high} entries of {item.name}, and not for any number of rows; give "
                "torch.export.export dynamic_shapes with an unbounded torch.export.Dim for its rows and its ids"
            )
        if item.holds in ("dense", "lengths", "offsets"):
            per_row = len(item.features) if item.layout == "flat" and item.holds != "dense" else 1
            least = max(least, -(-(low - item.last) // per_row))
    return least
