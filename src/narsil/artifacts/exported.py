"""Programs of torch.export (.pt2), loaded without unpickling anything.

Receives a file; produces an Exported. ``torch.export.load`` itself falls back to pickle for sample inputs and for some
constants, looks functions up by dotted names under ``torch`` and evaluates sizes as Python: here records that are
pickles are refused or left unread, every function must be an operator of aten, prims or plain arithmetic, and every
size an expression of symbols and known functions. What is looked at is what torch's own reader finds.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narsil.artifacts.pt2 import check_layout, is_package, models_in
from narsil.errors import ArtifactError, first_line

__all__ = ["Exported", "load_exported"]

_MAX_GRAPH_BYTES = 256 << 20
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+(\.\w+)?|torch\.sym_\w+|math\.(trunc|floor|ceil|sqrt)|"
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|pow|abs|ge|le|gt|lt|eq|ne|and_|or_|not_|getitem)"
)
_FORBIDDEN = re.compile(r"torch\.ops\.aten\.(from_file|_cuda\w*|record_stream)(\.\w+)?")
# What makes of a size, or of a number that was taken out of a tensor, what other rows would show otherwise.
_BENDS = re.compile(r"torch\.sym_(min|max|ite|not|float|int|sqrt)|math\.\w+|_operator\.(truediv|mod|pow|and_|or_|not_)")
_MOST_EXPRESSION = 4096  # characters of a size
_SYMBOL = re.compile(r"(s|u|zf|zuf)\d+")
# What a size may be made of, as sympy prints it with srepr. Powers are not let in: 9**9**9 would never end.
_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Add", "Mul", "Max", "Min", "FloorDiv", "CleanDiv", "CeilDiv", "Mod", "PythonMod"}
    | {"ModularIndexing", "Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan"}
    | {"Eq", "Ne", "Ge", "Le", "Gt", "Lt", "And", "Or", "Not", "IntTrueDiv", "FloatTrueDiv", "ToFloat"}
    | {"TruncToInt", "Identity"}
)
_NODES = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.USub, ast.cmpop)


@dataclass(frozen=True)
class Exported:
    """A loaded program. Its graph takes weights and inputs as one flat list."""

    program: Any  # torch.export.ExportedProgram
    names: tuple[str, ...]  # of the inputs that are tensors, in order
    sizes: dict[str, tuple[tuple[int, int | None], ...]]  # name -> (least, most) of each axis; None: any

    def __call__(self, given: Sequence[Any]) -> Any:
        """The result for tensors in the order of ``names``, as the model's author returned it."""
        from torch.export.graph_signature import InputKind
        from torch.utils import _pytree as pytree

        program, waiting, flat = self.program, iter(given), []
        for spec in program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                constant = type(spec.arg).__name__ == "ConstantArgument"
                flat.append(spec.arg.value if constant else next(waiting))
            elif spec.target in program.state_dict:
                flat.append(program.state_dict[spec.target])
            else:
                flat.append(program.constants[spec.target])
        return pytree.tree_unflatten(list(program.graph_module(*flat)), program.call_spec.out_spec)

    def branch(self) -> str:
        """The first number that follows from the rows in a way that no recording of a few rows shows; else empty."""
        for node in self.program.graph.nodes:
            if node.op == "call_function" and _BENDS.fullmatch(f"{node.target.__module__}.{node.target.__name__}"):
                return f"forward takes the {node.target.__name__} of a number that follows from the rows"
        return ""


def load_exported(path: Path) -> Exported:
    """The program in a file. Raises ArtifactError saying what the file is instead, or what in it is not let in."""
    names = check_layout(path)
    if is_package(path):
        raise ArtifactError(f"{path} is a package of AOTInductor's, which holds code and no program to read")
    if len(models := models_in(names)) != 1:
        raise ArtifactError(f"{path} holds {len(models)} exported programs where one is expected")
    try:
        program = _deserialized(path, models[0])
        return _described(program, path.name)
    except ArtifactError:
        raise
    except Exception as error:  # torch raises errors of every kind for damaged archives
        raise ArtifactError(f"{path} cannot be loaded as an exported program: {first_line(error)}") from None


