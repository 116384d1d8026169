"""Files before anything reads them: what is no file, or may not be read, is told in one sentence."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from narsil.errors import ArtifactError

__all__ = ["check_readable", "unreadable"]


def check_readable(path: Path) -> None:
    """Raises ArtifactError unless it is a file that this process may read. A pipe, which would never end, is none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ArtifactError(
                f"{path} is no file but a {'folder' if path.is_dir() else 'device or pipe'}; give a file"
            )
        path.open("rb").close()
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> ArtifactError:
    """The error about a path that the system refuses to read, with the next step."""
    step = "; check its owner and mode"
    refused = error.errno in (errno.EACCES, errno.EPERM)
    return ArtifactError(f"{path} cannot be read: {error.strerror or error}{step if refused else ''}")
