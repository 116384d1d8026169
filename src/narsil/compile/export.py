"""Has AOTInductor compile a DLRM without its lookup (core.Core): model.pt2, the inductor engine's code."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from narsil.artifacts.compiled_info import CompiledInfo
from narsil.compile.core import Core, DlrmParts
from narsil.compile.whole import WholeModel
from narsil.errors import ArtifactError, first_line

__all__ = ["export_core", "export_whole"]

_EXAMPLE_ROWS = 128  # of the inputs that torch.export traces; any number of rows runs


def export_core(parts: DlrmParts, info: CompiledInfo, path: Path) -> None:
    """Writes a package that takes any number of rows; weights are packed for oneDNN in it. Raises ArtifactError."""
    core = Core(parts, "bf16" if info.precision == "bf16" else "fp32").eval().to(info.device)
    dense = torch.rand(_EXAMPLE_ROWS, info.dense_dim, device=info.device)
    pooled = torch.rand(_EXAMPLE_ROWS, info.tables * info.dim, device=info.device)
    _export(core, (dense, pooled), info, path)


def export_whole(model: WholeModel, info: CompiledInfo, path: Path) -> None:
    """As export_core, of a program."""
    widths = [*([info.dense_dim] if model.whole.dense else []), *([info.tables] if model.whole.lengths else [])]
    widths += [*(call.width for call in model.whole.calls)]
    _export(model.core, tuple(torch.rand(_EXAMPLE_ROWS, width) for width in widths), info, path)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("extern_kernel_nodes.json") and (nodes := json.loads(archive.read(name)).get("nodes")):
                told = str(nodes[0].get("node", {}).get("target", "an operation"))
                raise ArtifactError(
                    f"AOTInductor has no code for {told} that runs without torch's interpreter; serve the model with "
                    "the torch backend"
                )


def _export(core: torch.nn.Module, inputs: tuple[torch.Tensor, ...], info: CompiledInfo, path: Path) -> None:
    rows = torch.export.Dim("rows", min=2, max=1 << 24)
    options = {
        "freezing": True,
        "emulate_precision_casts": info.whole is not None,  # else a number that is rounded and widened stays itself
        "aot_inductor.metadata": {"narsil": info.signature},
    }
    with torch.no_grad(), _quiet(), _one_thread():
        try:
            exported = torch.export.export(core, inputs, dynamic_shapes=_dynamic(core, inputs, rows))
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
        except Exception as error:  # Inductor raises its own kinds, and the C++ compiler's
            raise ArtifactError(f"AOTInductor could not compile the model: {first_line(error)}") from error


def _dynamic(core: torch.nn.Module, inputs: tuple[torch.Tensor, ...], rows: Any) -> Any:
    """Each input's first axis has that many rows."""
    each = tuple({0: rows} for _ in inputs)
    return each if isinstance(core, Core) else (each,)  # the one takes two inputs, the other any number


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
