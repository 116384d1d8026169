"""The process: what signals do before, while and after it serves; its standard files; what its memory is enough for."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from narsil.extension import AVAILABLE
from narsil.process import StopSignals, memory_remarks, pass_over_hangups, writing
from tests.support import PATIENCE_S

GIB = 1 << 30
SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Tests leave the signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def python(program: str, *before: str) -> subprocess.Popen[str]:
    """A Python process that runs this, its three standard files piped here."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )  # fmt: skip


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(return code, standard error) once it has ended."""
    with process:
        _, errors = process.communicate(timeout=PATIENCE_S)
        return process.returncode, errors


# Loading a model in one C call, as torch does: the interpreter's lock is held until standard input ends.
LOADING = """
import ctypes, threading
from narsil.process import end_on_signals
end_on_signals()
c = ctypes.PyDLL(None)
def load():
    c.write(1, b"loading\\n", 8)
    c.read(0, ctypes.create_string_buffer(1), 1)
thread = threading.Thread(target=load)
thread.start(); thread.join()
"""


@pytest.mark.skipif(not AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_load_that_holds_the_interpreter_s_lock(number):
    with python(LOADING) as loading:
        assert loading.stdout.readline() == "loading\n"
        loading.send_signal(number)
        assert loading.wait(PATIENCE_S) == -number
        assert (
            loading.stderr.read()
            == f"narsil: {number.name} before the server was ready: ended; nothing was in flight\n"
        )


@pytest.mark.parametrize(
    "native", [pytest.param("pass", id="native"), pytest.param("sys.modules['narsil._native'] = None", id="python")]
)
@pytest.mark.parametrize(
    ("before", "status"),
    [((), -signal.SIGTERM), (("unshare", "--fork", "--pid", "--kill-child"), 128 + signal.SIGTERM)],
    ids=["by the signal", "as process 1"],
)
def test_a_signal_before_the_server_is_ready_ends_the_process_with_a_line(native, before, status):
    if before and subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may make no namespace of processes")
    ended = python(
        f"import signal, sys; {native}\n"
        "from narsil.process import end_on_signals\n"
        "end_on_signals(); signal.raise_signal(signal.SIGTERM)",
        *before,
    )
    last_words = "narsil: SIGTERM before the server was ready: ended; nothing was in flight\n"
    assert outcome(ended) == (status, last_words)


@pytest.mark.skipif(not AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize("number", [-1, 0, 65, 10**6, signal.SIGKILL])
def test_native_code_refuses_what_is_no_signal_or_none_to_be_caught(number):
    from narsil._native import end_on_signal

    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        end_on_signal(number, b"")


def told(*numbers: int) -> tuple[bool, bool]:
    """(stop, hurry) after these signals."""

    async def tell() -> tuple[bool, bool]:
        signals = StopSignals()
        for number in numbers:
            signal.raise_signal(number)
        if numbers:
            await asyncio.wait_for(signals.stop.wait(), PATIENCE_S)
            await asyncio.sleep(0)  # both were told in one turn of the loop
        return signals.stop.is_set(), signals.hurry.is_set()

    return asyncio.run(tell())


def test_the_first_sigterm_stops_and_the_second_hurries():
    assert told() == (False, False)
    assert told(signal.SIGTERM) == (True, False)
    assert told(signal.SIGTERM, signal.SIGTERM) == (True, True)


def test_ctrl_c_stops_without_the_wait_for_routers_also_after_sigterm():
    assert told(signal.SIGINT) == (True, True)
    assert told(signal.SIGTERM, signal.SIGINT) == (True, True)


def test_a_second_ctrl_c_ends_the_process_and_a_late_sigterm_does_not():
    program = (
        "import asyncio, signal\n"
        "from narsil.process import StopSignals\n"
        "async def main(): StopSignals()\n"
        "asyncio.run(main())\n"
        "signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGINT); print('leaving', flush=True)\n"
        "signal.raise_signal(signal.SIGINT); print('still here', flush=True)"
    )
    with python(program) as done:
        printed, _ = done.communicate(timeout=PATIENCE_S)
    assert (done.returncode, printed) == (-signal.SIGINT, "leaving\n")


def test_a_hangup_changes_nothing_and_a_line_says_so(capfd):
    pass_over_hangups()
    signal.raise_signal(signal.SIGHUP)
    assert "SIGHUP is passed over" in capfd.readouterr().err


def test_where_hangups_are_ignored_they_stay_so_without_a_word(capfd):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pass_over_hangups()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.raise_signal(signal.SIGHUP)
    assert capfd.readouterr().err == ""


def test_no_file_takes_the_number_of_a_closed_standard_file():
    program = (
        "import os; [os.close(n) for n in (0, 1)]\n"
        "from narsil.process import fill_standard_files; fill_standard_files()\n"
        "os.write(2, str(os.open('/dev/zero', os.O_RDONLY)).encode())"
    )
    assert outcome(python(program)) == (0, "3")


def test_what_cannot_be_written_is_given_up_and_the_process_ends_well():
    program = (
        "import os, sys; from narsil.process import writing\n"
        "sys.stdout = open(1, 'w', closefd=False)\n"  # buffered, whatever the environment says
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        "with writing(1): print('x' * 10, flush=True)\n"
    )
    assert outcome(python(program)) == (0, "")


def test_only_failures_to_write_are_passed_over():
    with pytest.raises(ValueError, match="no"), writing(1):
        raise ValueError("no")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of 1 GiB together, without a byte on disk."""
    paths = [tmp_path / "tables.bin", tmp_path / "weights.bin"]
    for path in paths:
        path.touch()
        os.truncate(path, GIB // 2)
    return paths


def test_a_model_and_a_queue_that_do_not_fit_into_memory_are_told_with_their_sizes(files):
    (remark,) = memory_remarks(files, queue_bytes=GIB // 4, limit=GIB)
    assert "files (1.00 GiB) and max_queue_bytes (0.25 GiB) are more than the 1.00 GiB" in remark


def test_what_fits_into_memory_is_not_told(files):
    assert memory_remarks(files, queue_bytes=GIB // 4, limit=GIB + GIB // 4) == []


def test_the_limit_is_this_process_s_own(files, monkeypatch):
    monkeypatch.setattr("narsil.process.memory_limit", lambda: GIB)
    assert memory_remarks(files, queue_bytes=1)
    monkeypatch.setattr("narsil.process.memory_limit", lambda: None)
    assert memory_remarks(files, queue_bytes=1) == []
