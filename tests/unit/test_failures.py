"""Whatever a command raises becomes one sentence with a next step and an exit status; --debug shows where."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from narsil.cli.failures import Failure, explain
from narsil.errors import ConfigError, NarsilError
from narsil.process import Stopped
from tests.support import PATIENCE_S

SOURCE = str(Path(__file__).parents[2] / "src")


def narsil(*arguments: object, python: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a process; ``python`` runs before it."""
    program = f"{python}\nfrom narsil.cli import main\nmain()"
    environment = {**os.environ, "PYTHONPATH": SOURCE, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": PATIENCE_S, **options},
        text=True, check=False, env=environment,
    )  # fmt: skip


# Has the command `inspect` raise what it is told to.
RAISES = """
import click, sys, types
def fails():
    {}
sys.modules["narsil.cli.inspect"] = types.SimpleNamespace(command=click.Command("inspect", callback=fails))
"""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConfigError("lanes: too many"), "lanes: too many"),
        (PermissionError(errno.EACCES, "Permission denied", "/m/a"), "/m/a: Permission denied; check its owner"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError(errno.EROFS, "Read-only file system", "/out"), "/out: Read-only file system; write elsewhere"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "x: Too many open files; allow more open files"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "x"), "x: Invalid cross-device link; `narsil --debug`"),
        (MemoryError(), "out of memory; allow this process more"),
        (MemoryError("Unable to allocate 3 GiB\nfor an array"), "out of memory (Unable to allocate 3 GiB); allow"),
        (ModuleNotFoundError("No module named 'numpy'"), "No module named 'numpy': a part of this"),
        (UnicodeEncodeError("ascii", "µ", 0, 1, "no"), "cannot hold what is to be printed; set PYTHONIOENCODING=utf-8"),
        (RuntimeError("first\nsecond"), "not foreseen: RuntimeError: first; `narsil --debug`"),
        (RecursionError(), "not foreseen: RecursionError: RecursionError; `narsil --debug`"),
        (AssertionError(), "not foreseen: AssertionError: AssertionError; `narsil --debug`"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence_with_a_next_step(error, sentence):
    failure = explain(error)
    assert sentence in failure.sentence
    assert "\n" not in failure.sentence
    assert (failure.status, failure.signal) == (1, None)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (KeyboardInterrupt(), signal.SIGINT),
        (Stopped(signal.SIGTERM), signal.SIGTERM),
        (Stopped(signal.SIGHUP), signal.SIGHUP),
    ],
)
def test_who_is_ended_by_a_signal_says_so_and_ends_by_it(error, number):
    assert explain(error) == Failure(f"ended by {number.name}", 128 + number, number)


@pytest.mark.parametrize(
    ("raised", "status", "sentence"),
    [
        ("raise RuntimeError('what\\never')", 1, "narsil: not foreseen: RuntimeError: what; "),
        ("open('/proc/1/nothing')", 1, "narsil: /proc/1/nothing: No such file or directory; check the path"),
        ("open('/dev/full', 'wb', 0).write(b'x')", 1, "narsil: No space left on device; free some space"),
        ("bytearray(1 << 62)", 1, "narsil: out of memory; "),
        ("import no_such_module", 1, "narsil: No module named 'no_such_module': "),
        ("raise KeyboardInterrupt", -signal.SIGINT, "narsil: ended by SIGINT\n"),
        ("import signal; signal.raise_signal(15)", -signal.SIGTERM, "narsil: ended by SIGTERM\n"),
        ("import signal; signal.raise_signal(1)", -signal.SIGHUP, "narsil: ended by SIGHUP\n"),
        ("raise SystemExit(3)", 3, ""),
        ("raise click.Abort", -signal.SIGINT, "narsil: ended by SIGINT\n"),
    ],
)
def test_no_command_ends_in_a_traceback(raised, status, sentence):
    done = narsil("inspect", python=RAISES.format(raised))
    assert done.returncode == status
    assert done.stderr.startswith(sentence)
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.parametrize(
    ("options", "environment"), [(["--debug"], {}), ([], {"NARSIL_DEBUG": "1"})], ids=["option", "environment"]
)
def test_debug_shows_the_traceback_and_then_the_sentence(options, environment):
    done = narsil(*options, "inspect", python=RAISES.format("raise RuntimeError('what')"), env=environment)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == "RuntimeError: what"
    assert lines[-1].startswith("narsil: not foreseen: RuntimeError: what; ")


@pytest.mark.parametrize("value", ["", "0"])
def test_debug_in_the_environment_may_be_off(value):
    done = narsil("inspect", python=RAISES.format("raise RuntimeError('what')"), env={"NARSIL_DEBUG": value})
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_why_a_command_s_own_module_cannot_be_imported():
    done = narsil("--debug", "inspect", python="import sys; sys.modules['narsil.artifacts.artifact'] = None")
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("narsil: import of narsil.artifacts.artifact halted")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_standard_output_that_is_full_is_one_sentence(unbuffered):
    with open("/dev/full", "w") as full:
        done = narsil("serve", "--model", "m", "--print-config", stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 1
    assert done.stderr.startswith("narsil: No space left on device; free some space where it writes, standard output")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_has_nobody_to_print_to_ends_without_a_word(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        done = narsil("serve", "--model", "m", "--print-config", stdout=nobody, env={"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_standard_output_is_told():
    done = narsil("inspect", python=RAISES.format("raise BrokenPipeError(32, 'Broken pipe', 'load')"))
    assert (done.returncode, done.stderr.startswith("narsil: load: Broken pipe; ")) == (1, True)


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_standard_files_change_no_exit_status(closed):
    def close() -> None:
        for number in closed:
            os.close(number)

    assert narsil("serve", "--model", "m", "--print-config", preexec_fn=close).returncode == 0
    assert narsil("inspect", "/proc/1/nothing", preexec_fn=close).returncode == 1


def test_a_wrong_command_line_is_status_2():
    assert narsil("serve", "--lanes", "many").returncode == 2
    assert narsil("nothing").returncode == 2
    assert narsil("inspect", "--help").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_file_that_this_user_may_not_read_is_one_sentence():
    become_nobody = "import os, narsil.cli.inspect; os.setgid(65534); os.setuid(65534)"
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "manifest.json").write_text("{}")
        (folder / "manifest.json").chmod(0o600)
        done = narsil("inspect", folder, python=become_nobody)
        assert done.returncode == 1
        assert f"{folder}/manifest.json" in done.stderr
        assert "Permission denied" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        folder.chmod(0o700)
        done = narsil("inspect", folder / "model.pt", python=become_nobody)
        assert done.stderr.startswith(
            f"narsil: {folder}/model.pt cannot be read: Permission denied; check its owner and mode"
        )


def test_the_entry_point_is_light():
    """Until a command is chosen, nothing slow is imported."""
    done = narsil("--help", python="import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))")
    assert not {"torch", "grpc", "numpy", "pydantic", "asyncio"} & set(done.stderr.split())


def test_errors_of_narsil_s_own_are_told_as_they_are():
    assert explain(NarsilError("so it is")) == Failure("so it is")
