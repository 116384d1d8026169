"""FBGEMM's inference operator over quantized tables, as it stands in a ScriptModule: its tables, checked.

Receives IntNBitTableBatchedEmbeddingBagsCodegen modules; produces the tables' rows, places and names. FBGEMM's CPU
operator trusts what they say, so that nothing here may be taken for granted.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.finite import bad_weights, first_bad_row, first_bad_scale
from narsil.artifacts.schema import Pooling
from narsil.errors import ArtifactError
from narsil.program.steps import Table

__all__ = [
    "POOLING",
    "check_table_values",
    "check_tables",
    "device_of",
    "dims_of",
    "label",
    "table_at",
    "table_operators",
]

POOLING: dict[int, Pooling] = {0: "sum", 1: "mean"}

_TBE = "IntNBitTableBatchedEmbeddingBagsCodegen"
_PLACEMENTS = {0: "weights_dev", 1: "weights_uvm", 2: "weights_uvm", 3: "weights_host"}  # fbgemm EmbeddingLocation
_FLOATING = {0: np.float32, 1: np.float16}  # of FBGEMM's SparseType numbers, those whose rows are plain values
_SCALES = {4: np.float16, 8: np.float32}  # by the bytes of a row's scale and bias together


def table_operators(module: Any) -> list[Any]:
    """FBGEMM's operators over quantized tables in a ScriptModule, wherever they stand."""
    return [part for _, part in module.named_modules() if getattr(part, "original_name", "") == _TBE]


def table_at(tbe: Any, position: int, name: str) -> Table:
    """The table of an operator's feature, in host memory. ``check_tables`` has held it against the weights."""
    kind, dim = int(tbe.weights_tys[position]), dims_of(tbe)[position]
    weights = getattr(tbe, _PLACEMENTS[int(tbe.weights_placements[position])])
    return Table(
        name=label(tbe, int(tbe.feature_table_map[position])),
        data=weights.detach().cpu().numpy(),
        start=int(tbe.weights_offsets[position]),
        rows=int(tbe.rows_per_table[position]),
        dim=dim,
        kind=kind,
        row_bytes=_row_bytes(tbe, dim, kind, name),
        scale_bytes=int(tbe.scale_bias_size_in_bytes),
    )


def check_tables(tbe: Any, name: str) -> None:
    """Raises ArtifactError unless every row 0 .. rows - 1 of every table lies inside the weights.

    FBGEMM's CPU operator checks ids only against the table's padded size, and trusts offsets, dims and types.
    """
    rows, dims = tbe.rows_per_table.tolist(), dims_of(tbe)
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


def check_table_values(tbe: Any, name: str) -> None:
    """Raises ArtifactError, naming the table and the row, where a lookup would give NaN or infinity. The tables lie
    inside the weights, as check_tables has found."""
    rows, dims = tbe.rows_per_table.tolist(), dims_of(tbe)
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
            raise ArtifactError(
                bad_weights(name, f"row {bad} of table {label(tbe, int(tbe.feature_table_map[table]))}")
            )


def _leading_bytes(stored: Any, size: int) -> NDArray[np.uint8]:
    """(rows, size) the first bytes of each row, in host memory: a view where they lie there."""
    leading = stored[:, :size]
    found: NDArray[np.uint8] = (leading if leading.device.type == "cpu" else leading.contiguous().cpu()).numpy()
    return found


def label(tbe: Any, table: int) -> str:
    """A table's name."""
    names = list(getattr(tbe, "feature_names", []))  # despite its name: the tables' names
    if table < len(names) and names[table]:
        return str(names[table])
    per_table = getattr(tbe, "feature_names_per_table", None)
    return f"t_{per_table[table][0]}" if per_table else f"number {table}"


def dims_of(tbe: Any) -> list[int]:
    """Of each feature's table."""
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


def device_of(tbes: list[Any], name: str) -> str:
    """The one that all tables lie on. Raises ArtifactError where there are several."""
    devices = {str(tbe.current_device) for tbe in tbes}
    if len(devices) != 1:
        raise ArtifactError(f"{name}: tables lie on several devices ({', '.join(sorted(devices))}); package for one")
    return devices.pop()
