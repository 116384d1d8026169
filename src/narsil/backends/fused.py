"""The fused engine of the compiled backend: forward.cpp, which runs a whole forward tile by tile without the GIL.

Receives the library that `narsil compile` built, packed weights and tables, both mapped and shared by all lanes and
processes; owns per lane nothing but scratch memory. A row's score has the same bits in any batch and at any place.

The library gets ids that were validated before the queue, and holds them against the tables once more: it costs nothing
beside the memory that they lead to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import CompiledInfo
from narsil.artifacts.packed import KINDS, Packed, read_packed
from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError, ForwardFailed

__all__ = ["PARTS", "ForwardLibrary", "FusedBackend", "Geometry", "Network", "described"]

PARTS = ("lookup", "dense", "interaction", "over", "rest")  # of a forward, by forward.cpp's numbers

_VERSION = 2  # of forward.cpp's structures
_BAD_ID, _BAD_LENGTHS = 1, 2
_TILE_FLOATS = 1 << 15  # between two parts of a forward: 128 KiB, an eighth of a common second-level cache
_TILE_ROWS = (12, 64)  # at least, so that blocks are full, and at most
_ALIGN = 64


class _Layer(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("inputs", "outputs", "kind", "shift", "levels")),
        *((name, c_void_p) for name in ("weights", "bias", "scale", "excess")),
    )


class _Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("dense_columns", "tables", "dim", "row_bytes", "dense_layers", "over_layers")),
        *((name, c_int64) for name in ("width", "tile_rows")),
        *((name, c_void_p) for name in ("layers", "table_bytes", "table_starts", "table_rows", "mean")),
    )


class _Rows(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "values_count", "wide_ids")),
        *((name, c_void_p) for name in ("dense", "values", "lengths")),
    )


class ForwardLibrary:
    """forward.so, loaded into the process."""

    def __init__(self, path: Path) -> None:
        """Raises ArtifactError where the file is no build of this Narsil's forward.cpp."""
        try:
            # Not resolved: what /proc/self/fd leads to has no name.
            code = ctypes.CDLL(str(path.absolute()))
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be loaded ({error}): compile the model again here, and keep it where code may run (not "
                "on a volume that is mounted noexec)"
            ) from None
        try:
            version: Any = code.narsil_forward_version
            self.forward: Any = code.narsil_forward
            self.scratch_bytes: Any = code.narsil_scratch_bytes
            self.plan: Any = code.narsil_plan
            self.plan_bytes: Any = code.narsil_plan_bytes
        except AttributeError as error:
            raise ArtifactError(f"{path} is no build of Narsil's forward ({error}); compile the model again") from None
        version.restype = c_int64
        if version() != _VERSION:
            raise ArtifactError(f"{path} was built from another Narsil's forward; compile the model again")
        self.scratch_bytes.argtypes, self.scratch_bytes.restype = (POINTER(_Model), c_int64), c_int64
        self.forward.argtypes = (POINTER(_Model), POINTER(_Rows), c_void_p, c_void_p, POINTER(c_double))
        self.forward.restype = c_int
        self.plan_bytes.argtypes, self.plan_bytes.restype = (c_void_p, c_int64), c_int64  # a Plan: see plans.py
        self.plan.argtypes, self.plan.restype = (c_void_p,) * 4, c_int


@dataclass(frozen=True)
class Geometry:
    """Where a DLRM's tables lie, and how its rows are laid out."""

    dense_dim: int  # D
    dim: int
    row_bytes: int
    starts: tuple[int, ...]  # (T,) bytes
    rows: tuple[int, ...]  # (T,)
    mean: tuple[bool, ...]  # (T,) whether bags are averaged

    @classmethod
    def of(cls, info: CompiledInfo, schema: ModelSchema) -> Geometry:
        """A compiled artifact's."""
        rows = tuple(feature.rows for feature in schema.features)
        mean = tuple(feature.pooling == "mean" for feature in schema.features)
        return cls(info.dense_dim, info.dim, info.row_bytes, info.offsets, rows, mean)


