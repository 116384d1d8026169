"""Loads a model: an artifact and the settings in, a served model and what warms it out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from narsil.artifacts.artifact import BACKEND_ROLES, Artifact, open_artifact
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.watching import Watch
from narsil.backends.base import Backend
from narsil.backends.registry import load_backend
from narsil.config import ServeSettings
from narsil.dataflow import Features, Jagged, OneHot
from narsil.engine.independence import SIZES, WORKER, dependence
from narsil.engine.missing import missing_columns, shown
from narsil.engine.runner import Runner
from narsil.engine.served_model import RequestLimits, ServedModel
from narsil.errors import ArtifactError, ConfigError, NarsilError, last_line
from narsil.process import memory_remarks, warn_of

__all__ = ["failed_forward", "load_model", "warmup_of", "warmup_payloads"]

log = logging.getLogger(__name__)

_ODD_ROWS = 257  # that a backend which pads at all would pad

# By whether the model is compiled.
_IN_VAIN = {
    False: "a NaN in any of its dense columns becomes a score that is no number",
    True: "it was compiled without NaN, which nothing in the model is known to take",
}


def load_model(
    settings: ServeSettings, name: str = "", version: str = "", share: float = 1.0
) -> tuple[ServedModel, Watch]:
    """The settings' artifact, loaded once and shared by as many backends as there are lanes, and what tells when its
    files change. It is served by its own name and version where none are given. Raises NarsilError."""
    artifact = open_artifact(
        settings.served,
        verify=settings.verify_checksums,
        dense_dim=settings.dense_dim or None,
        ids="" if settings.ids == "auto" else settings.ids,
    )
    picked = artifact.schema.picking(settings.tasks) if settings.tasks else None
    backend = _loaded(artifact, settings, tune_kernels=settings.tune_kernels)
    log.info("loaded %s with the %s backend", settings.served, backend.name)
    if picked is not None:
        backend.schema = picked
    backend.schema = backend.schema.taking_nan(_nan_columns(settings, backend))
    whole = _rows_depend(settings, backend)
    if whole and backend.name == "torch" and backend.bucket(_ODD_ROWS) != _ODD_ROWS:
        # What compiles for every number of rows that it meets would do so for ever: requests are not padded.
        schema = backend.schema
        backend.close()
        backend = _loaded(artifact, settings, tune_kernels=False)
        backend.schema = schema
        log.info("its linear layers stay with torch's own kernels, since requests bring any number of rows")
    warn_of(settings.given_in_vain(backend=backend.name, checksums=artifact.manifest is not None))
    files = [getattr(artifact, role) for role in BACKEND_ROLES.get(backend.name, ())]
    warn_of(memory_remarks((file for file in files if file is not None), settings.max_queue_bytes))
    model = ServedModel(
        name or settings.model_name or artifact.name,
        version or artifact.version,
        [backend, *(backend.share() for _ in range(settings.lane_count - 1))],
        RequestLimits(settings.max_request_rows, settings.max_request_ids, settings.max_message_bytes),
        share=share,
        whole=whole,
    )
    return model, Watch(artifact, backend.name, copied=settings.copy_tables)


def _loaded(artifact: Artifact, settings: ServeSettings, *, tune_kernels: bool) -> Backend:
    return load_backend(
        artifact,
        settings.backend,
        settings.device,
        settings.intra_op_threads,
        tune_kernels=tune_kernels,
        batch_invariant=settings.batch_invariant,
        copy_tables=settings.copy_tables,
    )


def _nan_columns(settings: ServeSettings, backend: Backend) -> tuple[int, ...]:
    """The columns in which requests may hold NaN. Raises ConfigError where it is asked for and there is none, and
    ArtifactError where the model scores it as no number; the backend is closed then."""
    if not settings.allow_nan:
        return ()
    try:
        found = missing_columns(backend)
    except Exception as error:
        backend.close()
        if isinstance(error, NarsilError):
            raise
        raise failed_forward(settings.served, backend.name, error) from error
    if not found.columns:
        backend.close()
        raise ConfigError(
            f"{settings.served}: {_IN_VAIN[backend.name == 'compiled']}, so that --allow-nan allows nothing: leave it "
            "out, or replace NaN in the model, as torch.nan_to_num does"
        )
    log.info("NaN is taken for a missing number in the dense columns %s", shown(found.columns))
    if found.tried:
        log.warning(
            "%s: that dense columns %s take NaN was found by trial, not read from the model; a request that is scored "
            "as no number fails",
            settings.served,
            shown(found.tried),
        )
    return found.columns


def _rows_depend(settings: ServeSettings, backend: Backend) -> bool:
    """Whether the model scores a row by its company, and so its requests whole. Raises ConfigError where these would be
    fused, and ArtifactError where no forward ends well; the backend is closed then."""
    try:
        problem = dependence(backend)
        if problem is not None and settings.execution_mode == "batch":
            raise ConfigError(f"{settings.served}: rows depend on each other: {problem}. {WORKER}")
    except Exception as error:
        backend.close()
        if isinstance(error, NarsilError):
            raise
        raise failed_forward(settings.served, backend.name, error) from error
    if problem is not None:
        log.warning("%s: rows depend on each other: %s. Every request is scored whole", settings.served, problem)
    return problem is not None


def failed_forward(model: Path, backend: str, error: Exception) -> ArtifactError:
    """What a model's forward raised while it was tried, which may be anything, as an error of Narsil's."""
    return ArtifactError(
        f"{model} loads, but a forward of the {backend} backend fails on it "
        f"({type(error).__name__}: {last_line(error)}); package or compile it again"
    )


def warmup_of(model: ServedModel, max_batch_rows: int) -> list[Features]:
    """What every lane runs before the model is served. One that is served whole may not take every number of rows: it
    is warmed by what it takes, where it takes any."""
    payloads = list(warmup_payloads(model.schema, max_batch_rows))
    if not model.whole:
        return payloads
    runner = Runner(model.name, model.backends[0], whole=True)
    taken = [payload for payload in payloads if _runs(runner, payload)]
    if not taken:
        others = (payload for rows in SIZES for payload in _payloads_of(model.schema, rows))
        taken = [payload for payload in others if _runs(runner, payload)]
    return taken or payloads


def _runs(runner: Runner, payload: Features) -> bool:
    try:
        runner.run([payload])
    except Exception as error:  # a model's forward raises what it likes
        log.info(
            "model %s is not warmed with %d rows, which it does not take (%s)",
            runner.name,
            payload.rows,
            last_line(error),
        )
        return False
    return True


def warmup_payloads(schema: ModelSchema, max_batch_rows: int) -> Iterator[Features]:
    """Rows that take every path of a forward: small and large batches, one id a bag and bags of any length.

    Each size comes twice, since a profiling executor optimizes after its first runs.
    """
    for rows in sorted({min(rows, max_batch_rows) for rows in (1, 16, 128, 1024, max_batch_rows)}):
        yield from _payloads_of(schema, rows)


def _payloads_of(schema: ModelSchema, rows: int) -> Iterator[Features]:
    dense = np.zeros((rows, schema.dense_dim), dtype=np.float32)
    ids = (np.arange(rows, dtype=np.int64) % schema.rows[:, None]).astype(schema.id_dtype)
    lengths = schema.bags(np.tile(np.arange(rows, dtype=np.int32) % 3, (schema.num_features, 1)))
    values = np.zeros(int(lengths.sum()), dtype=schema.id_dtype)
    for _ in range(2):
        yield Features(rows, dense, OneHot(ids))
        yield Features(rows, dense, Jagged.laid_out(values, lengths))
