"""A catalog says which model a request means; a manager warms, swaps, drains and frees them."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from narsil.backends.fake import FakeBackend, FakeBehaviour
from narsil.catalog.catalog import EMPTY, Catalog, Routes
from narsil.catalog.manager import ModelManager
from narsil.engine.served_model import ModelState, ServedModel
from narsil.errors import ConfigError, ModelNotFound, NoModel
from tests.support import (
    PATIENCE_S,
    SCHEMA,
    AnEngine,
    engine_with,
    fake_model,
    one_hot,
    request,
    scores_alone,
    wait_until,
)


def test_without_a_name_the_first_model_is_meant_and_without_a_version_the_newest():
    a1, b1, a2 = fake_model(name="a"), fake_model(name="b"), fake_model(name="a", version="2")
    catalog = Catalog([a1, b1, a2])
    assert catalog.find() is a2
    assert catalog.find("a", "1") is a1
    assert catalog.find("", "1") is a1
    assert catalog.find("b") is b1
    assert catalog.by_preference() == [a2, b1, a1]


def test_what_is_not_served_is_refused_with_what_is():
    catalog = Catalog([fake_model(name="ads"), fake_model(name="feed"), fake_model(name="feed", version="2")])
    with pytest.raises(ModelNotFound, match="'video' is not served here; this server serves 'ads', 'feed'"):
        catalog.find("video")
    with pytest.raises(ModelNotFound, match="version '7' of feed is not served here; '1', '2' are"):
        catalog.find("feed", "7")
    with pytest.raises(ModelNotFound, match="version '7' of ads is not served here; '1' is"):
        catalog.find("", "7")
    with pytest.raises(NoModel, match="serves no model"):
        EMPTY.find()
    many = Catalog([fake_model(name=f"m{number}") for number in range(9)])
    with pytest.raises(ModelNotFound, match="'m4' and 4 others"):
        many.find("x")


def test_one_name_and_version_is_one_model():
    with pytest.raises(ConfigError, match="version '1' of fake is served already"):
        Catalog([fake_model()]).adding(fake_model())


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan")])
def test_a_model_s_share_of_the_lanes_is_above_zero(share):
    with pytest.raises(ConfigError, match=f"its share of the lanes must be above 0, not {share}"):
        fake_model(share=share)


class Closing(FakeBackend):
    """Says when it is closed."""

    def __init__(self, closed: list[str], name: str) -> None:
        super().__init__(SCHEMA)
        self.closed, self.label = closed, name

    def close(self) -> None:
        self.closed.append(self.label)


def served(engine: AnEngine) -> ModelManager:
    manager = ModelManager(engine)
    manager.subscribe(lambda catalog: None)
    return manager


def test_a_model_is_warm_on_every_lane_before_anybody_can_name_it():
    behaviour, seen = FakeBehaviour(), []
    with engine_with(lanes=2) as engine:
        manager = ModelManager(engine)
        manager.subscribe(lambda catalog: seen.append((len(catalog), list(behaviour.forwards))))
        model = fake_model(behaviour, lanes=2, name="new")
        states = [model.state]
        manager.add(model, [one_hot(3), one_hot(5)])
        assert [*states, model.state] == [ModelState.LOADING, ModelState.READY]
    assert seen[0] == (0, [])
    assert seen[1][0] == 1
    assert sorted(seen[1][1]) == [3, 3, 5, 5]


def test_a_model_whose_warmup_fails_is_never_named():
    with engine_with() as engine:
        manager = served(engine)
        broken = fake_model(FakeBehaviour(fail_if=lambda batch: True), name="broken")
        with pytest.raises(RuntimeError, match="told to fail"):
            manager.add(broken, [one_hot(1)])
        assert len(manager.catalog) == 0


def test_warming_one_model_leaves_the_others_served():
    warming = FakeBehaviour(hold=threading.Event())
    with engine_with(lanes=2) as engine:
        manager = served(engine)
        adding = threading.Thread(target=manager.add, args=(fake_model(warming, lanes=2, name="new"), [one_hot(1)] * 3))
        adding.start()
        wait_until(lambda: bool(warming.forwards))
        made = request(model=engine.model)
        engine.submit(made)
        warming.hold.set()
        assert made.reply.wait().error is None
        adding.join(PATIENCE_S)
        assert len(manager.catalog) == 1


def test_a_removed_model_answers_what_was_decoded_for_it_and_is_closed_with_the_last_of_it():
    closed: list[str] = []
    behaviour = FakeBehaviour(hold=threading.Event())
    with engine_with() as engine:
        manager = served(engine)
        backend = Closing(closed, "old")
        backend.behaviour = behaviour
        model = ServedModel("old", "1", [backend])
        manager.add(model)
        running, late = (request(2, model=model, features=one_hot(2, seed=seed)) for seed in (1, 2))
        engine.submit(running)
        wait_until(lambda: behaviour.forwards == [2])
        manager.remove(model)
        with pytest.raises(NoModel):
            manager.catalog.find("old")
        engine.submit(late)  # decoded before the swap, submitted after it
        behaviour.hold.set()
        for made in (running, late):
            np.testing.assert_array_equal(made.reply.wait().scores["default"], scores_alone(made.features))
        assert closed == []
        gone = weakref.ref(model)
        del model, running, late, made, backend
        wait_until(lambda: gc.collect() >= 0 and gone() is None)
        assert closed == ["old"]


def test_lanes_that_wait_hold_on_to_no_model():
    with engine_with(lanes=2) as engine:
        manager = served(engine)
        model = fake_model(lanes=2, name="old")
        manager.add(model, [one_hot(1)])
        made = [request(model=model) for _ in range(20)]
        for one in made:
            engine.submit(one)
        for one in made:
            one.reply.wait()
        manager.remove(model)
        gone = weakref.ref(model)
        del model, made, one
        wait_until(lambda: gone() is None)  # by reference counting alone: no collection is needed


def test_removing_a_model_that_is_not_served_changes_nothing():
    with engine_with() as engine:
        manager = served(engine)
        manager.add(fake_model(name="a"))
        manager.remove(fake_model(name="a"))
        assert len(manager.catalog) == 1


def test_a_model_can_be_removed_while_another_is_warmed():
    warming = FakeBehaviour(hold=threading.Event())
    with engine_with(lanes=2) as engine:
        manager = served(engine)
        old = fake_model(lanes=2, name="old")
        manager.add(old)
        adding = threading.Thread(target=manager.add, args=(fake_model(warming, lanes=2, name="new"), [one_hot(1)]))
        adding.start()
        wait_until(lambda: bool(warming.forwards))
        manager.remove(old)
        assert len(manager.catalog) == 0
        warming.hold.set()
        adding.join(PATIENCE_S)
        assert [model.name for model in manager.catalog] == ["new"]


def test_where_somebody_cannot_be_told_of_a_model_nothing_has_changed():
    seen: list[int] = []

    def failing(catalog: Catalog) -> None:
        if len(catalog) > 1:
            raise OSError("no descriptors left")

    with engine_with() as engine:
        manager = served(engine)
        manager.add(fake_model(name="a"))
        manager.subscribe(lambda catalog: seen.append(len(catalog)))
        manager.subscribe(failing)
        model = fake_model(name="b")
        with pytest.raises(OSError, match="no descriptors left"):
            manager.add(model)
        assert [one.name for one in manager.catalog] == ["a"]
        assert seen == [1, 2, 1]
        assert model.state is ModelState.LOADING
        gone = weakref.ref(model)
        del model
        wait_until(lambda: gc.collect() >= 0 and gone() is None)


def test_a_lane_that_cannot_begin_fails_the_models_that_need_it():
    def broken(lane: int) -> None:
        raise OSError(f"lane {lane} has no processor")

    engine = AnEngine(1, thread_setup=broken)
    engine.start()
    for name in ("a", "b"):
        with pytest.raises(OSError, match="has no processor"):
            engine.add(fake_model(name=name), [one_hot(1)])


def versions(name: str = "ads", count: int = 3) -> list[ServedModel]:
    return [fake_model(name=name, version=str(number)) for number in range(1, count + 1)]


def test_a_label_stands_for_a_version_and_a_version_of_that_name_comes_first():
    one, two, _ = models = versions()
    catalog = Catalog(models, {"ads": Routes({"stable": "1", "2": "1", "gone": "9"})})
    assert catalog.find("ads", "stable") is catalog.route("", "stable") is one
    assert catalog.find("ads", "2") is two
    with pytest.raises(
        ModelNotFound, match="version 'gone' of ads is not served here; '1', '2', '3', 'stable', '2' are"
    ):
        catalog.find("ads", "gone")


def test_requests_without_a_version_are_dealt_out_by_shares():
    one, two, three = models = versions()
    catalog = Catalog(models, {"ads": Routes({"canary": "2"}, {"1": 9.0, "canary": 1.0})})
    drawn = [catalog.route("ads") for _ in range(1000)]
    assert three not in drawn
    assert abs(drawn.count(two) - 100) <= 3
    for start in range(0, 1000, 50):
        assert 3 <= drawn[start : start + 50].count(two) <= 7
    assert catalog.route("ads", "3") is three
    assert catalog.find("ads") is one  # who asks about the model, asks about one


def test_the_share_of_what_is_not_served_goes_to_the_others():
    one, two, _ = models = versions()
    catalog = Catalog(models, {"ads": Routes({}, {"1": 1.0, "9": 99.0})})
    assert {catalog.route("ads") for _ in range(100)} == {one}
    nothing = Catalog(models[:2], {"ads": Routes({}, {"9": 1.0})})
    assert nothing.route("ads") is nothing.find() is two


def test_routes_outlive_the_models_that_come_and_go():
    one, two, three = versions()
    catalog = Catalog([one]).routing("ads", Routes({}, {"1": 1.0})).adding(two).adding(three).without(two)
    assert {catalog.route() for _ in range(10)} == {one}
    assert catalog.routes() == [("ads", "", [(one, 1.0)])]


def test_a_model_takes_the_place_of_another_of_its_name_and_version():
    engine = engine_with()
    with engine as made:
        manager = served(made)
        old, new = fake_model(), fake_model()
        manager.add(old)
        manager.add(new, replacing=old)
        assert list(manager.catalog) == [new]
        assert (old.state, new.state) == (ModelState.DRAINING, ModelState.READY)
        manager.remove(new)
        manager.add(fake_model(), replacing=new)  # which has gone meanwhile
        assert len(manager.catalog) == 1
