"""Runs models whose arguments a schema file names (backend name "torch"): exported programs, packages of AOTInductor's,
and TorchScript that takes several tensors, as facebookresearch/dlrm's ``(dense_x, lS_o, lS_i)``.

Receives an Artifact with Arguments; owns the loaded model, which all instances from ``share`` use together. What the
schema file says is held against the model when it is loaded: rows of first and of last ids are scored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from narsil.artifacts.arguments import Argument, Arguments
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.forwards import Forward, Loaded, forward_from
from narsil.artifacts.given import given
from narsil.artifacts.pt2 import is_package
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.signatures import check_readings, read_arguments
from narsil.backends.base import Backend
from narsil.backends.outputs import scores_of
from narsil.backends.packages import Packaged, checking, load_packaged
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError, ForwardFailed, last_line
from narsil.program.recording import named_outputs

__all__ = ["ArgumentsBackend"]

log = logging.getLogger(__name__)

_PROBED = 4  # rows of a trial
_LEAST, _MANY = 2, 10_000  # rows that a package is run with while it checks its inputs
_TRIALS = ((0, 2, "first ids"), (1, 1, "last ids"), (0, 0, "empty bags"))  # ids by the last one, in each bag, in words
_MOST_TRIED = 8  # rows of an export's smallest batch, below which fewer are tried


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
        if is_package(path):
            backend = cls._of_package(path, arguments, intra_op_threads)
        else:
            loaded = forward_from(path, arguments)
            _hold_against(loaded, arguments, path.name)
            backend = cls(loaded.forward, arguments, loaded.least, intra_op_threads)
        backend._check(path.name)
        backend._least = backend._settled_least()
        return backend

    @classmethod
    def _of_package(cls, path: Path, arguments: Arguments, threads: int) -> ArgumentsBackend:
        """A package's code, once it has been run with checks of its inputs."""
        with checking(path) as packaged:
            _check_keys(packaged, arguments.inputs, path.name)
            _check_constants(packaged, arguments.schema, path.name)
            trial = cls(packaged, arguments, 1, threads)
            trial._least = _LEAST
            trial._check(path.name, ((0, 2, "first ids"), (1, 2, "last ids")))
            trial._check_rows(path.name, _MANY)
        backend = cls(load_packaged(path), arguments, _LEAST, threads)
        backend._check_few_ids(path.name)
        return backend

    def bucket(self, rows: int) -> int:
        """See Backend.bucket."""
        return max(rows, self._least)

    def run(self, batch: Batch) -> Scores:
        """See Backend.run."""
        if batch.rows < self._least:
            raise ForwardFailed(f"the program was exported for batches of at least {self._least} rows")
        with torch.inference_mode():
            outputs = self._forward([given(item, batch, self.schema) for item in self._arguments.inputs])
        return scores_of(outputs, self.schema.outputs, batch)

    def share(self) -> ArgumentsBackend:
        """Another instance over the same model."""
        forward = self._forward.share() if isinstance(self._forward, Packaged) else self._forward
        shared = ArgumentsBackend(forward, self._arguments, self._least, self._threads)
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

    def close(self) -> None:
        """See Backend.close."""
        if isinstance(self._forward, Packaged):
            self._forward.close()

    def _check_rows(self, name: str, rows: int) -> None:
        """Raises ArtifactError where a program was compiled for fewer rows."""
        try:
            self.run(_rows(self.schema, rows, np.zeros(self.schema.num_features, np.int64), 1))
        except Exception as error:  # whatever a model raises
            raise ArtifactError(
                f"{name} does not take {rows} rows ({self._told(error)}); give torch.export.export dynamic_shapes with "
                "an unbounded torch.export.Dim for its rows and its ids, and compile it again"
            ) from None

    def _check_few_ids(self, name: str) -> None:
        """Raises ArtifactError where rows of no ids, or of one, score otherwise than beside rows of many: code that was
        compiled for two ids at least."""
        features, rows = self.schema.num_features, max(_PROBED, self._least)
        if not features:
            return
        for few in ([0] * features, [1] * features, [1] + [0] * (features - 1)):
            lengths = np.zeros((features, rows + 1), np.int32)
            lengths[:, 0], lengths[:, rows] = few, 2
            among, alone = (_bags(self.schema, lengths[:, :count]) for count in (rows + 1, rows))
            try:
                whole, part = self.run(among), self.run(alone)
                same = all(np.allclose(part[task], whole[task][:rows], rtol=1e-5, atol=1e-7) for task in part)
            except Exception as error:  # whatever a model raises
                same, told = False, self._told(error)
            else:
                told = "its scores are others"
            if not same:
                raise ArtifactError(
                    f"{name} does not take requests of fewer than two ids ({told}); serve the torch.export program "
                    "that it was compiled from"
                )

    def _told(self, error: Exception) -> str:
        """What a forward raised, with the names of its inputs."""

        def name(found: re.Match[str]) -> str:
            return self._arguments.inputs[int(found[1])].name if int(found[1]) < len(self._arguments.inputs) else ""

        told = re.sub(r"input_handles\[(\d+)\]", name, last_line(error))
        return re.sub(r"(aoti_torch_\w+)\(.*", r"\1 failed", told)

    def _check(self, name: str, trials: Sequence[tuple[int, int, str]] = _TRIALS) -> None:
        """Holds the model against its schema: names and widths of outputs, first and last ids, bags that are empty."""
        last = [feature.rows - 1 for feature in self.schema.features]
        for ids, length, told in trials:
            batch = _rows(self.schema, max(_PROBED, self._least), np.array(last) * ids, length)
            try:
                with torch.inference_mode():
                    result = self._forward([given(item, batch, self.schema) for item in self._arguments.inputs])
                    found = {task: tuple(scores.shape) for task, scores in named_outputs(result).items()}
                if set(found) != set(self.schema.tasks):
                    raise ArtifactError(
                        f"it returns {', '.join(found)} where the schema file has the tasks "
                        f"{', '.join(self.schema.tasks)}"
                    )
                scores_of(result, self.schema.outputs, batch)
            except Exception as error:  # whatever a model raises
                raise ArtifactError(
                    f"{name} and its schema file differ: on rows of {told}, {self._told(error)}; mend the schema file"
                ) from None


