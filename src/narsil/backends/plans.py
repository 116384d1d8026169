"""Plans: programs that the fused engine runs step by step, a tile of rows at a time, without the GIL.

Receives the library that `narsil compile` built, a plan, packed layers, arrays and tables, all mapped and shared by
lanes and processes; owns per lane nothing but scratch memory. A row's scores have the same bits in any batch and at any
place. The structures are program.hpp's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.packed import Packed, read_leading
from narsil.artifacts.plan import OPERATIONS, Plan, PlanStep, Stream
from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend, Columns, by_task
from narsil.backends.fused import ForwardLibrary, described
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError, ForwardFailed
from narsil.program.steps import IdArray, IdExpression, evaluate_ids

__all__ = ["PlanBackend", "PlanNetwork"]

_BAD_ID, _BAD_LENGTHS = 1, 2
# Layers' weights are read once for each tile: where they are larger than a cache, tiles of many rows are what keeps the
# memory from deciding. 4 MiB of values lie in a third-level cache beside them.
_TILE_FLOATS = 1 << 20
_TILE_ROWS = (24, 96)  # at least, so that a layer's blocks are full, and at most
_ALIGN = 64


class _Operand(Structure):
    _fields_ = (("at", c_int64), ("pitch", c_int64), ("constant", c_void_p))


class _Step(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("operation", "function", "at", "pitch", "width")),
        ("operands", _Operand * 3),
        ("sizes", c_int64 * 4),
        ("data", c_void_p * 2),
        ("numbers", c_float * 3),
    )


class _Table(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("rows", "row_bytes", "dim", "kind", "scale_bytes", "mean", "feature", "stream")),
    )


class _Plan(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("dense_columns", "features", "steps", "arena", "transient", "codes")),
        *((name, c_int64) for name in ("sub_rows", "vectors", "outputs", "tile_rows")),
        ("program", c_void_p),
        ("tables", c_void_p),
    )


class _Bags(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "values_count", "wide_ids")),
        *((name, c_void_p) for name in ("dense", "lengths", "values", "weights")),
    )


class PlanNetwork:
    """A plan as the library takes it: what all lanes share. Keeps the arrays that it points into."""

    def __init__(
        self,
        library: ForwardLibrary,
        plan: Plan,
        layers: Sequence[Packed],
        arrays: Sequence[NDArray[Any]],
        tables: NDArray[np.uint8],
    ) -> None:
        """``plan`` has been checked. Raises ArtifactError where the runs of a move leave what they move."""
        self.library = library
        self.plan = plan
        # (T,) bool by stream: the features that look something up in it.
        self.takers = [
            np.isin(np.arange(plan.features), [table.feature for table in plan.tables if table.stream == number])
            for number in range(len(plan.streams))
        ]
        self.streams = tuple(_stream(stream, arrays) for stream in plan.streams)
        for step in plan.steps:
            if step.operation == "move":
                _check_runs(step, arrays[step.data[0]], plan)
        native_layers = [described(layer) for layer in layers]
        steps = (_Step * max(len(plan.steps), 1))(*(_native_step(step, native_layers, arrays) for step in plan.steps))
        described_tables = (_Table * max(len(plan.tables), 1))(
            *(
                _Table(
                    *(tables.ctypes.data + table.start, table.rows, table.row_bytes, table.dim, table.kind),
                    *(table.scale_bytes, table.mean, table.feature, table.stream),
                )
                for table in plan.tables
            )
        )
        self._kept = (tuple(layers), tuple(arrays), tables, native_layers, steps, described_tables)
        linear = [step for step in plan.steps if step.operation == "linear"]
        pairs = [step.sizes for step in plan.steps if step.operation == "pairs"]
        self.model = _Plan(
            *(plan.dense_columns, plan.features, len(plan.steps), plan.arena, plan.transient),
            max((step.operands[0].stride for step in linear), default=0),
            max((step.sizes[0] for step in linear), default=1),
            max((_up(count, 4) * _up(dim, 16) for count, dim in pairs), default=0),
            *(plan.columns, min(max(_TILE_FLOATS // max(plan.arena, 1), _TILE_ROWS[0]), _TILE_ROWS[1])),
            *(ctypes.addressof(steps), ctypes.addressof(described_tables)),
        )

    @classmethod
    def load(cls, artifact: Artifact, plan: Plan) -> PlanNetwork:
        """Maps a folder's files. Raises ArtifactError where one does not fit the manifest."""
        if artifact.compiled is None or artifact.tables is None or artifact.weights is None:
            raise ArtifactError(f"{artifact.path} lacks its weights or its code; compile the model again")
        try:
            weights, tables = (np.memmap(path, np.uint8, mode="r") for path in (artifact.weights, artifact.tables))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{artifact.path} cannot be mapped: {error}; compile the model again") from None
        layers, used = read_leading(plan.layers, weights)
        return cls(ForwardLibrary(artifact.compiled), plan, layers, plan.read_arrays(weights[used:]), tables)


