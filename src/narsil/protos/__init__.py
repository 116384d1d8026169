"""The .proto files as a server describes them to those who ask, made from proto/ when the package is built.

No code is generated, and none of protobuf's runtime is needed: every message is read and written by hand, so that
Narsil asks for no version of protobuf that a neighbour in the same environment could not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from narsil.errors import ArtifactError
from narsil.wire import LEN, scan, text

__all__ = ["DESCRIPTORS", "ProtoFile", "files"]

DESCRIPTORS = Path(__file__).with_name("descriptors.binpb")  # a serialized google.protobuf.FileDescriptorSet

# Field numbers of google/protobuf/descriptor.proto: kind of thing -> {field that holds things inside it: their kind}.
_NAME, _PACKAGE, _SET_FILE = 1, 2, 1
_INSIDE = {
    "file": {4: "message", 5: "enum", 6: "service"},
    "message": {2: "field", 3: "message", 4: "enum", 8: "oneof"},
    "enum": {2: "value"},
    "service": {2: "method"},
}


@dataclass(frozen=True)
class ProtoFile:
    """One .proto file. None of ours imports another, so that each describes itself whole."""

    name: str  # its path below proto/
    descriptor: bytes  # a serialized google.protobuf.FileDescriptorProto
    symbols: frozenset[str]  # full names of its messages, fields, enums, values, services and methods


@cache
def files() -> tuple[ProtoFile, ...]:
    """All of them. Raises ArtifactError where the package was not built."""
    try:
        data = DESCRIPTORS.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{DESCRIPTORS} cannot be read ({error.strerror}): install Narsil, or run `python setup.py build_py`"
        ) from None
    return tuple(_file(data[start:stop]) for number, _, start, stop in scan(data, 0, len(data)) if number == _SET_FILE)


def _file(data: bytes) -> ProtoFile:
    found = {
        number: text(data, start, stop, "a descriptor")
        for number, kind, start, stop in scan(data, 0, len(data))
        if kind == LEN and number in (_NAME, _PACKAGE)
    }
    return ProtoFile(found[_NAME], data, frozenset(_symbols(data, 0, len(data), "file", found.get(_PACKAGE, ""))))


def _symbols(data: bytes, start: int, stop: int, kind: str, scope: str) -> Iterator[str]:
    """Full names of all that stands inside data[start:stop], a descriptor of this kind whose own name is ``scope``."""
    for number, _, begin, end in scan(data, start, stop):
        inside = _INSIDE.get(kind, {}).get(number)
        if inside is None:
            continue
        (name,) = (text(data, a, b, "a descriptor") for n, _, a, b in scan(data, begin, end) if n == _NAME)
        # The values of an enum stand beside it, as in C.
        full = ".".join(filter(None, (scope.rpartition(".")[0] if kind == "enum" else scope, name)))
        yield full
        yield from _symbols(data, begin, end, inside, full)
