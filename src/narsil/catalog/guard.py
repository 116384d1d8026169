"""Looks after the files of models that are served: what is written into a mapped file is what the next request would be
scored by, so its model goes out of service.

Owns one thread, which looks every few seconds.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

from narsil.artifacts.watching import Finding, Watch
from narsil.catalog.manager import ModelManager
from narsil.engine.served_model import ServedModel

__all__ = ["FileGuard"]

log = logging.getLogger(__name__)

INTERVAL_S = 2.0  # between two looks: some microseconds for each file


class FileGuard:
    """Watches the files of any number of models until ``stop``."""

    def __init__(
        self, manager: ModelManager, withdrawn: Callable[[ServedModel], None], interval: float | None = None
    ) -> None:
        """``withdrawn`` is called, in the guard's thread, after a model has been taken out of service."""
        self._manager = manager
        self._withdrawn = withdrawn
        self._interval = INTERVAL_S if interval is None else interval  # seconds
        self._watches: weakref.WeakKeyDictionary[ServedModel, Watch] = weakref.WeakKeyDictionary()
        self._told: weakref.WeakKeyDictionary[ServedModel, str] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="narsil-files", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Has the thread end. Does not wait for it: it may be in the middle of reading a large file."""
        self._stopped.set()

    def watch(self, model: ServedModel, watch: Watch) -> None:
        """Looks after this model's files too, for as long as the model lives."""
        with self._lock:
            self._watches[model] = watch

    def look(self) -> None:
        """One look at every file. What is new is logged once; a model that may score wrongly is withdrawn."""
        with self._lock:
            watches = list(self._watches.items())
        for model, watch in watches:
            finding = watch.look()
            if finding is not None and not self._stopped.is_set():
                self._act(model, finding)

    def _act(self, model: ServedModel, finding: Finding) -> None:
        if not finding.harmful:
            if self._told.get(model) != finding.text:
                log.warning("model %s: %s", model.name, finding.text)
                self._told[model] = finding.text
            return
        with self._lock:
            self._watches.pop(model, None)
        log.error("model %s is out of service: %s", model.name, finding.text)
        self._manager.remove(model)
        self._withdrawn(model)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self.look()
            except Exception:
                log.exception("the files of the models could not be looked at")
