"""Named tensors as features: every form of ids gives the same rows, and what does not fit is said by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.dataflow import Jagged, OneHot, RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports.codec.tensors import DTYPES, Tensor, features_of, inputs_of, outputs_of, picked, tensor_of
from tests.support import SCHEMA

LIMITS = RequestLimits(max_rows=100, max_ids=1000)
B, T = 5, 4
WEIGHTED = replace(SCHEMA, features=tuple(replace(feature, weighted=True) for feature in SCHEMA.features))


def tensor(name, values, datatype=None):
    values = np.asarray(values)
    kind = datatype or {"f": "FP32", "i": "INT64"}[values.dtype.kind]
    return tensor_of(name, kind, values.shape, values.astype(DTYPES[kind]).ravel())


def dense(rows=B, width=3):
    return tensor("dense", np.arange(rows * width).reshape(rows, width) / 7)


def ids(rows=B):
    return np.random.default_rng(3).integers(0, 7, (rows, T))


def bags(features):
    """[feature][row] -> ids, whatever form the features have."""
    sparse = features.sparse
    if isinstance(sparse, OneHot):
        return [[[int(i)] for i in row] for row in sparse.ids]
    return [
        [sparse.values[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
        for starts, lengths in zip(sparse.starts, sparse.lengths, strict=True)
    ]


def read(*tensors, schema=SCHEMA, limits=LIMITS):
    return features_of(tensors, schema, limits)


def jagged_case():
    lengths = np.random.default_rng(5).integers(0, 4, (B, T))  # sample-major
    lengths[0] = [0, 2, 1, 3]
    values = np.random.default_rng(6).integers(0, 7, int(lengths.sum()))
    ends = np.cumsum(lengths).reshape(B, T)
    by_row = [[values[ends[b, t] - lengths[b, t] : ends[b, t]].tolist() for b in range(B)] for t in range(T)]
    return values, lengths, by_row


@pytest.mark.parametrize("kind", ["INT32", "INT64"])
def test_one_id_for_each_feature_in_one_tensor(kind):
    found = read(dense(), tensor("ids", ids(), kind))
    assert found.rows == B
    assert isinstance(found.sparse, OneHot)
    assert bags(found) == [[[int(i)] for i in column] for column in ids().T]
    assert found.dense.tolist() == dense().values.reshape(B, 3).tolist()


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
def test_a_tensor_for_each_feature(shape):
    parts = [tensor(feature.name, ids()[:, t].reshape(shape)) for t, feature in enumerate(SCHEMA.features)]
    assert bags(read(dense(), *reversed(parts))) == [[[int(i)] for i in column] for column in ids().T]


def test_several_ids_for_each_row_of_a_feature():
    parts = [tensor(feature.name, ids()[:, t]) for t, feature in enumerate(SCHEMA.features[:3])]
    found = bags(read(dense(), *parts, tensor("shop", np.arange(2 * B).reshape(B, 2))))
    assert found[3] == [[2 * b, 2 * b + 1] for b in range(B)]
    assert found[0] == [[int(i)] for i in ids()[:, 0]]


def test_empty_bags_are_bounded_as_if_their_lengths_had_come():
    schema = replace(SCHEMA, dense_dim=0)
    for rows, most in ((100, 1600), (101, 1600)):
        parts = [tensor(feature.name, np.empty((rows, 0), np.int64)) for feature in SCHEMA.features]
        limits = RequestLimits(max_rows=1000, max_bytes=most)
        if rows == 100:
            assert bags(read(*parts, schema=schema, limits=limits)) == [[[]] * rows] * T
            continue
        with pytest.raises(InvalidRequest, match=r"101 rows of 4 features have 404 bags; in 1600 bytes"):
            read(*parts, schema=schema, limits=limits)


@pytest.mark.parametrize("kind", ["INT32", "INT64"])
def test_bags_of_all_features_row_by_row(kind):
    values, lengths, expected = jagged_case()
    assert bags(read(dense(), tensor("ids.values", values, kind), tensor("ids.lengths", lengths, kind))) == expected


@pytest.mark.parametrize("flat", [True, False])
def test_bags_as_torchrec_lays_them_out(flat):
    _, lengths, expected = jagged_case()
    values = [i for feature in expected for bag in feature for i in bag]
    counts = lengths.T.ravel() if flat else lengths.T
    inputs = tensor("id_list_features.values", values), tensor("id_list_features.lengths", counts)
    columns = replace(dense(), name="float_features")
    assert bags(read(columns, *inputs)) == expected


def test_bags_feature_by_feature():
    _, lengths, expected = jagged_case()
    parts = []
    for t, feature in enumerate(SCHEMA.features):
        parts.append(tensor(feature.name + ".values", np.array([i for bag in expected[t] for i in bag], np.int64)))
        parts.append(tensor(feature.name + ".lengths", lengths[:, t]))
    assert bags(read(dense(), *parts)) == expected


def test_weights_stand_beside_their_ids_in_every_form():
    values, lengths, expected = jagged_case()
    weights = np.arange(len(values)) / 8
    found = read(
        dense(), tensor("ids.values", values), tensor("ids.lengths", lengths), tensor("ids.weights", weights),
        schema=WEIGHTED,
    )  # fmt: skip
    parts, at = [], np.cumsum(lengths).reshape(B, T) - lengths
    for t, feature in enumerate(SCHEMA.features):
        mine = [weights[at[b, t] : at[b, t] + lengths[b, t]] for b in range(B)]
        parts += [
            tensor(feature.name + ".values", np.array([i for bag in expected[t] for i in bag], np.int64)),
            tensor(feature.name + ".lengths", lengths[:, t]),
            tensor(feature.name + ".weights", np.concatenate(mine)),
        ]
    other = read(dense(), *parts, schema=WEIGHTED)
    for one in (found, other):
        assert isinstance(one.sparse, Jagged)
        assert one.sparse.weights is not None
        for t in range(T):
            for b in range(B):
                start, length = int(one.sparse.starts[t, b]), int(lengths[b, t])
                assert one.sparse.weights[start : start + length].tolist() == (
                    weights[at[b, t] : at[b, t] + length].astype(np.float32).tolist()
                )


@pytest.mark.parametrize(("kind", "step"), [("FP16", 2**-11), ("BF16", 2**-7), ("FP64", 2**-24), ("FP32", 0)])
def test_dense_columns_in_every_float_type(kind, step):
    numbers = np.random.default_rng(9).standard_normal((B, 3)).astype(np.float32)
    if kind == "BF16":
        raw = (numbers.view(np.uint32) >> 16).astype("<u2")
        columns = Tensor("dense", kind, numbers.shape, raw.ravel())
    else:
        columns = tensor("dense", numbers, kind)
    found = read(columns, tensor("ids", ids())).dense
    assert found.dtype == np.float32
    assert np.allclose(found, numbers, rtol=max(step, 1e-12) * 1.01, atol=0)


def test_what_is_too_large_for_fp32_is_not_finite():
    with pytest.raises(InvalidRequest, match=r"row 0, column 0 is inf"):
        read(tensor("dense", np.full((B, 3), 1e300), "FP64"), tensor("ids", ids()))


def test_no_dense_columns():
    schema = replace(SCHEMA, dense_dim=0)
    values, lengths, expected = jagged_case()
    key_major = [i for feature in expected for bag in feature for i in bag]
    for inputs in (
        [tensor("ids", ids())],
        [tensor("ids.values", values), tensor("ids.lengths", lengths)],
        [tensor("id_list_features.values", key_major), tensor("id_list_features.lengths", lengths.T.ravel())],
        [tensor(feature.name, ids()[:, t]) for t, feature in enumerate(SCHEMA.features)],
    ):
        found = read(*inputs, schema=schema)
        assert (found.rows, found.dense.shape) == (B, (B, 0))


def test_a_feature_may_be_named_as_a_form_is():
    schema = replace(SCHEMA, features=(Feature("ids", "t", 50, 8),))
    assert bags(read(dense(), tensor("ids", ids()[:, 0]), schema=schema)) == [[[int(i)] for i in ids()[:, 0]]]


WRONG = [
    ([tensor("ids", ids())], r"dense is missing; the model takes dense FP32 \[-1, 3\] and ids INT64 \[-1, 4\]"),
    ([dense()], "the request holds no ids"),
    ([tensor("dense", np.zeros((B, 4))), tensor("ids", ids())], r"dense is \[5, 4\]; the model takes \[B, 3\]"),
    ([tensor("dense", np.zeros(3)), tensor("ids", ids())], r"dense is \[3\]; the model takes \[B, 3\]"),
    ([dense(), tensor("ids", ids()[:, :3])], r"ids is \[5, 3\]; with 5 rows the model takes \[5, 4\]"),
    ([dense(), tensor("ids", ids()[:4])], r"ids is \[4, 4\]; with 5 rows"),
    ([dense(), tensor("ids", ids()), tensor("more", ids())], "no input 'more' beside the others"),
    ([dense(), tensor("ids", ids()), tensor("ids", ids())], "two inputs have one name"),
    ([dense(), tensor("ids", ids() / 2)], "ids has the datatype FP32; send INT64 or INT32"),
    ([tensor("dense", ids()[:, :3]), tensor("ids", ids())], "dense has the datatype INT64; send FP32"),
    ([dense(), tensor("ids", ids() - 9)], "feature user, row 0: id -"),
    ([dense(), tensor("ids", ids() + 7)], "feature item, row .: id .* is outside its table t_item; ids are 0 to 6"),
    ([dense(), tensor("ids.values", ids())], "ids.values needs ids.lengths beside it"),
    ([dense(), tensor("ids.lengths", ids())], "ids.lengths needs ids.values beside it"),
    ([dense(), tensor("ids.values", [1]), tensor("ids.lengths", ids() * 0)], "add up to 0 ids and values holds 1"),
    ([dense(), tensor("user", ids()[:, 0])], "the input item is missing: every feature needs a tensor"),
    ([dense(0), tensor("ids", ids(0))], "the first dimension of the inputs is 0; it must be 1 to 100 rows"),
    ([dense(101), tensor("ids", ids(101))], "is 101; it must be 1 to 100 rows"),
    ([dense(), tensor("ids.values", np.zeros(1001, int)), tensor("ids.lengths", ids())], "1001 ids in all; the limit"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "text"), WRONG)
def test_what_does_not_fit_is_said_by_name(inputs, text):
    with pytest.raises(InvalidRequest, match=text):
        read(*inputs)


def test_a_negative_length_of_a_feature():
    parts = [tensor(feature.name, ids()[:, t]) for t, feature in enumerate(SCHEMA.features[:3])]
    lengths = tensor("shop.lengths", np.array([-1, 1, 1, 0, 0]))
    with pytest.raises(InvalidRequest, match=r"shop.lengths: a length is negative"):
        read(dense(), *parts, tensor("shop.values", [1]), lengths)
    with pytest.raises(InvalidRequest, match=r"shop.lengths add up to 2 and shop.values holds 1 ids"):
        read(dense(), *parts, tensor("shop.values", [1]), tensor("shop.lengths", np.array([1, 1, 0, 0, 0])))
    # As int32 it would be 1.
    with pytest.raises(InvalidRequest, match=r"a length is negative, or above"):
        read(dense(), *parts, tensor("shop.values", [1]), tensor("shop.lengths", np.array([2**32 + 1, 0, 0, 0, 0])))


def test_weights_of_a_feature_must_be_one_for_each_of_its_ids():
    # All weights together are as many as all ids: each feature's must be too, or they would weigh others' ids.
    parts = []
    for feature, count in zip(WEIGHTED.features, (4, 6, 5, 5), strict=True):
        parts += [
            tensor(feature.name + ".values", np.zeros(B, int)),
            tensor(feature.name + ".lengths", np.ones(B, int)),
            tensor(feature.name + ".weights", np.ones(count)),
        ]
    with pytest.raises(InvalidRequest, match=r"user: 4 weights for 5 ids"):
        read(dense(), *parts, schema=WEIGHTED)
    one_each = [tensor(feature.name, ids()[:, t]) for t, feature in enumerate(WEIGHTED.features)]
    weights = [tensor("user.weights", np.ones(4)), tensor("item.weights", np.ones(6))]
    with pytest.raises(InvalidRequest, match=r"user: 4 weights for 5 ids"):
        read(dense(), *one_each, *weights, schema=WEIGHTED)


def test_as_many_numbers_as_the_shape_says():
    with pytest.raises(InvalidRequest, match=r"x: 3 FP32 are given for the shape \[2, 2\]"):
        tensor_of("x", "FP32", (2, 2), np.zeros(3, np.float32))
    with pytest.raises(InvalidRequest, match=r"x: 5 FP32 are given for the shape \[2, 2\]"):
        tensor_of("x", "FP32", (2, 2), np.zeros(5, np.float32))
    with pytest.raises(InvalidRequest, match=r"negative size"):
        tensor_of("x", "FP32", (-1, -3), np.zeros(3, np.float32))


def test_what_a_model_takes_and_gives():
    assert inputs_of(SCHEMA) == [("dense", "FP32", (-1, 3)), ("ids", "INT64", (-1, 4))]
    assert [name for name, _, _ in inputs_of(WEIGHTED)] == ["dense", "ids.values", "ids.lengths", "ids.weights"]
    schema = ModelSchema(0, SCHEMA.features, ("a", "b"), (1, 3))
    assert inputs_of(schema) == [("ids", "INT64", (-1, 4))]
    assert outputs_of(schema) == [("a", "FP32", (-1,)), ("b", "FP32", (-1, 3))]
    scores = {"a": np.zeros(1, np.float32), "b": np.ones(1, np.float32)}
    assert list(picked(scores, ["b"])) == ["b"]
    assert list(picked(scores, [])) == ["a", "b"]


@given(st.data())
def test_whatever_tensors_come_they_are_features_or_an_invalid_request(data):
    names = st.sampled_from(
        [
            *("dense", "ids", "ids.values", "ids.lengths", "ids.weights", "user", "user.values", "user.lengths", "x"),
            *("item", "tags", "shop", "float_features", "id_list_features.values", "id_list_features.lengths"),
        ]
    )
    tensors = []
    for name in data.draw(st.lists(names, max_size=6)):
        shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
        kind = data.draw(st.sampled_from(sorted(DTYPES)))
        count = int(np.prod(shape))
        numbers = data.draw(st.lists(st.integers(-2, 60), min_size=count, max_size=count))
        values = np.array(numbers, np.int64).astype(DTYPES[kind])
        tensors.append(Tensor(name, kind, shape, values))
    schema = data.draw(st.sampled_from([SCHEMA, WEIGHTED, replace(SCHEMA, dense_dim=0)]))
    try:
        found = features_of(tensors, schema, LIMITS)
    except InvalidRequest:
        return
    assert found.dense.shape == (found.rows, schema.dense_dim)
    for feature, of_rows in zip(schema.features, bags(found), strict=True):
        assert len(of_rows) == found.rows
        assert all(0 <= i < feature.rows for bag in of_rows for i in bag)
