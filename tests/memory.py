"""Bytes that native code holds and objects that Python holds, counted by their allocators rather than by the kernel.

Resident memory is coarse: what was freed before hides what is lost now. These counts are exact, so that a test may
bound them by what a leak of a few bytes a request would cost.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass

_PROCESS = ctypes.CDLL(None)


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )
    hblkhd: int  # bytes in blocks that were mapped one by one
    uordblks: int  # bytes in use in all arenas


def native_bytes() -> int:
    """What malloc has handed out and not got back, in all threads; Python's small objects are not among it."""
    if hasattr(_PROCESS, "__sanitizer_get_current_allocated_bytes"):
        count = _PROCESS.__sanitizer_get_current_allocated_bytes
        count.restype = ctypes.c_size_t
        return int(count())
    look = _PROCESS.mallinfo2
    look.restype = _Mallinfo2
    found = look()
    return int(found.uordblks) + int(found.hblkhd)


@dataclass(frozen=True)
class Held:
    """A snapshot; the difference of two says what came to stay between them."""

    native: int  # bytes
    objects: int  # blocks of Python's own allocator

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        return cls(native_bytes(), sys.getallocatedblocks())

    def __sub__(self, other: Held) -> Held:
        return Held(self.native - other.native, self.objects - other.objects)
