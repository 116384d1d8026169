"""Weights that are no finite numbers are found, wherever they lie, and named by table and row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts import finite
from narsil.artifacts.finite import check_quantized_tables, first_bad_row, first_bad_scale
from narsil.errors import ArtifactError

NO_NUMBERS = [float("nan"), float("inf"), float("-inf")]


def quantized(rows: int, row_bytes: int) -> np.ndarray:
    """(rows, row_bytes) of INT8 rows with sound scales and biases, and bytes that would be NaN if read as FP16."""
    data = np.full((rows, row_bytes), 0xFF, np.uint8)
    data[:, :4] = np.full((rows, 2), finite.FP16_MOST, np.float16).view(np.uint8)
    return data


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("column", [0, 1], ids=["scale", "bias"])
@given(rows=st.integers(1, 40), row=st.integers(0, 39), row_bytes=st.integers(4, 23))
def test_a_scale_or_bias_that_is_no_number_is_found(column, value, rows, row, row_bytes):
    data = quantized(rows, row_bytes)
    assert first_bad_scale(data) is None
    row = min(row, rows - 1)
    pairs = np.array(data[:, :4]).view(np.float16)
    pairs[row:, column] = value  # this and the later rows: the first is named
    data[:, :4] = pairs.view(np.uint8)
    assert first_bad_scale(data) == row


def test_scales_of_four_bytes_are_read_as_such():
    data = np.zeros((3, 12), np.uint8)
    data[2, :8] = np.array([1.0, np.inf], np.float32).view(np.uint8)
    assert first_bad_scale(data, np.float32) == 2


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 3, 2)])
def test_a_value_that_is_no_number_is_found(shape, value):
    values = np.zeros(shape, np.float32)
    assert first_bad_row(values) is None
    values[5] = value
    assert first_bad_row(values) == 5


def test_what_comes_after_the_first_piece_is_looked_at_too(monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK_BYTES", 64)
    values = np.zeros((100, 4), np.float32)
    values[99, 3] = np.nan
    assert first_bad_row(values) == 99
    data = quantized(100, 9)
    data[98, :2] = 0xFF
    assert first_bad_scale(data) == 98


@pytest.mark.parametrize("values", [np.float32(1), np.zeros(0, np.float32), np.zeros((3, 0), np.float32)])
def test_a_single_number_and_none_at_all_are_sound(values):
    assert first_bad_row(np.asarray(values)) is None


def test_tables_in_one_file_are_told_apart():
    first, second = quantized(3, 9), quantized(5, 9)
    second[4, 2:4] = np.array([np.nan], np.float16).view(np.uint8)
    data = np.concatenate([np.full(64, 0xFF, np.uint8), first.ravel(), second.ravel(), np.full(64, 0xFF, np.uint8)])
    starts, names = (64, 64 + 27), ("t_user", "t_item")
    check_quantized_tables(data, starts[:1], (3,), 9, names[:1], "tables.bin")
    with pytest.raises(ArtifactError, match=r"tables\.bin: row 4 of table t_item is NaN or infinite"):
        check_quantized_tables(data, starts, (3, 5), 9, names, "tables.bin")
