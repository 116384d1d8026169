"""How a model comes and goes: warm, swap, drain, free.

Receives served models that have been loaded; owns the catalog that is in force. Every change is one swap: the engine's
lanes have run the model before anybody can name it, and what was decoded for a model that goes is still answered by it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from narsil.catalog.catalog import EMPTY, Catalog, Routes
from narsil.dataflow import Features
from narsil.engine.engine import Engine
from narsil.engine.served_model import ModelState, ServedModel

__all__ = ["ModelManager"]

log = logging.getLogger(__name__)

Publish = Callable[[Catalog], None]


class ModelManager:
    """Adds and removes models of a running engine. Thread-safe: models are warmed one at a time, and a model can be
    removed meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._adding = threading.Lock()
        self._changing = threading.Lock()  # held for a swap alone
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

    def add(self, model: ServedModel, warmup: Sequence[Features] = (), *, replacing: ServedModel | None = None) -> None:
        """Warms the model on every lane, then serves it, in the place of another of its name and version where one is
        given. Blocks for as long as that takes; others are served meanwhile, and what is replaced too.

        Raises ConfigError where its name and version are served already, and what a warmup forward or a subscriber
        raised; nothing has changed then.
        """
        with self._adding:
            self._catalog.adding(model, replacing)  # before the work: what would be refused after it
            began = monotonic()
            self._engine.add(model, warmup)
            try:
                with self._changing:
                    if replacing not in tuple(self._catalog):
                        replacing = None  # it was withdrawn meanwhile
                    self._swap(self._catalog.adding(model, replacing))
                    model.state = ModelState.READY
                    if replacing is not None:
                        replacing.state = ModelState.DRAINING
            except BaseException:
                self._engine.remove(model)
                raise
            if replacing is not None:
                self._engine.remove(replacing)
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

    def route(self, name: str, routes: Routes) -> None:
        """Requests for this name are led so from now on."""
        with self._changing:
            self._swap(self._catalog.routing(name, routes))

    def _swap(self, catalog: Catalog) -> None:
        """Everybody is told or nobody: where one raises, those who have been told are told the old one again."""
        before, told = self._catalog, 0
        try:
            for publish in self._subscribers:
                told += 1
                publish(catalog)
        except BaseException:
            for publish in self._subscribers[:told]:
                publish(before)
            raise
        self._catalog = catalog
