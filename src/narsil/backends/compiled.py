"""Opens a folder that ``narsil compile`` wrote (backend name "compiled") with the engine that it was compiled for.

Receives an Artifact with its compiled files; produces a FusedBackend (fused.py) or one of inductor.py's. Imports torch
for the latter alone: a model of the fused engine is served without.
"""

from __future__ import annotations

import numpy as np

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import SCALE_BIAS_BYTES, CompiledInfo, machine_problem
from narsil.artifacts.finite import bad_weights, check_quantized_tables, first_bad_row, first_bad_scale
from narsil.artifacts.plan import PlanTable
from narsil.artifacts.whole import WholeTable, row_bytes
from narsil.backends.base import Backend
from narsil.backends.fused import FusedBackend, Network
from narsil.backends.plans import PlanBackend, PlanNetwork
from narsil.errors import ArtifactError, ConfigError

__all__ = ["info_of", "load_compiled"]


def load_compiled(artifact: Artifact, intra_op_threads: int = 1, *, batch_invariant: bool = False) -> Backend:
    """Loads the code and maps the tables.

    ``batch_invariant`` makes a row's score the same bits in any batch; the fused engine's always is. Raises
    ArtifactError where the folder is damaged or was compiled for another machine or torch, and ConfigError on an option
    that its engine does not have.
    """
    info = info_of(artifact)
    if artifact.verified:  # else nobody wants all of the tables read now
        _check_tables(artifact, info)
    if info.engine != "fused":
        return _load_inductor(artifact, info, intra_op_threads, batch_invariant)
    if problem := machine_problem(info):
        raise ArtifactError(f"{artifact.path} cannot run compiled: {problem}")
    if intra_op_threads > 1:
        raise ConfigError(
            f"intra_op_threads is {intra_op_threads}, and the fused engine of {artifact.path} runs each forward on one "
            "thread: leave it at 1 and serve with more lanes, or compile with --engine inductor"
        )
    if info.plan is not None:
        return PlanBackend(PlanNetwork.load(artifact, info.plan), artifact.schema)
    return FusedBackend(Network.load(artifact, info), artifact.schema)


def info_of(artifact: Artifact) -> CompiledInfo:
    """What a folder was compiled from and for. Raises ArtifactError where that is not to be had or to be trusted."""
    size = artifact.files_for("compiled")["tables"].stat().st_size
    return CompiledInfo.from_manifest(artifact.manifest or {}, artifact.schema, size)


def _check_tables(artifact: Artifact, info: CompiledInfo) -> None:
    """Raises ArtifactError where a row's scale or bias is NaN or infinite: a checksum says what was written, not that
    it can be served."""
    if info.plan is not None:
        for table in info.plan.tables:
            _check_table(artifact, table, table.row_bytes, table.scale_bytes)
        return
    if info.whole is not None:
        for call in info.whole.calls:
            for each in call.tables:
                _check_table(artifact, each, row_bytes(each.dim, each.kind, call.row_alignment), SCALE_BIAS_BYTES)
        return
    path, features = artifact.files_for("compiled")["tables"], artifact.schema.features
    check_quantized_tables(
        np.memmap(path, np.uint8, mode="r"),
        info.offsets,
        [feature.rows for feature in features],
        info.row_bytes,
        [feature.table for feature in features],
        str(path),
    )


def _check_table(artifact: Artifact, table: PlanTable | WholeTable, width: int, scale_bytes: int) -> None:
    """As _check_tables, of a table of any kind, whose rows have ``width`` bytes."""
    path = artifact.files_for("compiled")["tables"]
    data = np.memmap(path, np.uint8, mode="r")
    rows = data[table.start : table.start + table.rows * width].reshape(table.rows, width)
    if table.kind > 1:
        bad = first_bad_scale(rows[:, :scale_bytes], np.float16 if scale_bytes == 4 else np.float32)
    else:
        kind = np.dtype(np.float32 if table.kind == 0 else np.float16)
        bad = first_bad_row(np.ascontiguousarray(rows[:, : table.dim * kind.itemsize]).view(kind))
    if bad is not None:
        name = artifact.schema.features[table.feature].table
        raise ArtifactError(bad_weights(str(path), f"row {bad} of table {name}"))


def _load_inductor(artifact: Artifact, info: CompiledInfo, intra_op_threads: int, batch_invariant: bool) -> Backend:
    try:
        from narsil.backends.inductor import load_inductor
    except (ImportError, OSError) as error:
        raise ArtifactError(
            f"{artifact.path} cannot run compiled: the inductor engine needs torch and fbgemm ({error}); install "
            "narsil[cpu], or compile for the fused engine"
        ) from None
    return load_inductor(artifact, info, intra_op_threads, batch_invariant=batch_invariant)
