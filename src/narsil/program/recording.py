"""Runs a model on probe rows and writes down every operation that it does, with the tensors that flow between them.

Receives a callable and its named inputs; produces a Recording. ``merged`` holds two recordings of one model, of
different rows, against each other: what differs between them follows from the rows (``Varying``), what does not is the
model's own. An operation of which only one of them knows means that the model branches on what it is given.

The lookups' ids are held against their tables before they run: FBGEMM's CPU operators trust them.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from narsil.errors import ArtifactError
from narsil.program.rewriting import REWRITTEN

__all__ = ["Constant", "Op", "Recording", "Ref", "Varying", "merged", "record"]

_FEW = 1 << 16  # numbers of a constant that forward makes each time it runs

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_KEPT = ("aten.linear",)

Guard = Callable[[str, Sequence[Any]], None]  # an operation and its arguments, before it runs


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor that was given, or that an operation before made."""

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor of the model's own."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Varying:
    """What was one thing in the first recording and another in the second: a number, or the model's own tensor."""

    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: ``aten.addmm`` and its like (overloads are told by their arguments), arguments by position and by
    name, and the numbers of what it made; None where that is no tensor."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int | None, ...]
    call: Any  # the operation itself

    def writes(self) -> tuple[Any, ...]:
        """The arguments that it changes in place."""
        schema = getattr(self.call, "_schema", None)
        if schema is None:
            return ()
        given = zip(schema.arguments, self.args, strict=False)
        named = [(item, self.kwargs[item.name]) for item in schema.arguments if item.name in self.kwargs]
        return tuple(
            value for item, value in (*given, *named) if item.alias_info is not None and item.alias_info.is_write
        )

    def tells(self, tag: torch.Tag) -> bool:
        """Whether torch says so of the operation."""
        return tag in getattr(self.call, "tags", ())


@dataclass(frozen=True)
class Recording:
    """All operations of one forward, in order."""

    inputs: Mapping[str, int]  # name -> number of the tensor
    ops: tuple[Op, ...]
    outputs: Mapping[str, Any]  # task -> Ref or Constant
    tensors: Sequence[Tensor]  # by number
    second: Sequence[Tensor] = field(default=())  # of a merged recording: the other's


def record(
    forward: Callable[[Any], Any], inputs: Mapping[str, Tensor], guard: Guard = lambda name, args: None
) -> Recording:
    """One forward over ``inputs``, written down. Raises whatever the model or the ``guard`` raises."""
    recorder = _Recorder(guard)
    numbers = {name: recorder.given(tensor) for name, tensor in inputs.items()}
    try:
        with torch.no_grad(), torch.jit.optimized_execution(False), recorder:
            result = forward(dict(inputs))
    except Exception:
        if recorder.raised is not None:  # of which TorchScript makes an error without words
            raise recorder.raised from None
        raise
    outputs = {name: recorder.described(tensor) for name, tensor in named_outputs(result).items()}
    return Recording(numbers, tuple(recorder.ops), outputs, recorder.tensors)


def named_outputs(result: Any) -> dict[str, Tensor]:
    """A forward's result by task: a lone tensor is ``default``, those of a tuple are 0, 1, ... Raises ArtifactError on
    what holds no tensors."""
    if isinstance(result, Tensor):
        return {"default": result}
    if isinstance(result, tuple | list):
        result = {str(number): item for number, item in enumerate(result)}
    if not isinstance(result, Mapping) or not result or not all(isinstance(item, Tensor) for item in result.values()):
        raise ArtifactError(
            f"forward returns {_stated(result)}, where a dict of named scores, a tuple or a tensor is expected; return "
            "the scores alone"
        )
    return {str(name): tensor for name, tensor in result.items()}


def _stated(result: Any) -> str:
    """What it is, and what it holds that is no tensor."""
    kind = type(result).__name__
    if not isinstance(result, Mapping):
        return f"a {kind}"
    if not result:
        return f"an empty {kind}"
    name, other = next((name, item) for name, item in result.items() if not isinstance(item, Tensor))
    return f"a {kind} whose {str(name)[:80]!r} is a {type(other).__name__}"


