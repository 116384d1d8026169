"""What may be a name: of a model or a version, and of a feature, a table or a task."""

from __future__ import annotations

import re

__all__ = ["MOST_CHARACTERS", "as_name", "is_label", "is_name"]

MOST_CHARACTERS = 256

_NAME = re.compile(r"[A-Za-z0-9_.\-/:]{1,256}")


def is_name(value: object) -> bool:
    """Whether a value may name a model or a version: it goes to metadata, files and shells."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def is_label(value: object) -> bool:
    """Whether a value may name a feature, a table or a task: any printable text. It goes to logs and terminals, so that
    control characters, line ends and what turns the direction of writing are none."""
    return isinstance(value, str) and 1 <= len(value) <= MOST_CHARACTERS and value.isprintable()


def as_name(text: str) -> str:
    """The name nearest to a text, such as a file's."""
    return re.sub(r"[^A-Za-z0-9_.\-/:]", "_", text)[:256] or "_"
