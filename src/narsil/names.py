"""What may be a name: of a model, a version, a feature, a table or a task."""

from __future__ import annotations

import re

__all__ = ["as_name", "is_name"]

_NAME = re.compile(r"[A-Za-z0-9_.\-/:]{1,256}")


def is_name(value: object) -> bool:
    """Whether a value may name a model, a version, a feature, a table or a task: it goes to logs and terminals."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def as_name(text: str) -> str:
    """The name nearest to a text, such as a file's."""
    return re.sub(r"[^A-Za-z0-9_.\-/:]", "_", text)[:256] or "_"
