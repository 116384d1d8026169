"""A served model: everything that running one model takes, made whole before anybody may name it.

Receives loaded backends, one per lane; owns them. Requests, queues and catalogs refer to it, and nothing of it changes
but its state, and what lanes keep with it. When the last of them has let go of it, the backends are closed: a request
keeps the model that it was decoded for until it ends, however many others have been put in that model's place by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.dataflow import RequestLimits
from narsil.engine.runner import Runner
from narsil.errors import ConfigError

__all__ = ["ModelState", "RequestLimits", "ServedModel"]


class ModelState(Enum):
    """Where a served model stands. It only ever moves downwards in this list."""

    LOADING = "loading"  # lanes warm it; nobody can name it yet
    READY = "ready"  # in the catalog
    DRAINING = "draining"  # out of the catalog; what was decoded for it is still answered


class ServedModel:
    """One version of one model. Compared and hashed by identity."""

    def __init__(
        self,
        name: str,
        version: str,
        backends: Sequence[Backend],
        limits: RequestLimits | None = None,
        *,
        share: float = 1.0,
        whole: bool = False,
    ) -> None:
        """``backends`` holds one instance per lane, of one model. ``share`` is its part of the lanes' time beside that
        of others, where all of them have work. ``whole``: its rows depend on each other, so that every request is a
        forward of its own, neither fused, nor padded, nor cut in pieces."""
        if not backends:
            raise ConfigError(f"model {name}: an engine needs at least one lane, and a backend for each")
        if not share > 0:
            raise ConfigError(f"model {name}: its share of the lanes must be above 0, not {share}")
        self.name = name
        self.version = version
        self.schema: ModelSchema = backends[0].schema
        self.backend: str = backends[0].name
        self.limits = replace(limits or RequestLimits(), whole=whole)
        self.backends = tuple(backends)
        self.runners: list[Runner | None] = [None] * len(backends)  # each lane's own, from when it has opened the model
        self.share = share
        self.whole = whole
        self.state = ModelState.LOADING
        closing = weakref.finalize(self, _close, self.backends)
        closing.atexit = False  # a process that ends frees everything anyway

    def __repr__(self) -> str:
        return f"ServedModel({self.name!r}, {self.version!r}, {self.state.value})"


def _close(backends: Sequence[Backend]) -> None:
    for backend in backends:
        backend.close()