def _check_records(path: Path, reader: Any) -> None:
    """Raises ArtifactError where something in an archive would run by being loaded."""
    for name in reader.get_file_names():
        if name.endswith("_config.json") or name.startswith("models/"):
            found = reader.read_bytes(name)
            if len(found) > _MAX_GRAPH_BYTES:
                raise ArtifactError(f"{path}: {name} is larger than {_MAX_GRAPH_BYTES} bytes")
            _check_json(path, json.loads(found))
        elif re.fullmatch(r"data/(weights|constants)/(.*\.pt|(custom_obj|opaque_obj).*)", name):
            raise ArtifactError(
                f"{path}: {name.rpartition('/')[2]} is a pickle, which Narsil does not load; save the program with the "
                "torch of today and with plain tensors alone"
            )


def _check_json(path: Path, data: Any) -> None:
    for key, value in _entries(data):
        if key == "use_pickle" and value:
            raise ArtifactError(f"{path}: a weight is stored as a pickle, which Narsil does not load; save it strided")
        if key == "target" and isinstance(value, str) and "graph_module" not in value:
            inner = value.startswith(("torch", "_operator", "math", "#"))
            if inner and (not _TARGET.fullmatch(value) or _FORBIDDEN.fullmatch(value)):
                raise ArtifactError(
                    f"{path} calls {value[:64]}, which is no operator that Narsil lets an exported program call; serve "
                    "the model as TorchScript"
                )
        if key == "expr_str" and not _is_expression(value):
            raise ArtifactError(f"{path}: a size is no expression that Narsil reads: {str(value)[:64]!r}")


def _is_expression(value: Any) -> bool:
    """Whether a text is made of numbers, symbols and known functions alone: sympy evaluates it."""
    if not isinstance(value, str) or len(value) > _MOST_EXPRESSION:
        return False
    try:
        nodes = list(ast.walk(ast.parse(value, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(_is_plain, nodes))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        return (isinstance(node.value, int) and node.value < 2**63) or (
            isinstance(node.value, str) and _SYMBOL.fullmatch(node.value) is not None
        )
    return isinstance(node, (*_NODES, *_OPERATORS))


def _entries(data: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _deserialized(path: Path, model: str) -> Any:
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _bytes_to_dataclass
    from torch.export.pt2_archive import _package as package

    with package.PT2ArchiveReader(str(path)) as reader:
        _check_records(path, reader)
        graph = reader.read_bytes(f"models/{model}.json")
        if b'"torchrec.' in graph or b'\\"torchrec.' in graph:
            _import_torchrec(path)
        # Sample inputs are a pickle, and are not needed.
        return ExportedProgramDeserializer(None).deserialize(
            _bytes_to_dataclass(schema.ExportedProgram, graph),
            package._load_state_dict(reader, model),
            package._load_constants(reader, model),
            b"",
        )


def _import_torchrec(path: Path) -> None:
    """Registers KeyedJaggedTensor, which a program may take."""
    try:
        import torchrec  # noqa: F401
    except (ImportError, OSError) as error:
        raise ArtifactError(
            f"{path} takes a type of TorchRec's, which cannot be imported ({first_line(error)}); install torchrec, or "
            "export the model with tensors as its arguments"
        ) from None


def _described(program: Any, name: str) -> Exported:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ArtifactError(f"{name} changes its buffers or its inputs in place; export it in eval mode")
    wanted = set(signature.user_inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    tensors = [node for node in placeholders if hasattr(node.meta.get("val"), "shape")]
    sizes = {node.name: tuple(_size(program, size) for size in node.meta["val"].shape) for node in tensors}
    return Exported(program, tuple(node.name for node in tensors), sizes)


def _size(program: Any, size: Any) -> tuple[int, int | None]:
    """(least, most) of an axis; most is None where there is none."""
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import bound_sympy

    if isinstance(size, int):
        return size, size
    found = bound_sympy(size.node.expr, program.range_constraints)
    return max(int(found.lower), 0), None if found.upper in (int_oo, -int_oo) else int(found.upper)
