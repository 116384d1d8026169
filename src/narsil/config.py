"""The settings of ``narsil serve``. Each is declared once, here: the command line, the environment and the TOML file
all come from this class.

Precedence: command line, then environment (``NARSIL_BATCH_SIZE=8``), then the TOML file, then the default.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from narsil.errors import ConfigError

ENV_PREFIX = "NARSIL_"

# What Kubernetes puts into every container beside a Service named narsil; none of it is meant for Narsil.
_SERVICE_LINK = re.compile(r"NARSIL_(SERVICE|PORT_\d+)_\w+")


class ServeSettings(BaseSettings):
    """Everything ``narsil serve`` can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, protected_namespaces=())

    model: Path = Field(description="Artifact folder, model_default.pt or .onnx file to serve.")
    model_name: str = Field("", description="Name that clients may ask for; empty: the artifact's own.")
    backend: Literal["auto", "torch", "onnx", "compiled"] = Field("auto", description="What runs the model.")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N.")
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
    verify_checksums: bool = Field(True, description="Hold the artifact's files against its manifest at start.")
    copy_tables: bool = Field(
        False, description="Serve from sealed copies of the model's files in memory, not from the files themselves."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Verbosity on standard error.")

    @model_validator(mode="before")
    @classmethod
    def _worker_mode_is_a_batch_of_one(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("execution_mode") == "worker":
            return {**values, "batch_size": 1, "batch_timeout_ms": 0.0}
        return values

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServeSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.tls_certificate is not None and self.transport == "native":
            raise ValueError("transport native has no TLS; use grpcio, or a proxy in front")
        return self

    @property
    def lane_count(self) -> int:
        """Lanes to start: as told, else one per usable core on a CPU and one on a GPU."""
        return self.lanes or (usable_cores() if self.device == "cpu" else 1)

    def to_toml(self) -> str:
        """The effective settings as a TOML file that ``--config`` accepts."""
        lines = []
        for name, value in self.model_dump().items():
            if value is not None:
                plain = str(value) if isinstance(value, Path | Enum) else value
                lines.append(f"{name} = {json.dumps(plain, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"


def load_settings(given: Mapping[str, Any], config: Path | None = None) -> ServeSettings:
    """The effective settings from the command line's values (unset ones left out), the environment and a TOML file.

    Raises ConfigError on an unknown key, a wrong value, or a file that cannot be read.
    """
    known = {f"{ENV_PREFIX}{name}".upper() for name in ServeSettings.model_fields}
    unknown = sorted(
        name
        for name in os.environ
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known and not _SERVICE_LINK.fullmatch(name)
    )
    if unknown:
        raise ConfigError(f"unknown environment variable {unknown[0]}; see `narsil serve --help` for the settings")
    if config is not None and not config.is_file():
        raise ConfigError(f"--config {config}: no such file")

    class _Layered(ServeSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if config is None:
                return init_settings, env_settings
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config)

    try:
        return _Layered(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail) for detail in error.errors())) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not valid TOML: {error}") from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def usable_cores() -> int:
    """Cores this process may use: its CPU affinity, less what a cgroup (v2 or v1) quota leaves of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cores, int(quota + 0.5))) if quota else cores


def _cgroup_quota() -> float | None:
    """The cgroup's CPU limit in cores; None where there is none."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit in ("max", "-1"):
        return None
    return int(limit) / int(period)


def _explain(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; see `narsil serve --help`"
    if detail["type"] == "missing":
        return f"{name} is not set: give --{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()} or {name} in --config"
    if name == "port" and str(detail["input"]).startswith("tcp://"):
        return (
            "NARSIL_PORT is set by Kubernetes for a Service named narsil: give --port, or set enableServiceLinks: false"
        )
    return f"{name}: {detail['msg']} (got {detail['input']!r})" if name else str(detail["msg"])
