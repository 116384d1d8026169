"""Has the kernel refuse a system call to this process, as a container's profile may. For processes of a test's own."""

from __future__ import annotations

import ctypes
import platform
import struct

# From linux/seccomp.h, linux/prctl.h, linux/audit.h and linux/bpf_common.h.
_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {"epoll_pwait2": dict.fromkeys(_ARCHITECTURES, 441), "epoll_ctl": {"x86_64": 233, "aarch64": 21}}


def refuse(name: str, error: int) -> None:
    """From now on, and for good, the call fails with this errno. Raises OSError where the kernel filters nothing."""
    machine = platform.machine()
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD_WORD, 0, 0, 4),  # seccomp_data.arch
            (_JUMP_EQUAL, 0, 3, _ARCHITECTURES[machine]),
            (_LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
            (_JUMP_EQUAL, 0, 1, CALLS[name][machine]),
            (_RETURN, 0, 0, _ERRNO | error),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    filters = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
