"""The inductor engine of the compiled backend: FBGEMM's lookup, then the core as AOTInductor compiled it.

Receives an Artifact with model.pt2 and tables.bin; owns a container of the core per instance, or on a GPU a stream. The
code and the tables are one for all instances from ``share``: on the CPU tables are mapped, so that their pages are the
system's own and are shared by processes as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401 - registers the lookup
import numpy as np
import torch
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import DEVICE, HOST, INT8, CompiledInfo, machine_problem
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.whole import Call, Whole, expression_of
from narsil.backends.aoti import Container, CoreLibrary
from narsil.backends.base import Backend, Columns, by_task, columns_of
from narsil.backends.kernels import bucket
from narsil.dataflow import Batch, Floats, Scores
from narsil.errors import ArtifactError, ConfigError, ForwardFailed
from narsil.program.steps import evaluate_ids

__all__ = ["CudaBackend", "InductorBackend", "WholeBackend", "gpu_flags", "load_inductor"]

_FP32 = 0  # FBGEMM's SparseType of what the lookup gives
_POOLING = {"sum": 0, "mean": 1}
_LEAST_ROWS = 2  # the compiled code's; a single row is scored beside a row of padding
_TILE_ROWS = 64  # of a batch-invariant run


def load_inductor(
    artifact: Artifact, info: CompiledInfo, intra_op_threads: int = 1, *, batch_invariant: bool = False
) -> Backend:
    """As load_compiled."""
    if problem := _problem(info):
        raise ArtifactError(f"{artifact.path} cannot run compiled: {problem}")
    if info.whole is not None:
        return WholeBackend.load(artifact, info, info.whole, intra_op_threads, batch_invariant=batch_invariant)
    if info.device == "cpu":
        return InductorBackend.load(artifact, info, intra_op_threads, batch_invariant=batch_invariant)
    if batch_invariant:
        raise ConfigError("batch_invariant is not to be had on a GPU; compile for the CPU")
    if intra_op_threads > 1:
        raise ConfigError(f"intra_op_threads is {intra_op_threads}, and a forward on a GPU has none; leave it at 1")
    return CudaBackend.load(artifact, info)


def gpu_flags() -> tuple[str, ...]:
    """What the GPU of this machine runs, as its compilers name it; empty without one."""
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (f"sm_{major}{minor}",)


def _problem(info: CompiledInfo) -> str | None:
    """As machine_problem; the code calls into torch, whose interface is each version's own."""
    if problem := machine_problem(info, gpu_flags() if info.device == "cuda" else ()):
        return problem
    here = str(torch.__version__)
    if info.torch != here:
        return (
            f"it was compiled with torch {info.torch} and this is torch {here}; compile the model again here with "
            "`narsil compile`"
        )
    return None


