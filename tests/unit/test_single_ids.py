"""Features of one id a row: what a request must hold, what others are told of them, what is drawn for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from narsil.artifacts.rows import extreme, random_batch, usual
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.bench.workload import Workload
from narsil.catalog.loading import warmup_payloads
from narsil.client import read_model
from narsil.dataflow import Jagged, RequestLimits
from narsil.engine.independence import probe_rows
from narsil.errors import ArtifactError, InvalidRequest
from narsil.transports import validate
from narsil.transports.codec import narsil_v1
from narsil.transports.native import _native_model

SCHEMA = ModelSchema(
    dense_dim=1,
    features=(Feature("bag", "t_bag", rows=10, dim=4), Feature("one", "t_one", rows=9, dim=4, single=True)),
)


def held(lengths: list[list[int]], *, key_major: bool) -> Any:
    counts = np.array(lengths, np.int32)
    given = counts if key_major else counts.T.copy()
    return validate.jagged(np.zeros(counts.sum(), np.int32), given, SCHEMA, "ids", key_major=key_major)


@pytest.mark.parametrize("key_major", [True, False])
def test_exactly_one_id_is_let_in(key_major: bool) -> None:
    assert held([[0, 3], [1, 1]], key_major=key_major).count == 5
    for count in (0, 2):
        with pytest.raises(InvalidRequest, match=f"feature one, row 1: {count} ids, where the model takes exactly one"):
            held([[0, 3], [1, count]], key_major=key_major)


def test_other_features_positions_are_their_own() -> None:
    lengths = np.array([[1], [2]], np.int32)
    with pytest.raises(InvalidRequest, match="feature one, row 0: 2 ids"):
        validate.check_bags(np.zeros(3, np.int32), lengths[::-1], np.array([1, 0]), SCHEMA, "ids", key_major=True)
    validate.check_bags(np.zeros(3, np.int32), lengths, np.array([1, 0]), SCHEMA, "ids", key_major=True)


def test_clients_are_told() -> None:
    body = narsil_v1.encode_model("m", "1", "torch", SCHEMA, RequestLimits())
    assert read_model(body).schema == SCHEMA


def test_a_manifest_says_it_where_it_says_something() -> None:
    plain = SCHEMA.to_dict()
    assert [feature.get("single") for feature in plain["features"]] == [None, True]
    assert ModelSchema.from_dict(plain) == SCHEMA
    plain["features"][1]["single"] = 1
    with pytest.raises(ArtifactError, match="feature one: single must be true or false"):
        ModelSchema.from_dict(plain)


def test_native_code_decodes_no_requests_for_them() -> None:
    for schema, rows in ((SCHEMA, 0), (ModelSchema(1, SCHEMA.features[:1]), 7)):
        model = SimpleNamespace(name="m", version="1", schema=schema, limits=RequestLimits(max_rows=7))
        told = _native_model(cast(Any, lambda model, **told: told), cast(Any, model))
        assert cast(Any, told)["max_rows"] == rows


def test_what_is_drawn_has_one() -> None:
    random = np.random.default_rng(0)
    batches = [random_batch(SCHEMA, 5, 4, random), *usual(SCHEMA, random), *extreme(SCHEMA, random)]
    lengths = [batch.lengths.reshape(2, -1) for batch in batches]
    parts = [
        *probe_rows(SCHEMA),
        *warmup_payloads(SCHEMA, 64),
        *Workload(SCHEMA, rows=5, bodies=3, max_ids=4).payloads(),
    ]
    lengths += [part.sparse.lengths for part in parts if isinstance(part.sparse, Jagged)]
    assert all((own[1] == 1).all() for own in lengths)
    assert any((own[0] != 1).any() for own in lengths)
    assert all(batch.lengths.sum() == len(batch.values) for batch in batches)
