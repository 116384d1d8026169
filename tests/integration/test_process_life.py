"""`narsil serve` as a process: signals while it loads, also as process 1; its log and its standard output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import narsil
from narsil.bench.servers import narsil_server
from tests.support import PATIENCE_S

SOURCE = str(Path(__file__).parents[2] / "src")
SERVE = ("serve", "--port", "0", "--model")
LAST_WORDS = "narsil: {} before the server was ready: ended; nothing was in flight\n"


# The command line, with a manifest that never comes: it is a pipe, which Narsil itself would refuse at once.
ENDLESS = """
import sys
from narsil.artifacts import artifact
from narsil.cli import main

def wait(file):
    with open(sys.argv[-1] + "/manifest.json") as pipe:
        pipe.read()

artifact.check_readable = wait
main()
"""


class Loading:
    """A command that loads a model and does not get to the end of it."""

    def __init__(self, folder: Path, command: Sequence[str], before: Sequence[str]) -> None:
        os.mkfifo(folder / "manifest.json")
        self._process = subprocess.Popen(
            [*before, sys.executable, "-c", ENDLESS, *command, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": SOURCE},
        )  # fmt: skip
        self._manifest = os.open(folder / "manifest.json", os.O_WRONLY)  # waits until somebody reads it

    @property
    def pid(self) -> int:
        """Of the command, where something else has started it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else self._process.pid

    def line(self) -> str:
        """The next line on standard error."""
        return self._process.stderr.readline()

    def outcome(self) -> tuple[int, str, str]:
        """(return code, standard output, standard error) of a command that ends by itself."""
        output, errors = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, output, errors

    def close(self) -> None:
        os.close(self._manifest)
        self._process.kill()
        self._process.communicate()


@contextmanager
def loading(folder: Path, command: Sequence[str] = SERVE, before: Sequence[str] = ()) -> Iterator[Loading]:
    one = Loading(folder, command, before)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def as_process_1() -> Sequence[str]:
    """What to begin a command's line with."""
    unshare = ["unshare", "--fork", "--pid", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may make no namespace of processes")
    return unshare


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_at_once_with_a_line(tmp_path, number):
    with loading(tmp_path) as server:
        os.kill(server.pid, number)
        assert server.outcome() == (-number, "", LAST_WORDS.format(number.name))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_also_as_process_1(tmp_path, as_process_1, number):
    """Whom the kernel spares what no handler asks for."""
    with loading(tmp_path, before=as_process_1) as server:
        os.kill(server.pid, number)
        assert server.outcome() == (128 + number, "", LAST_WORDS.format(number.name))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_other_commands_too_end_by_a_signal_and_say_so(tmp_path, number):
    with loading(tmp_path, ["inspect"]) as command:
        os.kill(command.pid, number)
        assert command.outcome() == (-number, "", f"narsil: ended by {number.name}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_other_commands_too_end_by_a_signal_as_process_1(tmp_path, as_process_1, number):
    with loading(tmp_path, ["inspect"], as_process_1) as command:
        os.kill(command.pid, number)
        assert command.outcome() == (128 + number, "", f"narsil: ended by {number.name}\n")


def test_sighup_while_it_loads_changes_nothing(tmp_path):
    with loading(tmp_path) as server:
        os.kill(server.pid, signal.SIGHUP)
        assert server.line().startswith("narsil: SIGHUP is passed over: ")
        os.kill(server.pid, signal.SIGTERM)
        assert server.outcome() == (-signal.SIGTERM, "", LAST_WORDS.format("SIGTERM"))


def test_sighup_does_not_end_a_server_and_too_little_memory_is_told_at_start(small_artifact):
    with narsil_server(small_artifact.path, backend="torch", lanes=1, max_queue_bytes=1 << 60) as server:
        assert "max_queue_bytes (1073741824.00 GiB) are more than the" in server.log_tail()
        server.send_signal(signal.SIGHUP)
        assert server.stop() == 0


def test_a_server_whose_standard_output_is_full_serves_and_stops_well(small_artifact):
    """Its ready line is in the log."""
    with open("/dev/full", "w") as full:
        options = ["--model", str(small_artifact.path), "--port", "0", "--lanes", "1"]
        server = subprocess.Popen(
            [sys.executable, "-m", "narsil", "serve", *options],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": SOURCE},
        )  # fmt: skip
    with server:
        told = next(line for line in server.stderr if "takes no ready line" in line)
        address = re.search(r" on (\S+) \(", told)[1]
        with narsil.Client(address) as client:
            assert client.model(timeout=PATIENCE_S).name == "small"
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
