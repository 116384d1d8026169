"""Models with several groups of id lists and several matrices of numbers: TorchRec's wire and Narsil's are scored alike
by both transports, alone and fused, and what is wrong with one group is refused by its name."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.fake import FakeBehaviour
from narsil.client import build_request
from narsil.dataflow import Features
from narsil.transports.codec import narsil_v1, predictor
from tests.conformance.serving import scores_in, serving
from tests.messages import narsil_pb2, predictor_pb2
from tests.support import PATIENCE_S, TRANSPORTS, jagged, scores_alone, unary, wait_until

SEVERAL_LISTS = ModelSchema(
    2,
    (
        Feature("user", "t_user", 50, 8, group="id_list_features"),
        Feature("item", "t_item", 7, 8, group="id_list_features"),
        Feature("shop", "t_shop", 20, 8, group="unary_features"),
    ),
)
EMBEDDINGS = ModelSchema(
    5,
    (Feature("user", "t_user", 50, 8, group="id_list_features"),),
    matrices=(("float_features", 2), ("embedding_features", 3)),
)
WEIGHTED_AND_UNARY = ModelSchema(
    3,
    (
        Feature("user", "t_user", 50, 8, group="id_list_features"),
        Feature("seen", "t_seen", 90, 8, weighted=True, group="id_score_list_features"),
        Feature("tags", "t_tags", 1000, 8, weighted=True, group="id_score_list_features"),
        Feature("shop", "t_shop", 20, 8, group="unary_features"),
    ),
    matrices=(("embedding_features", 3),),
)
SCHEMAS = {
    "several id lists": SEVERAL_LISTS,
    "embedding_features": EMBEDDINGS,
    "weighted beside unary": WEIGHTED_AND_UNARY,
}


@pytest.fixture(params=TRANSPORTS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=SCHEMAS)
def schema(request: pytest.FixtureRequest) -> ModelSchema:
    return SCHEMAS[request.param]


def rows_of(schema: ModelSchema, rows: int, seed: int) -> Features:
    """Random rows with bags of 0 to 4 ids; the weighted features' ids have weights, the others' are ones."""
    plain = jagged(rows, seed, schema)
    if not schema.weighted:
        return plain
    weighted = np.repeat([feature.weighted for feature in schema.features], plain.sparse.lengths.sum(axis=1))
    drawn = np.random.default_rng(seed).normal(1, 1, len(weighted)).astype(np.float32)
    return replace(plain, sparse=replace(plain.sparse, weights=np.where(weighted, drawn, np.float32(1))))


def torchrec_message(schema: ModelSchema, features: Features) -> Any:
    """As a client writes it that puts each feature into its group with TorchRec's own classes."""
    sparse: Any = features.sparse
    message = predictor_pb2.PredictionRequest(batch_size=features.rows)
    first = 0
    for name, width in schema.matrices or (("float_features", schema.dense_dim),):
        group = getattr(message, name)
        group.num_features = width
        group.values = np.ascontiguousarray(features.dense[:, first : first + width]).tobytes()
        first += width
    ends = np.cumsum([0, *sparse.lengths.sum(axis=1)])
    for name, positions in schema.groups:
        group, ids = getattr(message, name), slice(ends[positions.start], ends[positions.stop])
        group.num_features = positions.stop - positions.start
        group.lengths = np.ascontiguousarray(sparse.lengths[positions]).tobytes()
        group.values = sparse.values[ids].tobytes()
        if schema.features[positions.start].weighted:
            group.weights = sparse.weights[ids].tobytes()
    return message


def narsil_bytes(schema: ModelSchema, features: Features) -> bytes:
    """By rows, as Narsil's wire has them."""
    sparse: Any = features.sparse
    bags = zip(sparse.starts.T.flat, sparse.lengths.T.flat, strict=True)
    order = np.array([at for start, length in bags for at in range(start, start + length)], np.int64)
    weights = sparse.weights[order] if schema.weighted else None
    return build_request(features.dense, sparse.values[order], np.ascontiguousarray(sparse.lengths.T), weights=weights)


def ask(channel: grpc.Channel, method: str, bodies: Sequence[bytes]) -> list[Any]:
    return [unary(channel, method).future(body, timeout=PATIENCE_S) for body in bodies]


def test_both_wires_are_scored_alike_alone_and_fused(kind: str, schema: ModelSchema) -> None:
    behaviour = FakeBehaviour(hold=threading.Event())
    load = [rows_of(schema, 1 + number % 9, number) for number in range(40)]
    with serving(kind, behaviour, schema=schema) as (address, engine), grpc.insecure_channel(address) as channel:
        theirs = ask(channel, predictor.METHOD, [torchrec_message(schema, one).SerializeToString() for one in load])
        ours = ask(channel, narsil_v1.METHOD, [narsil_bytes(schema, one) for one in load])
        wait_until(lambda: engine.statistics().queued + engine.statistics().running == 2 * len(load))
        assert behaviour.hold is not None
        behaviour.hold.set()
        for features, torchrec, narsil in zip(load, theirs, ours, strict=True):
            expected = scores_alone(features, schema)
            np.testing.assert_array_equal(scores_in(torchrec.result()), expected)
            (scores,) = narsil_pb2.PredictResponse.FromString(narsil.result()).scores
            np.testing.assert_array_equal(np.frombuffer(scores.values, np.float32), expected)
    assert max(behaviour.forwards) > 9, "none were fused"
    assert len({float(score) for one in load for score in scores_alone(one, schema)}) > len(load)


@pytest.mark.parametrize(
    ("schema", "group", "field", "change", "why"),
    [
        (SEVERAL_LISTS, "unary_features", "num_features", 2, "unary_features.num_features is 2; the model takes 1"),
        (SEVERAL_LISTS, "unary_features", "lengths", bytes(4), "unary_features.lengths: 4 bytes for 1 features x 2"),
        (
            EMBEDDINGS,
            "embedding_features",
            "num_features",
            4,
            "embedding_features.num_features is 4; the model takes 3",
        ),
        (EMBEDDINGS, "embedding_features", "values", bytes(8), "embedding_features.values: 8 bytes for 2 rows"),
        (
            WEIGHTED_AND_UNARY,
            "id_score_list_features",
            "weights",
            bytes(400),
            "id_score_list_features: 100 weights",
        ),
        (
            WEIGHTED_AND_UNARY,
            "unary_features",
            "weights",
            bytes(400),
            "unary_features: 100 weights given, but",
        ),
    ],
)
def test_what_is_wrong_with_a_group_is_told_by_its_name_and_harms_no_other_request(
    kind: str, schema: ModelSchema, group: str, field: str, change: Any, why: str
) -> None:
    features = rows_of(schema, 2, 1)
    good, bad = torchrec_message(schema, features), torchrec_message(schema, features)
    setattr(getattr(bad, group), field, change)
    with serving(kind, schema=schema) as (address, _), grpc.insecure_channel(address) as channel:
        refused, served = ask(channel, predictor.METHOD, [bad.SerializeToString(), good.SerializeToString()])
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert why in refused.details()
        np.testing.assert_array_equal(scores_in(served.result()), scores_alone(features, schema))
