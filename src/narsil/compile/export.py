"""Has AOTInductor compile a DLRM without its lookup (core.Core): model.pt2, the inductor engine's code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from narsil.artifacts.compiled_info import CompiledInfo
from narsil.compile.core import Core, DlrmParts
from narsil.errors import ArtifactError, first_line

__all__ = ["export_core"]

_EXAMPLE_ROWS = 128  # of the inputs that torch.export traces; any number of rows runs


def export_core(parts: DlrmParts, info: CompiledInfo, path: Path) -> None:
    """Writes a package that takes any number of rows; weights are packed for oneDNN in it. Raises ArtifactError."""
    core = Core(parts, "bf16" if info.precision == "bf16" else "fp32").eval().to(info.device)
    dense = torch.rand(_EXAMPLE_ROWS, info.dense_dim, device=info.device)
    pooled = torch.rand(_EXAMPLE_ROWS, info.tables * info.dim, device=info.device)
    rows = torch.export.Dim("rows", min=2, max=1 << 24)
    options = {"freezing": True, "aot_inductor.metadata": {"narsil": info.signature}}
    with torch.no_grad(), _quiet(), _one_thread():
        try:
            exported = torch.export.export(core, (dense, pooled), dynamic_shapes=({0: rows}, {0: rows}))
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
        except Exception as error:  # Inductor raises its own kinds, and the C++ compiler's
            raise ArtifactError(f"AOTInductor could not compile the model: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the deprecations that torch's own compiler steps on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lanes run forwards on one thread; weights are packed and loops cut for that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
