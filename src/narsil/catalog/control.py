"""Serves what a repository holds: loads, replaces and unloads models by its versions' policies, as somebody asks or as
the folder changes.

Owns what is known of every version: whether it is served, or why not. One change at a time; whoever asks waits for it.
A version that cannot be loaded changes nothing of what is served.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from narsil.catalog.catalog import Routes
from narsil.catalog.manager import ModelManager
from narsil.catalog.repository import Held, ModelConfig, ModelFolder, Repository, read_repository
from narsil.dataflow import Features
from narsil.engine.served_model import ServedModel
from narsil.errors import ArtifactError, ModelNotFound, NarsilError, Refused, last_line

__all__ = ["ModelControl", "Standing"]

log = logging.getLogger(__name__)

MOST_WAITING = 64  # calls to load or unload
INTERVAL_S = 2.0  # between two looks at a repository that is watched

Load = Callable[[ModelFolder, Held], tuple[ServedModel, list[Features]]]  # a model, and what warms it


@dataclass(frozen=True)
class Standing:
    """Where one version of the repository stands."""

    state: str  # READY, LOADING or UNAVAILABLE, as Triton has them
    reason: str = ""  # of one that is not served


@dataclass(frozen=True)
class _Served:
    """What was loaded: it need not be loaded again while this is the same."""

    model: weakref.ref[ServedModel]  # what has been withdrawn is not kept alive from here
    held: Held
    config: ModelConfig

    def is_still(self, held: Held, config: ModelConfig) -> bool:
        before, now = self.config, config
        return self.held.stamp == held.stamp and (before.settings, before.share) == (now.settings, now.share)


class ModelControl:
    """Thread-safe."""

    def __init__(self, root: Path, manager: ModelManager, load: Load, *, explicit: bool = False) -> None:
        """``explicit``: models are loaded and unloaded as clients ask."""
        self._root = root
        self._manager = manager
        self._load = load
        self._explicit = explicit
        self._changing = threading.Lock()  # held for a whole change
        self._served: dict[tuple[str, str], _Served] = {}
        self._problems: dict[tuple[str, str], str] = {}  # (name, version or empty) -> why it is not served
        self._loading: tuple[str, str] | None = None
        self._unloaded: set[str] = set()  # names that somebody unloaded
        self._seen: dict[str, object] = {}  # name -> what the last look saw of it
        self._done: dict[str, object] = {}  # name -> what was acted upon
        self._stopped = threading.Event()
        self._asked: queue.Queue[tuple[Future[bytes], Callable[[], None]]] = queue.Queue(MOST_WAITING)
        if explicit:  # a daemon, since a process that ends does not wait for a load
            threading.Thread(target=self._carry_out, name="narsil-admin", daemon=True).start()

    def load_all(self) -> None:
        """Loads every model. Raises ArtifactError where none can be served, with the first reason."""
        with self._changing:
            found = self._look()
            for folder in found.models.values():
                self._done[folder.name] = folder
                self._bring(folder)
        if not len(self._manager.catalog):
            reason = next(iter(self._problems.values()), "it holds no model: put one in NAME/VERSION/")
            raise ArtifactError(f"the repository {self._root} has nothing to serve: {reason}")

    def load(self, name: str) -> Future[bytes]:
        """Serves what the repository holds of a name now; done, with nothing, when it is served.

        Ends with Refused where a version cannot be loaded, and with ModelNotFound. Raises Refused where models are not
        loaded by clients, or too many calls wait.
        """
        return self._ask(partial(self._load_named, name))

    def unload(self, name: str) -> Future[bytes]:
        """No version of a name is served from now on; what was decoded for them is still answered.

        Ends with ModelNotFound where there is no such name. Raises as `load`.
        """
        return self._ask(partial(self._unload_named, name))

    def _load_named(self, name: str) -> None:
        with self._changing:
            found = self._look()
            folder = found.models.get(name)
            if folder is None:
                problem = found.problems.get((name, ""))
                if problem is not None:
                    raise Refused(f"failed to load {name!r}: {problem}")
                raise ModelNotFound(f"the repository has no model {name[:80]!r}")
            self._unloaded.discard(name)
            failed = self._bring(folder)
        if failed:
            raise Refused(f"failed to load {name!r}: {failed[0]}")

    def _unload_named(self, name: str) -> None:
        with self._changing:
            if not any(of == name for of, _ in (*self._served, *self._problems)):
                raise ModelNotFound(f"the repository has no model {name[:80]!r} that is or was to be served")
            self._unloaded.add(name)
            self._drop(name, keep=())

    def index(self) -> list[tuple[str, str, Standing]]:
        """(name, version, where it stands) of all that is or was to be served, in the order of names."""
        there = {(model.name, model.version): Standing("READY") for model in self._manager.catalog}
        for (name, version), problem in self._problems.copy().items():
            there.setdefault((name, version), Standing("UNAVAILABLE", problem))
        if self._loading is not None:
            there.setdefault(self._loading, Standing("LOADING"))
        return [(name, version, standing) for (name, version), standing in sorted(there.items())]

    def watch(self) -> None:
        """Looks at the folder every few seconds until `stop`, in a thread of its own."""
        threading.Thread(target=self._watch, name="narsil-repository", daemon=True).start()

    def stop(self) -> None:
        """Changes nothing more. Does not wait for a load that goes on."""
        self._stopped.set()

    def refresh(self) -> None:
        """One look: serves what has changed since the last one that acted and has not changed between two looks, and
        unloads what has gone. What is not whole is left for the next look."""
        with self._changing:
            found = self._look()
            for name, folder in found.models.items():
                settled, self._seen[name] = self._seen.get(name) == folder, folder
                if not settled or self._done.get(name) == folder or self._stopped.is_set():
                    continue
                waiting = [held for held in self._missing(folder) if not held.complete()]
                for held in waiting:
                    self._problems[name, held.version] = (
                        f"{held.folder} is not complete yet: when its copy is, put a file READY in it, or copy under a "
                        "name that begins with a dot and rename it"
                    )
                if not waiting:
                    self._done[name] = folder
                    self._bring(folder)
            for name in {name for name, _ in self._served} - set(found.models):
                self._done.pop(name, None)
                self._drop(name, keep=())

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            try:
                self.refresh()
            except NarsilError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("the repository %s could not be looked at", self._root)

    def _ask(self, change: Callable[[], None]) -> Future[bytes]:
        if not self._explicit:
            raise Refused(
                "models are not loaded and unloaded by clients here; start the server with --repository and "
                "--model-control explicit"
            )
        job: Future[bytes] = Future()
        try:
            self._asked.put_nowait((job, change))
        except queue.Full:
            raise Refused(
                f"{MOST_WAITING} calls to load or unload wait already; try again when they are done"
            ) from None
        return job

    def _carry_out(self) -> None:
        """What clients ask for, one after the other."""
        while not self._stopped.is_set():
            job, change = self._asked.get()
            if not job.set_running_or_notify_cancel():
                continue
            try:
                change()
            except Exception as error:
                job.set_exception(error)
            else:
                job.set_result(b"")

    def _look(self) -> Repository:
        found = read_repository(self._root)
        kept = {key: why for key, why in self._problems.items() if key[0] in found.models and key not in found.problems}
        self._problems = {**kept, **found.problems}
        return found

    def _missing(self, folder: ModelFolder) -> list[Held]:
        """What its policy serves and is not served yet, as it lies there now."""
        try:
            wanted = folder.wanted()
        except NarsilError:
            return []
        found = ((held, self._current(folder.name, held.version)) for held in wanted)
        return [held for held, current in found if current is None or not current.is_still(held, folder.config)]

    def _current(self, name: str, version: str) -> _Served | None:
        """What is served; not what has been withdrawn meanwhile."""
        found = self._served.get((name, version))
        return found if found is not None and found.model() in tuple(self._manager.catalog) else None

    def _bring(self, folder: ModelFolder) -> list[str]:
        """Serves what the folder's policy wants, then lets go of its other versions: not where one could not be
        loaded, so that the old one goes on. Returns what went wrong."""
        name = folder.name
        try:
            wanted = folder.wanted()
        except NarsilError as error:
            self._problems[name, ""] = str(error)
            log.error("%s", error)
            return [str(error)]
        self._problems.pop((name, ""), None)
        failed = []
        for held in self._missing(folder):
            self._loading = (name, held.version)
            try:
                self._bring_one(folder, held)
                self._problems.pop((name, held.version), None)
            except Exception as error:
                told = str(error) if isinstance(error, NarsilError) else f"{type(error).__name__}: {last_line(error)}"
                self._problems[name, held.version] = told
                log.error("model %s, version %s is not loaded: %s", name, held.version, told)
                failed.append(told)
            finally:
                self._loading = None
        self._manager.route(name, folder.config.routes)
        if not failed:
            self._drop(name, keep=tuple(held.version for held in wanted))
        return failed

    def _bring_one(self, folder: ModelFolder, held: Held) -> None:
        current = self._current(folder.name, held.version)
        model, warmup = self._load(folder, held)
        self._manager.add(model, warmup, replacing=None if current is None else current.model())
        self._served[folder.name, held.version] = _Served(weakref.ref(model), held, folder.config)

    def _drop(self, name: str, keep: tuple[str, ...]) -> None:
        """Lets go of the versions of a name that are not to be kept."""
        if not keep:
            self._manager.route(name, Routes())
        for of, version in [key for key in self._served if key[0] == name and key[1] not in keep]:
            model = self._served.pop((of, version)).model()
            if model is not None:
                self._manager.remove(model)
        for key in [key for key in self._problems if key[0] == name and key[1] and key[1] not in keep]:
            del self._problems[key]
        if not keep:
            self._problems[name, ""] = "unloaded" if name in self._unloaded else "it has gone from the repository"
