"""Archives of torch.export and AOTInductor (.pt2): told apart, and looked through before torch sees them.

Receives a file; produces the names in it, or refuses. Readers differ in what they make of an odd archive: one takes the
first of two records of a name and another the last, one follows a path and another does not. So that all of them find
the same, an archive is as torch writes it: plain names, no two alike, nothing compressed or encrypted, and no more
bytes in its records than in the file.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from narsil.artifacts.compiled_info import processor_flags
from narsil.artifacts.files import check_readable, unreadable
from narsil.errors import ArtifactError

__all__ = ["check_layout", "check_package", "is_package", "is_pt2", "keys_of", "library_in", "models_in"]

_MODEL = re.compile(r"[^/]+/models/([^/]+)\.json")
_PACKAGED = re.compile(r"[^/]+/data/aotinductor/([^/]+)/([^/]+)")
_MAX_TEXT = 16 << 20
_ENCRYPTED = 1
# What the names of AOTInductor's vector instructions need, by the words that it has for them.
_NEEDS = {
    "AVX2": ("avx2", "fma"),
    "AVX512": ("avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile",),
    "ASIMD": ("asimd",),
    "NEON": ("asimd",),
}


def _names(path: Path) -> list[str]:
    """Of an archive's records; none where it is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # zipfile's own error, and those of struct and codecs that it lets through
        return []


def is_pt2(path: Path) -> bool:
    """Whether a file is an archive of torch.export's or of AOTInductor's, by its table of contents."""
    return any(name.endswith("/archive_format") for name in _names(path))


def is_package(path: Path) -> bool:
    """Whether an archive holds compiled code, and no program that could be run instead."""
    names = _names(path)
    return any(map(_PACKAGED.fullmatch, names)) and not models_in(names)


def models_in(names: Sequence[str]) -> list[str]:
    """The names of the exported programs in an archive."""
    return [found[1] for name in names if (found := _MODEL.fullmatch(name))]


def check_layout(path: Path) -> list[str]:
    """The names of an archive's records. Raises ArtifactError where readers could differ about them, or read more than
    the file has."""
    check_readable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception:  # zipfile's own error, and those of struct and codecs that it lets through
        raise ArtifactError(f"{path} is truncated or damaged, or no exported program; copy it again") from None
    seen: set[str] = set()
    for entry in entries:
        shown = repr(entry.filename)[:80]
        if not _is_plain(entry.filename):
            raise ArtifactError(f"{path} holds the record {shown}, whose name leads elsewhere; save the program again")
        if entry.filename.casefold() in seen:
            raise ArtifactError(f"{path} holds the record {shown} twice; save the program again")
        seen.add(entry.filename.casefold())
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise ArtifactError(
                f"{path} holds the record {shown} compressed or encrypted, as torch never does; save the program again"
            )
    if sum(entry.file_size for entry in entries) > size:
        raise ArtifactError(f"{path} has records of more bytes than the file; copy it again")
    return [entry.filename for entry in entries]


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and all(part not in ("", ".", "..") for part in parts)


def library_in(path: Path, names: Sequence[str]) -> str:
    """The name of the one library of a package. Raises ArtifactError where it holds none, or several models."""
    packaged = {found[1] for name in names if (found := _PACKAGED.fullmatch(name))}
    if len(packaged) != 1:
        raise ArtifactError(f"{path} holds {len(packaged)} compiled models where one is expected; package one alone")
    libraries = [name for name in names if name.endswith(".so")]
    if len(libraries) != 1:
        raise ArtifactError(
            f"{path} holds {len(libraries)} libraries where one is expected; package it without package_cpp_only"
        )
    return libraries[0]


def check_package(path: Path, names: Sequence[str]) -> None:
    """Raises ArtifactError where a package is for another machine, or calls what its code does not hold."""
    with zipfile.ZipFile(path) as archive:
        found = [(name, _json(path, archive, name)) for name in names if name.endswith(".json")]
    for name, told in found:
        if name.endswith("wrapper_metadata.json") and isinstance(told, dict):
            _check_machine(path, told)
        nodes = told.get("nodes") if name.endswith("extern_kernel_nodes.json") and isinstance(told, dict) else None
        if nodes:
            first = nodes[0] if isinstance(nodes, list) else {}
            node = first.get("node") if isinstance(first, dict) else None
            target = str(node.get("target") if isinstance(node, dict) else "an operation")[:80]
            raise ArtifactError(
                f"{path} calls {target}, which AOTInductor has no code for and leaves to torch's interpreter; serve "
                "the torch.export program that it was compiled from"
            )
    if any(name.endswith("custom_objs_config.json") and told for name, told in found):
        raise ArtifactError(f"{path} holds objects that are pickles, which Narsil does not load; compile it without")


def _json(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > _MAX_TEXT:
        raise ArtifactError(f"{path}: {name} is larger than {_MAX_TEXT} bytes")
    try:
        return json.loads(archive.read(name))
    except (ValueError, RecursionError, zipfile.BadZipFile):
        raise ArtifactError(f"{path}: {name.rpartition('/')[2]} is damaged; copy it again") from None


def _check_machine(path: Path, told: dict[str, Any]) -> None:
    """Raises ArtifactError where metadata names another device, system, processor or set of instructions."""
    again = "compile it again for this one, or serve the torch.export program that it was compiled from"
    device = str(told.get("AOTI_DEVICE_KEY", "cpu"))[:32]
    if device != "cpu":
        raise ArtifactError(f"{path} was compiled for {device}, and Narsil runs such packages on the CPU; {again}")
    for key, here in (("AOTI_PLATFORM", sys.platform), ("AOTI_MACHINE", platform.machine())):
        if key in told and told[key] != here:
            raise ArtifactError(f"{path} was compiled for {str(told[key])[:32]} and this machine is {here}; {again}")
    flags = processor_flags()
    for word in str(told.get("AOTI_CPU_ISA", "")).upper().split():
        lacking = [flag for flag in _NEEDS.get(word, ()) if flags and flag not in flags]
        if lacking:
            raise ArtifactError(
                f"{path} was compiled for a processor with {lacking[0]}, which this machine's lacks; {again}"
            )


def keys_of(specification: Any) -> tuple[str, ...]:
    """Of each leaf of a pytree's specification, the key of the dict that holds it; empty where none does."""

    def leaves(item: Any, key: str) -> Iterator[str]:
        if item["type"] is None:
            yield key
            return
        names = json.loads(item["context"]) if item["type"] == "builtins.dict" else [""] * len(item["children_spec"])
        for name, child in zip(names, item["children_spec"], strict=True):
            yield from leaves(child, str(name))

    return tuple(leaves(specification, ""))
