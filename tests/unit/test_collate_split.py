"""Collation fuses any parts into one key-major batch; splitting takes the scores apart again."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil.backends.fake import fake_scores
from narsil.dataflow import Features, Jagged
from narsil.engine.collate import Collator
from narsil.engine.split import join, split
from tests.support import SCHEMA, jagged, one_hot, scores_alone


def bags_of(features: Features) -> list[list[list[int]]]:
    """[feature][row] -> ids, read straight from the definition of Features."""
    sparse = features.sparse
    if isinstance(sparse, Jagged):
        return [
            [sparse.values[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
            for starts, lengths in zip(sparse.starts, sparse.lengths, strict=True)
        ]
    return [[[int(value)] for value in row] for row in sparse.ids]


def bags_of_batch(batch) -> list[list[list[int]]]:
    """The same, read from the batch's key-major lengths and values."""
    ends = np.cumsum(batch.lengths)
    bags = [batch.values[end - n : end].tolist() for end, n in zip(ends, batch.lengths, strict=True)]
    return [bags[t * batch.rows : (t + 1) * batch.rows] for t in range(SCHEMA.num_features)]


def sample_major(features: Features) -> Features:
    """The same rows as a sample-major payload holds them."""
    bags = bags_of(features)
    lengths = np.array([[len(bag) for bag in column] for column in zip(*bags, strict=True)], dtype=np.int32)  # (B, T)
    values = np.array([i for column in zip(*bags, strict=True) for bag in column for i in bag], dtype=np.int64)
    starts = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape) - lengths
    return Features(features.rows, features.dense, Jagged(values, starts.T, lengths.T))


parts = st.lists(
    st.builds(
        lambda make, rows, seed: make(rows, seed),
        st.sampled_from([one_hot, jagged, lambda rows, seed: sample_major(jagged(rows, seed))]),
        st.integers(1, 7),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(parts)
def test_a_batch_holds_every_part_s_bags_in_order_for_every_feature(group):
    batch = Collator(SCHEMA).collate(group)
    assert batch.rows == sum(part.rows for part in group)
    assert batch.values.dtype == SCHEMA.id_dtype
    expected = [[bag for part in group for bag in bags_of(part)[t]] for t in range(SCHEMA.num_features)]
    assert bags_of_batch(batch) == expected
    np.testing.assert_array_equal(batch.dense, np.concatenate([part.dense for part in group]))
    assert not batch.one_hot or (batch.lengths == 1).all()


@settings(deadline=None)
@given(parts)
def test_every_part_gets_the_scores_it_would_get_alone(group):
    scores = {"default": fake_scores(Collator(SCHEMA).collate(group))}
    scores["which"] = np.outer(scores["default"], [1, 2, 3])
    for part, piece in zip(group, split(scores, [part.rows for part in group]), strict=True):
        np.testing.assert_array_equal(piece["default"], scores_alone(part))
        np.testing.assert_array_equal(piece["which"], np.outer(scores_alone(part), [1, 2, 3]))


@settings(deadline=None)
@given(st.sampled_from([one_hot, jagged]), st.integers(1, 30), st.integers(1, 30), st.integers(0, 100))
def test_a_request_run_in_slices_and_joined_scores_as_if_whole(make, rows, step, seed):
    whole = make(rows, seed)
    alone = [scores_alone(whole.slice(start, min(start + step, rows))) for start in range(0, rows, step)]
    found = join([{"default": scores, "which": np.outer(scores, [1, 2, 3])} for scores in alone])
    np.testing.assert_array_equal(found["default"], scores_alone(whole))
    np.testing.assert_array_equal(found["which"], np.outer(scores_alone(whole), [1, 2, 3]))


def test_the_buffers_of_a_lane_serve_batches_of_changing_size():
    collator = Collator(SCHEMA)
    for rows in (3, 300, 1, 40, 1000, 7):
        part = one_hot(rows, seed=rows)
        np.testing.assert_array_equal(fake_scores(collator.collate([part])), scores_alone(part))


def test_ids_without_a_weight_weigh_one_beside_weighted_company():
    plain = jagged(3, seed=1)
    sparse = jagged(2, seed=2).sparse
    assert isinstance(sparse, Jagged)
    weights = np.arange(len(sparse.values), dtype=np.float32)
    weighted = Features(2, jagged(2, seed=2).dense, Jagged(sparse.values, sparse.starts, sparse.lengths, weights))
    batch = Collator(SCHEMA).collate([plain, weighted])
    assert batch.weights is not None
    by_bag = np.split(batch.weights, np.cumsum(batch.lengths)[:-1])
    for t in range(SCHEMA.num_features):
        for row in range(3):
            assert (by_bag[t * 5 + row] == 1).all()
        for row in range(2):
            start, length = sparse.starts[t, row], sparse.lengths[t, row]
            np.testing.assert_array_equal(by_bag[t * 5 + 3 + row], weights[start : start + length])


def weighing(features: Features, weight: float) -> Features:
    """The same rows, every id of the same weight."""
    sparse = features.sparse
    assert isinstance(sparse, Jagged)
    weights = np.full(len(sparse.values), weight, np.float32)
    return Features(features.rows, features.dense, Jagged(sparse.values, sparse.starts, sparse.lengths, weights))


def test_a_batch_has_weights_where_all_of_its_parts_have_and_none_where_none_has():
    plain = [jagged(3, seed=1), jagged(2, seed=2)]
    assert Collator(SCHEMA).collate(plain).weights is None
    weighted = Collator(SCHEMA).collate([weighing(part, 2.0) for part in plain])
    assert weighted.weights is not None
    assert weighted.weights.tolist() == [2.0] * len(weighted.values)


def test_a_lane_s_buffer_serves_twice_the_rows_that_it_was_made_for():
    collator = Collator(SCHEMA)
    small = collator.collate([one_hot(5)])
    large = collator.collate([one_hot(10)])
    for first, second in ((small.dense, large.dense), (small.values, large.values), (small.lengths, large.lengths)):
        assert np.shares_memory(first, second)


def test_a_batch_of_empty_bags_only():
    nothing = Features(
        2,
        np.zeros((2, SCHEMA.dense_dim), dtype=np.float32),
        Jagged(np.empty(0, np.int32), np.zeros((4, 2), np.int64), np.zeros((4, 2), np.int32)),
    )
    batch = Collator(SCHEMA).collate([nothing, nothing])
    assert len(batch.values) == 0
    assert batch.lengths.tolist() == [0] * 16
