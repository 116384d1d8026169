"""Rows from a file, for judging a compiled model: what `examples/train_dlrm.py` leaves beside its checkpoint.

Receives an `.npz` file with

    dense     (N, D)
    ids       (N, T): one id in each bag; or else
    lengths   (N, T) of the bags, and
    values    (sum of lengths,) their ids: all bags of row 0 first, in the schema's order of features
    weights   (sum of lengths,) beside values or ids, where the model takes weights; optional
    labels    (N,) where the model scores one task, else (N, tasks): 0 or 1, for the AUC; optional

and produces a Calibration whose rows fit the schema. Nothing in the file is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.files import check_readable
from narsil.artifacts.rows import of_bags
from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Batch, Floats, Ints
from narsil.errors import ArtifactError, first_line

__all__ = ["Calibration", "load_calibration"]

_NAMES = ("dense", "ids", "lengths", "values", "weights", "labels")
_BATCH_ROWS = 500

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Calibration:
    """Rows with bags of any length."""

    dense: Floats  # (N, D)
    lengths: NDArray[np.int32]  # (N, T)
    values: Ints  # (sum of lengths,) sample-major
    weights: Floats | None = None  # beside values
    labels: Floats | None = None  # (N, tasks) 0 or 1, in the schema's order of tasks

    def __len__(self) -> int:
        return len(self.dense)

    def of_tasks(self, places: Sequence[int]) -> Calibration:
        """The same with the labels of these tasks alone."""
        return self if self.labels is None else replace(self, labels=self.labels[:, list(places)])

    def batches(self) -> Iterator[Batch]:
        """All rows, in order, key-major within each batch."""
        stops = np.cumsum(self.lengths.sum(axis=1), dtype=np.int64)
        for start in range(0, len(self), _BATCH_ROWS):
            lengths = self.lengths[start : start + _BATCH_ROWS]
            last = int(stops[start + len(lengths) - 1])
            ids = slice(last - int(lengths.sum()), last)
            order = np.arange(lengths.size).reshape(lengths.shape).T.ravel()
            place = of_bags(lengths.ravel(), order)
            yield Batch(
                len(lengths),
                self.dense[start : start + _BATCH_ROWS],
                lengths.ravel()[order],
                self.values[ids][place],
                one_hot=bool((lengths == 1).all()),
                weights=None if self.weights is None else self.weights[ids][place],
            )


def load_calibration(path: Path, schema: ModelSchema) -> Calibration:
    """The rows in a file. Raises ArtifactError, naming the array, where they are unreadable or do not fit."""
    arrays = _arrays(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ArtifactError(f"{path}: {name} holds {array.dtype}, which are no numbers")
    dense = _table(arrays, "dense", schema.dense_dim, path)
    if not len(dense):
        raise ArtifactError(f"{path}: dense has no rows; at least 1 is needed")
    if not (np.isfinite(dense) | (np.isnan(dense) & schema.takes_nan)).all():
        taken = f", or NaN in the columns {', '.join(map(str, schema.nan_columns))}" if schema.nan_columns else ""
        raise ArtifactError(f"{path}: dense must be finite{taken}")
    lengths, values = _bags(arrays, schema, path)
    labels = None if "labels" not in arrays else _by_task(arrays["labels"], len(schema.tasks), path)
    for name, rows in (("bags", lengths), ("labels", labels)):
        if rows is not None and len(rows) != len(dense):
            raise ArtifactError(
                f"{path}: {name} and dense must have the same number of rows, not {len(rows)} and {len(dense)}"
            )
    if labels is not None and not np.isin(labels, (0, 1)).all():
        raise ArtifactError(f"{path}: labels must be 0 or 1")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(dense, np.float32)
    if np.isinf(numbers).any():
        raise ArtifactError(f"{path}: dense has numbers beyond those of float32")
    return Calibration(
        numbers,
        np.ascontiguousarray(lengths, np.int32),
        np.ascontiguousarray(values, schema.id_dtype),
        _weights(arrays, len(values), schema, path),
        None if labels is None else labels.astype(np.float32),
    )


def _table(arrays: Arrays, name: str, columns: int, path: Path) -> NDArray[Any]:
    """An array of so many columns."""
    if name not in arrays:
        raise ArtifactError(
            f"{path} has no array {name}; calibration files hold dense, ids (or lengths and values) and, optionally, "
            "weights and labels"
        )
    if arrays[name].ndim != 2 or arrays[name].shape[1] != columns:
        raise ArtifactError(f"{path}: {name} has shape {arrays[name].shape}; the model needs (rows, {columns})")
    return arrays[name]


def _bags(arrays: Arrays, schema: ModelSchema, path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """((N, T) lengths, (sum,) ids within their tables)."""
    if "ids" in arrays and ("lengths" in arrays or "values" in arrays):
        raise ArtifactError(f"{path} has ids and lengths or values; give one id a bag as ids, or else the other two")
    if "lengths" in arrays or "values" in arrays:
        lengths = _table(arrays, "lengths", schema.num_features, path)
        if "values" not in arrays or arrays["values"].ndim != 1:
            raise ArtifactError(f"{path}: lengths come with values, a list of the ids of all bags")
        values = arrays["values"]
        if not np.issubdtype(lengths.dtype, np.integer):
            raise ArtifactError(f"{path}: lengths must be whole numbers")
        # The largest first: a sum of such as are no lengths may wrap.
        most = min(len(values), np.iinfo(np.int32).max)
        if lengths.size and (lengths.min() < 0 or lengths.max() > most):
            raise ArtifactError(f"{path}: lengths must lie between 0 and {most}, the number of values")
        if int(lengths.sum(dtype=np.int64)) != len(values):
            raise ArtifactError(
                f"{path}: lengths add up to {lengths.sum(dtype=np.int64)}, and there are {len(values)} values"
            )
    else:
        ids = _table(arrays, "ids", schema.num_features, path)
        lengths, values = np.ones(ids.shape, np.int32), ids.ravel()
    if not np.issubdtype(values.dtype, np.integer):
        raise ArtifactError(f"{path}: ids must be whole numbers")
    least, limits = (np.repeat(np.tile(each, len(lengths)), lengths.ravel()) for each in (schema.least, schema.rows))
    if ((values < least) | (values >= limits)).any():
        raise ArtifactError(f"{path}: ids lie outside of the model's tables; is it another model's file?")
    return lengths, values


def _weights(arrays: Arrays, count: int, schema: ModelSchema, path: Path) -> Floats | None:
    """(sum,); ones where the model takes weights and the file has none."""
    if "weights" not in arrays:
        return np.ones(count, np.float32) if schema.weighted else None
    if not schema.weighted:
        raise ArtifactError(f"{path} has weights, and the model takes none; leave them out")
    weights = arrays["weights"].ravel()
    if len(weights) != count:
        raise ArtifactError(f"{path}: there are {len(weights)} weights and {count} ids")
    with np.errstate(over="ignore"):
        weights = weights.astype(np.float32)
    if not np.isfinite(weights).all():
        raise ArtifactError(f"{path}: weights must be finite")
    return weights


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Those of a calibration that the file has. Raises ArtifactError where it cannot be read."""
    check_readable(path)
    made = "write it with numpy.savez"
    with path.open("rb") as start:
        if start.read(2) != b"PK":  # numpy would advise to unpickle it
            raise ArtifactError(f"{path} is no .npz file, which is a zip of arrays; {made}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in _NAMES if name in file}
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
