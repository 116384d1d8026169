"""Regions of POSIX shared memory that clients on this machine register, and hand tensors over in.

Receives names and numbers as a request holds them, all of them hostile. Owns a descriptor for each region. Nothing is
mapped: a client may shrink its memory, or change what is in it, at any time. So bytes are copied out of it before
anything is checked, and what is no longer there is an error of that request. Thread-safe.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from dataclasses import dataclass

from narsil.errors import InvalidRequest

FOLDER = "/dev/shm"  # noqa: S108 - where Linux keeps what shm_open makes
MAX_REGIONS = 1024  # each of them holds a descriptor
MAX_NAME = 256  # characters
_MOST_SHOWN = 80  # characters of a name that a client gave


class Region:
    """A part of one shared memory object. Lives as long as anybody holds it, registered or not."""

    def __init__(self, name: str, key: str, offset: int, size: int) -> None:
        """Raises InvalidRequest where there is no such object, or it is smaller."""
        self.name, self.key, self.offset, self.size = name, key, offset, size
        self._descriptor = _opened(key)
        weakref.finalize(self, os.close, self._descriptor)
        held = os.fstat(self._descriptor)
        if not stat.S_ISREG(held.st_mode):
            raise InvalidRequest(f"shared memory key {key[:_MOST_SHOWN]!r} is no shared memory object")
        if offset + size > held.st_size:
            raise InvalidRequest(
                f"shared memory key {key[:_MOST_SHOWN]!r} has {held.st_size} bytes, not {size} from {offset} on"
            )

    def read(self, offset: int, size: int) -> bytes:
        """A copy of ``size`` bytes from ``offset`` of the region on. Raises InvalidRequest where they are not there."""
        parts: list[bytes] = []
        left = size
        while left:
            part = os.pread(self._descriptor, left, self.offset + offset + size - left)
            if not part:
                raise self._shrunk()
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Puts bytes into the region. Raises InvalidRequest where it is not there any more."""
        at = self.offset + offset
        if os.fstat(self._descriptor).st_size < at + len(data):
            raise self._shrunk()  # writing would make it grow
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(self._descriptor, view, at)
            except OSError as error:
                raise InvalidRequest(
                    f"shared memory region {self.name!r} cannot be written: {error.strerror}"
                ) from None
            view, at = view[written:], at + written

    def _shrunk(self) -> InvalidRequest:
        return InvalidRequest(
            f"shared memory region {self.name!r} is smaller than when it was registered; register it again"
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """A part of a region, for one tensor."""

    region: Region
    offset: int
    size: int

    def read(self) -> bytes:
        """See Region.read."""
        return self.region.read(self.offset, self.size)

    def write(self, data: bytes) -> None:
        """See Region.write."""
        self.region.write(self.offset, data)


class SharedMemory:
    """The regions of one server, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """From now on ``name`` means these bytes of an object. Raises InvalidRequest, and then nothing has changed."""
        if not 1 <= len(name) <= MAX_NAME:
            raise InvalidRequest(
                f"a shared memory region's name has 1 to {MAX_NAME} characters, and this one {len(name)}"
            )
        if size < 1:
            raise InvalidRequest(f"shared memory region {name[:_MOST_SHOWN]!r} has no bytes; give byte_size")
        region = Region(name, key, offset, size)
        with self._lock:
            if name in self._regions:
                raise InvalidRequest(
                    f"shared memory region {name[:_MOST_SHOWN]!r} is registered already; unregister it before"
                )
            if len(self._regions) >= MAX_REGIONS:
                raise InvalidRequest(f"{MAX_REGIONS} shared memory regions are registered; unregister one before")
            self._regions[name] = region

    def unregister(self, name: str) -> None:
        """The name means nothing any more; nor does any, where it is empty. Requests that have begun go on."""
        with self._lock:
            gone = [self._regions.pop(name, None)] if name else list(self._regions.values())
            if not name:
                self._regions.clear()
        del gone  # closed outside of the lock

    def regions(self, name: str = "") -> tuple[Region, ...]:
        """All, or the one of this name. Raises InvalidRequest where that is not registered."""
        with self._lock:
            if not name:
                return tuple(self._regions.values())
            if (found := self._regions.get(name)) is None:
                raise InvalidRequest(f"shared memory region {name[:_MOST_SHOWN]!r} is not registered")
            return (found,)

    def slot(self, name: str, offset: int, size: int) -> Slot:
        """A part of a region. Raises InvalidRequest where it reaches beyond."""
        (region,) = self.regions(name)
        if offset < 0 or size < 0 or offset + size > region.size:
            raise InvalidRequest(
                f"shared memory region {name[:_MOST_SHOWN]!r} has {region.size} bytes, not {size} from {offset} on"
            )
        return Slot(region, offset, size)


def _opened(key: str) -> int:
    """A descriptor of the object that shm_open would open, never of anything else."""
    shown, inner = key[:_MOST_SHOWN], key.removeprefix("/")
    if not inner or "/" in inner or "\0" in inner or inner in (".", ".."):
        raise InvalidRequest(f"shared memory key {shown!r} is none: send a slash and a name without one, as in '/rows'")
    try:
        # Neither a link out of the folder nor a pipe that waits for somebody.
        return os.open(f"{FOLDER}/{inner}", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no name"
        raise InvalidRequest(f"shared memory key {shown!r} cannot be opened by this server: {why}") from None
