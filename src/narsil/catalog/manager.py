"""How a model comes and goes: warm, swap, drain, free.

Receives served models that have been loaded; owns the catalog that is in force. Every change is one swap: the engine's
lanes have run the model before anybody can name it, and what was decoded for a model that goes is still answered by it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from narsil.catalog.catalog import EMPTY, Catalog
from narsil.dataflow import Features
from narsil.engine.engine import Engine
from narsil.engine.served_model import ModelState, ServedModel

__all__ = ["ModelManager"]

log = logging.getLogger(__name__)

Publish = Callable[[Catalog], None]


class ModelManager:
    """Adds and removes models of a running engine. Thread-safe; one change at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changing = threading.Lock()
        self._catalog = EMPTY
        self._subscribers: list[Publish] = []

    @property
    def catalog(self) -> Catalog:
        """What is served now."""
        return self._catalog

    def subscribe(self, publish: Publish) -> None:
        """Has ``publish`` called with the catalog, now and at every swap, in the thread that makes the change."""
        with self._changing:
            publish(self._catalog)
            self._subscribers.append(publish)

    def add(self, model: ServedModel, warmup: Sequence[Features] = ()) -> None:
        """Warms the model on every lane, then serves it. Blocks for as long as that takes; others are served meanwhile.

        Raises ConfigError where its name and version are served already, and what a warmup forward raised; nothing has
        changed then.
        """
        with self._changing:
            after = self._catalog.adding(model)
            began = monotonic()
            self._engine.add(model, warmup)
            model.state = ModelState.READY
            self._swap(after)
            log.info("serving %s, version %s, after %.1f s of warmup", model.name, model.version, monotonic() - began)

    def remove(self, model: ServedModel) -> None:
        """Nobody can name the model from now on. It ends, and its memory is freed, with the last request that was
        decoded for it. Does nothing where it is not served."""
        with self._changing:
            if model not in tuple(self._catalog):
                return
            self._swap(self._catalog.without(model))
            model.state = ModelState.DRAINING
            self._engine.remove(model)
            log.info("no longer serving %s, version %s", model.name, model.version)

    def _swap(self, catalog: Catalog) -> None:
        self._catalog = catalog
        for publish in self._subscribers:
            publish(catalog)
