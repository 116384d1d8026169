"""Requests for models with several groups of id lists or several matrices of numbers, and for models without ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.bench.workload import Workload
from narsil.dataflow import Jagged, RequestLimits
from narsil.engine.collate import Collator
from narsil.errors import ArtifactError, InvalidRequest
from narsil.transports.codec import predictor
from tests import messages

LIMITS = RequestLimits()
SCHEMA = ModelSchema(
    3,
    (
        Feature("a", "ta", 10, 4, group="id_list_features"),
        Feature("b", "tb", 20, 4, group="id_list_features"),
        Feature("w", "tw", 30, 4, weighted=True, group="id_score_list_features"),
    ),
    matrices=(("float_features", 1), ("embedding_features", 2)),
)


def floats(numbers: list[float]) -> bytes:
    return np.array(numbers, np.float32).tobytes()


def ints(numbers: list[int]) -> bytes:
    return np.array(numbers, np.int32).tobytes()


def request(**changes):
    """Two rows."""
    made = messages.predictor_pb2.PredictionRequest(batch_size=2)
    made.float_features.num_features, made.float_features.values = 1, floats([1, 2])
    made.embedding_features.num_features = 2
    made.embedding_features.values = floats([3, 4, 5, 6])
    lists, scored = made.id_list_features, made.id_score_list_features
    lists.num_features, lists.lengths = 2, ints([1, 0, 2, 1])
    lists.values = ints([7, 11, 12, 13])
    scored.num_features, scored.lengths = 1, ints([1, 2])
    scored.values, scored.weights = ints([21, 22, 23]), floats([0.5, 2, -1])
    for path, value in changes.items():
        group, name = path.split("__")
        setattr(getattr(made, group), name, value)
    return made


def test_each_group_s_features_and_columns_stand_where_the_schema_has_them() -> None:
    batch = Collator(SCHEMA).collate([predictor.decode(request().SerializeToString(), SCHEMA, LIMITS)])
    assert batch.dense.tolist() == [[1, 3, 4], [2, 5, 6]]
    assert batch.lengths.tolist() == [1, 0, 2, 1, 1, 2]
    assert batch.values.tolist() == [7, 11, 12, 13, 21, 22, 23]
    assert batch.weights.tolist() == [1, 1, 1, 1, 0.5, 2, -1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"embedding_features__num_features": 3}, "embedding_features.num_features is 3; the model takes 2 columns"),
        ({"embedding_features__values": bytes(12)}, "embedding_features.values: 12 bytes for 2 rows; .* 2 float32"),
        ({"embedding_features__values": floats([0, 0, np.nan, 0])}, "row 1, column 0 is nan"),
        ({"id_score_list_features__num_features": 0}, "id_score_list_features.num_features is 0; .* 1 features"),
        ({"id_score_list_features__weights": bytes(8)}, "id_score_list_features: 2 weights for 3 ids"),
        ({"id_score_list_features__weights": floats([0, np.nan, 0])}, "weight 1 is nan"),
        ({"id_score_list_features__values": ints([21, 30, 0])}, "feature w, row 1: id 30 is outside"),
        ({"id_list_features__weights": bytes(16)}, "id_list_features: 4 weights given, but no table"),
        ({"id_list_features__lengths": bytes(8)}, "id_list_features.lengths: 8 bytes for 2 features x 2 rows"),
    ],
)
def test_a_bad_group_is_refused_by_its_name(changes, why) -> None:
    with pytest.raises(InvalidRequest, match=why):
        predictor.decode(request(**changes).SerializeToString(), SCHEMA, LIMITS)


def test_a_group_that_no_feature_is_in_is_passed_over_and_told() -> None:
    made = request(unary_features__num_features=1, unary_features__values=bytes(8))
    read = predictor.read(made.SerializeToString())
    read.features(SCHEMA, LIMITS)
    assert read.passed_over() == ("unary_features",)


def test_without_batch_size_the_first_matrix_tells_it() -> None:
    made = request()
    made.batch_size = 0
    assert predictor.decode(made.SerializeToString(), SCHEMA, LIMITS).rows == 2


def test_a_weight_of_a_feature_that_takes_none_must_be_1() -> None:
    from narsil.client import build_request
    from narsil.transports.codec import narsil_v1

    def body(weight):
        return build_request(np.zeros((1, 3)), [0, 0, 0], [[1, 1, 1]], weights=[1, weight, 0.5])

    taken = narsil_v1.decode(body(1), SCHEMA, LIMITS).sparse
    assert isinstance(taken, Jagged)
    assert taken.weights is not None
    assert taken.weights.tolist() == [1, 1, 0.5]
    with pytest.raises(InvalidRequest, match=r"feature b, row 0: weight 2\.0, but the feature takes no weights"):
        narsil_v1.decode(body(2), SCHEMA, LIMITS)


@given(st.lists(st.sampled_from(["g", "id_list_features", "unary_features", "id_score_list_features"]), unique=True))
def test_what_the_workload_writes_is_read_back_as_it_was(groups) -> None:
    features = tuple(
        Feature(f"{group}{at}", "t", 50, 4, weighted=group == "g", group=group) for group in groups for at in range(2)
    )
    schema = replace(SCHEMA, features=features)
    load = Workload(schema, rows=5, bodies=1, max_ids=3)
    (sent,), (body,) = load.payloads(), load.serialized("predictor")
    found = [Collator(schema).collate([part]) for part in (sent, predictor.decode(body, schema, LIMITS))]
    assert isinstance(sent.sparse, Jagged)
    for name in ("dense", "lengths", "values"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name))


def test_a_model_without_ids_reads_its_columns() -> None:
    schema = ModelSchema(2, ())
    made = messages.predictor_pb2.PredictionRequest(batch_size=1)
    made.float_features.num_features, made.float_features.values = 2, floats([1, 2])
    batch = Collator(schema).collate([predictor.decode(made.SerializeToString(), schema, LIMITS)])
    assert (batch.dense.tolist(), batch.lengths.size, batch.values.size) == ([[1, 2]], 0, 0)


def test_a_schema_says_its_groups_and_matrices_and_others_say_nothing_of_them() -> None:
    assert ModelSchema.from_dict(SCHEMA.to_dict()) == SCHEMA
    plain = ModelSchema(1, (Feature("a", "t", 10, 4),)).to_dict()
    assert "matrices" not in plain
    assert "group" not in plain["features"][0]


def test_groups_in_pieces_and_matrices_of_other_widths_are_refused() -> None:
    a, b, w = SCHEMA.features
    with pytest.raises(ArtifactError, match="must follow each other"):
        replace(SCHEMA, features=(a, w, b))
    with pytest.raises(ArtifactError, match="do not add up to 4"):
        replace(SCHEMA, dense_dim=4)


def test_inspect_shows_which_matrix_and_group_is_whose(capsys) -> None:
    from narsil.artifacts.artifact import Artifact
    from narsil.cli.inspect import _print

    artifact = Artifact(Path("m"), "m", "1", SCHEMA, "cpu")
    _print(artifact, {"files": [], "versions": None})
    shown = capsys.readouterr().out
    assert "float_features (B, 1), embedding_features (B, 2) float32" in shown
    assert "id_score_list_features" in shown