class Network:
    """A model as the library takes it: what all lanes share. Keeps the arrays that it points into."""

    def __init__(
        self,
        library: ForwardLibrary,
        geometry: Geometry,
        layers: Sequence[Packed],
        dense_layers: int,
        tables: NDArray[np.uint8],
    ) -> None:
        self.library = library
        self.geometry = geometry
        starts, rows = np.array(geometry.starts, np.int64), np.array(geometry.rows, np.int64)
        mean = np.array(geometry.mean, np.uint8)
        native = (_Layer * len(layers))(*map(described, layers))
        self._kept = (tuple(layers), tables, starts, rows, mean, native)
        extents = [extent for layer in layers for extent in (layer.shape.inputs, layer.shape.outputs)]
        width = -(-max(extents) // 64) * 64
        self.model = _Model(
            *(geometry.dense_dim, len(rows), geometry.dim, geometry.row_bytes, dense_layers),
            *(len(layers) - dense_layers, width, min(max(_TILE_FLOATS // width, _TILE_ROWS[0]), _TILE_ROWS[1])),
            *(ctypes.addressof(native), tables.ctypes.data, starts.ctypes.data, rows.ctypes.data, mean.ctypes.data),
        )

    @classmethod
    def load(cls, artifact: Artifact, info: CompiledInfo) -> Network:
        """Maps a folder's files. Raises ArtifactError where one does not fit the manifest."""
        if artifact.compiled is None or artifact.tables is None or artifact.weights is None:
            raise ArtifactError(f"{artifact.path} lacks its weights or its code; compile the model again")
        try:
            weights, tables = (np.memmap(path, np.uint8, mode="r") for path in (artifact.weights, artifact.tables))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{artifact.path} cannot be mapped: {error}; compile the model again") from None
        layers = read_packed(info.layers, weights)
        return cls(
            ForwardLibrary(artifact.compiled), Geometry.of(info, artifact.schema), layers, info.dense_layers, tables
        )


class FusedBackend(Backend):
    """A DLRM's forward in one call."""

    name = "compiled"

    def __init__(self, network: Network, schema: ModelSchema) -> None:
        self.schema = schema
        self.device = "cpu"
        (self._task,) = schema.tasks  # CompiledInfo has looked
        self._network = network
        self._scratch: NDArray[np.uint8] = np.empty(0, np.uint8)

    def run(self, batch: Batch) -> Scores:
        """As Backend.run; the batch's arrays are lent to the library, not copied."""
        return {self._task: self.score(batch)}

    def score(self, batch: Batch, seconds: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
        """(B,) float32. Adds to ``seconds``, (5,) float64, what each of PARTS took.

        Raises ForwardFailed on arrays that do not belong together, or an id outside of its table.
        """
        rows, model, library = batch.rows, self._network.model, self._network.library
        dense = np.ascontiguousarray(batch.dense, np.float32)
        wide = batch.values.dtype != np.int32
        values = np.ascontiguousarray(batch.values, np.int64 if wide else np.int32)
        lengths = None if batch.one_hot else np.ascontiguousarray(batch.lengths, np.int32)
        if dense.shape != (rows, model.dense_columns) or (lengths is not None and lengths.size != model.tables * rows):
            raise ForwardFailed(f"dense {dense.shape} and {batch.lengths.size} lengths do not make {rows} rows")
        lent = _Rows(
            *(rows, values.size, wide, dense.ctypes.data, values.ctypes.data),
            None if lengths is None else lengths.ctypes.data,
        )
        scratch = self._memory(library.scratch_bytes(byref(model), rows))
        scores = np.empty(rows, np.float32)
        parts = None if seconds is None else seconds.ctypes.data_as(POINTER(c_double))
        # The one long call: it runs without the GIL.
        status = library.forward(byref(model), byref(lent), scratch, scores.ctypes.data, parts)
        if status == _BAD_ID:
            raise ForwardFailed("an id lies outside of its feature's table")
        if status == _BAD_LENGTHS:
            raise ForwardFailed("the bags' lengths do not add up to the ids")
        return scores

    def _memory(self, size: int) -> int:
        """The address of so many bytes of scratch memory, aligned."""
        if len(self._scratch) < size + _ALIGN:
            self._scratch = np.empty(size + size // 2 + _ALIGN, np.uint8)
        address = int(self._scratch.ctypes.data)
        return address + -address % _ALIGN

    def share(self) -> FusedBackend:
        """Another instance over the same weights and tables: some hundred kilobytes of scratch memory."""
        return FusedBackend(self._network, self.schema)


def described(layer: Packed) -> _Layer:
    """A layer as the library takes it; it points into the layer's arrays."""
    shape = layer.shape
    return _Layer(
        *(shape.inputs, shape.outputs, KINDS.index(shape.kind), shape.shift, shape.levels),
        *(array.ctypes.data for array in (layer.weights, layer.bias, layer.scale, layer.excess)),
    )
