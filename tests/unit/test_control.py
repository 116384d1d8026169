"""What a repository's server does: which versions it serves as its folder and its clients have it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from narsil.catalog.control import MOST_WAITING, ModelControl, Standing
from narsil.catalog.manager import ModelManager
from narsil.catalog.repository import Held, ModelFolder
from narsil.dataflow import Features
from narsil.engine.served_model import ModelState, ServedModel
from narsil.errors import ArtifactError, ModelNotFound, Refused
from tests.support import PATIENCE_S, AnEngine, engine_with, fake_model
from tests.unit.test_repository import put


class Loads:
    """Loads fakes, and remembers which; versions in ``broken`` fail."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        self.hold: threading.Event | None = None

    def __call__(self, folder: ModelFolder, held: Held) -> tuple[ServedModel, list[Features]]:
        if self.hold is not None:
            assert self.hold.wait(PATIENCE_S)
        if held.version in self.broken:
            raise ArtifactError(f"{folder.name} {held.version} is damaged")
        self.loaded.append((folder.name, held.version))
        return fake_model(name=folder.name, version=held.version), []


@pytest.fixture
def engine() -> Iterator[AnEngine]:
    with engine_with() as made:
        yield made


@pytest.fixture
def manager(engine) -> ModelManager:
    return ModelManager(engine)


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def control(tmp_path, manager, loads) -> Iterator[ModelControl]:
    made = ModelControl(tmp_path, manager, loads, explicit=True)
    yield made
    made.stop()


def served(manager: ModelManager) -> list[tuple[str, str]]:
    return [(model.name, model.version) for model in manager.catalog]


def done(job: Future[bytes]) -> None:
    assert job.result(PATIENCE_S) == b""


def test_all_models_are_served_and_each_in_the_versions_of_its_policy(tmp_path, manager, control):
    put(tmp_path, "ads", "1", "2")
    put(tmp_path, "feed", "1", "2", "3", config="versions = { latest = 2 }")
    control.load_all()
    assert served(manager) == [("ads", "2"), ("feed", "2"), ("feed", "3")]
    assert manager.catalog.find("feed").version == "3"
    assert control.index() == [("ads", "2", Standing("READY"))] + [("feed", v, Standing("READY")) for v in ("2", "3")]


def test_what_cannot_be_served_is_told_and_the_others_are(tmp_path, manager, control, loads):
    put(tmp_path, "ads", "1")
    put(tmp_path, "feed", "2")
    (tmp_path / "empty").mkdir()
    loads.broken = {"2"}
    control.load_all()
    assert served(manager) == [("ads", "1")]
    states = {(name, version): standing for name, version, standing in control.index()}
    assert states["feed", "2"] == Standing("UNAVAILABLE", "feed 2 is damaged")
    assert "holds no version" in states["empty", ""].reason


def test_a_repository_with_nothing_to_serve_ends_the_start_with_the_reason(tmp_path, control, loads):
    with pytest.raises(ArtifactError, match="has nothing to serve: it holds no model: put one in NAME/VERSION/"):
        control.load_all()
    put(tmp_path, "ads", "1")
    loads.broken = {"1"}
    with pytest.raises(ArtifactError, match="has nothing to serve: ads 1 is damaged"):
        control.load_all()


def test_a_new_version_takes_the_place_of_the_old_one_as_a_client_asks(tmp_path, manager, control, loads):
    put(tmp_path, "ads", "1")
    control.load_all()
    (old,) = manager.catalog
    put(tmp_path, "ads", "2")
    done(control.load("ads"))
    assert served(manager) == [("ads", "2")]
    assert old.state is ModelState.DRAINING
    done(control.load("ads"))
    assert loads.loaded == [("ads", "1"), ("ads", "2")]  # what is as it was is not loaded again


def test_a_version_that_fails_changes_nothing_of_what_is_served(tmp_path, manager, control, loads):
    put(tmp_path, "ads", "1")
    control.load_all()
    put(tmp_path, "ads", "2")
    loads.broken = {"2"}
    with pytest.raises(Refused, match="failed to load 'ads': ads 2 is damaged"):
        control.load("ads").result(PATIENCE_S)
    assert served(manager) == [("ads", "1")]
    assert ("ads", "2", Standing("UNAVAILABLE", "ads 2 is damaged")) in control.index()
    loads.broken = set()
    done(control.load("ads"))
    assert served(manager) == [("ads", "2")]
    assert control.index() == [("ads", "2", Standing("READY"))]


def test_the_same_version_with_other_files_is_swapped_in_one_step(tmp_path, manager, control):
    folder = put(tmp_path, "ads", "1")
    control.load_all()
    (old,) = manager.catalog
    catalogs = []
    manager.subscribe(catalogs.append)
    new = folder / "1" / "new"
    new.write_bytes(b"another")
    os.replace(new, folder / "1" / "model_default.pt")
    done(control.load("ads"))
    (model,) = manager.catalog
    assert model is not old
    assert model.version == "1"
    assert all(len(catalog) == 1 for catalog in catalogs)


