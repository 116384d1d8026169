"""Chooses and loads the backend that runs an artifact. Backends are imported only when they are chosen."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.watching import copied
from narsil.backends.base import Backend
from narsil.dataflow import Batch
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable, ForwardFailed, first_line

__all__ = ["BackendName", "load_backend"]

log = logging.getLogger(__name__)

BackendName = Literal["auto", "torch", "onnx", "compiled"]


@dataclass(frozen=True)
class _Options:
    """How to load, whatever the backend."""

    device: str | None
    intra_op_threads: int
    tune_kernels: bool
    batch_invariant: bool
    copy_tables: bool


def load_backend(
    artifact: Artifact,
    name: str = "auto",
    device: str | None = None,
    intra_op_threads: int = 1,
    *,
    tune_kernels: bool = True,
    batch_invariant: bool = False,
    copy_tables: bool = False,
) -> Backend:
    """The artifact, loaded on ``device`` (None: the one it was packaged for).

    ``auto`` takes compiled where the artifact holds a compiled model that scores a row here, else torch where it has
    TorchScript for that device and torch and fbgemm are installed, else onnx. ``batch_invariant`` asks for scores that
    are the same bits in any batch, which only compiled ones are; ``copy_tables`` for private, sealed copies of files
    that would be mapped. Raises ArtifactError, ConfigError or DeviceUnavailable, saying what to do.
    """
    if intra_op_threads < 1:
        raise ConfigError(f"intra_op_threads must be at least 1, not {intra_op_threads}")
    options = _Options(device, intra_op_threads, tune_kernels, batch_invariant, copy_tables)
    backend = None
    if name == "compiled":
        backend = _load_compiled(artifact, options)
    elif name == "auto" and artifact.offers("compiled"):
        backend = _compiled_where_it_runs(artifact, options)
    if backend is None:
        chosen = _choose(artifact, device) if name == "auto" else name
        if batch_invariant:
            raise ConfigError(
                f"batch_invariant needs the compiled backend, not {chosen}, whose sums depend on the batch's size; "
                f"make a compiled artifact with `narsil compile {artifact.path}`"
            )
        backend = _load_portable(artifact, chosen, options)
    for problem in artifact.damage.values():
        log.warning("%s (passed over: the %s backend does not need it)", problem, backend.name)
    return backend


def _compiled_where_it_runs(artifact: Artifact, options: _Options) -> Backend | None:
    """The compiled backend, or None after a warning where the artifact's TorchScript has to run instead.

    Whether it runs is found by trying: a volume that is mounted noexec, or libraries older than those it was built
    with, cannot be seen in advance. Raises ArtifactError where there is nothing to fall back to, and always on a
    manifest that contradicts itself.
    """
    from narsil.backends.compiled import info_of

    if artifact.problem("compiled") is None:
        info_of(artifact)
    try:
        return _load_compiled(artifact, options)
    except ArtifactError as error:
        if artifact.torchscript is None or options.batch_invariant:
            raise
        log.warning("%s. Falling back to the torch backend", error)
        return None


def _load_compiled(artifact: Artifact, options: _Options) -> Backend:
    from narsil.backends.compiled import info_of, load_compiled

    asked = options.device
    if asked is not None and not _same(baked := info_of(artifact).device, asked):
        raise ArtifactError(f"{artifact.path} is compiled for {baked} and cannot run on {asked}; use --device {baked}")
    backend = None
    try:
        with copied(artifact, "compiled") if options.copy_tables else nullcontext(artifact) as mapped:
            backend = load_compiled(mapped, options.intra_op_threads, batch_invariant=options.batch_invariant)
        _try_a_row(backend)
    except Exception as error:
        if backend is not None:
            backend.close()
        if isinstance(error, ArtifactError | ConfigError):
            raise
        raise ArtifactError(
            f"{artifact.path} cannot run compiled: {first_line(error)}; compile the model again here"
        ) from error
    return backend


def _try_a_row(backend: Backend) -> None:
    """Scores one row of zeros and first ids. Raises whatever the forward raises, and ForwardFailed on no number."""
    schema = backend.schema
    values = np.zeros(schema.num_features, schema.id_dtype)
    dense = np.zeros((1, schema.dense_dim), np.float32)
    scores = backend.run(Batch(1, dense, np.ones(schema.num_features, np.int32), values, one_hot=True))
    for task in schema.tasks:
        if not np.isfinite(scores[task][:1]).all():
            raise ForwardFailed(f"it scores a row of zeros as {scores[task][0]} for the task {task}")


def _choose(artifact: Artifact, device: str | None) -> str:
    """torch or onnx: what auto takes where there is nothing compiled.

    A TorchScript file that is damaged or gone is told by whoever loads it, and not replaced by the ONNX graph, whose
    FP32 tables score otherwise: that is for ``--backend onnx`` to ask for.
    """
    fits = artifact.offers("torch") and (device is None or _same(artifact.device, device))
    if fits and _torch_problem() is None:
        return "torch"
    if artifact.onnx is not None and device in (None, "cpu") and find_spec("onnxruntime") is not None:
        return "onnx"
    if fits and artifact.onnx is not None:
        raise ConfigError(
            f"{artifact.path} needs torch and fbgemm ({_torch_problem()}), or onnxruntime for its ONNX graph: "
            "install narsil[cpu], narsil[cuda] or narsil[onnx]"
        )
    return "torch" if artifact.offers("torch") or artifact.onnx is None else "onnx"


def _load_portable(artifact: Artifact, name: str, options: _Options) -> Backend:
    threads = options.intra_op_threads
    if name == "torch":
        return _load_torch(artifact, options.device or artifact.device, threads, options.tune_kernels)
    if name == "onnx":
        if find_spec("onnxruntime") is None:
            raise ConfigError("the onnx backend needs onnxruntime: install narsil[onnx]")
        from narsil.backends.onnx import OnnxBackend

        if artifact.schema.weighted:
            raise ArtifactError(
                f"{artifact.path} takes weights, which its ONNX graph has no input for; use --backend torch"
            )

        return OnnxBackend.load(artifact, options.device or "cpu", threads, copy_tables=options.copy_tables)
    raise ConfigError(f"backend must be auto, torch, onnx or compiled, not {name!r}")


def _load_torch(artifact: Artifact, device: str, intra_op_threads: int, tune_kernels: bool) -> Backend:
    if problem := _torch_problem():
        raise ConfigError(f"the torch backend needs torch and fbgemm ({problem}); install narsil[cpu] or narsil[cuda]")
    script = artifact.files_for("torch")["torchscript"]
    if not _same(artifact.device, device):
        raise ArtifactError(
            f"{script} is packaged for {artifact.device} and cannot run on {device}; "
            f"package it with --device {device}, or serve it with --device {artifact.device}"
        )
    if artifact.arguments is not None:
        from narsil.backends.arguments import ArgumentsBackend

        return ArgumentsBackend.load(artifact, intra_op_threads)
    # The module's own name for the device is the one that its constants hold.
    device = artifact.device
    if device != "cpu":
        import torch

        if not torch.cuda.is_available() or int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise DeviceUnavailable(
                f"{script} is packaged for {device}, which is not on this machine; "
                "package it with --device cpu, or serve it where that GPU is"
            )
    from narsil.backends.torchscript import TorchScriptBackend

    return TorchScriptBackend.load(artifact, device, intra_op_threads, tune=tune_kernels)


def _torch_problem() -> str | None:
    """Why torch and fbgemm cannot be imported: not installed, or built for libraries that are not here."""
    try:
        import fbgemm_gpu  # noqa: F401
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return first_line(error)
    return None


def _same(baked: str, asked: str) -> bool:
    """Whether two names mean one device: cuda is cuda:0."""
    return baked == asked or {baked, asked} == {"cuda", "cuda:0"}
