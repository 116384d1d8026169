"""A folder of models, as Triton and TF Serving have it: what lies in it, and which versions are to be served.

    DIR/NAME/VERSION/       an artifact: a folder with manifest.json, or one TorchScript file or exported program
    DIR/NAME/config.toml    settings of this model: see ModelConfig; may be missing

Receives a path whose files are hostile until they are read; produces plain values. Loads nothing. Names come from the
folder alone, and what a client asks for is looked up among them: no path is made of a client's text.
"""

from __future__ import annotations

import re
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from narsil.artifacts.artifact import MANIFEST, NEWER, FileState
from narsil.catalog.catalog import Routes
from narsil.errors import ConfigError
from narsil.names import is_name

__all__ = ["CONFIG_FILE", "READY_FILE", "Held", "ModelConfig", "ModelFolder", "Repository", "read_repository"]

CONFIG_FILE = "config.toml"
READY_FILE = "READY"  # in a version's folder: its copy is complete

_MODEL_FILES = (".pt", ".pt2", ".onnx")
_MOST_FILES = 1000  # of one version
_MOST_CONFIG_BYTES = 1 << 20
_NUMBERS = re.compile(r"(\d+)")

Stamp = tuple[tuple[str, FileState], ...]  # of a version's files, by their paths in its folder


class Latest(BaseModel):
    """The policy ``{ latest = N }``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    latest: int = Field(ge=1, le=100)


class ModelConfig(BaseModel):
    """What NAME/config.toml may say. ``settings`` are settings of the server's that hold for this model alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    versions: Literal["latest", "all"] | Latest | tuple[str, ...] = "latest"
    labels: dict[str, str] = {}  # label -> version
    split: dict[str, float] = {}  # label or version -> share of the requests that give no version
    share: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # of the lanes' time, where several models have work
    settings: dict[str, Any] = {}

    @field_validator("labels")
    @classmethod
    def _names(cls, labels: dict[str, str]) -> dict[str, str]:
        for name in (*labels, *labels.values()):
            if not is_name(name):
                raise ValueError(f"{name[:80]!r} is no name: use 1 to 256 of letters, digits and _ . - / :")
        return labels

    @field_validator("split")
    @classmethod
    def _shares(cls, split: dict[str, float]) -> dict[str, float]:
        for of, share in split.items():
            if not 0 < share < float("inf"):
                raise ValueError(f"the share of {of[:80]!r} must be above 0; leave it out to give it none")
        return split

    @property
    def routes(self) -> Routes:
        """How requests find their version."""
        return Routes(self.labels, self.split)


@dataclass(frozen=True)
class Held:
    """A version that lies in the repository."""

    version: str
    folder: Path
    path: Path  # of the artifact: the folder, or the one file in it
    stamp: Stamp  # what tells whether it is still the same

    def complete(self) -> bool:
        """Whether all of it is there, as far as it can be told without loading: it is marked so, or has checksums that
        loading will hold it against, or each of its files is a whole archive."""
        if (self.folder / READY_FILE).exists() or self.path == self.folder:
            return True
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.testzip() is None
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
            return False


@dataclass(frozen=True)
class ModelFolder:
    """A model of the repository."""

    name: str
    config: ModelConfig
    versions: tuple[Held, ...]  # oldest first

    def wanted(self) -> tuple[Held, ...]:
        """The versions that its policy serves, oldest first. Raises ConfigError where one of them is not there."""
        policy = self.config.versions
        if policy == "all":
            return self.versions
        if policy == "latest" or isinstance(policy, Latest):
            return self.versions[-(policy.latest if isinstance(policy, Latest) else 1) :]
        there = {held.version: held for held in self.versions}
        for version in policy:
            if version not in there:
                raise ConfigError(
                    f"{self.name}/{CONFIG_FILE} asks for version {version[:80]!r}, which the repository does not have; "
                    f"it has {', '.join(there) or 'none'}"
                )
        return tuple(there[version] for version in dict.fromkeys(policy))