class _Recorder(TorchDispatchMode):
    """Tensors are known by their identity, so all of them are kept until the recording ends."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._constants: dict[int, Constant] = {}
        self._guard = guard
        self._rewriting = False  # whether operations come from one that is rewritten
        self.raised: Exception | None = None  # by the guard or by an operation

    def given(self, tensor: Tensor) -> int:
        """The number of a tensor that is an input or an operation's result."""
        self._numbers[id(tensor)] = number = len(self.tensors)
        self.tensors.append(tensor)
        return number

    def described(self, value: Any) -> Any:
        """An argument, with every tensor in it by its number; an unseen one is the model's own."""
        if isinstance(value, Tensor):
            number = self._numbers.get(id(value))
            return self._constants.setdefault(id(value), Constant(value)) if number is None else Ref(number)
        if isinstance(value, tuple | list):
            return tuple(self.described(item) for item in value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and writes it down."""
        name = str(func.overloadpacket)
        if (result := self._rewritten(name, func, args, kwargs or {})) is not None:
            return result
        described = self.described(args), {key: self.described(value) for key, value in (kwargs or {}).items()}
        if torch.Tag.inplace_view in func.tags and isinstance(described[0][0], Ref):
            # The same tensor lies otherwise from here on: what was given before is kept as it lay.
            self.tensors[described[0][0].number] = args[0].detach()
            name = name.removesuffix("_")
        try:
            self._guard(name, args)
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            self.raised = error
            raise
        made = result if isinstance(result, tuple | list) else (result,)
        outputs = tuple(self.given(item) if isinstance(item, Tensor) else None for item in made)
        call = func if name == str(func.overloadpacket) else getattr(torch.ops.aten, name.removeprefix("aten."))
        self.ops.append(Op(name, *described, outputs, call))
        return result

    def _rewritten(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of plain operations that do the same, written down; None where there are none."""
        plain = REWRITTEN.get(name)
        if plain is None and self._rewriting and name not in _KEPT and func.has_kernel_for_dispatch_key(_COMPOSITE):
            plain = func.decompose  # of one that a rewritten operation does: others come here in parts
        if plain is None:
            return None
        before, outer = (len(self.ops), len(self.tensors)), self._rewriting
        self._rewriting = True
        try:
            with self:
                result = plain(*args, **kwargs)
        finally:
            self._rewriting = outer
        if result is None:
            del self.ops[before[0] :], self.tensors[before[1] :]
        return result


def merged(first: Recording, second: Recording) -> Recording:
    """Two recordings of one model as one, its numbers that differ as Varying. Raises ArtifactError where the operations
    themselves differ."""
    if len(first.ops) != len(second.ops) or _places(first) != _places(second):
        raise ArtifactError(
            "forward does other operations for other rows, so that what it computes cannot be read from one of them; "
            "take the branch on data or on sizes out of the model"
        )
    ops = tuple(_merged_op(one, other) for one, other in zip(first.ops, second.ops, strict=True))
    return Recording(first.inputs, ops, first.outputs, first.tensors, second.tensors)


def _places(recording: Recording) -> dict[str, int | None]:
    """Task -> the number of its tensor."""
    return {task: made.number if isinstance(made, Ref) else None for task, made in recording.outputs.items()}


def _merged_op(one: Op, other: Op) -> Op:
    if one.name != other.name or one.outputs != other.outputs or one.kwargs.keys() != other.kwargs.keys():
        raise ArtifactError(
            f"forward does {one.name} for some rows and {other.name} for others; take the branch on data or on sizes "
            f"out "
            "of the model"
        )
    args = _merged_value(one.args, other.args)
    kwargs = {key: _merged_value(value, other.kwargs[key]) for key, value in one.kwargs.items()}
    return Op(one.name, args, kwargs, one.outputs, one.call)


def _merged_value(one: Any, other: Any) -> Any:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(_merged_value(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Constant) and isinstance(other, Constant):
        return one if _same(one.tensor, other.tensor) else Varying(one, other)
    return one if _equal(one, other) else Varying(one, other)


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments that are no tensors are one; packed weights and their like compare by identity alone."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.ScriptObject):
        return hash(one) == hash(other)
    return bool(one == other) or str(one) == str(other) == "nan"


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether it is one tensor of the model's: the same memory, or the same few numbers made anew."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return one.numel() <= _FEW and bool(torch.equal(one, other))
