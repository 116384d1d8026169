"""Which of a forward's arguments are ids, and which are lengths or offsets, as the graph has it: a first guess.

Receives a program of torch.export or a ScriptModule; produces the lookups in it, and what leads to their ids, to their
offsets and to their weights. Followed is what an operation moves or changes, its first argument, and not what it is
told beside that: sizes, places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Traced", "lookups_of_program", "lookups_of_script"]

_LOOKUPS = {"aten.embedding_bag": (1, 2, 6), "aten.embedding": (1, None, None)}  # places of ids, offsets and weights
_JOINS = ("aten.cat", "aten.stack", "aten.concat")


@dataclass(frozen=True)
class Traced:
    """One lookup: the inputs that lead to its ids, to its offsets and to its weights."""

    ids: tuple[str, ...]
    offsets: tuple[str, ...]
    weights: tuple[str, ...]
    summed: bool  # whether offsets are sums of lengths


def lookups_of_program(program: Any, inputs: Iterable[str]) -> list[Traced]:
    """Those of an exported program."""
    wanted = set(inputs)

    def name(node: Any) -> str:
        target = node.target
        return f"{target.__module__.rpartition('.')[2]}.{target.__name__.partition('.')[0]}"

    def behind(value: Any) -> Iterator[Any]:
        if isinstance(value, list | tuple):
            for item in value:
                yield from behind(item)
        elif hasattr(value, "op"):
            yield value
            if value.op == "call_function" and value.args:
                yield from behind(value.args[0])

    def led(value: Any) -> tuple[tuple[str, ...], bool]:
        found = list(behind(value))
        summed = any(node.op == "call_function" and name(node) == "aten.cumsum" for node in found)
        return tuple(dict.fromkeys(node.name for node in found if node.name in wanted)), summed

    traced = []
    for node in program.graph.nodes:
        places = _LOOKUPS.get(name(node)) if node.op == "call_function" else None
        if places is not None:
            given = [node.args[at] if at is not None and at < len(node.args) else None for at in places]
            traced.append(_traced(*(led(value) for value in given)))
    return traced


def lookups_of_script(module: Any) -> list[Traced]:
    """Those of a ScriptModule, inlined and frozen."""
    import torch

    graph = torch.jit.freeze(module).graph
    names = {value.debugName(): value.debugName().partition(".")[0] for value in list(graph.inputs())[1:]}

    def behind(value: Any, seen: set[str]) -> Iterator[Any]:
        if value.debugName() in seen:
            return
        seen.add(value.debugName())
        yield value
        node = value.node()
        kind = node.kind()
        if kind in ("prim::If", "prim::Loop"):
            place = [made.debugName() for made in node.outputs()].index(value.debugName())
            for block in node.blocks():
                yield from behind(list(block.outputs())[place + (kind == "prim::Loop")], seen)
        elif kind == "prim::ListConstruct":
            for item in node.inputs():
                yield from behind(item, seen)
        elif kind not in ("prim::Param", "aten::numel", "aten::arange") and any(True for _ in node.inputs()):
            yield from behind(next(node.inputs()), seen)

    def led(value: Any) -> tuple[tuple[str, ...], bool]:
        found = list(behind(value, set())) if value is not None else []
        summed = any(each.node().kind() == "aten::cumsum" for each in found)
        return tuple(dict.fromkeys(names[each.debugName()] for each in found if each.debugName() in names)), summed

    traced = []
    for node in _nodes(graph):
        places = _LOOKUPS.get(node.kind().replace("::", "."))
        if places is not None:
            given = list(node.inputs())
            traced.append(_traced(*(led(given[at]) if at is not None else ((), False) for at in places)))
    return traced


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _traced(ids: Any, offsets: Any, weights: Any) -> Traced:
    return Traced(ids[0], tuple(name for name in offsets[0] if name not in ids[0]), weights[0], offsets[1])
