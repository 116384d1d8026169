"""Opens, checks and describes a model's files.

Receives a path: a folder that ``narsil package`` wrote, one of its files, or a TorchScript file from TorchRec's own
packager. Produces an Artifact. Owns manifest.json and its format. Imports no torch where there is a manifest.

    DIR/manifest.json                  schema, device, architecture, and every file's size and SHA-256
    DIR/model_default.pt               TorchScript, INT8 tables                                 role torchscript
    DIR/narsil_dlrm_default.onnx       ONNX graph, FP32                                         role onnx
    DIR/narsil_dlrm_default.onnx.data  its tables                                               role onnx_data

A folder that ``narsil compile`` wrote has a format of its own and more roles: see compiled_info.py.

A manifest is read as hostile input: its files are plain names that stay in the folder. A file that is missing or
damaged stops those who need it and nobody else: its path is None, and the artifact's ``damage`` says why.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from narsil.artifacts.arguments import Arguments, arguments_of, read_schema_file, schema_file_of
from narsil.artifacts.files import check_readable, unreadable
from narsil.artifacts.schema import ModelSchema
from narsil.errors import ArtifactError, first_line
from narsil.names import as_name, is_name

__all__ = [
    "BACKEND_ROLES",
    "COMPILED_FILE",
    "COMPILED_FORMAT",
    "FORMAT",
    "FUSED_FILE",
    "MANIFEST",
    "NEWER",
    "ONNX_DATA_FILE",
    "ONNX_FILE",
    "ONNX_SCHEMA",
    "TABLES_FILE",
    "TORCHSCRIPT_FILE",
    "WEIGHTS_FILE",
    "Artifact",
    "FileState",
    "model_file",
    "open_artifact",
    "read_manifest",
    "sha256",
    "write_manifest",
]

FORMAT = "narsil.artifact/1"
COMPILED_FORMAT = "narsil.compiled/1"
MANIFEST = "manifest.json"
NEWER = ".narsil.new"  # a folder in an artifact's folder which is the artifact: see replacing.py
TORCHSCRIPT_FILE = "model_default.pt"  # the name that TorchRec's packager and servers use
ONNX_FILE = "narsil_dlrm_default.onnx"
ONNX_DATA_FILE = ONNX_FILE + ".data"
COMPILED_FILE = "model.pt2"
FUSED_FILE = "forward.so"
WEIGHTS_FILE = "weights.bin"
TABLES_FILE = "tables.bin"
ONNX_SCHEMA = "narsil.schema"  # the graph's metadata entry that holds the schema it was built for

_MAX_MANIFEST_BYTES = 16 << 20
_MAX_NAME_BYTES = 255  # of a file, on every common file system
# What each backend reads; the first role is the one that says that there is something for it to run.
BACKEND_ROLES: Mapping[str, tuple[str, ...]] = {
    "compiled": ("compiled", "tables", "weights"),
    "torch": ("torchscript",),
    "onnx": ("onnx", "onnx_data"),
}
_ROLES = frozenset(role for roles in BACKEND_ROLES.values() for role in roles)
_ABSENT = {
    "compiled": "holds no compiled model; make one with `narsil compile`",
    "torch": "has no TorchScript file; use --backend onnx",
    "onnx": "has no ONNX graph; package it with --onnx, or use --backend torch",
}
_KEYS = frozenset({"format", "name", "version", "schema", "device", "files"})
_CHUNK = 4 << 20


@dataclass(frozen=True)
class FileState:
    """What tells whether a file is still the one that was looked at. Writing to it changes the times."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # nobody can set it back, as copying tools do with the other

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The file's, now. Raises OSError."""
        found = path.stat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class Artifact:
    """A model on disk whose files have been checked. The path of a file that is not there or not whole is None."""

    path: Path
    name: str
    version: str
    schema: ModelSchema
    device: str  # the device baked in the TorchScript: cpu, cuda or cuda:N
    torchscript: Path | None = None
    onnx: Path | None = None
    onnx_data: Path | None = None  # its tables
    compiled: Path | None = None
    tables: Path | None = None  # of the compiled model
    weights: Path | None = None  # of the fused engine
    arguments: Arguments | None = None  # of a model with a schema file, whose file is ``torchscript`` all the same
    manifest: Mapping[str, Any] | None = None
    damage: Mapping[str, str] = field(default_factory=dict)  # role -> what is wrong with its file
    seen: Mapping[Path, FileState] = field(default_factory=dict)  # the files, before they were read
    verified: bool = False  # whether every byte of them was held against the manifest's checksums

    def offers(self, backend: str) -> bool:
        """Whether there is something for a backend to run, whole or not."""
        return any(getattr(self, role) or role in self.damage for role in BACKEND_ROLES[backend][:1])

    def problem(self, backend: str) -> str | None:
        """Why a backend cannot be given its files, in a sentence; None where it can."""
        roles = BACKEND_ROLES[backend]
        for role in roles:
            if role in self.damage:
                return self.damage[role]
        if getattr(self, roles[0]) is None:
            return f"{self.path} {_ABSENT[backend]}"
        if backend == "compiled" and self.tables is None:
            return f"{self.path / MANIFEST} lists {self.compiled} without its tables; compile the model again"
        return None

    def files_for(self, backend: str) -> dict[str, Path]:
        """Role -> path of the files that a backend reads. Raises ArtifactError with what ``problem`` says."""
        if problem := self.problem(backend):
            raise ArtifactError(problem)
        files = {role: getattr(self, role) for role in BACKEND_ROLES[backend]}
        return {role: path for role, path in files.items() if path is not None}


