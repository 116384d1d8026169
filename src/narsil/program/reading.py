"""The door to this room: recordings in, programs out, with all readers at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from narsil.program import composed, dense, ragged, sequences, singles, turned
from narsil.program.reader import Reader, Readings, TableOf
from narsil.program.recording import Recording, merged, record
from narsil.program.values import Known

__all__ = ["Readings", "merged", "read", "record"]

READERS = (dense, composed, ragged, sequences, singles, turned)  # which register what they read when imported


def read(
    recording: Recording,
    rows: tuple[int, int],
    groups: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]],
    table_of: TableOf,
    columns: Sequence[str],
    known: Mapping[int, Known],
) -> Readings:
    """The program of a merged recording. ``rows``: B of either; ``groups``: the (T, B) lengths of either; ``columns``:
    the inputs of numbers; ``known``: what the other inputs are."""
    reader = Reader(recording, rows, groups, table_of)
    return reader.read({name: recording.inputs[name] for name in columns}, known)
