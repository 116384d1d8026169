"""Runs a folder that ``narsil compile`` wrote (backend name "compiled"), with the engine that it was compiled for.

``load_compiled`` gives a FusedBackend (see fused.py) or an InductorBackend: FBGEMM's lookup, then the core as
AOTInductor compiled it. The latter receives an Artifact with model.pt2 and tables.bin and owns a container of the core
per instance. The code and the tables are one for all instances from ``share``: tables are mapped, so that their pages
are the system's own and are shared by processes as well.
"""

from __future__ import annotations

import logging
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
from narsil.backends.aoti import Container, Library
from narsil.backends.base import Backend
from narsil.backends.fused import FusedBackend, Network
from narsil.backends.kernels import bucket
from narsil.dataflow import Batch, Floats, Scores
from narsil.errors import ArtifactError, ConfigError

__all__ = ["CudaBackend", "InductorBackend", "compiled_device", "gpu_flags", "load_compiled", "why_not"]

log = logging.getLogger(__name__)

_FP32 = 0  # FBGEMM's SparseType of what the lookup gives
_POOLING = {"sum": 0, "mean": 1}
_LEAST_ROWS = 2  # the compiled code's; a single row is scored beside a row of padding
_TILE_ROWS = 64  # of a batch-invariant run


def why_not(artifact: Artifact) -> str | None:
    """Why the compiled model cannot run here; None where it can. Raises ArtifactError where its manifest is damaged."""
    if problem := artifact.problem("compiled"):
        return problem
    info = _info(artifact)
    gpu = gpu_flags() if info.device == "cuda" else ()
    return machine_problem(info, str(torch.__version__), gpu)


def gpu_flags() -> tuple[str, ...]:
    """What the GPU of this machine runs, as its compilers name it; empty without one."""
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (f"sm_{major}{minor}",)


def compiled_device(artifact: Artifact) -> str:
    """cpu or cuda: what the folder was compiled for."""
    return _info(artifact).device


def load_compiled(artifact: Artifact, intra_op_threads: int = 1, *, batch_invariant: bool = False) -> Backend:
    """Loads the code and maps the tables.

    ``batch_invariant`` makes a row's score the same bits in any batch; the fused engine's always is. Raises
    ArtifactError where the folder is damaged, or was compiled for another processor or torch.
    """
    info = _info(artifact)
    if problem := why_not(artifact):
        raise ArtifactError(f"{artifact.path} cannot run compiled: {problem}")
    if info.engine == "fused":
        if intra_op_threads > 1:
            log.warning("the compiled backend runs each forward on one thread; more lanes use more cores")
        return FusedBackend(Network.load(artifact, info), artifact.schema)
    if info.device == "cuda":
        if batch_invariant:
            raise ConfigError("batch_invariant is not to be had on a GPU; compile for the CPU")
        return CudaBackend.load(artifact, info)
    return InductorBackend.load(artifact, info, intra_op_threads, batch_invariant=batch_invariant)


def _info(artifact: Artifact) -> CompiledInfo:
    size = artifact.files_for("compiled")["tables"].stat().st_size
    return CompiledInfo.from_manifest(artifact.manifest or {}, artifact.schema, size)


class Lookup:
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

    library: Library
    lookup: Lookup
    info: CompiledInfo


class InductorBackend(Backend):
    """FBGEMM's lookup, then the core as AOTInductor compiled it."""

    name = "compiled"

    def __init__(
        self, shared: _Shared, schema: ModelSchema, intra_op_threads: int = 1, *, batch_invariant: bool = False
    ) -> None:
        self.schema = schema
        self.device = "cpu"
        self._shared = shared
        self._threads = intra_op_threads
        self._invariant = batch_invariant
        self._container = Container(shared.library)
        self._ones: NDArray[Any] = np.arange(1, dtype=schema.id_dtype)

    @classmethod
    def load(
        cls, artifact: Artifact, info: CompiledInfo, intra_op_threads: int = 1, *, batch_invariant: bool = False
    ) -> InductorBackend:
        """As load_compiled, which has looked whether it can run here."""
        assert artifact.compiled is not None and artifact.tables is not None  # noqa: PT018, S101 - _info has looked
        # Copy on write: nothing ever writes, and torch warns of memory that it may not.
        weights = torch.from_numpy(np.memmap(artifact.tables, dtype=np.uint8, mode="c"))
        shared = _Shared(Library(artifact.compiled, info.signature), Lookup(weights, info), info)
        return cls(shared, artifact.schema, intra_op_threads, batch_invariant=batch_invariant)

    def bucket(self, rows: int) -> int:
        """See Backend.bucket: oneDNN compiles for every number of rows."""
        if self._invariant:
            return -(-rows // _TILE_ROWS) * _TILE_ROWS
        return max(bucket(rows), _LEAST_ROWS)

    def run(self, batch: Batch) -> Scores:
        """As Backend.run; dense features are lent to the compiled code, not copied."""
        with torch.inference_mode():
            pooled = self._shared.lookup(_tensor(batch.values), _tensor(self._ends(batch)))
        dense = np.ascontiguousarray(batch.dense)
        scores = self._by_tiles(dense, pooled) if self._invariant else self._padded(dense, pooled, _LEAST_ROWS)
        return {self.schema.tasks[0]: scores}

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

    def thread_setup(self) -> None:
        """Sets this thread's intra-op thread count: torch keeps it per thread."""
        torch.set_num_threads(self._threads)

    def close(self) -> None:
        """Frees the container."""
        self._container.close()


class CudaBackend(Backend):
    """The inductor engine on a GPU: lookup and core on a stream of the lane's own, tables in the GPU's memory."""

    name = "compiled"

    def __init__(self, shared: _Gpu, schema: ModelSchema) -> None:
        self.schema = schema
        self.device = "cuda"
        self._shared = shared
        self._stream = torch.cuda.Stream()
        # torch's own runner: it holds the GIL, but only for as long as it takes to start the kernels.
        self._run = torch._inductor.aoti_load_package(str(shared.package))

    @classmethod
    def load(cls, artifact: Artifact, info: CompiledInfo) -> CudaBackend:
        """As load_compiled, which has looked whether it can run here."""
        assert artifact.compiled is not None and artifact.tables is not None  # noqa: PT018, S101 - _info has looked
        weights = torch.from_numpy(np.memmap(artifact.tables, dtype=np.uint8, mode="c")).cuda()
        return cls(_Gpu(artifact.compiled, Lookup(weights, info)), artifact.schema)

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
        return {self.schema.tasks[0]: scores}

    def share(self) -> CudaBackend:
        """Another stream and another runner over the same tables."""
        return CudaBackend(self._shared, self.schema)


@dataclass(frozen=True)
class _Gpu:
    """What all instances on a GPU use together."""

    package: Path
    lookup: Lookup


def _ends_of(batch: Batch) -> NDArray[Any]:
    """(T * B + 1,) where each bag begins in values, in their type."""
    ends = np.zeros(len(batch.lengths) + 1, dtype=batch.values.dtype)
    np.cumsum(batch.lengths, out=ends[1:])
    return ends


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())