def open_artifact(
    path: str | Path, *, verify: bool = True, dense_dim: int | Mapping[str, int] | None = None, ids: str = ""
) -> Artifact:
    """The artifact at a path.

    ``dense_dim``: the number of dense columns, or of each input of them, where neither a manifest nor the model says;
    ``ids``: int32 or int64, which it is given, likewise.

    ``verify`` reads every file once and compares its SHA-256 with the manifest's. Raises ArtifactError where the
    manifest is damaged, or no backend's files are all there, whole, and in the folder. Where those of one backend are,
    the artifact's ``damage`` says what is wrong with the others'.
    """
    path = Path(path)
    try:
        return _open(path, verify, dense_dim, ids)
    except OSError as error:  # a folder on the way that may not be read, a name too long, a circle of links
        raise unreadable(path, error) from None


def _open(path: Path, verify: bool, dense_dim: int | Mapping[str, int] | None, ids: str) -> Artifact:
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; make an artifact with `narsil package dlrm --out {path}`")
    folder = path if path.is_dir() else path.parent
    only = None if path.is_dir() else path.name
    if only == MANIFEST:
        only = None
    if (folder / NEWER / MANIFEST).exists():
        folder = folder / NEWER
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        listed = {entry["file"] for entry in manifest["files"].values()}
        if only is None or only in listed:
            return _from_manifest(folder, manifest, only, verify)
    if only is not None and path.suffix == ".onnx":
        raise ArtifactError(
            f"{path} has no {MANIFEST} beside it that lists it; ONNX models are served from the folder "
            "that `narsil package` wrote"
        )
    return _from_torchscript(_only_torchscript(path), dense_dim, ids)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest, with every field of the right type. Raises ArtifactError."""
    file = folder / MANIFEST
    check_readable(file)
    try:
        size = file.stat().st_size
        if size > _MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{file} is {size} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}")
        manifest: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read as JSON: {first_line(error)}; package the model again") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ArtifactError(f"{file} is not a manifest of Narsil's: it has no format field")
    if manifest["format"] not in (FORMAT, COMPILED_FORMAT):
        raise ArtifactError(
            f"{file} is of format {str(manifest['format'])[:64]!r}; this Narsil reads {FORMAT} and {COMPILED_FORMAT}: "
            "package the model again, or install the Narsil that wrote it"
        )
    missing = sorted(_KEYS - manifest.keys())
    if missing:
        raise ArtifactError(f"{file} lacks {', '.join(missing)}; package the model again")
    for key, kind in (("name", str), ("version", str), ("device", str), ("schema", dict), ("files", dict)):
        if not isinstance(manifest[key], kind):
            raise ArtifactError(f"{file}: {key} is a {type(manifest[key]).__name__}, not a {kind.__name__}")
    for key in ("name", "version"):
        if not is_name(manifest[key]):
            raise ArtifactError(f"{file}: {key} is not made of 1 to 256 letters, digits and _.-/:")
    if not isinstance(manifest.get("versions", {}), dict):
        raise ArtifactError(f"{file}: versions is not an object; package the model again")
    if not manifest["files"]:
        raise ArtifactError(f"{file} lists no file; package the model again")
    for role, entry in manifest["files"].items():
        _check_entry(file, role, entry)
    return manifest


def write_manifest(
    folder: Path,
    *,
    name: str,
    version: str,
    schema: ModelSchema,
    device: str,
    files: Mapping[str, Path],
    architecture: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
    compiled: Mapping[str, Any] | None = None,
    arguments: Arguments | None = None,
) -> None:
    """Writes manifest.json over files (role -> path) that already lie in the folder.

    ``architecture`` and ``quantization`` are for people: what is no mapping, from another manifest, is left out.
    ``compiled`` is CompiledInfo.to_dict's, for a compiled artifact; ``arguments``: of the model that it was compiled
    from, where that has a schema file.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT if compiled is None else COMPILED_FORMAT,
        "name": name,
        "version": version,
        "device": device,
        "schema": schema.to_dict(),
        "files": {
            role: {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            for role, path in files.items()
        },
        "architecture": dict(architecture) if isinstance(architecture, Mapping) else {},
        "versions": {
            "narsil": _installed("narsil"),
            "python": platform.python_version(),
            "torch": _installed("torch"),
            "fbgemm": _installed("fbgemm-gpu-cpu") or _installed("fbgemm-gpu"),
            "onnx": _installed("onnx"),
        },
    }
    for section, content in (("quantization", quantization), ("compiled", compiled)):
        if isinstance(content, Mapping):
            manifest[section] = dict(content)
    if arguments is not None:
        manifest["inputs"] = arguments.to_list()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _from_manifest(folder: Path, manifest: dict[str, Any], only: str | None, verify: bool) -> Artifact:
    schema = ModelSchema.from_dict(manifest["schema"])
    files, seen, damage = _checked_files(folder, _asked_for(manifest["files"], only), verify)
    artifact = Artifact(
        path=folder,
        name=manifest["name"],
        version=manifest["version"],
        schema=schema,
        device=manifest["device"],
        manifest=manifest,
        arguments=arguments_of(folder / MANIFEST, schema, manifest["inputs"]) if "inputs" in manifest else None,
        damage=damage,
        seen=seen,
        verified=verify,
        **files,
    )
    problems = [artifact.problem(backend) for backend in BACKEND_ROLES if artifact.offers(backend)]
    if not problems:
        raise ArtifactError(f"{folder / MANIFEST} lists no model_default.pt and no ONNX graph; package the model again")
    if all(problems):
        raise ArtifactError(str(problems[0]))
    return artifact


