"""Settings: declared once; command line over environment over file over default; unknown keys are fatal."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from narsil.cgroups import usable_cores
from narsil.cli.serve import command
from narsil.config import ServeSettings, load_settings
from narsil.errors import ConfigError
from narsil.names import as_name

GIVEN: dict[str, Any] = {"model": Path("m")}


def config_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "narsil.toml"
    path.write_text(text, encoding="utf-8", newline="\n")
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


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("click", ("click",)),
        ("click, buy ,p(sell) 7d", ("click", "buy", "p(sell) 7d")),
        ('"a,b", "c ""d"""', ("a,b", 'c "d"')),
        ("点击", ("点击",)),
        (["a,b", "c"], ("a,b", "c")),
    ],
)
def test_tasks_are_a_line_of_names_or_a_list(tmp_path, line, names):
    settings = load_settings({**GIVEN, "tasks": line})
    assert settings.tasks == names
    assert load_settings({}, config_file(tmp_path, settings.to_toml())).tasks == names


@pytest.mark.parametrize("line", ["click,click", "a,,b", ",", " , a", 'a,"b', '"a"b', "a\nb", ["a", "a"], [""]])
def test_tasks_that_cannot_be_meant_are_refused(line):
    with pytest.raises(ConfigError, match=r"tasks: .*(twice, or an empty one|is no line of names)"):
        load_settings({**GIVEN, "tasks": line})


