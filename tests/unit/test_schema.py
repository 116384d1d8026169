from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.errors import ArtifactError, ConfigError
from narsil.packaging.dlrm import DlrmConfig, check_weights, random_weights

names = st.text(min_size=1, max_size=24).filter(str.isprintable)
features = st.builds(
    Feature,
    name=names,
    table=names,
    rows=st.integers(1, 2**40),
    dim=st.integers(1, 4096),
    pooling=st.sampled_from(["sum", "mean"]),
)
schemas = st.builds(
    ModelSchema,
    dense_dim=st.integers(0, 10_000),
    features=st.lists(features, min_size=1, max_size=8, unique_by=lambda feature: feature.name).map(tuple),
    tasks=st.lists(names, min_size=2, max_size=2, unique=True).map(tuple),
    widths=st.sampled_from([(), (1, 1), (1, 5), (2**31 - 1, 3)]),
)
FEATURE: dict[str, Any] = {"name": "user", "table": "t_user", "rows": 10, "dim": 8}


@given(schemas)
def test_a_schema_survives_its_manifest(schema: ModelSchema) -> None:
    assert ModelSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be a positive integer"),
        ({"rows": True}, "rows must be a positive integer"),
        ({"rows": "10"}, "rows must be a positive integer"),
        ({"dim": -4}, "dim must be a positive integer"),
        ({"name": "a\nb"}, "is no printable text of 1 to 256 characters"),
        ({"name": ""}, "is no printable text of 1 to 256 characters"),
        ({"table": None}, "is no printable text of 1 to 256 characters"),
        ({"pooling": "max"}, "pooling must be sum or mean"),
        ({"colour": "red"}, "the schema is damaged"),
    ],
)
def test_a_damaged_feature_is_refused(change: dict[str, object], message: str) -> None:
    feature = {"name": "user", "table": "t_user", "rows": 10, "dim": 8} | change
    with pytest.raises(ArtifactError, match=message):
        ModelSchema.from_dict({"dense_dim": 1, "features": [feature], "tasks": ["default"]})


@pytest.mark.parametrize("data", [{}, {"dense_dim": 1}, {"dense_dim": 1, "features": [], "tasks": ["x"], "more": 1}])
def test_missing_and_unknown_keys_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="a schema has dense_dim, features and tasks"):
        ModelSchema.from_dict(data)


@pytest.mark.parametrize("widths", [[2], [1, 0], [1, True], [1, 2.0], [1, 2**31], [1, "2"], [1, None], "11", 2])
def test_widths_are_one_positive_integer_for_each_task(widths: object) -> None:
    with pytest.raises(ArtifactError, match="widths must be positive integers, one for each of 2 tasks"):
        ModelSchema.from_dict({"dense_dim": 1, "features": [FEATURE], "tasks": ["a", "b"], "widths": widths})


def test_a_manifest_tells_widths_only_where_one_is_not_1() -> None:
    unsaid = ("group", "least", "single")
    written = {key: value for key, value in asdict(Feature(**FEATURE)).items() if key not in unsaid}
    plain = {"dense_dim": 1, "features": [written], "tasks": ["a", "b"]}
    schema = ModelSchema.from_dict(plain)
    assert schema.widths == (1, 1)
    assert schema.to_dict() == plain
    assert ModelSchema.from_dict({**plain, "widths": [1, 1]}) == schema
    assert ModelSchema.from_dict({**plain, "widths": [3, 1]}).to_dict() == {**plain, "widths": [3, 1]}


@pytest.mark.parametrize("name", ["user id", "点击率", "p(click)|7d", "é", "x" * 256, "%s{}\\", "🛒"])
def test_features_tables_and_tasks_have_names_of_any_printable_text(name: str) -> None:
    schema = ModelSchema(1, (Feature(name, name, 10, 8),), (name,))
    assert ModelSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


@pytest.mark.parametrize("name", ["", "x" * 257, "a\x00", "a\x1b[31m", "a\u202eb", "a\ud800", "a\u2028b", 7, None])
def test_a_name_that_would_upset_a_terminal_or_a_wire_is_refused(name: Any) -> None:
    with pytest.raises(ArtifactError, match="printable text of 1 to 256 characters"):
        Feature(name, "t", 10, 8)
    with pytest.raises(ArtifactError, match="printable texts of 1 to 256 characters"):
        ModelSchema(1, (Feature("a", "t", 10, 8),), (name,))