def _asked_for(entries: Mapping[str, Mapping[str, Any]], only: str | None) -> Mapping[str, Mapping[str, Any]]:
    """The manifest's files, or those of the one backend that reads the file which was named."""
    if only is None:
        return entries
    for roles in BACKEND_ROLES.values():
        chosen = {role: entries[role] for role in roles if role in entries}
        if only in {entry["file"] for entry in chosen.values()}:
            return chosen
    return {}


def _checked_files(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], verify: bool
) -> tuple[dict[str, Any], dict[Path, FileState], dict[str, str]]:
    """Role -> path and path -> state of the files that are whole; role -> what is wrong of the others."""
    files: dict[str, Any] = {}
    seen: dict[Path, FileState] = {}
    damage: dict[str, str] = {}
    for role, entry in entries.items():
        path = folder / str(entry["file"])
        try:
            seen[path] = _checked_file(path, entry, verify)
            files[role] = path
        except ArtifactError as error:
            damage[role] = str(error)
    return files, seen, damage


def _check_entry(manifest: Path, role: Any, entry: Any) -> None:
    if role not in _ROLES:
        raise ArtifactError(f"{manifest} lists a file for the unknown role {str(role)[:64]!r}")
    if not isinstance(entry, dict) or set(entry) != {"file", "bytes", "sha256"}:
        raise ArtifactError(f"{manifest}: the entry of {role} must have file, bytes and sha256")
    name = entry["file"]
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0:"):
        raise ArtifactError(f"{manifest}: the file of {role} must be a plain name in the same folder, not {name!r}")
    if not name.isprintable() or len(name.encode()) > _MAX_NAME_BYTES:
        raise ArtifactError(f"{manifest}: the file of {role} is no printable name of at most {_MAX_NAME_BYTES} bytes")
    if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
        raise ArtifactError(f"{manifest}: bytes and sha256 of {role} must be a number and a string")