def _rows(schema: ModelSchema, rows: int, ids: NDArray[np.int64], length: int) -> Batch:
    """Rows of zeros, whose bags hold one id of each feature ``length`` times."""
    lengths = schema.bags(np.full((schema.num_features, rows), length))
    values = np.repeat(ids, lengths.sum(axis=1)).astype(schema.id_dtype)
    weights = np.ones(len(values), np.float32) if schema.weighted else None
    dense = np.zeros((rows, schema.dense_dim), np.float32)
    return Batch(rows, dense, lengths.ravel(), values, bool((lengths == 1).all()), weights)


def _bags(schema: ModelSchema, lengths: NDArray[np.int32]) -> Batch:
    """Rows with so many of each feature's last ids."""
    rows, lengths = lengths.shape[1], schema.bags(lengths)
    values = np.repeat(schema.rows - 1, lengths.sum(axis=1)).astype(schema.id_dtype)
    weights = np.ones(len(values), np.float32) if schema.weighted else None
    dense = np.ones((rows, schema.dense_dim), np.float32)
    return Batch(rows, dense, np.ascontiguousarray(lengths).ravel(), values, one_hot=False, weights=weights)


def _drawn(schema: ModelSchema, rows: int) -> Batch:
    """Rows by chance, bags of two: row i is the same whatever their number."""
    random = np.random.default_rng(1)
    dense = random.standard_normal((_MOST_TRIED, schema.dense_dim)).astype(np.float32)[:rows]
    ids = random.integers(0, schema.rows[:, None], (schema.num_features, 2 * _MOST_TRIED))
    lengths = schema.bags(np.full((schema.num_features, rows), 2))
    own = [ids[feature, :count] for feature, count in enumerate(lengths.sum(axis=1))]
    values = np.concatenate([*own, np.empty(0, np.int64)]).astype(schema.id_dtype)
    weights = np.ones(len(values), np.float32) if schema.weighted else None
    return Batch(rows, dense, lengths.ravel(), values, bool((lengths == 1).all()), weights)


def _hold_against(loaded: Loaded, arguments: Arguments, name: str) -> None:
    """Raises ArtifactError where the schema file says other things of the tables than the model's operations do, as far
    as these can be read."""
    try:
        readings = read_arguments(loaded, arguments, name)
    except ArtifactError as problem:
        log.debug("%s is not read: %s", name, problem)
        return
    check_readings(readings, arguments.schema, name)


def _check_keys(packaged: Packaged, inputs: Sequence[Argument], name: str) -> None:
    """Raises ArtifactError where a package takes another number of tensors, or a dict of others."""
    if len(packaged.keys) != len(inputs):
        raise ArtifactError(
            f"{name} takes {len(packaged.keys)} tensors, its schema file has {len(inputs)} inputs; give one for each, "
            "in this order"
        )
    for key, item in zip(packaged.keys, inputs, strict=True):
        if item.layout == "list":
            raise ArtifactError(f"{name}: a list is as many inputs as it has tensors; give {item.name} one for each")
        if key and item.name != key and not item.name.endswith("_" + key):
            raise ArtifactError(f"{name} takes {key} where its schema file has {item.name}; give them in its order")


def _check_constants(packaged: Packaged, schema: ModelSchema, name: str) -> None:
    """Raises ArtifactError where a package holds no tensor as large as a feature's table."""
    most = max(packaged.constants().values(), default=0)
    for feature in schema.features:
        if feature.rows * feature.dim > most:
            raise ArtifactError(
                f"{name} holds no table of {feature.rows} rows of {feature.dim} for the feature {feature.name}: mend "
                "the schema file; or serve the torch.export program, if the model maps ids before it looks them up"
            )
