"""The settings of ``narsil serve``. Each is declared once, here: the command line, the environment and the TOML file
all come from this class.

Precedence: command line, then environment (``NARSIL_BATCH_SIZE=8``), then the TOML file, then the default.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import os
import re
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from narsil.cgroups import usable_cores
from narsil.errors import ConfigError
from narsil.names import is_name

log = logging.getLogger(__name__)

ENV_PREFIX = "NARSIL_"
_NO_SETTINGS = frozenset({"NARSIL_CONFIG", "NARSIL_DEBUG"})  # variables of the command line that are none

# What Kubernetes, and Docker's links, put into every container beside a Service whose name begins with narsil, as
# narsil, narsil-canary or narsil-lanes do. None of it is meant for Narsil.
_SERVICE_LINK = re.compile(
    r"NARSIL(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")  # the value of NARSIL_PORT, NARSIL_CANARY_PORT..

_MOST_COLUMNS = 1 << 20
# What NAME/config.toml of a repository may set for one model; all else is the process's.
MODEL_SETTINGS = (
    "backend",
    "tasks",
    "dense_dim",
    "allow_nan",
    "tune_kernels",
    "batch_invariant",
    "max_request_rows",
    "max_request_ids",
    "verify_checksums",
    "copy_tables",
)

_MOST_SOCKET_PATH = 107  # bytes, by unix(7)

# Settings that do nothing with these values, and so are not given in vain.
_IDLE_VALUES: dict[str, Any] = {
    "batch_size": 1,
    "batch_timeout_ms": 0.0,
    "copy_tables": False,
    "http_connections": 1024,
    "http_host": "127.0.0.1",
    "intra_op_threads": 1,
    "model_control": "none",
    "model_name": "",
    "pin_lanes": False,
    "port": 0,
    "tune_kernels": False,
    "verify_checksums": False,
}


class ServeSettings(BaseModel):
    """Everything ``narsil serve`` can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Path | None = Field(None, description="Artifact folder, model_default.pt or .onnx file to serve.")
    repository: Path | None = Field(None, description="Folder of models to serve in a model's place: NAME/VERSION/...")
    model_control: Literal["none", "explicit", "watch"] = Field(
        "none",
        description="Of a repository. none: served as it is at start. explicit: clients may load and unload models. "
        "watch: what changes in the folder is served by itself.",
    )
    model_name: str = Field("", description="Name that clients may ask for; empty: the artifact's own.")
    backend: Literal["auto", "torch", "onnx", "compiled"] = Field("auto", description="What runs the model.")
    tasks: tuple[str, ...] = Field(
        (),
        description="Of the model's tasks, those that answers have, in this order: a,b,... Quote a name with a comma.",
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N.")
    dense_dim: int | dict[str, int] = Field(
        0,
        description="Dense columns of a TorchScript file that takes any number, or KEY=N,... of one that has several "
        "inputs of them; 0: as it says.",
    )
    ids: Literal["auto", "int32", "int64"] = Field(
        "auto",
        description="What a TorchScript file without a manifest is given as ids, where it would look others up in the "
        "other; auto: as it says.",
    )
    allow_nan: bool = Field(
        False, description="Take NaN for a missing number, in those columns in which the model turns it into a score."
    )
    execution_mode: Literal["batch", "worker"] = Field(
        "batch", description="batch: requests in flight become one fused forward. worker: one by one."
    )
    lanes: int = Field(0, ge=0, le=1024, description="Threads that run forwards; 0: one per usable core (1 on a GPU).")
    pin_lanes: bool = Field(False, description="Bind each lane to processors of its own (CPU only).")
    intra_op_threads: int = Field(1, ge=1, le=256, description="Threads inside one forward.")
    tune_kernels: bool = Field(
        True, description="torch backend: run linear layers on the kernels that measure fastest here."
    )
    batch_invariant: bool = Field(
        False, description="compiled backend: a row's score has the same bits alone and in any batch."
    )
    batch_size: int = Field(16, ge=1, le=65536, description="Requests per batch at most.")
    batch_timeout_ms: float = Field(
        0.0, ge=0, le=60_000, allow_inf_nan=False, description="How long a free lane waits for company."
    )
    max_batch_rows: int = Field(
        4096, ge=1, le=1 << 24, description="Rows per forward at most; larger requests are split."
    )
    transport: Literal["auto", "native", "grpcio"] = Field(
        "auto", description="What speaks gRPC; auto: the native data plane where it was built, grpcio for TLS."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on, or unix:PATH.")
    port: int = Field(50051, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    http_port: int | None = Field(
        None, ge=0, le=65535, description="Port of the Open Inference Protocol over HTTP; 0: any free one. Unset: none."
    )
    http_host: str = Field("127.0.0.1", min_length=1, description="Address that HTTP listens on.")
    http_connections: int = Field(1024, ge=1, le=65536, description="HTTP connections at a time.")
    max_queue_requests: int = Field(1024, ge=1, description="Requests that may wait; more are refused at once.")
    max_queue_rows: int = Field(131_072, ge=1, description="Rows that may wait.")
    max_queue_ids: int = Field(1 << 24, ge=1, le=(1 << 31) - 1, description="Sparse ids that may wait.")
    max_queue_bytes: int = Field(1 << 29, ge=1, description="Bytes of messages that may wait.")
    max_request_rows: int = Field(131_072, ge=1, description="Rows of one request at most.")
    max_request_ids: int = Field(1 << 22, ge=1, le=(1 << 31) - 1, description="Sparse ids of one request at most.")
    max_message_bytes: int = Field(16 << 20, ge=1024, le=(1 << 31) - 1, description="Bytes of one request at most.")
    max_metadata_bytes: int = Field(
        16 << 10,
        ge=1024,
        le=1 << 20,
        description="Bytes of one call's metadata at most, as HTTP/2 counts them: names, values and 32 a field.",
    )
    max_resets_per_second: int = Field(
        200,
        ge=1,
        le=1_000_000,
        description="Streams that one connection may have reset a second, as a mean over five seconds.",
    )
    shared_memory: bool = Field(
        False,
        description="Let clients of the Open Inference Protocol hand tensors over in shared memory of this machine.",
    )
    shutdown_delay: float = Field(
        0.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="Seconds after SIGTERM in which health says NOT_SERVING while calls are still taken.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=86_400, allow_inf_nan=False, description="How long a stop lets requests in flight finish."
    )
    tls_certificate: Path | None = Field(None, description="PEM certificate chain; turns TLS on.")
    tls_key: Path | None = Field(None, description="PEM private key of the certificate.")
    tls_client_ca: Path | None = Field(None, description="PEM authority; clients must show a certificate it signed.")
    verify_checksums: bool = Field(
        True, description="Hold the artifact's files against its manifest at start, and compiled tables for NaN."
    )
    copy_tables: bool = Field(
        False, description="Serve from sealed copies of the model's files in memory, not from the files themselves."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Verbosity on standard error.")

    @model_validator(mode="before")
    @classmethod
    def _worker_mode_is_a_batch_of_one(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("execution_mode") == "worker":
            return {"batch_size": 1, "batch_timeout_ms": 0.0, **values}
        return values

    @field_validator("model_name")
    @classmethod
    def _clients_can_ask_for_it(cls, name: str) -> str:
        if name and not is_name(name):
            raise ValueError(f"{name[:80]!r} is no name: use 1 to 256 of letters, digits and _ . - / :")
        return name

    @field_validator("tasks", mode="before")
    @classmethod
    def _a_line_of_names(cls, tasks: Any) -> Any:
        return names_in(tasks) if isinstance(tasks, str) else tasks

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if "" in tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"{', '.join(tasks)!r} has a name twice, or an empty one")
        return tasks

    @field_validator("dense_dim", mode="before")
    @classmethod
    def _numbers_of_columns(cls, widths: Any) -> Any:
        if isinstance(widths, str):
            return widths_in(widths)
        for width in widths.values() if isinstance(widths, Mapping) else (widths,):
            if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= _MOST_COLUMNS:
                raise ValueError(f"{str(width)[:64]} is no number of columns; it must be 0 to {_MOST_COLUMNS}")
        return widths

    @field_validator("host")
    @classmethod
    def _a_socket_takes_the_path(cls, host: str) -> str:
        length = len(os.fsencode(host.removeprefix("unix:")))
        if host.startswith("unix:") and not 1 <= length <= _MOST_SOCKET_PATH:
            raise ValueError(
                f"{host} cannot be listened on: a socket's path has 1 to {_MOST_SOCKET_PATH} bytes, and this one "
                f"{length}; give another, or a relative one"
            )
        return host

    @model_validator(mode="after")
    def _one_thing_is_served(self) -> ServeSettings:
        if self.model is None and self.repository is None:
            raise ValueError(
                f"model is not set: give --model, {ENV_PREFIX}MODEL or model in --config, or a folder of models by "
                "--repository"
            )
        if self.model is not None and self.repository is not None:
            raise ValueError("model and repository are both set; leave one of them out")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServeSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.tls_certificate is not None and self.transport == "native":
            raise ValueError("transport native has no TLS; use grpcio, or a proxy in front")
        return self

    @model_validator(mode="after")
    def _nothing_is_given_in_vain(self) -> ServeSettings:
        for remark in self.given_in_vain():
            raise ValueError(f"{remark}: leave one of them out")
        return self

    @cached_property
    def lane_count(self) -> int:
        """Lanes to start: as told, else one per usable core on a CPU and one on a GPU. It stays what it was."""
        return self.lanes or (usable_cores() if self.device == "cpu" else 1)

    @property
    def served(self) -> Path:
        """The model's path, or the repository's."""
        found = self.model or self.repository
        assert found is not None  # noqa: S101 - see _one_thing_is_served
        return found

    def for_model(self, path: Path, said: Mapping[str, Any], where: Path) -> ServeSettings:
        """The settings for one model of the repository, whose file ``where`` says some for it alone. Raises
        ConfigError on one that is no model's, or wrong."""
        for name in said:
            if name not in MODEL_SETTINGS:
                raise ConfigError(f"{where}: {name} is no setting of one model; it may set {', '.join(MODEL_SETTINGS)}")
        given = self.model_dump(include=self.model_fields_set - {"repository", "model_control", *said})
        merged = {**given, **said, "model": path}
        idle = ServeSettings.model_construct(**merged)._without_effect(merged.get("backend", "auto"), self.transport)
        try:
            return ServeSettings(**{name: value for name, value in merged.items() if name in said or name not in idle})
        except ValidationError as error:
            raise ConfigError(f"{where}: {'; '.join(_explain(detail) for detail in error.errors())}") from None

    def given_in_vain(
        self, backend: str | None = None, transport: str | None = None, checksums: bool = True
    ) -> list[str]:
        """Which of the settings that were given can have no effect beside the others, a remark on each.

        Among the settings alone there are none, since they would have been refused. ``backend`` and ``transport`` are
        what ``auto`` has become, and ``checksums`` is whether the artifact has any.
        """
        idle = self._without_effect(backend or self.backend, transport or self.transport, checksums)
        return [
            f"{name} {_plain(getattr(self, name))} has no effect with {other}"
            for name, other in idle.items()
            if name in self.model_fields_set
        ]

    def _without_effect(self, backend: str, transport: str, checksums: bool = True) -> dict[str, str]:
        """Settings that would do something but for another: name -> that other."""
        on_gpu, worker = self.device != "cpu", self.execution_mode == "worker"
        cases = [
            ("batch_size", worker, "execution_mode worker"),
            ("batch_timeout_ms", worker, "execution_mode worker"),
            ("batch_timeout_ms", self.batch_size == 1, "batch_size 1"),
            ("copy_tables", backend == "torch", "the torch backend, which maps no file"),
            ("http_connections", self.http_port is None, "no http_port"),
            ("http_host", self.http_port is None, "no http_port"),
            ("intra_op_threads", on_gpu, f"device {self.device}"),
            ("max_resets_per_second", transport == "grpcio", "transport grpcio"),
            ("model_control", self.repository is None, "model, which is one that stays"),
            ("model_name", self.repository is not None, "repository, whose folders name its models"),
            (
                "max_resets_per_second",
                self.tls_certificate is not None,
                "tls_certificate, which takes transport grpcio",
            ),
            ("pin_lanes", on_gpu, f"device {self.device}"),
            ("port", self.host.startswith("unix:"), f"host {self.host}"),
            ("tune_kernels", on_gpu, f"device {self.device}"),
            ("tune_kernels", backend in ("onnx", "compiled"), f"the {backend} backend"),
            ("verify_checksums", not checksums, "an artifact without a manifest"),
        ]
        for one, together in _PART_OF.items():
            limit = getattr(self, together)
            cases.append((one, getattr(self, one) > limit, f"{together} {limit}, which is less"))
        idle: dict[str, str] = {}
        for name, in_vain, other in cases:
            if in_vain and getattr(self, name) != _IDLE_VALUES.get(name):
                idle.setdefault(name, other)
        return idle

    def to_toml(self) -> str:
        """The effective settings as a TOML file that ``--config`` accepts. Raises ConfigError where none could hold
        them."""
        idle = self._without_effect(self.backend, self.transport)
        lines = []
        for name, value in self.model_dump().items():
            if value is not None and name not in idle:
                # TOML's strings are JSON's, but for the one control character that JSON lets stand.
                text = json.dumps(_plain(value), ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{name} = {text}\n")
        try:
            return "".join(lines).encode().decode()
        except UnicodeEncodeError:
            raise ConfigError("a setting holds bytes that are not UTF-8, which no TOML file can hold") from None


def names_in(line: str) -> tuple[str, ...]:
    """The names of a comma-separated line; one that has a comma itself stands in double quotes. Raises ValueError."""
    try:
        (names,) = csv.reader([line], skipinitialspace=True, strict=True)
    except (ValueError, csv.Error):
        raise ValueError(
            f"{line[:128]!r} is no line of names: separate them by commas, and quote one that has any"
        ) from None
    return tuple(name.strip() for name in names)


def widths_in(text: str) -> int | dict[str, int]:
    """A number of columns, or the numbers by key of a line of KEY=N,... Raises ValueError."""
    parts = [part.rpartition("=") for part in names_in(text)]
    numbers = [int(number) if number.strip().isdecimal() else -1 for _, _, number in parts]
    if not parts or not all(0 <= number <= _MOST_COLUMNS for number in numbers):
        raise ValueError(f"{text[:128]!r} is no number of columns, 0 to {_MOST_COLUMNS}, nor KEY=N,...")
    keys = [key.strip() for key, _, _ in parts]
    if keys == [""]:
        return numbers[0]
    if "" in keys or len(set(keys)) != len(keys):
        raise ValueError(f"{text[:128]!r} has a key twice, or a number without one: give KEY=N,...")
    return dict(zip(keys, numbers, strict=True))


# What one request or batch may have, and what all that wait may have together.
_PART_OF = {
    "batch_size": "max_queue_requests",
    "max_request_rows": "max_queue_rows",
    "max_request_ids": "max_queue_ids",
    "max_message_bytes": "max_queue_bytes",
}


def load_settings(given: Mapping[str, Any], config: Path | None = None) -> ServeSettings:
    """The effective settings from the command line's values (unset ones left out), the environment and a TOML file.

    Raises ConfigError on an unknown key, a wrong value, or a file that cannot be read.
    """
    file = {} if config is None else _from_file(config)
    try:
        return ServeSettings(**{**file, **_from_environment(os.environ), **given})
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail) for detail in error.errors())) from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings in the environment, by name. Variables without a value count as unset.

    Raises ConfigError on one that is probably a setting misspelt; warns of others that begin like settings.
    """
    found = {}
    for variable, value in sorted(environment.items()):
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or not value.strip() or name in _NO_SETTINGS or _is_service(name, value):
            continue
        setting = name.removeprefix(ENV_PREFIX).lower()
        if setting in ServeSettings.model_fields:
            found[setting] = value
        elif meant := _nearest(setting):
            raise ConfigError(
                f"unknown environment variable {variable}: did you mean {ENV_PREFIX}{meant.upper()}? "
                "See `narsil serve --help` for the settings"
            )
        else:
            log.warning("the environment variable %s is no setting of Narsil's and is passed over", variable)
    return found


def _is_service(name: str, value: str) -> bool:
    """Whether a variable says where a Kubernetes Service is."""
    link = name == "NARSIL_PORT" or (name.startswith(ENV_PREFIX) and name.endswith("_PORT"))
    return bool(_SERVICE_LINK.fullmatch(name)) or (link and bool(_SERVICE_ADDRESS.match(value)))


def _nearest(name: str) -> str | None:
    """The setting that somebody who wrote ``name`` probably meant: nearly the same letters, or words left out."""
    plain = {setting.replace("_", ""): setting for setting in ServeSettings.model_fields}
    for match in difflib.get_close_matches(name.replace("_", "").lower(), plain, n=1, cutoff=0.8):
        return plain[match]
    words = set(name.lower().split("_"))
    return next((setting for setting in ServeSettings.model_fields if words <= set(setting.split("_"))), None)


def _from_file(path: Path) -> dict[str, Any]:
    """What a TOML file holds, with or without the byte order mark that some editors write."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path} is not UTF-8, as TOML is; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path} is not valid TOML: {error}") from None


def _explain(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        meant = _nearest(name)
        return f"unknown setting {name!r}" + (f": did you mean {meant}?" if meant else "; see `narsil serve --help`")
    if name and detail["type"] == "value_error":
        return f"{name}: {detail['ctx']['error']}"
    return f"{name}: {detail['msg']} (got {detail['input']!r})" if name else str(detail["ctx"]["error"])


def _plain(value: Any) -> Any:
    """A setting's value as JSON has it."""
    if isinstance(value, dict):
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow([f"{key}={number}" for key, number in value.items()])
        return line.getvalue()
    return str(value) if isinstance(value, Path) else value