def test_tasks_are_picked_with_their_widths_in_the_order_given() -> None:
    schema = ModelSchema(1, (Feature("a", "t", 10, 8),), ("click", "buy", "scroll"), (1, 3, 2))
    picked = schema.picking(["scroll", "buy"])
    assert (picked.tasks, picked.widths, picked.features) == (("scroll", "buy"), (2, 3), schema.features)
    with pytest.raises(ConfigError, match="no task 'sell'; it has click, buy, scroll"):
        schema.picking(["buy", "sell"])


def test_two_features_cannot_share_a_name() -> None:
    twin = Feature("user", "t", 10, 8)
    with pytest.raises(ArtifactError, match="share one name"):
        ModelSchema(1, (twin, twin))


def test_ids_need_int64_only_where_a_table_does() -> None:
    assert ModelSchema(1, (Feature("a", "t", 2**31, 8),)).id_dtype == np.int32
    assert ModelSchema(1, (Feature("a", "t", 2**31 + 1, 8),)).id_dtype == np.int64


def test_a_dlrm_has_one_feature_per_table_in_order() -> None:
    schema = DlrmConfig(tables=3, rows=(5, 6, 7)).schema
    assert [(feature.name, feature.table, feature.rows) for feature in schema.features] == [
        ("cat_0", "t_cat_0", 5),
        ("cat_1", "t_cat_1", 6),
        ("cat_2", "t_cat_2", 7),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 32}, "dense_arch must end in dim, 32"),
        ({"dim": 30, "dense_arch": (30,)}, "multiple of 4"),
        ({"over_arch": (16, 2)}, "over_arch must end in 1"),
        ({"over_arch": (1,)}, "over_arch takes at least 2"),
        ({"dense_arch": ()}, "dense_arch takes at least 1"),
        ({"rows": (1, 2)}, "rows has 2 entries for 26 tables"),
        ({"rows": 0}, "rows must be a whole number"),
        ({"tables": 0}, "tables must be a whole number"),
        ({"pooling": "max"}, "pooling must be sum or mean"),
        ({"tables": 2, "feature_names": ("a", "a")}, "share one name"),
        ({"tables": 1, "table_names": ("a.b",)}, "has a dot"),
        ({"tables": 1, "feature_names": ("a\tb",)}, "is no printable text"),
    ],
)
def test_an_architecture_that_does_not_fit_together_names_its_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DlrmConfig(**options)  # type: ignore[arg-type]


def test_random_weights_are_seeded_and_every_row_differs(small_config: DlrmConfig) -> None:
    first, again = random_weights(small_config), random_weights(small_config)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for name, array in first.items():
        if "embedding_bags" in name:
            assert len(np.unique(array, axis=0)) == len(array)
    check_weights(small_config, first)


def test_weights_are_held_against_the_architecture(small_config: DlrmConfig, small_weights: dict) -> None:
    bias = "over_arch.model.1.bias"
    rest = {name: array for name, array in small_weights.items() if name != bias}
    with pytest.raises(ArtifactError, match=r"lacks over_arch\.model\.1\.bias"):
        check_weights(small_config, rest)
    with pytest.raises(ArtifactError, match="holds attention, which"):
        check_weights(small_config, {**small_weights, "attention": np.zeros(1, np.float32)})
    with pytest.raises(ArtifactError, match=r"has shape \(2,\); the architecture needs \(1,\)"):
        check_weights(small_config, {**rest, bias: np.zeros(2, np.float32)})
    wide: Any = np.zeros(1, np.float64)
    with pytest.raises(ArtifactError, match="is float64"):
        check_weights(small_config, {**rest, bias: wide})
    with pytest.raises(ArtifactError, match=r"row 0 of over_arch\.model\.1\.bias is NaN or infinite"):
        check_weights(small_config, {**rest, bias: np.full(1, np.inf, np.float32)})
