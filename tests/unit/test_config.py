"""Settings: declared once; command line over environment over file over default; unknown keys are fatal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from narsil.cli.serve import command
from narsil.config import ServeSettings, load_settings, usable_cores
from narsil.errors import ConfigError

GIVEN = {"model": Path("m")}


def config_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "narsil.toml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path, monkeypatch):
    path = config_file(tmp_path, "batch_size = 2\nlanes = 2\nport = 2\n")
    monkeypatch.setenv("NARSIL_LANES", "3")
    monkeypatch.setenv("NARSIL_PORT", "3")
    settings = load_settings({**GIVEN, "port": 4}, path)
    assert (settings.batch_size, settings.lanes, settings.port, settings.max_batch_rows) == (2, 3, 4, 4096)


def test_what_print_config_prints_is_a_file_that_gives_the_same_settings(tmp_path):
    settings = load_settings({**GIVEN, "batch_timeout_ms": 2.5, "backend": "onnx", "verify_checksums": False})
    again = load_settings({}, config_file(tmp_path, settings.to_toml()))
    assert again.model_dump() == settings.model_dump()


def test_worker_mode_is_a_batch_limit_of_one():
    settings = load_settings({**GIVEN, "execution_mode": "worker", "batch_size": 16, "batch_timeout_ms": 5})
    assert (settings.batch_size, settings.batch_timeout_ms) == (1, 0.0)


@pytest.mark.parametrize("source", ["file", "environment"])
def test_worker_mode_from_anywhere_is_a_batch_limit_of_one(source, tmp_path, monkeypatch):
    path = None
    if source == "file":
        path = config_file(tmp_path, 'execution_mode = "worker"\n')
    else:
        monkeypatch.setenv("NARSIL_EXECUTION_MODE", "worker")
    assert load_settings(GIVEN, path).batch_size == 1


@pytest.mark.parametrize(
    ("given", "text", "message"),
    [
        ({}, "", "model is not set: give --model, NARSIL_MODEL or model in --config"),
        (GIVEN, "batch_sise = 3", "unknown setting 'batch_sise'"),
        (GIVEN, "batch_size = 0", "batch_size: .*greater than or equal to 1"),
        (GIVEN, 'lanes = "many"', "lanes: .*integer"),
        (GIVEN, "lanes = = 3", "is not valid TOML"),
        ({**GIVEN, "drain_seconds": float("inf")}, "", "drain_seconds: "),
        ({**GIVEN, "max_message_bytes": 1 << 31}, "", "max_message_bytes: "),
        ({**GIVEN, "device": "gpu"}, "", "device: "),
        ({**GIVEN, "backend": "tf"}, "", "backend: "),
        ({**GIVEN, "tls_key": Path("k")}, "", "tls_certificate and tls_key go together"),
        ({**GIVEN, "tls_client_ca": Path("k")}, "", "tls_client_ca needs"),
    ],
)
def test_a_wrong_setting_is_fatal_and_named(tmp_path, given, text, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(given, config_file(tmp_path, text))


def test_an_unknown_environment_variable_is_fatal(monkeypatch):
    monkeypatch.setenv("NARSIL_BATCHSIZE", "3")
    with pytest.raises(ConfigError, match="unknown environment variable NARSIL_BATCHSIZE"):
        load_settings(GIVEN)


def test_what_kubernetes_sets_for_a_service_of_this_name_is_not_taken_for_settings(monkeypatch):
    monkeypatch.setenv("NARSIL_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("NARSIL_PORT_50051_TCP_ADDR", "10.0.0.1")
    assert load_settings(GIVEN).port == 50051
    monkeypatch.setenv("NARSIL_PORT", "tcp://10.0.0.1:50051")
    assert load_settings({**GIVEN, "port": 1234}).port == 1234
    with pytest.raises(ConfigError, match="enableServiceLinks: false"):
        load_settings(GIVEN)


def test_a_missing_file_is_fatal(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(GIVEN, tmp_path / "none.toml")


def test_lanes_default_to_the_usable_cores_on_a_cpu_and_to_one_on_a_gpu():
    assert load_settings(GIVEN).lane_count == usable_cores() >= 1
    assert load_settings({**GIVEN, "device": "cuda:1"}).lane_count == 1
    assert load_settings({**GIVEN, "lanes": 7}).lane_count == 7


def test_every_setting_is_an_option_with_a_description():
    names = {parameter.name for parameter in command.params}
    assert set(ServeSettings.model_fields) <= names
    assert all(field.description for field in ServeSettings.model_fields.values())


def test_serve_prints_its_effective_settings_without_loading_a_model():
    result = CliRunner().invoke(command, ["--model", "m", "--lanes", "3", "--no-verify-checksums", "--print-config"])
    assert result.exit_code == 0, result.output
    assert "lanes = 3\n" in result.output
    assert "verify_checksums = false\n" in result.output


def test_settings_cannot_change_once_made():
    with pytest.raises(ValueError, match="frozen"):
        load_settings(GIVEN).lanes = 3  # type: ignore[misc]


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_a_cgroup_quota_bounds_the_usable_cores(monkeypatch):
    monkeypatch.setattr("narsil.config._cgroup_quota", lambda: 1.0)
    assert usable_cores() == 1