class PlanBackend(Backend):
    """A program's forward in one call."""

    name = "compiled"

    def __init__(self, network: PlanNetwork, schema: ModelSchema, columns: Columns | None = None) -> None:
        """``columns``: those of each task, where the schema has some of the plan's tasks alone."""
        self.schema = schema
        self._columns = columns or dict(zip(schema.tasks, network.plan.outputs, strict=True))
        self.device = "cpu"
        self._network = network
        self._scratch: NDArray[np.uint8] = np.empty(0, np.uint8)

    def run(self, batch: Batch) -> Scores:
        """As Backend.run; the batch's arrays are lent to the library, not copied."""
        scores = self.score(batch)
        return by_task(scores, self._columns, self.schema.tasks)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """(B, columns) float32: all tasks' beside each other.

        Raises ForwardFailed on arrays that do not belong together, or an id outside of its table.
        """
        rows, model, library = batch.rows, self._network.model, self._network.library
        dense = np.ascontiguousarray(batch.dense, np.float32)
        wide = batch.values.dtype != np.int32
        kind = np.int64 if wide else np.int32
        lengths = None if batch.one_hot else np.ascontiguousarray(batch.lengths, np.int32)
        if dense.shape != (rows, model.dense_columns) or (
            lengths is not None and lengths.size != model.features * rows
        ):
            raise ForwardFailed(f"dense {dense.shape} and {batch.lengths.size} lengths do not make {rows} rows")
        values, weights = self._streams(batch, kind)
        by_stream = _pointers(values), _pointers(weights)
        lent = _Bags(
            *(rows, batch.values.size, wide, dense.ctypes.data, None if lengths is None else lengths.ctypes.data),
            *map(ctypes.addressof, by_stream),
        )
        scores = np.empty((rows, model.outputs), np.float32)
        scratch = self._memory(library.plan_bytes(byref(model), rows))
        # The one long call: it runs without the GIL.
        status = library.plan(byref(model), byref(lent), scratch, scores.ctypes.data)
        if status == _BAD_ID:
            raise ForwardFailed("an id lies outside of its feature's table")
        if status == _BAD_LENGTHS:
            raise ForwardFailed("the bags' lengths do not add up to the ids")
        if status:
            raise ForwardFailed(f"the plan has a step that its code does not know (status {status})")
        return scores

    def _streams(self, batch: Batch, kind: Any) -> tuple[list[NDArray[Any]], list[NDArray[Any] | None]]:
        """By stream: ids and weights, after what the model does to them."""
        values: list[NDArray[Any]] = []
        weights: list[NDArray[Any] | None] = []
        for (ids, weighing), takers in zip(self._network.streams, self._network.takers, strict=True):
            own = None if takers.all() else _ids_of(takers, batch)
            values.append(np.ascontiguousarray(batch.values, kind) if ids is None else _made(ids, batch, own, kind))
            weights.append(None if weighing is None else _made(weighing, batch, own, np.float32))
        return values, weights

    def _memory(self, size: int) -> int:
        """The address of so many bytes of scratch memory, aligned."""
        if len(self._scratch) < size + _ALIGN:
            self._scratch = np.empty(size + size // 2 + _ALIGN, np.uint8)
        address = int(self._scratch.ctypes.data)
        return address + -address % _ALIGN

    def share(self) -> PlanBackend:
        """Another instance over the same weights and tables: scratch memory alone."""
        return PlanBackend(self._network, self.schema, self._columns)


def _ids_of(features: NDArray[np.bool_], batch: Batch) -> NDArray[np.bool_]:
    """(N,): whether each id belongs to one of the features."""
    lengths = batch.lengths.reshape(len(features), -1).sum(axis=1)
    found = np.repeat(features, np.maximum(lengths, 0))
    if len(found) != len(batch.values):
        raise ForwardFailed("the bags' lengths do not add up to the ids")
    return found


def _made(expression: IdExpression, batch: Batch, own: NDArray[np.bool_] | None, kind: Any) -> NDArray[Any]:
    """(N,) of what is done to ids, or of their weights; zeros for those of which ``own`` is false, which nothing
    reads."""
    made = np.zeros(batch.values.shape, kind)
    ids = batch.values if own is None else batch.values[own]
    weights = batch.weights if own is None or batch.weights is None else batch.weights[own]
    with np.errstate(all="ignore"):
        made[slice(None) if own is None else own] = evaluate_ids(expression, ids, weights)
    return made


def _pointers(arrays: Sequence[NDArray[Any] | None]) -> Any:
    return (c_void_p * max(len(arrays), 1))(*(None if array is None else array.ctypes.data for array in arrays))


def _native_step(step: PlanStep, layers: Sequence[Structure], arrays: Sequence[NDArray[Any]]) -> _Step:
    pitch = 0 if step.transient else step.stride
    native = _Step(OPERATIONS.index(step.operation), step.function, step.at, pitch, step.width)
    for position, operand in enumerate(step.operands):
        constant = arrays[operand.array].ctypes.data if operand.array >= 0 else None
        native.operands[position] = _Operand(operand.at, 0 if operand.transient else operand.stride, constant)
    for position, size in enumerate(step.sizes):
        native.sizes[position] = size
    for position, number in enumerate(step.data):
        if step.operation == "linear":
            native.data[position] = ctypes.addressof(layers[number])
        else:
            native.data[position] = arrays[number].ctypes.data if number >= 0 else None
    for position, value in enumerate((*step.numbers, None, None, None)[:3]):
        native.numbers[position] = float("nan") if value is None else value
    return native


def _check_runs(step: PlanStep, runs: NDArray[np.int64], plan: Plan) -> None:
    """Raises ArtifactError where a run leaves what it moves. A pitch of 0 is that of a value with one row for all."""
    at, pitch, column, to, length = runs[: 5 * step.sizes[0]].reshape(-1, 5).T
    room = np.where(pitch == 0, plan.transient - at, pitch)
    inside = (at >= 0) & (pitch >= 0) & (at + pitch <= np.where(pitch == 0, plan.transient, plan.arena))
    inside &= (column >= 0) & (to >= 0) & (length > 0) & (length <= room) & (column <= room - length)
    if not (inside & (length <= step.width) & (to <= step.width - length)).all():
        raise ArtifactError("a move of the plan leaves the values that it moves; compile the model again")


def _stream(stream: Stream, arrays: Sequence[NDArray[Any]]) -> tuple[IdExpression | None, IdExpression | None]:
    """(ids, weights) of a stream, once they have given a number for an id. Raises ArtifactError where they are no such
    expressions."""
    found = None if stream.ids is None else _expression(stream.ids, arrays), _expression(stream.weights, arrays)
    try:
        for expression in found:
            if expression is not None and not isinstance(expression, IdExpression):
                raise TypeError(f"it is {expression!r:.32}")
            if expression is not None:
                with np.errstate(all="ignore"):
                    np.asarray(evaluate_ids(expression, np.zeros(1, np.int32), np.ones(1, np.float32))).astype(
                        np.float64
                    )
    except Exception as error:  # of whatever a function makes of what it is not made for
        raise ArtifactError(f"a stream of the plan is no expression ({error}); compile the model again") from None
    return found


def _expression(data: Any, arrays: Sequence[NDArray[Any]]) -> Any:
    """The inverse of how compile/lowering.py writes one."""
    if isinstance(data, str):
        return IdExpression(data)
    if isinstance(data, list) and len(data) == 2 and data[0] == "array":
        number = data[1]
        if type(number) is not int or not 0 <= number < len(arrays) or arrays[number].dtype != np.int64:
            raise ArtifactError("a stream of the plan takes ids out of no array; compile the model again")
        return IdArray(arrays[number])
    if isinstance(data, list) and data and isinstance(data[0], str):
        return IdExpression(data[0], tuple(_expression(item, arrays) for item in data[1:]))
    if data is None or isinstance(data, int | float):
        return data
    raise ArtifactError("a stream of the plan is no expression; compile the model again")


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
