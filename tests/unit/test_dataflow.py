"""What the types along a request's path say of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narsil.dataflow import Features, Jagged, OneHot
from tests.support import request


def bags(key_major: bool = True) -> Jagged:
    """Two features, three rows: bags (1, 2), (), (3) and (4), (5, 6, 7), ()."""
    lengths = np.array([[2, 0, 1], [1, 3, 0]], np.int32)
    if key_major:
        return Jagged.laid_out(np.array([1, 2, 3, 4, 5, 6, 7], np.int32), lengths)
    return Jagged.laid_out(np.array([1, 2, 4, 5, 6, 7, 3], np.int32), np.ascontiguousarray(lengths.T), key_major=False)


@pytest.mark.parametrize("key_major", [True, False])
def test_bags_laid_end_to_end_are_found_in_either_order(key_major):
    found = bags(key_major)
    as_lists = [
        [found.values[start : start + length].tolist() for start, length in zip(*both, strict=True)]
        for both in zip(found.starts, found.lengths, strict=True)
    ]
    assert as_lists == [[[1, 2], [], [3]], [[4], [5, 6, 7], []]]
    assert found.count == 7


def test_bags_that_share_ids_count_them_each_time():
    shared = Jagged(np.array([5, 6], np.int32), np.zeros((1, 3), np.int64), np.full((1, 3), 2, np.int32))
    assert (shared.count, len(shared.values)) == (6, 2)


def test_features_weigh_what_their_arrays_hold():
    dense = np.zeros((3, 4), np.float32)
    one_hot, jagged = OneHot(np.zeros((2, 3), np.int32)), bags()
    assert Features(3, dense, one_hot).nbytes == 3 * 4 * 4 + 2 * 3 * 4
    assert Features(3, dense, jagged).nbytes == 3 * 4 * 4 + 7 * 4 + 6 * 8 + 6 * 4
    weighted = replace(jagged, weights=np.ones(7, np.float32))
    assert Features(3, dense, weighted).nbytes == 3 * 4 * 4 + 7 * 4 + 6 * 8 + 6 * 4 + 7 * 4
    assert (Features(3, dense, one_hot).ids, Features(3, dense, jagged).ids) == (6, 7)


def test_a_slice_has_the_rows_asked_for_and_copies_nothing():
    dense = np.arange(12, dtype=np.float32).reshape(3, 4)
    weighted = replace(bags(), weights=np.ones(7, np.float32))
    for sparse in (OneHot(np.arange(6, dtype=np.int32).reshape(2, 3)), weighted):
        part = Features(3, dense, sparse).slice(1, 3)
        assert part.rows == 2
        np.testing.assert_array_equal(part.dense, dense[1:])
        assert np.shares_memory(part.dense, dense)
        if isinstance(part.sparse, OneHot):
            assert part.sparse.ids.tolist() == [[1, 2], [4, 5]]
        else:
            assert part.sparse.lengths.tolist() == [[0, 1], [3, 0]]
            assert part.sparse.values is weighted.values
            assert part.sparse.weights is weighted.weights
        assert part.portable() is part


def test_a_request_has_expired_when_its_deadline_comes():
    assert not request().expired(1e9)
    assert not request(deadline=2.0).expired(1.999)
    assert request(deadline=2.0).expired(2.0)
    assert request(7).rows == 7
