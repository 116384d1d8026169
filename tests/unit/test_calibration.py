"""Calibration files: rows that fit the model, with labels for each of its tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil.compile.calibration import load_calibration
from narsil.dataflow import Batch
from narsil.errors import ArtifactError
from tests.support import SCHEMA

WEIGHTED = replace(SCHEMA, features=tuple(replace(feature, weighted=True) for feature in SCHEMA.features))
TWO = replace(SCHEMA, tasks=("click", "buy"), widths=())
ROWS = 5


def saved(folder: Path, **changed: Any) -> Path:
    """A file of five rows."""
    arrays = {"dense": np.ones((ROWS, 3)), "ids": np.zeros((ROWS, 4), np.int64), **changed}
    np.savez(folder / "rows.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder / "rows.npz"


def test_rows_come_in_the_model_s_own_types(tmp_path):
    found = load_calibration(saved(tmp_path), SCHEMA)
    assert len(found) == ROWS
    assert (found.dense.dtype, found.values.dtype) == (np.dtype(np.float32), SCHEMA.id_dtype)
    assert (found.weights, found.labels) == (None, None)
    assert found.lengths.tolist() == np.ones((ROWS, 4)).tolist()


LENGTHS = np.array([[2, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 3, 0, 0], [0, 0, 0, 12]])
VALUES = np.array([49, 1, 999, 2, 6, 998, 19, 0, 1, 2, *range(12)])
BAGS: dict[str, Any] = {"ids": None, "lengths": LENGTHS, "values": VALUES}


def test_all_rows_come_whole_and_in_order(tmp_path):
    random = np.random.default_rng(0)
    lengths = random.integers(0, 4, (1203, 4))
    values = random.integers(0, 7, lengths.sum())
    dense = np.arange(1203 * 3, dtype=np.float32).reshape(1203, 3)
    found = load_calibration(saved(tmp_path, ids=None, dense=dense, lengths=lengths, values=values), SCHEMA)
    batches = list(found.batches())
    assert [batch.rows for batch in batches] == [500, 500, 203]
    np.testing.assert_array_equal(np.concatenate([batch.dense for batch in batches]), dense)
    back = [bag for batch in batches for row in range(batch.rows) for bag in bags_of(batch, row)]
    assert back == [bag.tolist() for bag in np.split(values, np.cumsum(lengths)[:-1])]


def bags_of(batch: Batch, row: int) -> list[list[int]]:
    """Those of one row, by feature."""
    bags = np.split(batch.values, np.cumsum(batch.lengths)[:-1])
    return [bag.tolist() for bag in bags[row :: batch.rows]]


def test_one_id_in_each_bag_is_one_hot_however_it_is_written(tmp_path):
    ids = np.arange(ROWS * 4).reshape(ROWS, 4) % 7
    (short,) = load_calibration(saved(tmp_path, ids=ids), SCHEMA).batches()
    ones = {"ids": None, "lengths": np.ones((ROWS, 4), int), "values": ids.ravel()}
    (long,) = load_calibration(saved(tmp_path, **ones), SCHEMA).batches()
    for batch in (short, long):
        assert batch.one_hot
        assert batch.weights is None
        np.testing.assert_array_equal(batch.values.reshape(4, ROWS), ids.T)
    assert not next(load_calibration(saved(tmp_path, **BAGS), SCHEMA).batches()).one_hot


def test_weights_stay_beside_their_ids(tmp_path):
    weights = np.arange(len(VALUES)) / 4
    found = load_calibration(saved(tmp_path, **BAGS, weights=weights), WEIGHTED)
    (batch,) = found.batches()
    pairs = sorted(zip(batch.values.tolist(), batch.weights.tolist(), strict=True))
    assert pairs == sorted(zip(VALUES.tolist(), weights.tolist(), strict=True))
    assert batch.weights[:2].tolist() == [0, 0.25]  # of the first bag
    one_hot = load_calibration(saved(tmp_path, weights=np.arange(ROWS * 4).reshape(ROWS, 4)), WEIGHTED)
    assert next(one_hot.batches()).weights[:2].tolist() == [0, 4]
    left_out = load_calibration(saved(tmp_path, **BAGS), WEIGHTED)
    assert left_out.weights.tolist() == [1] * len(VALUES)


def test_labels_have_a_column_for_each_task(tmp_path):
    one = np.arange(ROWS) % 2
    found = load_calibration(saved(tmp_path, labels=one), SCHEMA)
    assert found.labels.tolist() == one[:, None].tolist()
    both = np.column_stack([one, 1 - one])
    assert load_calibration(saved(tmp_path, labels=both), TWO).labels.tolist() == both.tolist()


@pytest.mark.parametrize(
    ("schema", "changed", "says"),
    [
        (TWO, {"labels": np.zeros(ROWS)}, r"labels has shape \(5,\); the model needs \(rows, 2\), a column for each"),
        (SCHEMA, {"labels": np.zeros((ROWS, 2))}, r"labels has shape \(5, 2\); the model needs \(rows, 1\)"),
        (SCHEMA, {"labels": np.zeros(ROWS - 1)}, "must have the same number of rows"),
        (SCHEMA, {"labels": np.full(ROWS, 2)}, "labels must be 0 or 1"),
        (SCHEMA, {"labels": np.full(ROWS, np.nan)}, "labels must be 0 or 1"),
        (SCHEMA, {"dense": None}, "has no array dense"),
        (SCHEMA, {"dense": np.ones((ROWS, 2))}, r"dense has shape \(5, 2\); the model needs \(rows, 3\)"),
        (SCHEMA, {"dense": np.full((ROWS, 3), np.inf)}, "dense must be finite"),
        (SCHEMA, {"dense": np.ones((0, 3)), "ids": np.zeros((0, 4), int)}, "at least 1"),
        (SCHEMA, {"ids": np.zeros((ROWS, 4))}, "ids must be whole numbers"),
        (SCHEMA, {"ids": np.full((ROWS, 4), 7)}, "outside of the model's tables"),
        (SCHEMA, {"ids": np.full((ROWS, 4), -1)}, "outside of the model's tables"),
        (SCHEMA, {"dense": np.full((ROWS, 3), 1e39)}, "dense has numbers beyond those of float32"),
        (SCHEMA, {"ids": None}, r"has no array ids; .* ids \(or lengths and values\)"),
        (SCHEMA, {**BAGS, "ids": np.zeros((ROWS, 4), int)}, "has ids and lengths or values"),
        (SCHEMA, {**BAGS, "values": None}, "lengths come with values"),
        (SCHEMA, {**BAGS, "lengths": None}, "has no array lengths"),
        (SCHEMA, {**BAGS, "values": VALUES[:, None]}, "lengths come with values, a list"),
        (SCHEMA, {**BAGS, "values": VALUES[:-1]}, "lengths add up to 22, and there are 21 values"),
        (SCHEMA, {**BAGS, "values": VALUES * 1.0}, "ids must be whole numbers"),
        (SCHEMA, {**BAGS, "values": VALUES + 20}, "outside of the model's tables"),
        (SCHEMA, {**BAGS, "lengths": LENGTHS * 1.0}, "lengths must be whole numbers"),
        (SCHEMA, {**BAGS, "lengths": -LENGTHS}, "lengths must lie between 0 and 22"),
        (SCHEMA, {**BAGS, "lengths": LENGTHS.astype(np.uint64) + 2**62}, "lengths must lie between 0 and 22"),
        (SCHEMA, {**BAGS, "lengths": LENGTHS.T}, r"lengths has shape \(4, 5\); the model needs \(rows, 4\)"),
        (
            SCHEMA,
            {**BAGS, "lengths": LENGTHS[LENGTHS.sum(axis=1) > 0]},
            "bags and dense must have the same number of r",
        ),
        (SCHEMA, {**BAGS, "weights": np.ones(22)}, "has weights, and the model takes none"),
        (WEIGHTED, {**BAGS, "weights": np.ones(21)}, "there are 21 weights and 22 ids"),
        (WEIGHTED, {**BAGS, "weights": np.full(22, np.nan)}, "weights must be finite"),
        (WEIGHTED, {**BAGS, "weights": np.full(22, 1e39)}, "weights must be finite"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, schema, changed, says):
    with pytest.raises(ArtifactError, match=says):
        load_calibration(saved(tmp_path, **changed), schema)
