"""A model whose mapped files are written to goes out of service; one whose files are replaced is served on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from narsil.artifacts.watching import Finding, Watch
from narsil.catalog.guard import FileGuard
from narsil.catalog.manager import ModelManager
from narsil.engine.served_model import ModelState, ServedModel
from tests.support import PATIENCE_S, engine_with, fake_model, wait_until


class FakeWatch:
    """Finds what a test says."""

    def __init__(self, finding: Finding | None = None) -> None:
        self.finding = finding
        self.looks = 0

    def look(self) -> Finding | None:
        self.looks += 1
        return self.finding


@contextmanager
def guarded(watch: FakeWatch, interval: float = 60.0) -> Iterator[tuple[FileGuard, ModelManager, list[ServedModel]]]:
    with engine_with() as engine:
        manager, withdrawn = ModelManager(engine), []
        model = fake_model(name="ranker")
        manager.add(model)
        guard = FileGuard(manager, withdrawn.append, interval)
        guard.watch(model, cast(Watch, watch))
        guard.start()
        try:
            yield guard, manager, withdrawn
        finally:
            guard.stop()


def test_a_harmful_finding_takes_the_model_out_of_service_and_the_log_says_why(caplog):
    watch = FakeWatch(Finding("tables.bin has been overwritten in place", True))
    with guarded(watch) as (guard, manager, withdrawn):
        guard.look()
        assert len(manager.catalog) == 0
        assert [model.state for model in withdrawn] == [ModelState.DRAINING]
    assert "model ranker is out of service: tables.bin has been overwritten" in caplog.text


def test_a_harmless_finding_is_told_once_and_the_model_is_served_on(caplog):
    watch = FakeWatch(Finding("model_default.pt has been replaced", False))
    with guarded(watch) as (guard, manager, withdrawn):
        guard.look()
        guard.look()
        assert len(manager.catalog) == 1
        assert withdrawn == []
    assert caplog.text.count("has been replaced") == 1


def test_it_looks_again_and_again_by_itself_and_survives_a_look_that_fails(caplog):
    class Failing(FakeWatch):
        def look(self) -> Finding | None:
            super().look()
            raise RuntimeError("no such device")

    watch = Failing()
    with guarded(watch, interval=0.001):
        wait_until(lambda: watch.looks > 3)
    assert "could not be looked at" in caplog.text


def test_every_model_over_the_same_files_goes_out_of_service():
    watch = FakeWatch(Finding("tables.bin has been overwritten in place", True))
    with guarded(watch) as (guard, manager, withdrawn):
        newer = fake_model(name="ranker", version="2")
        manager.add(newer)
        guard.watch(newer, cast(Watch, watch))
        guard.look()
        assert len(manager.catalog) == 0
        assert len(withdrawn) == 2


def test_stopping_does_not_wait_for_a_look_that_takes_long():
    class Slow(FakeWatch):
        def __init__(self) -> None:
            super().__init__()
            self.looking, self.go = threading.Event(), threading.Event()

        def look(self) -> Finding | None:
            self.looking.set()
            assert self.go.wait(PATIENCE_S)
            return Finding("tables.bin has been overwritten in place", True)

    watch = Slow()
    with guarded(watch, interval=0.001) as (guard, manager, withdrawn):
        assert watch.looking.wait(PATIENCE_S)
        guard.stop()
        watch.go.set()
        assert withdrawn == []  # and what it finds then changes nothing any more
        assert len(manager.catalog) == 1


@pytest.mark.parametrize("started", [True, False])
def test_it_ends_when_told(started):
    with engine_with() as engine:
        guard = FileGuard(ModelManager(engine), lambda model: None)
        if started:
            guard.start()
        guard.stop()
