"""Finds where a TorchScript forward does other things for other rows, which no recording of a few rows can show.

Receives a ScriptModule; produces a sentence, or nothing. A number that follows from the rows, a size or one that an
operation took out of a tensor, may say how tensors are cut and laid out: two recordings show how it does (see
program/recording.py). It may not choose a branch, count a loop's turns, be cut off, divided or rounded, or stay in the
module: any of that may turn out otherwise for rows that were not recorded.

TorchRec's own classes, which keep the books of bags, and FBGEMM's are not looked into: their branches are on the form
of a request, which is one. What they give as numbers follows from the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["branch_on_rows"]

_TRUSTED = re.compile(r"code/__torch__/(torchrec|fbgemm_gpu)/")  # by the qualified name of what was scripted
_TRUSTED_HERE = re.compile(r'File "[^"]*/site-packages/(torchrec|fbgemm_gpu)/')  # of what was scripted in this process
_TRUSTED_TYPE = re.compile(r"__torch__\.(torchrec|fbgemm_gpu)\.")
_NUMBERS = re.compile(r"\b(int|float|bool|number|Scalar|t)\b")  # in a type that holds numbers
# What a tensor has whatever the rows.
_FIXED = frozenset(
    {"aten::dim", "prim::dtype", "prim::device", "prim::layout", "aten::is_floating_point", "aten::is_complex"}
    | {"aten::__is__", "aten::__isnot__", "prim::isinstance", "prim::is_cuda", "aten::device", "prim::requires_grad"}
    | {"aten::get_device", "aten::element_size", "aten::__contains__", "aten::is_signed", "prim::is_nested"}
)
# What makes two numbers differ where their sources do.
_LINEAR = frozenset(
    {"aten::add", "aten::sub", "aten::neg", "aten::__getitem__", "aten::slice", "aten::append", "aten::copy"}
    | {"prim::ListConstruct", "prim::ListUnpack", "prim::TupleConstruct", "prim::TupleUnpack", "prim::TupleIndex"}
    | {"prim::unchecked_cast", "aten::Int", "aten::IntImplicit", "aten::item", "prim::tolist", "aten::tolist"}
    | {"prim::NumToTensor", "aten::size", "aten::numel", "aten::len", "aten::list", "prim::data", "aten::_set_item"}
    | {"prim::GetAttr", "aten::__range_length", "aten::values", "aten::keys", "aten::items", "aten::floordiv"}
)
# What makes two numbers differ where the one of its sources that follows from the rows does.
_ONE_TO_ONE = frozenset({"aten::mul", "aten::div", "aten::Float", "aten::FloatImplicit", "aten::sqrt", "aten::log"})
_HARMLESS = frozenset({"aten::format", "prim::RaiseException", "prim::Print", "aten::warn", "aten::__not__"})
_PLAIN, _BENT = 1, 2  # what is known of a number that follows from the rows: how it does, or no more than that


def branch_on_rows(module: Any) -> str:
    """The first place where what forward does follows from the rows in a way that no recording shows; empty where there
    is none."""
    graph = module.inlined_graph  # a copy
    torch._C._jit_pass_constant_propagation(graph)  # a branch on an argument that is always None goes
    return _Walk(graph).problem


class _Walk:
    def __init__(self, graph: Any) -> None:
        self.follows: dict[str, int] = {}  # value -> _PLAIN or _BENT; others are the same for all rows
        self.own = {next(graph.inputs()).debugName()}  # the module, and what its attributes hold
        self.problem = ""
        while True:  # until nothing is learned: loops carry values round
            before = len(self.follows), sum(self.follows.values()), len(self.own)
            self._block(graph)
            if self.problem or before == (len(self.follows), sum(self.follows.values()), len(self.own)):
                break

    def _block(self, block: Any) -> None:
        for node in block.nodes():
            kind = node.kind()
            if kind in ("prim::If", "prim::Loop"):
                self._branch(node, kind)
            elif kind != "prim::Constant":
                self._node(node, kind)

    def _branch(self, node: Any, kind: str) -> None:
        blocks, inputs = list(node.blocks()), list(node.inputs())
        deciding = inputs[:1] if kind == "prim::If" else [*inputs[:2], next(blocks[0].outputs())]
        if kind == "prim::Loop":
            inner = list(blocks[0].inputs())
            self._flow(inputs[:1], inner[:1])
            self._flow(inputs[2:], inner[1:])
            self._flow(list(blocks[0].outputs())[1:], inner[1:])
        for block in blocks:
            self._block(block)
        for block in blocks:
            made = list(block.outputs())
            if kind == "prim::Loop":
                made = made[1:]
            if not _raises(block):
                self._flow(made, node.outputs())
        if self._rank(deciding) == 0:
            return
        if _trusted(node) or (kind == "prim::If" and all(map(_only_compares, blocks))):
            self._mark(node.outputs(), _BENT)
        elif not any(map(_raises, blocks)):
            self._complain(node, "branches on" if kind == "prim::If" else "loops over")

    def _flow(self, sources: Iterable[Any], targets: Iterable[Any]) -> None:
        for source, target in zip(sources, targets, strict=False):
            self._mark([target], self.follows.get(source.debugName(), 0))
            if source.debugName() in self.own:
                self.own.add(target.debugName())

    def _node(self, node: Any, kind: str) -> None:
        inputs, outputs = list(node.inputs()), list(node.outputs())
        trusted, rank = _trusted(node), self._rank(inputs)
        if kind == "prim::GetAttr" and inputs[0].debugName() in self.own:
            self.own.add(outputs[0].debugName())
            return
        if kind == "prim::SetAttr":
            # What a request was made into holds what it likes; a module that is written to scores otherwise later.
            if inputs[0].debugName() in self.own and not _TRUSTED_TYPE.match(str(inputs[0].type())):
                self.problem = self.problem or f"forward writes to its module's attribute {node.s('name')}"
            return
        if kind == "aten::len" and _is_as_long(inputs[0]):
            return
        if kind in _FIXED or kind in _HARMLESS:
            self._mark(outputs, _BENT if kind == "aten::__not__" and rank else 0)
            return
        if kind == "prim::TupleUnpack" and all(parts := [_put_at(inputs[0], at) for at in range(len(outputs))]):
            for part, output in zip(parts, outputs, strict=True):
                self._mark([output], self._rank(part))
            return
        taken = [value for value in inputs if _is_tensor(value) and value.debugName() not in self.own]
        if (taken or kind == "prim::GetAttr") and any(map(_holds_numbers, outputs)):
            sizes = kind in ("aten::size", "aten::numel", "aten::len", "prim::GetAttr")
            sizes = sizes or (kind == "prim::tolist" and _counts_ids(inputs[0]))
            rank = max(rank, _PLAIN if sizes or trusted else _BENT)
        if not rank:
            return
        if any(map(_is_tensor, outputs)) and not trusted and not self._shows(node, kind, inputs):
            self._complain(node, "computes with")
        self._mark(outputs, rank if self._is_linear(kind, inputs) else _BENT)
        if kind in ("aten::append", "aten::_set_item"):
            self._mark(inputs[:1], rank)

    def _shows(self, node: Any, kind: str, inputs: list[Any]) -> bool:
        """Whether two recordings show what an operation on tensors does with the numbers that follow from the rows."""
        return kind.startswith("prim::") or self._rank(inputs) < _BENT

    def _is_linear(self, kind: str, inputs: list[Any]) -> bool:
        following = [value for value in inputs if self.follows.get(value.debugName(), 0)]
        if kind == "aten::mul" and all(map(_is_size, following)):
            return True
        return kind in _LINEAR or (kind in _ONE_TO_ONE and len(following) < 2)

    def _rank(self, values: Iterable[Any]) -> int:
        return max((self.follows.get(value.debugName(), 0) for value in values), default=0)

    def _mark(self, values: Iterable[Any], rank: int) -> None:
        for value in values:
            if rank and _holds_numbers(value):
                self.follows[value.debugName()] = max(rank, self.follows.get(value.debugName(), 0))

    def _complain(self, node: Any, does: str) -> None:
        self.problem = self.problem or f"forward {does} a number that follows from the rows ({_place(node)})"


def _raises(block: Any) -> bool:
    return any(node.kind() == "prim::RaiseException" for node in block.nodes())


def _put_at(value: Any, place: int) -> list[Any]:
    """What a tuple may have at a place; empty where that is not known."""
    node = value.node()
    if node.kind() == "prim::TupleConstruct":
        return [list(node.inputs())[place]]
    if node.kind() != "prim::If":
        return []
    output = [made.debugName() for made in node.outputs()].index(value.debugName())
    made = [list(block.outputs())[output] for block in node.blocks() if not _raises(block)]
    found = [_put_at(part, place) for part in made if part.node().kind() != "prim::Uninitialized"]
    return [part for each in found for part in each] if all(found) else []


def _only_compares(block: Any) -> bool:
    """Whether a branch gives nothing but truth values, of numbers, as ``and`` and ``or`` do."""
    values = [value for node in block.nodes() for value in node.outputs()]
    kinds = [str(value.type()) for value in (*values, *block.outputs())]
    return all(kind in ("bool", "int", "float") for kind in kinds) and not any(
        list(node.blocks()) or node.kind() == "prim::SetAttr" for node in block.nodes()
    )


def _is_size(value: Any) -> bool:
    """Whether a number is a tensor's size, to which nothing was added: of two of them, the product is a multiple of how
    many rows there are, or their square, which recordings tell apart."""
    node = value.node()
    of = next(iter(node.inputs()), None)
    if node.kind() in ("prim::ListUnpack", "aten::__getitem__"):
        return bool(of is not None and of.node().kind() == "aten::size")
    return bool(node.kind() == "aten::size")


def _is_as_long(value: Any) -> bool:
    """Whether a list has as many numbers for other rows: how many axes there are, or those that are written down."""
    node = value.node()
    kind, inputs = node.kind(), list(node.inputs())
    if kind in ("aten::size", "prim::ListConstruct"):
        return True
    if kind in ("aten::add", "aten::list"):
        return all(map(_is_as_long, inputs))
    constant = all(bound.node().kind() == "prim::Constant" for bound in inputs[1:])
    return bool(kind == "aten::slice" and constant and _is_as_long(inputs[0]))


def _trusted(node: Any) -> bool:
    source = node.sourceRange()
    return bool(_TRUSTED.search(source) or ("code/__torch__" not in source and _TRUSTED_HERE.search(source)))


def _counts_ids(value: Any) -> bool:
    """Whether a tensor is made of the lengths or offsets of TorchRec's bags by nothing but sums, as the sizes are by
    which the wrapper of an EmbeddingCollection splits what was looked up."""
    node = value.node()
    kind, inputs = node.kind(), list(node.inputs())
    if kind == "prim::GetAttr":
        return bool(_TRUSTED_TYPE.match(str(inputs[0].type()))) and node.s("name") in ("_lengths", "_offsets")
    if kind == "prim::If":
        place = [made.debugName() for made in node.outputs()].index(value.debugName())
        found = [list(block.outputs())[place] for block in node.blocks()]
        found = [made for made in found if made.node().kind() != "prim::Uninitialized"]
        return bool(found) and all(map(_counts_ids, found))
    summing = ("aten::sum", "aten::view", "aten::to", "aten::diff", "prim::unchecked_cast")
    return kind in summing and _counts_ids(inputs[0])


def _is_tensor(value: Any) -> bool:
    return "Tensor" in str(value.type())


def _holds_numbers(value: Any) -> bool:
    kind = str(value.type())
    return bool(_NUMBERS.search(kind)) and "Tensor" not in kind


def _place(node: Any) -> str:
    """The marked line of a node's source, which is the model's own."""
    lines = node.sourceRange().splitlines()
    marked = next((number for number, line in enumerate(lines) if "~" in line), 0)
    return f"{node.kind()}: {lines[max(marked - 1, 0)].strip():.80}" if lines else node.kind()
