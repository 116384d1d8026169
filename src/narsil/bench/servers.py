"""Servers under measurement: started, watched and ended by their process id.

Owns the processes it starts. Linux only (reads /proc).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from narsil.errors import NarsilError


class ServerDied(NarsilError):
    """A server under measurement did not start, or ended on its own."""


class Watched(Protocol):
    """A server whose CPU and memory are read while it is under load."""

    def cpu_s(self) -> float:
        """User and system seconds used so far."""

    def peak_mib(self) -> float:
        """The largest resident set so far, MiB."""


class AttachedServer:
    """A server that somebody else started, known by its process id."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def cpu_s(self) -> float:
        """See Watched.cpu_s."""
        return cpu_seconds(self._pid)

    def peak_mib(self) -> float:
        """See Watched.peak_mib."""
        return peak_mib(self._pid)


class ServerProcess:
    """A server as a child process: ready once it prints a line that ``ready`` matches, whose group 1 is its address."""

    def __init__(
        self,
        argv: Sequence[str],
        ready: str,
        *,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 120,
    ) -> None:
        self._argv = list(argv)
        self._ready = re.compile(ready)
        self._environment = {**os.environ, **(environment or {})}
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.address = ""

    def start(self) -> str:
        """Starts the server and waits for its ready line; returns its address. Raises ServerDied."""
        self._process = subprocess.Popen(
            self._argv, stdout=subprocess.PIPE, stderr=self._log, text=True, env=self._environment
        )
        watchdog = threading.Timer(self._start_timeout, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout or ():
                if found := self._ready.search(line):
                    self.address = found.group(1)
                    return self.address
        finally:
            watchdog.cancel()
        status = self._process.wait()
        log = self.log_tail()
        self.stop()
        raise ServerDied(f"{self._argv[0]} did not become ready (exit {status}):\n{log}")

    @property
    def pid(self) -> int:
        """Process id. Raises ServerDied before start."""
        if self._process is None:
            raise ServerDied(f"{self._argv[0]} has not been started")
        return self._process.pid

    def cpu_s(self) -> float:
        """See Watched.cpu_s."""
        return cpu_seconds(self.pid)

    def peak_mib(self) -> float:
        """See Watched.peak_mib."""
        return peak_mib(self.pid)

    def send_signal(self, number: signal.Signals) -> None:
        """Signals the server if it is still alive."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, then waits; returns the exit status."""
        if self._process is None:
            return 0
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout: float = 40) -> int:
        """The exit status of a server that is about to leave; SIGKILL when it takes longer than ``timeout`` seconds."""
        if self._process is None:
            return 0
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        return status

    def log_tail(self, lines: int = 20) -> str:
        """The last lines the server wrote to standard error."""
        self._log.seek(0)
        return "".join(self._log.readlines()[-lines:])

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def narsil_server(model: Path | None = None, **options: object) -> ServerProcess:
    """``narsil serve``, on a free port unless told otherwise, with further options by their setting's name."""
    argv = [sys.executable, "-m", "narsil", "serve"]
    for name, value in {**({} if model is None else {"model": model}), "port": 0, **options}.items():
        flag = name.replace("_", "-")
        argv += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return ServerProcess(argv, r"^narsil: serving .* on (\S+) \(")


def torchrec_cpp_server(binary: Path, model_file: Path, threads: int) -> ServerProcess:
    """The C++ baseline on a free port."""
    argv = [str(binary), "--model", str(model_file), "--port", "0", "--threads", str(threads)]
    return ServerProcess(argv, r"^listening on (\S+)")


def cpu_seconds(pid: int) -> float:
    """User and system seconds of all threads of a process, ended ones too, to the nanosecond.

    The process's own CPU clock, as clock_getcpuclockid names it: /proc counts in hundredths of a second, which is
    too coarse for a few cheap requests.
    """
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        raise ServerDied(f"there is no process {pid} to read the CPU and memory of") from None


def peak_mib(pid: int) -> float:
    """High-water mark of a process's resident set, MiB."""
    status = _proc(pid, "status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) / 1024 if found else 0.0


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        raise ServerDied(f"there is no process {pid} to read the CPU and memory of") from None
