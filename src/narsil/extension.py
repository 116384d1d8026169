"""The native extension, if it was built, and a request's rows as it holds them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, TypeGuard

from narsil.dataflow import Features, Jagged, OneHot, Payload

if TYPE_CHECKING:
    from narsil._native import Call

try:
    import_module("narsil._native")
except ImportError as error:
    MISSING = str(error)  # why it cannot be used
else:
    MISSING = ""
AVAILABLE = not MISSING


class NativeFeatures:
    """Rows of a message that native code has read and validated, still in the message. A Payload."""

    __slots__ = ("call", "ids", "rows")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.rows: int = call.rows
        self.ids: int = call.ids

    def slice(self, start: int, stop: int) -> Features:
        """See Payload.slice."""
        return self.portable().slice(start, stop)

    def portable(self) -> Features:
        """See Payload.portable. The arrays are read-only views of the message."""
        call = self.call
        dense, values, lengths = call.arrays()
        if lengths is None:
            ids = values.reshape(-1, self.rows) if call.key_major else values.reshape(self.rows, -1).T
            return Features(self.rows, dense, OneHot(ids))
        return Features(self.rows, dense, Jagged.laid_out(values, lengths, key_major=call.key_major))


def all_native(parts: Sequence[Payload]) -> TypeGuard[Sequence[NativeFeatures]]:
    """Whether every part can be fused by native code."""
    return all(type(part) is NativeFeatures for part in parts)
