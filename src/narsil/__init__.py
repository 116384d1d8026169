"""Narsil: a serving engine for recommendation models.

The public API is what ``__all__`` names. Importing the package loads none of it: neither torch nor grpc.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narsil.client import AsyncClient, Client, Context, ModelInfo, Prediction, TransportError
    from narsil.errors import (
        DeadlineExceeded,
        InvalidRequest,
        MessageTooLarge,
        ModelNotFound,
        NarsilError,
        QueueFull,
        RequestError,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "Context",
    "DeadlineExceeded",
    "InvalidRequest",
    "MessageTooLarge",
    "ModelInfo",
    "ModelNotFound",
    "NarsilError",
    "Prediction",
    "QueueFull",
    "RequestError",
    "TransportError",
    "__version__",
]

_ERRORS = (
    "DeadlineExceeded",
    "InvalidRequest",
    "MessageTooLarge",
    "ModelNotFound",
    "NarsilError",
    "QueueFull",
    "RequestError",
)
_HOME = dict.fromkeys(_ERRORS, "narsil.errors")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'narsil' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "narsil.client")), name)