def _checked_file(path: Path, entry: Mapping[str, Any], verify: bool) -> FileState:
    """The state of a file that is whole, from before it was read."""
    try:
        # Links within the folder are how volumes are mounted (Kubernetes); links out of it are an escape.
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise ArtifactError(f"{path} is a link that leads out of the artifact's folder; put the file itself there")
        if not path.is_file():
            raise ArtifactError(f"{path} is listed in {MANIFEST} but is not there; copy the whole folder again")
        state = FileState.of(path)
        if state.size != entry["bytes"]:
            again = "copy the folder again or package again"
            raise ArtifactError(f"{path} has {state.size} bytes where {MANIFEST} says {entry['bytes']}; {again}")
        if verify and sha256(path) != entry["sha256"].lower():
            raise ArtifactError(
                f"{path} does not match the SHA-256 in {MANIFEST}: it was changed or damaged; copy the folder again"
            )
    except OSError as error:
        raise unreadable(path, error) from None
    except RuntimeError:
        raise ArtifactError(f"{path} is a link that leads back to itself; copy the whole folder again") from None
    return state


def model_file(path: Path) -> Path:
    """The one model's file at a path that has no manifest. Raises ArtifactError."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give a model's file")
    if (path if path.is_dir() else path.parent).joinpath(MANIFEST).exists():
        raise ArtifactError(f"{path} has a {MANIFEST}, which says what it takes; it needs no schema file")
    return _only_torchscript(path)


def _only_torchscript(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / TORCHSCRIPT_FILE).is_file():
        return path / TORCHSCRIPT_FILE
    found = sorted((*path.glob("*.pt"), *path.glob("*.pt2")))
    if len(found) == 1:
        return found[0]
    raise ArtifactError(
        f"{path} has neither {MANIFEST} nor {TORCHSCRIPT_FILE}; give an artifact's folder or a TorchScript file"
    )


def _from_torchscript(file: Path, dense_dim: int | Mapping[str, int] | None, ids: str) -> Artifact:
    from narsil.artifacts.torchrec import derive_schema

    seen = {file: FileState.of(file)}
    generic = file.stem.startswith("model") and file.resolve().parent.name
    name = as_name(generic or file.stem)
    if (told := schema_file_of(file)) is not None:
        seen[told] = FileState.of(told)
        arguments = read_schema_file(told)
        return Artifact(file, name, "1", arguments.schema, "cpu", torchscript=file, arguments=arguments, seen=seen)
    if file.suffix == ".pt2":
        raise ArtifactError(
            f"{file} needs a schema file beside it, {file.stem}.schema.json, that says what its inputs are: "
            f"`narsil inspect --write-schema {file}` drafts one"
        )
    schema, device = derive_schema(file, dense_dim, ids)
    return Artifact(path=file, name=name, version="1", schema=schema, device=device, torchscript=file, seen=seen)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