class PooledLookup:
    """FBGEMM's pooled lookup in INT8 tables, on the device that the weights lie on."""

    def __init__(self, weights: torch.Tensor, info: CompiledInfo) -> None:
        tables, device = info.tables, weights.device
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        place = HOST if device.type == "cpu" else DEVICE
        self.width = tables * info.dim
        self._operator: Callable[..., torch.Tensor] = (
            torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default
        )
        self._before = (
            *(weights, nothing, torch.full((tables,), place, dtype=torch.int32, device=device)),
            *(torch.tensor(info.offsets, device=device), torch.full((tables,), INT8, dtype=torch.uint8, device=device)),
            *(torch.arange(0, self.width + 1, info.dim, dtype=torch.int32, device=device), self.width),
            *(0, 0, info.dim, 0, 0),  # the largest dim among the tables of each type
        )
        self._after = (_POOLING[info.pooling], None, _FP32, None, None, info.row_alignment)

    def __call__(self, values: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """(N,) ids, (T * B + 1,) where each bag begins, of the same type -> (B, T * dim). Drops the GIL."""
        return self._operator(*self._before, values, ends, *self._after)


@dataclass(frozen=True)
class _Shared:
    """What all instances use together."""

    library: CoreLibrary
    lookup: PooledLookup
    info: CompiledInfo


class _ContainerBackend(Backend):
    """What AOTInductor's code asks of its callers on a CPU, whatever it was compiled of; owns a container of it."""

    name = "compiled"
    device = "cpu"

    def __init__(
        self, schema: ModelSchema, container: Container, intra_op_threads: int, *, batch_invariant: bool
    ) -> None:
        self.schema = schema
        self._container = container
        self._threads = intra_op_threads
        self._invariant = batch_invariant

    def bucket(self, rows: int) -> int:
        """See Backend.bucket: oneDNN compiles for every number of rows."""
        if self._invariant:
            return -(-rows // _TILE_ROWS) * _TILE_ROWS
        return max(bucket(rows), _LEAST_ROWS)

    def thread_setup(self) -> None:
        """Sets this thread's intra-op thread count: torch keeps it per thread."""
        torch.set_num_threads(self._threads)

    def close(self) -> None:
        """Frees the container."""
        self._container.close()


class InductorBackend(_ContainerBackend):
    """FBGEMM's lookup, then the core as AOTInductor compiled it."""

    def __init__(
        self, shared: _Shared, schema: ModelSchema, intra_op_threads: int = 1, *, batch_invariant: bool = False
    ) -> None:
        super().__init__(schema, Container(shared.library), intra_op_threads, batch_invariant=batch_invariant)
        self._shared = shared
        (self._task,) = schema.tasks  # CompiledInfo has looked
        self._ones: NDArray[Any] = np.arange(1, dtype=schema.id_dtype)

    @classmethod
    def load(
        cls, artifact: Artifact, info: CompiledInfo, intra_op_threads: int = 1, *, batch_invariant: bool = False
    ) -> InductorBackend:
        """As load_inductor, which has looked whether it can run here."""
        assert artifact.compiled is not None and artifact.tables is not None  # noqa: PT018, S101 - info_of has looked
        # Copy on write: nothing ever writes, and torch warns of memory that it may not.
        weights = torch.from_numpy(np.memmap(artifact.tables, dtype=np.uint8, mode="c"))
        shared = _Shared(CoreLibrary(artifact.compiled, info.signature), PooledLookup(weights, info), info)
        return cls(shared, artifact.schema, intra_op_threads, batch_invariant=batch_invariant)

    def run(self, batch: Batch) -> Scores:
        """As Backend.run; dense features are lent to the compiled code, not copied."""
        with torch.inference_mode():
            pooled = self._shared.lookup(_tensor(batch.values), _tensor(self._ends(batch)))
        dense = np.ascontiguousarray(batch.dense)
        scores = self._by_tiles(dense, pooled) if self._invariant else self._padded(dense, pooled, _LEAST_ROWS)
        return {self._task: scores}

    def _padded(self, dense: Floats, pooled: torch.Tensor, least: int) -> Floats:
        """The scores of rows that are brought to at least ``least`` with zeros."""
        rows = len(dense)
        if rows < least:
            dense = np.concatenate([dense, np.zeros((least - rows, dense.shape[1]), np.float32)])
            pooled = torch.cat([pooled, pooled.new_zeros(least - rows, pooled.shape[1])])
        return self._container.run(dense, pooled)[:rows]

    def _by_tiles(self, dense: Floats, pooled: torch.Tensor) -> Floats:
        """The scores, by forwards that all have the same number of rows: a kernel that is chosen by that number, or
        cuts its sums by it, is then always the same one."""
        starts = range(0, len(dense), _TILE_ROWS)
        parts = [
            self._padded(dense[start : start + _TILE_ROWS], pooled[start : start + _TILE_ROWS], _TILE_ROWS)
            for start in starts
        ]
        return np.concatenate(parts)

    def _ends(self, batch: Batch) -> NDArray[Any]:
        """As _ends_of; those of one id a bag are kept."""
        bags = len(batch.lengths)
        if not batch.one_hot:
            return _ends_of(batch)
        if len(self._ones) <= bags or self._ones.dtype != batch.values.dtype:
            self._ones = np.arange(2 * bags + 1, dtype=batch.values.dtype)
        return self._ones[: bags + 1]

    def share(self) -> InductorBackend:
        """Another container over the same code and tables."""
        return InductorBackend(self._shared, self.schema, self._threads, batch_invariant=self._invariant)


class TableLookup:
    """FBGEMM's pooled lookup in tables of any kind, for the bags of some of a request's features."""

    def __init__(self, weights: torch.Tensor, call: Call) -> None:
        tables, count = call.tables, len(call.tables)
        nothing = torch.empty(0, dtype=torch.uint8)
        most = [max((table.dim for table in tables if table.kind == kind), default=0) for kind in (4, 3, 2, 1, 0)]
        self._features = [table.feature for table in tables]
        self._operator: Callable[..., torch.Tensor] = (
            torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default
        )
        self._before = (
            *(weights, nothing, torch.full((count,), HOST, dtype=torch.int32)),
            torch.tensor([table.start for table in tables], dtype=torch.int64),
            torch.tensor([table.kind for table in tables], dtype=torch.uint8),
            torch.tensor(np.cumsum([0, *(table.dim for table in tables)]), dtype=torch.int32),
            *(call.width, *most),
        )
        self._pooling = _POOLING["mean" if call.mean else "sum"]
        self._after = (_FP32, None, None, call.row_alignment)

    def __call__(
        self, rows: int, ends: NDArray[Any], values: NDArray[Any], weights: NDArray[np.float32] | None
    ) -> torch.Tensor:
        """Where each of the request's bags begins, (T * B + 1,), and what is in them -> (B, sum of dims)."""
        order = self._features
        if order != list(range((len(ends) - 1) // max(rows, 1))):
            spans = [(int(ends[feature * rows]), int(ends[(feature + 1) * rows])) for feature in order]
            lengths = np.concatenate([np.diff(ends[feature * rows : (feature + 1) * rows + 1]) for feature in order])
            values = np.concatenate([values[start:stop] for start, stop in spans])
            weights = None if weights is None else np.concatenate([weights[start:stop] for start, stop in spans])
            ends = np.concatenate([[0], np.cumsum(lengths)])
        given = None if weights is None else _tensor(weights)
        ids, begins = _tensor(np.ascontiguousarray(values)), _tensor(ends.astype(values.dtype, copy=False))
        return self._operator(*self._before, ids, begins, self._pooling, given, *self._after)


@dataclass(frozen=True)
class _WholeShared:
    """What all instances of a whole program use together."""

    library: CoreLibrary
    whole: Whole
    lookups: tuple[TableLookup, ...]
    streams: tuple[tuple[Any, Any], ...]  # expressions of ids and of weights
    columns: Columns  # of all of the program's tasks, whichever of them a schema picks


class WholeBackend(_ContainerBackend):
    """A program: FBGEMM's lookups, then all between them and the scores as AOTInductor compiled it."""

    def __init__(
        self, shared: _WholeShared, schema: ModelSchema, intra_op_threads: int = 1, *, batch_invariant: bool = False
    ) -> None:
        container = Container(shared.library, len(shared.lookups) + shared.whole.dense + shared.whole.lengths)
        super().__init__(schema, container, intra_op_threads, batch_invariant=batch_invariant)
        self._shared = shared

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        info: CompiledInfo,
        whole: Whole,
        intra_op_threads: int = 1,
        *,
        batch_invariant: bool = False,
    ) -> WholeBackend:
        """As load_inductor, which has looked whether it can run here."""
        assert artifact.compiled is not None and artifact.tables is not None  # noqa: PT018, S101 - info_of has looked
        # Copy on write: nothing ever writes, and torch warns of memory that it may not.
        weights = torch.from_numpy(np.memmap(artifact.tables, dtype=np.uint8, mode="c"))
        lookups = tuple(TableLookup(weights, call) for call in whole.calls)
        streams = tuple((expression_of(stream.ids), expression_of(stream.weights)) for stream in whole.streams)
        library = CoreLibrary(artifact.compiled, info.signature)
        shared = _WholeShared(library, whole, lookups, streams, columns_of(artifact.schema))
        return cls(shared, artifact.schema, intra_op_threads, batch_invariant=batch_invariant)

    def run(self, batch: Batch) -> Scores:
        """As Backend.run."""
        least = _TILE_ROWS if self._invariant else _LEAST_ROWS
        step = _TILE_ROWS if self._invariant else max(batch.rows, _LEAST_ROWS)
        columns = sum(width for _, width in self._shared.columns.values())
        with torch.inference_mode():
            inputs = self._inputs(batch)
            parts = []
            for start in range(0, batch.rows, step):
                given = [each[start : start + step] for each in inputs]
                rows = len(given[0])
                if rows < least:
                    given = [torch.cat([each, each.new_zeros(least - rows, each.shape[1])]) for each in given]
                parts.append(self._container.run_all(given, columns)[:rows])
        scores = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return by_task(scores, self._shared.columns, self.schema.tasks)

    def _inputs(self, batch: Batch) -> list[torch.Tensor]:
        """What the compiled code takes: dense columns, and what each call gives."""
        inputs = []
        if self._shared.whole.dense:
            dense = np.ascontiguousarray(batch.dense, np.float32)
            if dense.shape != (batch.rows, self.schema.dense_dim):
                raise ForwardFailed(f"dense {dense.shape} does not make {batch.rows} rows")
            inputs.append(_tensor(dense))
        ends = np.concatenate([[0], np.cumsum(batch.lengths, dtype=np.int64)])
        if ends[-1] != len(batch.values) or len(ends) != self.schema.num_features * batch.rows + 1:
            raise ForwardFailed("the bags' lengths do not add up to the ids")
        if self._shared.whole.lengths:
            lengths = batch.lengths.reshape(self.schema.num_features, batch.rows).T
            inputs.append(_tensor(np.ascontiguousarray(lengths, np.float32)))
        streams = [self._stream(batch, *stream) for stream in self._shared.streams]
        for lookup, call in zip(self._shared.lookups, self._shared.whole.calls, strict=True):
            inputs.append(lookup(batch.rows, ends, *streams[call.stream]))
        return inputs

    def _stream(self, batch: Batch, ids: Any, weights: Any) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """What is looked up, and its weights, after what the model does to them."""
        shape = batch.values.shape
        with np.errstate(all="ignore"):
            values = batch.values
            if ids is not None:
                values = np.broadcast_to(evaluate_ids(ids, batch.values, batch.weights), shape).astype(np.int64)
            if weights is None:
                return values, None
            given = np.broadcast_to(evaluate_ids(weights, batch.values, batch.weights), shape)
            return values, np.ascontiguousarray(given, np.float32)

    def share(self) -> WholeBackend:
        """Another container over the same code and tables."""
        return WholeBackend(self._shared, self.schema, self._threads, batch_invariant=self._invariant)


class CudaBackend(Backend):
    """The inductor engine on a GPU: lookup and core on a stream of the lane's own, tables in the GPU's memory."""

    name = "compiled"

    def __init__(self, shared: _Gpu, schema: ModelSchema) -> None:
        self.schema = schema
        self.device = "cuda"
        self._shared = shared
        (self._task,) = schema.tasks  # CompiledInfo has looked
        self._stream = torch.cuda.Stream()
        # torch's own runner: it holds the GIL, but only for as long as it takes to start the kernels.
        self._run = torch._inductor.aoti_load_package(str(shared.package))

    @classmethod
    def load(cls, artifact: Artifact, info: CompiledInfo) -> CudaBackend:
        """As load_inductor, which has looked whether it can run here."""
        assert artifact.compiled is not None and artifact.tables is not None  # noqa: PT018, S101 - info_of has looked
        weights = torch.from_numpy(np.memmap(artifact.tables, dtype=np.uint8, mode="c")).cuda()
        return cls(_Gpu(artifact.compiled, PooledLookup(weights, info)), artifact.schema)

    def run(self, batch: Batch) -> Scores:
        """As Backend.run."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            host = (batch.values, _ends_of(batch), np.ascontiguousarray(batch.dense))
            values, ends, dense = (_tensor(array).cuda(non_blocking=True) for array in host)
            pooled = self._shared.lookup(values, ends)
            rows = max(batch.rows, _LEAST_ROWS)
            if batch.rows < rows:
                dense, pooled = dense.repeat(rows, 1), pooled.repeat(rows, 1)
            scores: NDArray[np.float32] = self._run(dense, pooled)[: batch.rows].cpu().numpy()
        return {self._task: scores}

    def share(self) -> CudaBackend:
        """Another stream and another runner over the same tables."""
        return CudaBackend(self._shared, self.schema)


@dataclass(frozen=True)
class _Gpu:
    """What all instances on a GPU use together."""

    package: Path
    lookup: PooledLookup


def _ends_of(batch: Batch) -> NDArray[Any]:
    """(T * B + 1,) where each bag begins in values, in their type."""
    ends = np.zeros(len(batch.lengths) + 1, dtype=batch.values.dtype)
    np.cumsum(batch.lengths, out=ends[1:])
    return ends


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())
