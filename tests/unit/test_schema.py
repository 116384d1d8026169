from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.errors import ArtifactError, ConfigError
from narsil.packaging.dlrm import DlrmConfig, check_weights, random_weights

names = st.from_regex(r"[A-Za-z0-9_.\-/:]{1,24}", fullmatch=True)
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
)


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
        ({"name": "a b"}, "is not made of letters"),
        ({"name": ""}, "is not made of letters"),
        ({"table": None}, "is not made of letters"),
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
        ({"tables": 1, "feature_names": ("a b",)}, "is not made of letters"),
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
