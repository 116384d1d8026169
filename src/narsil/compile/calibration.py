"""Rows from a file, for judging a compiled model: what `examples/train_dlrm.py` leaves beside its checkpoint.

Receives an `.npz` file with ``dense`` (N, D), ``ids`` (N, T) and, for the AUC, ``labels``, (N,) where the model scores
one task and else (N, tasks); produces a Calibration whose rows fit the schema. Nothing in the file is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.files import check_readable
from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Floats, Ints
from narsil.errors import ArtifactError, first_line

__all__ = ["Calibration", "load_calibration"]


@dataclass(frozen=True)
class Calibration:
    """Rows of one id per feature."""

    dense: Floats  # (N, D)
    ids: Ints  # (N, T), sample-major
    labels: Floats | None = None  # (N, tasks) 0 or 1, in the schema's order of tasks

    def __len__(self) -> int:
        return len(self.dense)


def load_calibration(path: Path, schema: ModelSchema) -> Calibration:
    """The rows in a file. Raises ArtifactError, naming the array, where they are unreadable or do not fit."""
    arrays = _arrays(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ArtifactError(f"{path}: {name} holds {array.dtype}, which are no numbers")
    for name, columns in (("dense", schema.dense_dim), ("ids", schema.num_features)):
        if name not in arrays:
            raise ArtifactError(
                f"{path} has no array {name}; calibration files hold dense, ids and, optionally, labels"
            )
        if arrays[name].ndim != 2 or arrays[name].shape[1] != columns:
            raise ArtifactError(f"{path}: {name} has shape {arrays[name].shape}; the model needs (rows, {columns})")
    dense, ids, labels = arrays["dense"], arrays["ids"], arrays.get("labels")
    if labels is not None:
        labels = _by_task(labels, len(schema.tasks), path)
    if len(dense) != len(ids) or not len(dense) or (labels is not None and len(labels) != len(dense)):
        raise ArtifactError(f"{path}: dense, ids and labels must have the same number of rows, at least 1")
    if not np.issubdtype(ids.dtype, np.integer) or not np.isfinite(dense).all():
        raise ArtifactError(f"{path}: ids must be whole numbers and dense finite")
    if ids.min() < 0 or (ids.max(axis=0) >= schema.rows).any():
        raise ArtifactError(f"{path}: ids lie outside of the model's tables; is it another model's file?")
    if labels is not None and not np.isin(labels, (0, 1)).all():
        raise ArtifactError(f"{path}: labels must be 0 or 1")
    return Calibration(
        np.ascontiguousarray(dense, np.float32),
        np.ascontiguousarray(ids, schema.id_dtype),
        None if labels is None else labels.astype(np.float32),
    )


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Those of a calibration that the file has. Raises ArtifactError where it cannot be read."""
    check_readable(path)
    made = "write it with numpy.savez"
    with path.open("rb") as start:
        if start.read(2) != b"PK":  # numpy would advise to unpickle it
            raise ArtifactError(f"{path} is no .npz file, which is a zip of arrays; {made}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("dense", "ids", "labels") if name in file}
    except Exception as error:  # numpy's, and those of zipfile and zlib that it lets through
        raise ArtifactError(f"{path} cannot be read as .npz: {first_line(error)}; {made}") from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # numpy hands out a member of another format as it is
            raise ArtifactError(f"{path}: {name} is no array in numpy's format; {made}")
    return found


def _by_task(labels: NDArray[Any], tasks: int, path: Path) -> NDArray[Any]:
    """(N, tasks). Raises ArtifactError on another shape."""
    if labels.ndim == 1 and tasks == 1:
        return labels[:, None]
    if labels.ndim != 2 or labels.shape[1] != tasks:
        raise ArtifactError(
            f"{path}: labels has shape {labels.shape}; the model needs (rows, {tasks}), a column for each of its tasks"
        )
    return labels
