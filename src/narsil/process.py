"""What belongs to the process that serves, whatever it serves: what its memory is enough for.

Receives figures and the machine's limits, produces remarks for the log. Owns nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from narsil.cgroups import memory_limit

__all__ = ["memory_remarks", "warn_of"]

log = logging.getLogger(__name__)

_GIB = 1 << 30


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
