"""Models whose arguments a schema file names, as functions of those: exported programs, and TorchScript that takes
several tensors.

Receives a file and what its schema file says; produces a Loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narsil.artifacts.arguments import Argument, Arguments
from narsil.artifacts.branches import branch_on_rows
from narsil.artifacts.exported import Exported, load_exported
from narsil.artifacts.pt2 import is_pt2
from narsil.artifacts.tbe import table_operators
from narsil.artifacts.torchscript import load_torchscript
from narsil.errors import ArtifactError

__all__ = ["Forward", "Loaded", "called_in_order", "forward_from"]

_MATRICES = ("by_feature", "by_row")  # layouts of two axes
Forward = Callable[[Sequence[Any]], Any]  # arguments in the schema file's order


@dataclass(frozen=True)
class Loaded:
    """A model that takes what its schema file says."""

    forward: Forward
    least: int  # rows that it says it takes at least
    branch: str  # where it does other things for other rows, as no recording shows; else empty


def forward_from(path: Path, arguments: Arguments) -> Loaded:
    """The model in a file. Raises ArtifactError where it takes other arguments."""
    if is_pt2(path):
        exported = load_exported(path)
        return Loaded(exported, _least_rows(exported, arguments, path.name), exported.branch())
    module = load_torchscript(path, "cpu")
    return Loaded(_scripted(module, arguments.inputs, path.name), 1, branch_on_rows(module))


def _scripted(module: Any, inputs: Sequence[Argument], name: str) -> Forward:
    """A ScriptModule's forward over arguments in the schema file's order."""
    if table_operators(module):
        raise ArtifactError(
            f"{name} looks up FBGEMM's quantized tables, which trust the ids that they are given: Narsil serves such "
            "models where forward takes one Dict[str, Tensor], and without a schema file"
        )
    taken = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    if len(taken) == 1 and str(taken[0].type).replace(" ", "") == "Dict[str,Tensor]":
        return lambda tensors: module(dict(zip((item.name for item in inputs), tensors, strict=True)))
    types = {argument.name: str(argument.type) for argument in taken}
    _check_names(types, inputs, name)
    for item in inputs:
        wanted = "List[Tensor]" if item.layout == "list" else "Tensor"
        if types[item.name] != wanted:
            raise ArtifactError(
                f"{name}: forward takes {item.name} as {types[item.name]} where its schema file has the layout "
                f"{item.layout}, a {wanted}"
            )
    places = [[item.name for item in inputs].index(argument) for argument in types]
    return lambda tensors: module(*(tensors[place] for place in places))


def called_in_order(module: Any, name: str) -> tuple[list[tuple[str, bool]], Forward]:
    """(name of each argument, and whether it is a list of tensors; the module over these). Raises ArtifactError where
    it takes something else."""
    taken = []
    for argument in module.forward.schema.arguments:
        kind = str(argument.type).replace(" ", "")
        if argument.name == "self":
            continue
        if kind == "Dict[str,Tensor]":
            raise ArtifactError(f"{name} takes a dict of tensors and needs no schema file; serve it as it is")
        if kind not in ("Tensor", "List[Tensor]"):
            raise ArtifactError(
                f"{name}: forward takes {argument.name} as {kind}, where tensors and lists of tensors can be served; "
                "wrap it in a module that takes these"
            )
        taken.append((argument.name, kind != "Tensor"))
    return taken, lambda tensors: module(*tensors)


def _check_names(taken: Mapping[str, Any] | Sequence[str], inputs: Sequence[Argument], name: str) -> None:
    told = [item.name for item in inputs]
    if sorted(told) != sorted(taken):
        odd = sorted(set(told) ^ set(taken))
        raise ArtifactError(
            f"{name} takes {', '.join(taken)}, its schema file has {', '.join(told)}: they differ in {odd[0]}"
        )


def _least_rows(exported: Exported, arguments: Arguments, name: str) -> int:
    """The fewest rows that a program was exported for. Raises ArtifactError where it was for some numbers alone."""
    _check_names(exported.names, arguments.inputs, name)
    if [item.name for item in arguments.inputs] != list(exported.names):
        raise ArtifactError(f"{name} takes {', '.join(exported.names)}: give the inputs in this order")
    least = 1
    for item in arguments.inputs:
        axes = exported.sizes[item.name]
        if item.layout == "list" or len(axes) != (2 if item.holds == "dense" or item.layout in _MATRICES else 1):
            raise ArtifactError(
                f"{name}: {item.name} has {len(axes)} axes, where its schema file says {item.holds}, {item.layout}"
            )
        low, high = axes[-1 if item.layout == "by_feature" else 0]
        if high is not None:
            raise ArtifactError(
                f"{name} was exported for {low} to {high} entries of {item.name}, and not for any number of rows; give "
                "torch.export.export dynamic_shapes with an unbounded torch.export.Dim for its rows and its ids"
            )
        single = item.holds == "ids" and all(arguments.schema.features[at].single for at in item.features)
        if single or item.holds in ("dense", "lengths", "offsets"):
            per_row = len(item.features) if item.layout == "flat" and item.holds != "dense" else 1
            least = max(least, -(-(low - item.last) // per_row))
    return least
