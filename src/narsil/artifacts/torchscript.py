"""TorchScript files: loaded, and what the graph of a forward says of its inputs.

Receives a file; produces a ScriptModule and an Interface. Nothing in the file is unpickled by Python: only
``torch.jit.load`` reads it.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narsil.artifacts.files import check_readable, unreadable
from narsil.errors import ArtifactError, first_line

__all__ = ["Interface", "forward_of", "in_order", "interface_of", "load_torchscript"]

LENGTHS, VALUES, WEIGHTS = ".lengths", ".values", ".weights"  # behind a group's name

_PASS_THROUGH = {"aten::to", "aten::contiguous", "aten::detach", "aten::float", "prim::unchecked_cast"}


_FIRST = ("float_features", "embedding_features", "id_list_features", "id_score_list_features", "unary_features")


def in_order(keys: Iterable[str]) -> tuple[str, ...]:
    """Inputs in the order in which a request has them: TorchRec's own first, as its wire numbers them."""
    return tuple(sorted(keys, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key)))


def load_torchscript(path: Path, device: str) -> Any:
    """The ScriptModule in a file, its tensors on ``device``. Raises ArtifactError saying what the file is instead."""
    _check_archive(path)
    try:
        import fbgemm_gpu  # noqa: F401 - registers the operators that the archive names
        import torch
    except ImportError as error:
        raise ArtifactError(
            f"reading {path.name} needs torch and fbgemm ({error}); install narsil[cpu] or narsil[cuda]"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is TorchRec's format all the same
            return torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # torch raises RuntimeError, ValueError and its own kinds for damaged archives
        raise ArtifactError(f"{path} is a TorchScript archive that torch cannot load: {first_line(error)}") from None


@dataclass(frozen=True)
class Interface:
    """What forward's graph says of its one argument, a dict of tensors."""

    reads: frozenset[str]  # keys of the dict
    features: dict[str, tuple[str, ...]]  # X of the keys X.lengths and X.values -> the features, in key-major order
    widths: dict[str, int]  # of the matrices of numbers that enter a linear layer at once: its columns
    tasks: tuple[str, ...]  # keys of the dict that it returns; empty where that is not plain to see
    joined: bool = False  # whether it joins groups, of one feature each, in one KeyedJaggedTensor


def interface_of(module: Any, name: str) -> Interface:
    """A loaded ScriptModule's. Raises ArtifactError where forward takes something else, or does not name its
    features."""
    inputs = list(module.graph.inputs())
    if len(inputs) < 2 or inputs[1].type().annotation_str != "Dict[str, Tensor]" or _unanswered(module):
        raise ArtifactError(
            f"{name}: forward does not take one Dict[str, Tensor], as TorchRec's predictors do, and a device at most; "
            "wrap the model in a "
            "PredictModule"
        )
    reads = {_constant(node.inputsAt(1)) for node in _getitems(inputs[1])}
    if not all(isinstance(key, str) for key in reads):
        raise ArtifactError(f"{name}: forward reads keys of its dict that are not constant; name them in the model")
    groups = sorted(
        {key.removesuffix(LENGTHS) for key in reads if key.endswith(LENGTHS)}
        | {key.removesuffix(VALUES) for key in _in_bags(module, inputs[1]) if key.endswith(VALUES)}
    )
    columns = sorted(reads - {group + part for group in groups for part in (LENGTHS, VALUES, WEIGHTS)})
    joined = {group for keys in _joined(module, inputs[1], groups) for group in keys}
    features = {group: (group,) if group in joined else _features(module, inputs[1], group, name) for group in groups}
    found = {key: _dense_dim(module, key) for key in columns}
    widths = {key: width for key, width in found.items() if width is not None}
    return Interface(frozenset(reads), features, widths, _tasks(module), bool(joined))


_DEVICES = ("Device", "Optional[Device]")


def _arguments(module: Any) -> list[Any]:
    """Those of forward beside the module and its dict."""
    schema = getattr(module, "forward", module).schema  # a script may be a function, too
    return [argument for argument in schema.arguments if argument.name != "self"][1:]


def _unanswered(module: Any) -> bool:
    """Whether forward has an argument that is neither a device nor has a default."""
    return any(
        not argument.has_default_value() and argument.type.annotation_str not in _DEVICES and argument.name != "device"
        for argument in _arguments(module)
    )


def forward_of(module: Any, device: str) -> Any:
    """The module, or where its forward takes a device too, what calls it with that."""
    import torch

    told = {
        argument.name: torch.device(device) if argument.type.annotation_str in _DEVICES else device
        for argument in _arguments(module)
        if argument.type.annotation_str in _DEVICES or argument.name == "device"
    }
    return _Forward(module, told) if told else module


@dataclass(frozen=True)
class _Forward:
    """A module's forward with arguments beside its dict."""

    module: Any
    arguments: dict[str, Any]

    def __call__(self, inputs: Any) -> Any:
        return self.module(inputs, **self.arguments)

    def parameters(self) -> Iterator[Any]:
        """The module's."""
        parameters: Iterator[Any] = self.module.parameters()
        return parameters


def _features(module: Any, batch: Any, group: str, name: str) -> tuple[str, ...]:
    """The features of a group, from the KeyedJaggedTensor that is built from it."""
    built = {
        tuple(_strings(node.inputsAt(1)))
        for node in module.graph.nodes()
        if _builds_kjt(node) and group + VALUES in _keys_behind(node, batch)
    }
    if not built and hasattr(module, "id_list_features_keys"):
        built = {tuple(str(key) for key in module.id_list_features_keys)}
    if len(built) != 1 or not min(built):
        raise ArtifactError(
            f"{name}: forward builds {len(built)} KeyedJaggedTensors with a constant key list from {group} where one "
            "is expected, so the order of the features is unknown; save the scripted module itself, neither traced nor "
            "frozen, and build one of them from a list of names"
        )
    return built.pop()


def _joined(module: Any, batch: Any, groups: Sequence[str]) -> list[set[str]]:
    """The groups that are joined in one KeyedJaggedTensor, which has a key for each."""
    found = []
    for node in filter(_builds_kjt, module.graph.nodes()):
        behind = _keys_behind(node, batch)
        own = {group for group in groups if group + VALUES in behind}
        if len(own) > 1 and len(_strings(node.inputsAt(1))) == len(own):
            found.append(own)
    return found


def _in_bags(module: Any, batch: Any) -> set[str]:
    """The keys that a KeyedJaggedTensor is built of, whether or not lengths are among them."""
    return {key for node in module.graph.nodes() if _builds_kjt(node) for key in _keys_behind(node, batch)}


def _keys_behind(node: Any, batch: Any) -> set[str]:
    """The keys of the dict that a node's inputs come from."""
    waiting, seen, keys = [node], set(), set()
    while waiting:
        for value in waiting.pop().inputs():
            source = value.node()
            if source.kind() == "aten::__getitem__" and source.inputsAt(0).debugName() == batch.debugName():
                keys.add(str(_constant(source.inputsAt(1))))
            elif value.debugName() not in seen:
                seen.add(value.debugName())
                waiting.append(source)
    return keys


def _tasks(module: Any) -> tuple[str, ...]:
    """The constant keys of the returned dict; empty where it is none."""
    value = next(module.graph.outputs())
    while value.node().kind() in _PASS_THROUGH:
        value = value.node().inputsAt(0)
    if value.node().kind() != "prim::DictConstruct":
        return ()
    names = [_constant(item) for item in list(value.node().inputs())[::2]]
    return tuple(names) if all(isinstance(name, str) for name in names) else ()


def _dense_dim(module: Any, key: str) -> int | None:
    """Columns of the linear layer that an input enters at once."""
    batch = list(module.inlined_graph.inputs())[1]
    waiting = [node.output() for node in _getitems(batch) if _constant(node.inputsAt(1)) == key]
    while waiting:
        for use in waiting.pop().uses():
            kind = use.user.kind()
            if kind == "aten::linear" and use.offset == 0:
                return int(_attribute(module, use.user.inputsAt(1)).shape[1])
            if kind in _PASS_THROUGH and use.offset == 0:
                waiting.append(use.user.output())
    return None


def _getitems(batch: Any) -> Iterator[Any]:
    for use in batch.uses():
        if use.user.kind() == "aten::__getitem__" and use.offset == 0:
            yield use.user


def _builds_kjt(node: Any) -> bool:
    return (
        node.kind() == "prim::CallMethod"
        and node.s("name") == "__init__"
        and str(node.inputsAt(0).type()).endswith("KeyedJaggedTensor")
    )


def _strings(value: Any) -> list[str]:
    """A constant list of strings; empty where it is not constant."""
    if value.node().kind() == "prim::ListConstruct":
        items = [_constant(item) for item in value.node().inputs()]
    else:
        items = _constant(value) or []
    return items if all(isinstance(item, str) for item in items) else []


def _constant(value: Any) -> Any:
    return value.toIValue() if value.node().kind() == "prim::Constant" else None


def _attribute(module: Any, value: Any) -> Any:
    """The tensor that a chain of prim::GetAttr leads to from the module."""
    names: list[str] = []
    while value.node().kind() == "prim::GetAttr":
        names.append(value.node().s("name"))
        value = value.node().inputsAt(0)
    for name in reversed(names):
        module = getattr(module, name)
    return module


def _check_archive(path: Path) -> None:
    """Tells what a file is from its first bytes and its table of contents, before torch sees it."""
    check_readable(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head != b"PK\x03\x04":
            pickled = head[:1] == b"\x80"
            kind = "a legacy torch.save pickle" if pickled else "empty" if not head else "not a TorchScript archive"
            raise ArtifactError(f"{path} is {kind}; give the model_default.pt that torch.jit.save wrote")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except ArtifactError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception:  # zipfile's own error, and those of struct, codecs and arithmetic that it lets through
        raise ArtifactError(f"{path} is truncated or damaged; copy it again") from None
    if any("/code/" in name for name in names):
        return
    if any(name.endswith("/data.pkl") for name in names):
        raise ArtifactError(
            f"{path} is a torch.save pickle, not TorchScript; Narsil never unpickles models: "
            "package the weights with `narsil package dlrm --checkpoint`"
        )
    raise ArtifactError(f"{path} is a zip archive without TorchScript code; give the model_default.pt of a packager")