@given(
    text=st.text(min_size=1, max_size=20),
    worker=st.booleans(),
    backend=st.sampled_from(["auto", "torch", "onnx", "compiled"]),
    device=st.sampled_from(["cpu", "cuda:1"]),
    transport=st.sampled_from(["auto", "native", "grpcio"]),
    unix=st.booleans(),
    queue_rows=st.integers(1, 1 << 40),
    seconds=st.floats(0, 3600),
)
def test_whatever_the_settings_what_is_printed_gives_them_again(
    text, worker, backend, device, transport, unix, queue_rows, seconds
):
    settings = load_settings(
        {
            "model": Path(text),
            "model_name": as_name(text),
            "execution_mode": "worker" if worker else "batch",
            "backend": backend,
            "device": device,
            "transport": transport,
            "host": f"unix:{text}" if unix else "::1",
            "max_queue_rows": queue_rows,
            "shutdown_delay": seconds,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        again = load_settings({}, config_file(Path(folder), settings.to_toml()))
    assert again.model_dump() == settings.model_dump()


def test_settings_that_no_file_could_hold_are_not_printed():
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings({"model": Path(os.fsdecode(b"m\xff"))}).to_toml()


@pytest.mark.parametrize("source", ["file", "environment"])
def test_worker_mode_from_anywhere_is_a_batch_limit_of_one(source, tmp_path, monkeypatch):
    path = None
    if source == "file":
        path = config_file(tmp_path, 'execution_mode = "worker"\n')
    else:
        monkeypatch.setenv("NARSIL_EXECUTION_MODE", "worker")
    settings = load_settings(GIVEN, path)
    assert (settings.batch_size, settings.batch_timeout_ms) == (1, 0.0)


@pytest.mark.parametrize(
    ("given", "text", "message"),
    [
        ({}, "", "model is not set: give --model, NARSIL_MODEL or model in --config"),
        (GIVEN, "batch_sise = 3", "unknown setting 'batch_sise': did you mean batch_size"),
        (GIVEN, "[serve]\nlanes = 3", "unknown setting 'serve'; see"),
        (GIVEN, "batch_size = 0", "batch_size: .*greater than or equal to 1"),
        (GIVEN, 'lanes = "many"', "lanes: .*integer"),
        (GIVEN, "lanes = = 3", "is not valid TOML"),
        ({**GIVEN, "drain_seconds": float("inf")}, "", "drain_seconds: "),
        ({**GIVEN, "max_message_bytes": 1 << 31}, "", "max_message_bytes: "),
        ({**GIVEN, "device": "gpu"}, "", "device: "),
        ({**GIVEN, "backend": "tf"}, "", "backend: "),
        ({**GIVEN, "tls_key": Path("k")}, "", "tls_certificate and tls_key go together"),
        ({**GIVEN, "model_name": "a b"}, "", "model_name: 'a b' is no name: use"),
        ({**GIVEN, "host": "unix:/" + "x" * 107}, "", "x cannot be listened on: a socket's path has 1 to 107 bytes"),
        ({**GIVEN, "host": "unix:"}, "", "host: unix: cannot be listened on"),
        ({**GIVEN, "tls_client_ca": Path("k")}, "", "tls_client_ca needs"),
    ],
)
def test_a_wrong_setting_is_fatal_and_named(tmp_path, given, text, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(given, config_file(tmp_path, text))


IN_VAIN = [
    ({"execution_mode": "worker", "batch_size": 16}, "batch_size 16 has no effect with execution_mode worker"),
    (
        {"execution_mode": "worker", "batch_timeout_ms": 5},
        "batch_timeout_ms 5.0 has no effect with execution_mode worker",
    ),
    ({"batch_size": 1, "batch_timeout_ms": 5}, "batch_timeout_ms 5.0 has no effect with batch_size 1"),
    ({"backend": "torch", "copy_tables": True}, "copy_tables True has no effect with the torch backend"),
    (
        {"transport": "grpcio", "max_resets_per_second": 9},
        "max_resets_per_second 9 has no effect with transport grpcio",
    ),
    (
        {"tls_certificate": "c", "tls_key": "k", "max_resets_per_second": 9},
        "max_resets_per_second 9 has no effect with tls_certificate",
    ),
    ({"device": "cuda", "intra_op_threads": 2}, "intra_op_threads 2 has no effect with device cuda"),
    ({"device": "cuda", "pin_lanes": True}, "pin_lanes True has no effect with device cuda"),
    ({"http_host": "::1"}, "http_host ::1 has no effect with no http_port"),
    ({"http_connections": 7}, "http_connections 7 has no effect with no http_port"),
    ({"host": "unix:/tmp/s", "port": 50051}, "port 50051 has no effect with host unix:/tmp/s"),
    ({"device": "cuda:1", "tune_kernels": True}, "tune_kernels True has no effect with device cuda:1"),
    ({"backend": "onnx", "tune_kernels": True}, "tune_kernels True has no effect with the onnx backend"),
    ({"max_request_rows": 6, "max_queue_rows": 5}, "max_request_rows 6 has no effect with max_queue_rows 5"),
    ({"max_request_ids": 6, "max_queue_ids": 5}, "max_request_ids 6 has no effect with max_queue_ids 5"),
    ({"max_message_bytes": 6000, "max_queue_bytes": 5000}, "max_message_bytes 6000 has no effect with max_queue_bytes"),
    ({"batch_size": 6, "max_queue_requests": 5}, "batch_size 6 has no effect with max_queue_requests 5"),
]


@pytest.mark.parametrize(("given", "message"), IN_VAIN)
def test_a_setting_that_is_given_in_vain_is_refused_and_both_are_named(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_settings({**GIVEN, **given})


@pytest.mark.parametrize(
    "given",
    [
        {"execution_mode": "worker", "batch_size": 1, "batch_timeout_ms": 0.0},
        {"device": "cuda", "pin_lanes": False, "tune_kernels": False},
        {"host": "unix:/tmp/s", "port": 0},
        {"max_queue_rows": 5},  # the limit of one request is the default, which nobody chose
        {"backend": "onnx"},
    ],
)
def test_what_is_not_given_or_asks_for_nothing_is_not_refused(given):
    load_settings({**GIVEN, **given})


def test_what_auto_has_become_shows_what_else_was_given_in_vain():
    settings = load_settings({**GIVEN, "tune_kernels": True, "max_resets_per_second": 9})
    assert settings.given_in_vain() == []
    assert settings.given_in_vain(backend="torch", transport="native") == []
    assert settings.given_in_vain(backend="compiled", transport="grpcio") == [
        "max_resets_per_second 9 has no effect with transport grpcio",
        "tune_kernels True has no effect with the compiled backend",
    ]
    assert load_settings(GIVEN).given_in_vain(backend="compiled", transport="grpcio") == []


def test_checksums_that_an_artifact_does_not_have_cannot_be_verified():
    remark = "verify_checksums True has no effect with an artifact without a manifest"
    assert load_settings({**GIVEN, "verify_checksums": True}).given_in_vain(checksums=False) == [remark]
    assert load_settings({**GIVEN, "verify_checksums": True}).given_in_vain() == []
    assert load_settings({**GIVEN, "verify_checksums": False}).given_in_vain(checksums=False) == []
    assert load_settings(GIVEN).given_in_vain(checksums=False) == []


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("NARSIL_BATCHSIZE", "NARSIL_BATCH_SIZE"),
        ("NARSIL_BATCH_SISE", "NARSIL_BATCH_SIZE"),
        ("narsil_lane", "NARSIL_LANES"),
        ("NARSIL_PORTS", "NARSIL_PORT"),
        ("NARSIL_QUEUE_ROWS", "NARSIL_MAX_QUEUE_ROWS"),
        ("NARSIL_THREADS", "NARSIL_INTRA_OP_THREADS"),
        ("NARSIL_DRAIN", "NARSIL_DRAIN_SECONDS"),
    ],
)
def test_a_misspelt_environment_variable_is_fatal_and_told_the_nearest_name(variable, meant, monkeypatch):
    monkeypatch.setenv(variable, "3")
    with pytest.raises(ConfigError, match=f"unknown environment variable {variable}: did you mean {meant}\\?"):
        load_settings(GIVEN)


@pytest.mark.parametrize(
    "variable", ["NARSIL_HOME", "NARSIL_VERSION", "NARSIL_IMAGE_TAG", "NARSIL_POD_NAME", "NARSIL_CANARY_PORT"]
)
def test_a_variable_that_only_begins_like_a_setting_is_passed_over_with_a_warning(variable, monkeypatch, caplog):
    monkeypatch.setenv(variable, "3")
    assert load_settings(GIVEN).model_fields_set == {"model"}
    assert f"{variable} is no setting" in caplog.text


def service_links(name: str) -> dict[str, str]:
    """What Kubernetes sets in every container of a namespace for a Service of this name with a named and a plain port,
    and Docker for a link."""
    prefix = name.upper().replace("-", "_")
    links = {
        f"{prefix}_SERVICE_HOST": "10.0.0.1",
        f"{prefix}_SERVICE_PORT": "50051",
        f"{prefix}_SERVICE_PORT_GRPC": "50051",
        f"{prefix}_SERVICE_PORT_HTTP_METRICS": "9090",
        f"{prefix}_PORT": "tcp://10.0.0.1:50051",
    }
    for port, protocol in ((50051, "tcp"), (53, "udp"), (9, "sctp")):
        one = f"{prefix}_PORT_{port}_{protocol.upper()}"
        links[one] = f"{protocol}://10.0.0.1:{port}"
        links |= {f"{one}_PROTO": protocol, f"{one}_PORT": str(port), f"{one}_ADDR": "10.0.0.1"}
    return links


@pytest.mark.parametrize(
    "service",
    ["narsil", "narsil-canary", "narsil-lanes", "narsil-batch-size", "narsil-port", "narsil-2", "narsil-serve"],
)
def test_what_kubernetes_sets_for_any_service_is_not_taken_for_settings(service, monkeypatch, caplog):
    for variable, value in service_links(service).items():
        monkeypatch.setenv(variable, value)
    settings = load_settings(GIVEN)
    assert (settings.model_fields_set, settings.port) == ({"model"}, 50051)
    assert not caplog.text


# A Service's address is told from a number by what it begins with.
PORTS = {"port", "http_port"}


def test_no_setting_but_ports_has_a_name_that_a_service_s_variable_could_have():
    services = ("narsil", "narsil-a-b", "narsil-http")
    taken = {variable for service in services for variable in service_links(service)}
    for name in set(ServeSettings.model_fields) - PORTS:
        assert not re.search(r"_(SERVICE_HOST|SERVICE_PORT|PORT|PROTO|ADDR)$", f"_{name.upper()}")
        assert f"NARSIL_{name.upper()}" not in taken


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_environment_variable_counts_as_unset(value, monkeypatch):
    for name in (*ServeSettings.model_fields, "batchsize"):
        monkeypatch.setenv(f"NARSIL_{name.upper()}", value)
    assert load_settings(GIVEN) == ServeSettings(**GIVEN)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "narsil.toml"
    path.write_bytes(b"\xef\xbb\xbflanes = 3\r\n")
    assert load_settings(GIVEN, path).lanes == 3


def test_a_file_in_another_encoding_is_fatal_in_one_sentence(tmp_path):
    path = tmp_path / "narsil.toml"
    path.write_bytes("lanes = 3\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="is not UTF-8, as TOML is; save it as UTF-8"):
        load_settings(GIVEN, path)


def test_a_missing_file_is_fatal(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(GIVEN, tmp_path / "none.toml")


def test_a_file_that_cannot_be_read_is_fatal_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_settings(GIVEN, tmp_path)


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


@pytest.mark.parametrize("given", ["13", "a.values=1,b=12"])
def test_the_command_line_takes_dense_columns_as_the_file_does(given):
    result = CliRunner().invoke(command, ["--model", "m", "--dense-dim", given, "--print-config"])
    assert result.exit_code == 0, result.output
    assert load_settings({**GIVEN, "dense_dim": given}).to_toml().split("dense_dim")[1].splitlines()[0] in result.output


def test_settings_cannot_change_once_made():
    with pytest.raises(ValueError, match="frozen"):
        load_settings(GIVEN).lanes = 3


@pytest.mark.parametrize(
    ("given", "widths", "printed"),
    [
        ("13", 13, "dense_dim = 13"),
        (13, 13, "dense_dim = 13"),
        ("a.values=1,b=12", {"a.values": 1, "b": 12}, 'dense_dim = "a.values=1,b=12"'),
        ({"b": 2}, {"b": 2}, 'dense_dim = "b=2"'),
        ('"a,b=c=2"', {"a,b=c": 2}, 'dense_dim = "\\"a,b=c=2\\""'),
    ],
)
def test_dense_columns_are_one_number_or_one_for_each_input(given, widths, printed, tmp_path):
    settings = load_settings({**GIVEN, "dense_dim": given})
    assert settings.dense_dim == widths
    assert printed in settings.to_toml()
    assert load_settings({}, config_file(tmp_path, settings.to_toml())).dense_dim == widths


@pytest.mark.parametrize(
    "given", ["", "x", "-1", "1.5", "a=", "a=b", "a=1,a=2", "a=1,2", "=3,a=2", -1, True, {"a": -1}]
)
def test_what_is_no_number_of_columns_is_refused(given):
    with pytest.raises(ConfigError, match=r"^dense_dim: .*(no number of columns|a key twice)"):
        load_settings({**GIVEN, "dense_dim": given})


def test_a_repository_takes_a_models_place():
    settings = load_settings({"repository": Path("models"), "model_control": "watch"})
    assert (settings.model, settings.served) == (None, Path("models"))
    with pytest.raises(ConfigError, match="model and repository are both set; leave one of them out"):
        load_settings({**GIVEN, "repository": Path("models")})
    with pytest.raises(
        ConfigError, match="model_name ads has no effect with repository, whose folders name its models"
    ):
        load_settings({"repository": Path("models"), "model_name": "ads"})
    with pytest.raises(ConfigError, match="model_control watch has no effect with model, which is one that stays"):
        load_settings({**GIVEN, "model_control": "watch"})


def test_one_model_of_a_repository_has_settings_of_its_own():
    settings = load_settings({"repository": Path("models"), "lanes": 3, "tune_kernels": True, "backend": "torch"})
    where = Path("models/ads/config.toml")
    own = settings.for_model(Path("models/ads/1"), {"max_request_rows": 7, "tasks": ["click"]}, where)
    assert (own.model, own.lanes, own.backend, own.max_request_rows, own.tasks, own.tune_kernels) == (
        *(Path("models/ads/1"), 3, "torch", 7),
        *(("click",), True),
    )
    compiled = settings.for_model(Path("models/ads/1"), {"backend": "compiled"}, where)
    assert "tune_kernels" not in compiled.model_fields_set  # the server's, without effect on it, is no fault of its own
    for said, message in (
        ({"lanes": 2}, "lanes is no setting of one model; it may set backend, tasks"),
        ({"max_request_rows": 0}, "max_request_rows: .*greater than or equal to 1"),
        ({"backend": "compiled", "tune_kernels": True}, "tune_kernels True has no effect with the compiled backend"),
    ):
        with pytest.raises(ConfigError, match=f"models/ads/config.toml: {message}"):
            settings.for_model(Path("models/ads/1"), said, where)
