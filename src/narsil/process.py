"""The process that a command runs in: what signals mean to it, how it ends, its standard files, its memory.

    SIGTERM, SIGINT    most commands: unwind and end; see Stopped
                       narsil serve, before it listens: end at once, since nothing can be lost; see end_on_signals
                       narsil serve, afterwards: stop in order; see StopSignals
    SIGHUP             narsil serve: passed over, with a line on standard error. Others: as SIGTERM

Receives signals, figures and the machine's limits; produces exceptions, events and remarks. Owns the handlers of these
signals. Imports nothing heavy: it is there before anything else is.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from narsil.cgroups import memory_limit

__all__ = [
    "StopSignals",
    "Stopped",
    "end_by",
    "end_on_signals",
    "fill_standard_files",
    "memory_remarks",
    "pass_over_hangups",
    "raise_on_signals",
    "warn_of",
    "writing",
]

log = logging.getLogger(__name__)

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_GIB = 1 << 30


class Stopped(BaseException):
    """A signal asked this process to end. No Exception, so that nobody who catches those catches it; it unwinds as
    KeyboardInterrupt does, and files half written are cleared away."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_on_signals() -> None:
    """From now on SIGTERM, and SIGHUP unless it is ignored, raise Stopped in the main thread. Otherwise the kernel
    would end the process without a last word, or not at all where it is process 1 of a container."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, stop)


def end_on_signals() -> None:
    """From now on SIGTERM and SIGINT end the process at once, with a line that says so, until StopSignals takes over.

    Where it was built, native code does it: loading a model can hold the interpreter's lock for minutes, in which no
    Python handler runs. Process 1 of a container needs some handler, since its kernel spares it the default action.
    """
    end_on_signal = None
    with suppress(ImportError):
        end_on_signal = import_module("narsil._native").end_on_signal
    for number in _STOPPING:
        name = signal.Signals(number).name
        words = f"narsil: {name} before the server was ready: ended; nothing was in flight\n".encode()
        _end_on_signal(number, words)  # also beside the native one: asyncio.run replaces a SIGINT of Python's default
        if end_on_signal is not None:
            end_on_signal(number, words)


def _end_on_signal(number: int, last_words: bytes) -> None:
    """As the native one, but not before the interpreter's lock is free."""

    def handle(number: int, frame: FrameType | None) -> None:
        _say(last_words)
        end_by(number)

    signal.signal(number, handle)


def end_by(number: int) -> NoReturn:
    """Ends this process as the signal's default action would, but process 1 of a container, which that spares, with
    status 128 + number."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def pass_over_hangups() -> None:
    """From now on SIGHUP, which comes when a terminal is closed or by the habit of asking daemons to reload, changes
    nothing; a line says so. Where it is ignored already (nohup), it stays so."""

    def handle(number: int, frame: FrameType | None) -> None:
        _say(b"narsil: SIGHUP is passed over: settings and models are not reloaded, and SIGTERM stops the server\n")

    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)


def _say(line: bytes) -> None:
    """Writes a line to standard error from a signal's handler, which may have interrupted the logging of another."""
    with suppress(OSError):  # there may be none any more
        os.write(2, line)


class StopSignals:
    """SIGTERM and SIGINT as events of the running loop, from when this is made.

    ``stop`` is set by the first of them. ``hurry``, for who waits before he stops, is set by the second, and by SIGINT
    at once: nobody routes requests to a server in a terminal. A second SIGINT ends the process. The handlers outlive
    the loop, so that a signal sent by an impatient supervisor while the process is leaving does not turn a clean exit
    into a killed one.
    """

    def __init__(self) -> None:
        import asyncio  # slow to import, and commands that do not serve need none

        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in _STOPPING:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, lambda *_: end_by(signal.SIGINT))
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, number)

    def _tell(self, number: int) -> None:
        if number == signal.SIGINT or self.stop.is_set():
            self.hurry.set()
        self.stop.set()


def fill_standard_files() -> None:
    """Opens /dev/null where standard input, output or error is closed. The next file or socket would take its number,
    and get what some library prints."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


@contextmanager
def writing(number: int) -> Iterator[None]:
    """A block that writes to standard output (1) or error (2). Where that fails, all goes on as if it had not.

    What could not be written is given up: the interpreter would otherwise try again when it ends, and fail.
    """
    try:
        yield
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def memory_remarks(files: Iterable[Path], queue_bytes: int, limit: int | None = None) -> list[str]:
    """A remark where a model's files, once in memory, and the messages that may wait (``queue_bytes``) are more than
    this process may have; ``limit`` None: what its cgroups and the machine let it have."""
    limit = memory_limit() if limit is None else limit
    model = sum(file.stat().st_size for file in files)
    if limit is None or model + queue_bytes <= limit:
        return []
    return [
        f"the model's files ({model / _GIB:.2f} GiB) and max_queue_bytes ({queue_bytes / _GIB:.2f} GiB) are more than "
        f"the {limit / _GIB:.2f} GiB of memory that this process may have by its cgroups and this machine: it may be "
        "killed, or wait for the disk; allow it more memory, or lower max_queue_bytes"
    ]


def warn_of(remarks: Iterable[str]) -> None:
    """Logs each."""
    for remark in remarks:
        log.warning("%s", remark)