@dataclass(frozen=True)
class Repository:
    """What a look found."""

    models: Mapping[str, ModelFolder]
    problems: Mapping[tuple[str, str], str]  # (name, version or empty) -> why it cannot be served, a sentence


def read_repository(root: Path) -> Repository:
    """The models in a folder; folders whose names begin with a dot are passed over, so that copies can be made under
    such a name. Raises ConfigError where the folder itself cannot be read."""
    models: dict[str, ModelFolder] = {}
    problems: dict[tuple[str, str], str] = {}
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"the repository {root} cannot be read: {error.strerror}") from None
    for folder in folders:
        if not is_name(folder.name):
            problems[folder.name[:80], ""] = "its folder's name is no model's: use letters, digits and _ . -"
            continue
        try:
            config = _read_config(folder / CONFIG_FILE)
            versions = _versions(folder, problems)
        except (ConfigError, OSError) as error:
            problems[folder.name, ""] = str(error)
            continue
        if versions:
            models[folder.name] = ModelFolder(folder.name, config, tuple(versions))
        elif not any(name == folder.name for name, _ in problems):
            problems[folder.name, ""] = f"{folder} holds no version: put the artifact in {folder / '1'}"
    return Repository(models, problems)


def in_order(version: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts versions as people count: 2 before 10, v1.9 before v1.10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in _NUMBERS.split(version) if part)


def _versions(folder: Path, problems: dict[tuple[str, str], str]) -> list[Held]:
    found = []
    for path in folder.iterdir():
        if not path.is_dir() or path.name.startswith("."):
            continue
        if not is_name(path.name):
            problems[folder.name, path.name[:80]] = "its folder's name is no version's: use letters, digits and _ . -"
            continue
        try:
            found.append(Held(path.name, path, _artifact_in(path), _stamp(path)))
        except (ConfigError, OSError) as error:
            problems[folder.name, path.name] = str(error)
    return sorted(found, key=lambda held: in_order(held.version))


def _artifact_in(folder: Path) -> Path:
    """The folder where it has a manifest, or else the one model file in it. Raises ConfigError."""
    if (folder / MANIFEST).exists() or (folder / NEWER / MANIFEST).exists():
        return folder
    files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file())
    if len(files) == 1:
        return files[0]
    names = ", ".join(path.name for path in files[:5])
    raise ConfigError(
        f"{folder} holds {names}: keep one model in a version's folder"
        if files
        else f"{folder} holds no model: neither {MANIFEST} nor a file that ends in {', '.join(_MODEL_FILES)}"
    )


def _stamp(folder: Path) -> Stamp:
    paths = [path for path in _files(folder) if path.name != READY_FILE]
    if len(paths) > _MOST_FILES:
        raise ConfigError(f"{folder} holds more than {_MOST_FILES} files: keep one model in a version's folder")
    return tuple(
        sorted(((str(path.relative_to(folder)), FileState.of(path)) for path in paths), key=lambda one: one[0])
    )


def _files(folder: Path) -> Iterator[Path]:
    """The files of an artifact's folder; nothing below the one level that artifacts have."""
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.name == NEWER:
            yield from (inner for inner in path.iterdir() if inner.is_file())


def _read_config(path: Path) -> ModelConfig:
    """Raises ConfigError, naming the file and the key."""
    if not path.exists():
        return ModelConfig()
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {_MOST_CONFIG_BYTES} bytes")
        said = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
        own = {name: said.pop(name) for name in list(said) if name in ModelConfig.model_fields and name != "settings"}
        return ModelConfig(**{**own, "settings": said})
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        reason = first.get("ctx", {}).get("error") or first["msg"]
        if where == "versions":
            reason = 'give "latest", "all", { latest = N } or a list of versions'
        raise ConfigError(f"{path}: {where}: {reason}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