def test_routes_follow_the_config(tmp_path, manager, control):
    folder = put(tmp_path, "ads", "1", "2", config='versions = "all"\n[labels]\ncanary = "2"\n')
    control.load_all()
    assert manager.catalog.find("ads", "canary").version == "2"
    (folder / "config.toml").write_text('versions = "all"\n[labels]\ncanary = "1"\n[split]\n"1" = 1\n')
    done(control.load("ads"))
    assert manager.catalog.find("ads", "canary").version == "1"
    assert manager.catalog.find("ads").version == "1"


def test_unloaded_models_are_gone_until_they_are_loaded(tmp_path, manager, control):
    put(tmp_path, "ads", "1")
    put(tmp_path, "feed", "1")
    control.load_all()
    done(control.unload("ads"))
    assert served(manager) == [("feed", "1")]
    assert control.index() == [("ads", "", Standing("UNAVAILABLE", "unloaded")), ("feed", "1", Standing("READY"))]
    done(control.load("ads"))
    assert served(manager) == [("feed", "1"), ("ads", "1")]
    assert control.index() == [("ads", "1", Standing("READY")), ("feed", "1", Standing("READY"))]


def test_names_that_are_not_there_are_refused_as_they_are(tmp_path, control):
    put(tmp_path, "ads", "1", config="versions = 3")
    for name in ("feed", "../etc", "", "ads/1"):
        with pytest.raises(ModelNotFound, match="the repository has no model"):
            control.load(name).result(PATIENCE_S)
        with pytest.raises(ModelNotFound, match="the repository has no model"):
            control.unload(name).result(PATIENCE_S)
    with pytest.raises(Refused, match=r"failed to load 'ads': .*config\.toml: versions: give"):
        control.load("ads").result(PATIENCE_S)


def test_clients_load_nothing_where_that_was_not_allowed(tmp_path, manager, loads):
    control = ModelControl(tmp_path, manager, loads)
    with pytest.raises(Refused, match="--model-control explicit"):
        control.load("ads")
    with pytest.raises(Refused, match="--model-control explicit"):
        control.unload("ads")


def test_a_load_shows_while_it_goes_on_and_many_wait_but_not_any_number(tmp_path, control, loads):
    put(tmp_path, "ads", "1")
    loads.hold = threading.Event()
    jobs = [control.load("ads")]
    while not any(standing.state == "LOADING" for _, _, standing in control.index()):
        assert not jobs[0].done()
    jobs += [control.load("ads") for _ in range(MOST_WAITING)]
    with pytest.raises(Refused, match="wait already; try again"):
        control.load("ads")
    loads.hold.set()
    for job in jobs:
        done(job)
    assert loads.loaded == [("ads", "1")]


def looks(control: ModelControl, times: int = 2) -> None:
    for _ in range(times):
        control.refresh()


def test_a_watched_folder_is_followed(tmp_path, manager, control, loads):
    put(tmp_path, "ads", "1")
    control.load_all()
    marked = put(tmp_path, "ads", "2") / "2" / "READY"
    marked.touch()
    control.refresh()
    assert served(manager) == [("ads", "1")]  # it may still grow
    control.refresh()
    assert served(manager) == [("ads", "2")]
    put(tmp_path, "feed", "1") / "1"
    (tmp_path / "feed" / "1" / "READY").touch()
    looks(control)
    assert served(manager) == [("ads", "2"), ("feed", "1")]
    shutil.rmtree(tmp_path / "ads")
    control.refresh()
    assert served(manager) == [("feed", "1")]
    looks(control, 3)
    assert loads.loaded == [("ads", "1"), ("ads", "2"), ("feed", "1")]


def test_half_a_copy_is_not_served_and_says_what_it_waits_for(tmp_path, manager, control):
    put(tmp_path, "ads", "1")
    control.load_all()
    put(tmp_path, "ads", "2")  # no archive, no manifest, and not marked
    looks(control, 3)
    assert served(manager) == [("ads", "1")]
    (waiting,) = [standing for _, version, standing in control.index() if version == "2"]
    assert "is not complete yet: when its copy is, put a file READY in it" in waiting.reason
    (tmp_path / "ads" / "2" / "READY").touch()
    control.refresh()
    assert served(manager) == [("ads", "2")]
    assert control.index() == [("ads", "2", Standing("READY"))]


def test_a_version_that_failed_is_tried_again_when_it_has_changed(tmp_path, manager, control, loads):
    put(tmp_path, "ads", "1")
    control.load_all()
    folder = put(tmp_path, "ads", "2") / "2"
    (folder / "READY").touch()
    loads.broken = {"2"}
    looks(control, 4)
    assert served(manager) == [("ads", "1")]
    loads.broken = set()
    looks(control, 2)
    assert served(manager) == [("ads", "1")]
    (folder / "model_default.pt").write_bytes(b"mended")
    looks(control, 2)
    assert served(manager) == [("ads", "2")]
