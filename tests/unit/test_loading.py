"""How a model is tried as it is loaded: whether its rows are independent, what warms it, what its forward raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from narsil.backends.fake import FakeBackend
from narsil.catalog import loading
from narsil.catalog.loading import failed_forward, load_model, warmup_of, warmup_payloads
from narsil.config import ServeSettings, load_settings
from narsil.dataflow import Batch, Floats
from narsil.engine.served_model import ServedModel
from narsil.errors import ArtifactError, ConfigError
from tests.support import SCHEMA


class Loaded(FakeBackend):
    """A backend that scores as it is told, and knows whether it has been closed."""

    def __init__(self, change: Callable[[Floats, Batch], Floats]) -> None:
        super().__init__(SCHEMA)
        self.change = change
        self.closed = False

    def run(self, batch):
        return {"default": self.change(super().run(batch)["default"], batch)}

    def share(self):
        return Loaded(self.change)

    def close(self):
        self.closed = True


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServedModel]:
    """Loads a backend as if an artifact had held it."""

    def loaded(backend: Loaded, **settings: Any) -> ServedModel:
        artifact = SimpleNamespace(name="mine", version="3", manifest=None)
        monkeypatch.setattr(loading, "open_artifact", lambda path, verify, dense_dim, ids: artifact)
        monkeypatch.setattr(loading, "load_backend", lambda *_, **__: backend)
        monkeypatch.setattr(loading, "Watch", lambda *_, **__: None)
        return load_model(ServeSettings(**{"model": "models/mine", "lanes": 2, **settings}))[0]

    return loaded


def centred(scores, batch):
    return scores - scores.mean()


def by_fours(scores, batch):
    return scores.reshape(-1, 4).ravel() - scores.mean()


def test_rows_that_stand_for_themselves_are_batched(load):
    model = load(Loaded(lambda scores, batch: scores))
    assert not model.whole
    assert len(model.backends) == 2


def test_rows_that_depend_on_each_other_are_refused_in_batch_mode_with_the_figures_and_the_way_out(load):
    backend = Loaded(centred)
    sentence = (
        r"models/mine: rows depend on each other: it scores default of row \d+ \S+ among 24 rows and \S+ beside "
        r"others. Serve it with --execution-mode worker, which scores each request by itself"
    )
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        load(backend)
    assert backend.closed


def test_worker_mode_serves_them_whole_and_says_so(load, caplog):
    model = load(Loaded(centred), execution_mode="worker")
    assert model.whole
    assert "rows depend on each other: it scores default of row" in caplog.text


@pytest.mark.parametrize("mode", ["batch", "worker"])
def test_what_a_forward_raises_on_any_rows_is_a_sentence(load, mode):
    def never(scores, batch):
        raise RuntimeError("quoted code\nno such operator")

    backend = Loaded(never)
    with pytest.raises(
        ArtifactError, match=r"^models/mine loads, but a forward of the fake backend fails on it \(Runt"
    ):
        load(backend, execution_mode=mode)
    assert backend.closed


def test_scores_by_chance_are_refused_in_either_mode(load):
    random = np.random.default_rng(0)
    backend = Loaded(lambda scores, batch: scores * (random.random(batch.rows) < 0.5).astype(np.float32))
    with pytest.raises(ArtifactError, match="otherwise each time"):
        load(backend, execution_mode="worker")
    assert backend.closed


def rows_of(model: ServedModel, most: int = 512) -> list[int]:
    return [features.rows for features in warmup_of(model, most)]


def test_a_model_that_is_served_whole_is_warmed_by_the_sizes_that_it_takes():
    every = [features.rows for features in warmup_payloads(SCHEMA, 512)]
    assert sorted(set(every)) == [1, 16, 128, 512]
    assert rows_of(ServedModel("m", "1", [Loaded(by_fours)], whole=True)) == [rows for rows in every if rows > 1]
    assert rows_of(ServedModel("m", "1", [Loaded(centred)], whole=True)) == every


def test_one_that_takes_no_usual_size_is_warmed_by_the_ones_it_was_tried_with():
    def by_fives(scores, batch):
        if batch.rows % 5:
            raise RuntimeError("no")
        return scores - scores.mean()

    assert set(rows_of(ServedModel("m", "1", [Loaded(by_fives)], whole=True))) == {5, 60}


class Padding(Loaded):
    """One that asks for batches of whole dozens."""

    name = "torch"

    def bucket(self, rows):
        return -(-rows // 12) * 12


@pytest.mark.parametrize(("change", "reloaded"), [(centred, True), (lambda scores, batch: scores, False)])
def test_kernels_that_compile_for_each_number_of_rows_are_not_for_requests_of_any_number(monkeypatch, change, reloaded):
    artifact = SimpleNamespace(name="mine", version="3", manifest=None, torchscript=None)
    made: list[tuple[bool, Loaded]] = []

    def load_backend(*_, tune_kernels, **__):
        made.append((tune_kernels, (Padding if tune_kernels else Loaded)(change)))
        return made[-1][1]

    monkeypatch.setattr(loading, "open_artifact", lambda path, verify, dense_dim, ids: artifact)
    monkeypatch.setattr(loading, "load_backend", load_backend)
    monkeypatch.setattr(loading, "Watch", lambda *_, **__: None)
    model, _ = load_model(load_settings({"model": "models/mine", "lanes": 1, "execution_mode": "worker"}))
    assert [tuned for tuned, _ in made] == ([True, False] if reloaded else [True])
    assert model.backends[0] is made[-1][1]
    assert made[0][1].closed == reloaded


def test_others_are_warmed_by_every_size_so_that_one_that_fails_ends_the_start():
    every = [features.rows for features in warmup_payloads(SCHEMA, 512)]
    assert rows_of(ServedModel("m", "1", [Loaded(by_fours)])) == every


def test_a_model_that_takes_no_size_fails_by_them():
    def never(scores, batch):
        raise RuntimeError("no")

    assert rows_of(ServedModel("m", "1", [Loaded(never)], whole=True))
    assert "(RuntimeError: no); package or compile it" in str(failed_forward(Path("m"), "fake", RuntimeError("no")))
