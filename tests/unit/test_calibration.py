"""Calibration files: rows that fit the model, with labels for each of its tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil.compile.calibration import load_calibration
from narsil.errors import ArtifactError
from tests.support import SCHEMA

TWO = replace(SCHEMA, tasks=("click", "buy"))
ROWS = 5


def saved(folder: Path, **changed: Any) -> Path:
    """A file of five rows."""
    arrays = {"dense": np.ones((ROWS, 3)), "ids": np.zeros((ROWS, 4), np.int64), **changed}
    np.savez(folder / "rows.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder / "rows.npz"


def test_rows_come_in_the_model_s_own_types(tmp_path):
    found = load_calibration(saved(tmp_path), SCHEMA)
    assert len(found) == ROWS
    assert (found.dense.dtype, found.ids.dtype) == (np.dtype(np.float32), SCHEMA.id_dtype)
    assert found.labels is None


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
        (SCHEMA, {"dense": np.full((ROWS, 3), np.inf)}, "dense finite"),
        (SCHEMA, {"dense": np.ones((0, 3)), "ids": np.zeros((0, 4), int)}, "at least 1"),
        (SCHEMA, {"ids": np.zeros((ROWS, 4))}, "ids must be whole numbers"),
        (SCHEMA, {"ids": np.full((ROWS, 4), 7)}, "outside of the model's tables"),
        (SCHEMA, {"ids": np.full((ROWS, 4), -1)}, "outside of the model's tables"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, schema, changed, says):
    with pytest.raises(ArtifactError, match=says):
        load_calibration(saved(tmp_path, **changed), schema)
