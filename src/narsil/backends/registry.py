"""Chooses and loads the backend that runs an artifact. Backends are imported only when they are chosen."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal

from narsil.artifacts.artifact import Artifact
from narsil.backends.base import Backend
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable, first_line

__all__ = ["BackendName", "load_backend"]

log = logging.getLogger(__name__)

BackendName = Literal["auto", "torch", "onnx", "compiled"]


def load_backend(
    artifact: Artifact,
    name: str = "auto",
    device: str | None = None,
    intra_op_threads: int = 1,
    *,
    tune_kernels: bool = True,
    batch_invariant: bool = False,
) -> Backend:
    """The artifact, loaded on ``device`` (None: the one it was packaged for).

    ``auto`` takes compiled where the artifact holds a compiled model that can run here, else torch where it has
    TorchScript for that device and torch and fbgemm are installed, else onnx. ``batch_invariant`` asks for scores that
    are the same bits in any batch, which only compiled ones are. Raises ArtifactError, ConfigError or
    DeviceUnavailable, saying what to do.
    """
    if intra_op_threads < 1:
        raise ConfigError(f"intra_op_threads must be at least 1, not {intra_op_threads}")
    if artifact.schema.weighted:
        raise ArtifactError(f"{artifact.path} has weighted features, which no backend here runs")
    chosen = _choose(artifact, device) if name == "auto" else name
    for problem in artifact.damage.values():
        log.warning("%s (passed over: the %s backend does not need it)", problem, chosen)
    if chosen == "compiled":
        return _load_compiled(artifact, device, intra_op_threads, batch_invariant)
    if batch_invariant:
        raise ConfigError(
            f"batch_invariant needs the compiled backend, not {chosen}, whose sums depend on the batch's size; "
            f"make a compiled artifact with `narsil compile {artifact.path}`"
        )
    if chosen == "torch":
        return _load_torch(artifact, device or artifact.device, intra_op_threads, tune_kernels)
    if chosen == "onnx":
        if find_spec("onnxruntime") is None:
            raise ConfigError("the onnx backend needs onnxruntime: install narsil[onnx]")
        from narsil.backends.onnx import OnnxBackend

        return OnnxBackend.load(artifact, device or "cpu", intra_op_threads)
    raise ConfigError(f"backend must be auto, torch, onnx or compiled, not {chosen!r}")


def _choose(artifact: Artifact, device: str | None) -> str:
    if artifact.offers("compiled") and _torch_problem() is None:
        from narsil.backends.compiled import compiled_device, why_not

        problem = why_not(artifact)
        if problem is None and device is not None and not _same(compiled_device(artifact), device):
            problem = f"it was compiled for {compiled_device(artifact)}, not {device}"
        if problem is None or artifact.torchscript is None:
            return "compiled"
        log.warning("%s cannot run compiled: %s. Falling back to the torch backend", artifact.path, problem)
    fits = artifact.torchscript is not None and (device is None or _same(artifact.device, device))
    if fits and _torch_problem() is None:
        return "torch"
    if artifact.onnx is not None and device in (None, "cpu") and find_spec("onnxruntime") is not None:
        return "onnx"
    if fits and artifact.onnx is not None:
        raise ConfigError(
            f"{artifact.path} needs torch and fbgemm ({_torch_problem()}), or onnxruntime for its ONNX graph: "
            "install narsil[cpu], narsil[cuda] or narsil[onnx]"
        )
    return "torch" if artifact.torchscript is not None or artifact.onnx is None else "onnx"


def _load_compiled(artifact: Artifact, device: str | None, intra_op_threads: int, batch_invariant: bool) -> Backend:
    if problem := _torch_problem():
        raise ConfigError(f"the compiled backend needs torch and fbgemm ({problem}); install narsil[cpu]")
    from narsil.backends.compiled import compiled_device, load_compiled

    if device is not None and not _same(baked := compiled_device(artifact), device):
        raise ConfigError(f"{artifact.path} is compiled for {baked} and cannot run on {device}; use --device {baked}")
    return load_compiled(artifact, intra_op_threads, batch_invariant=batch_invariant)


def _load_torch(artifact: Artifact, device: str, intra_op_threads: int, tune_kernels: bool) -> Backend:
    if problem := _torch_problem():
        raise ConfigError(f"the torch backend needs torch and fbgemm ({problem}); install narsil[cpu] or narsil[cuda]")
    script = artifact.files_for("torch")["torchscript"]
    if not _same(artifact.device, device):
        raise ArtifactError(
            f"{script} is packaged for {artifact.device} and cannot run on {device}; "
            f"package it with --device {device}, or serve it with --device {artifact.device}"
        )
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
