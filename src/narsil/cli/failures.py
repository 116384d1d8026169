"""What a command's failure means to whoever called it: one sentence with a next step, and an exit status.

Receives whatever a command raised, foreign errors too, and produces a Failure. Owns the exit statuses:

    0          done
    1          failed, and a sentence on standard error says why
    2          wrong command line
    128 + N    ended by signal N: 130 Ctrl-C, 143 SIGTERM; 141 where nobody reads standard output any more
"""

from __future__ import annotations

import errno
import select
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

from narsil.errors import NarsilError, first_line
from narsil.process import Stopped

__all__ = ["Failure", "explain"]

_FAILED = 1
_STDOUT = 1
_NEXT_STEPS = {
    errno.EACCES: "check its owner and mode, or run as a user who may do this",
    errno.EPERM: "check its owner and mode, or run as a user who may do this",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space where it writes, standard output included, or write elsewhere",
    errno.EDQUOT: "free some space where it writes, standard output included, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EIO: "the device may be failing, and the kernel's log says more",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "the machine has too many files open",
    errno.ENOMEM: "allow this process more memory, or end others",
}
_SHOW_ME = "`narsil --debug` and the same command show the traceback"


@dataclass(frozen=True)
class Failure:
    """How a command that raised ends."""

    sentence: str  # empty: there is nobody to tell
    status: int = _FAILED
    signal: int | None = None  # by which the process ends, where it can


def explain(error: BaseException) -> Failure:
    """How a command ends that raised this."""
    if isinstance(error, NarsilError):
        return Failure(str(error))
    if isinstance(error, Stopped | KeyboardInterrupt):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        return Failure(f"ended by {signal.Signals(number).name}", 128 + number, number)
    if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
        return Failure("", 128 + signal.SIGPIPE)
    return Failure(_sentence(error))


def _nobody_reads_stdout() -> bool:
    """Whether standard output is a pipe or a socket whose other end is closed."""
    with suppress(OSError):
        poll = select.poll()
        poll.register(_STDOUT, select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False


def _sentence(error: BaseException) -> str:
    """What a foreign error says, and what to do."""
    said = first_line(error)
    if isinstance(error, MemoryError):
        more = "" if said == "MemoryError" else f" ({said})"
        return f"out of memory{more}; allow this process more, or choose a smaller model or fewer rows"
    if isinstance(error, ImportError):
        return (
            f"{said}: a part of this installation is missing or does not fit the others; install Narsil again, with "
            "the extra that this needs: narsil[cpu], narsil[cuda], narsil[onnx] or narsil[bench]"
        )
    if isinstance(error, UnicodeEncodeError):
        return f"{sys.stdout.encoding} cannot hold what is to be printed; set PYTHONIOENCODING=utf-8"
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}; {_NEXT_STEPS.get(error.errno or 0, _SHOW_ME)}"
    return f"not foreseen: {type(error).__name__}: {said}; {_SHOW_ME}"
