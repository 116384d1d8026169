"""The libraries that commands need beside their own: what is missing is told before the work."""

from __future__ import annotations

from narsil.errors import ConfigError, first_line

__all__ = ["check_torch"]


def check_torch(doing: str) -> None:
    """Raises ConfigError, naming what needs them, where torch or fbgemm cannot be imported."""
    try:
        import fbgemm_gpu  # noqa: F401
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{doing} needs torch and fbgemm ({first_line(error)}); install narsil[cpu] or narsil[cuda]"
        ) from None
