"""Rows that a model takes, drawn by chance, to hold one form of it against another.

Receives a schema and a generator; produces Batches. ``random_batch`` draws evenly. ``usual`` and ``extreme`` draw what
clients send, and what tells forms apart that agree on even rows:

              usual                                      extreme, beside all that is usual
    dense     even in [0, 1); N(0, 1); all zeros         Student's t with 2 degrees of freedom; log-normal of either
                                                         sign; N(0, 1) times 10 and times 100
    ids       even over the table; Zipf's (exponent 1);  half of a bag 0; half of it the last; one id again and again
              one of a bag 0; one of it the last
    bags      of one id each; of 0 to 4                  of 0 to 12; half of 0 to 100, half of 0 to 4
    weights   even in [0, 2); 1                          0; N(0, 1)

Where NaN is a value of some columns, half of the rows have it in some of them, or in all. Each row of numbers and each
bag has one kind. In half of the rows no number is below zero: a model may take logarithms.
Where a file's rows are given, its rows of numbers are what is usual, and numbers between the least and the largest of
its columns are extreme. What is usual is what trained models see, and where a limit can hold for every row; rounding
grows with what is rounded, so that over extreme rows only an average can be held to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Batch, Floats

__all__ = ["USUAL_ROWS", "Vocabularies", "extreme", "of_bags", "random_batch", "rows_of", "usual", "with_missing"]

USUAL_ROWS = 10_000  # at least; half of them one-hot
_BATCH_ROWS = 500
_ODD_BATCHES = (1, 2, 7)  # rows of the batches that come first, where code for whole vectors may slip
_USUAL_BAGS = (None, 4)  # the longest of a batch, by turns; None: one id in each
_EXTREME_BAGS = (None, 4, 12)
_EXTREME_BATCHES = 6
_SHORT, _LONG = 4, 100
_LONG_BATCHES = 4
_MISSING = {0.0: 0.5, 0.3: 0.4, 1.0: 0.1}  # how much of a row is missing, of what may be -> the share of such rows
_LONG_IDS = 250_000  # of a batch of long bags, about: it has fewer rows where there are many features

# Kind -> its share.
Shares = Mapping[str, float]
_DENSE: Shares = {"even": 0.5, "normal": 0.4, "zeros": 0.1}
_EXTREME_DENSE: Shares = {"even": 1, "normal": 1, "zeros": 1, "tails": 2, "lognormal": 2, "tens": 1.5, "hundreds": 1.5}
_IDS: Shares = {"even": 0.4, "zipf": 0.3, "first": 0.15, "last": 0.15}
_EXTREME_IDS: Shares = {"even": 2, "zipf": 2, "firsts": 2, "lasts": 2, "repeated": 2}
_WEIGHTS: Shares = {"even": 0.6, "one": 0.4}
_EXTREME_WEIGHTS: Shares = {"even": 1, "one": 1, "zero": 1, "normal": 1}

Random = np.random.Generator
Counts = NDArray[np.int32]


def random_batch(schema: ModelSchema, rows: int, longest: int | None, random: Random) -> Batch:
    """Rows with ids even over each table, one a bag or 0 to ``longest``, and dense values even in [0, 1)."""
    dense = random.random((rows, schema.dense_dim), dtype=np.float32)
    shape = (schema.num_features, rows)
    lengths = np.ones(shape, np.int32) if longest is None else random.integers(0, longest + 1, shape, np.int32)
    lengths = schema.bags(lengths)
    limits = np.repeat(schema.rows, lengths.sum(axis=1))
    values = random.integers(0, limits).astype(schema.id_dtype)
    return Batch(rows, dense, lengths.ravel(), values, one_hot=longest is None)


Vocabularies = Mapping[int, NDArray[np.int64]]  # position of a feature -> ids that its model knows


def usual(
    schema: ModelSchema, random: Random, given: Floats | None = None, known: Vocabularies | None = None
) -> Iterator[Batch]:
    """At least USUAL_ROWS rows. ``given``: (N, D) rows of numbers out of a file; half of the ids of a feature are of
    its ``known`` ones, where it has such."""
    for number, rows in enumerate([*_ODD_BATCHES, *_ODD_BATCHES] + [_BATCH_ROWS] * (USUAL_ROWS // _BATCH_ROWS)):
        lengths = _lengths(schema, rows, _USUAL_BAGS[number % len(_USUAL_BAGS)], random)
        dense = _dense(_DENSE, (rows, schema.dense_dim), random)
        if given is not None:
            dense = given[random.integers(0, len(given), rows)]
        yield _with_known(_batch(schema, dense, lengths, _IDS, _WEIGHTS, random), schema, known or {}, random)


def extreme(
    schema: ModelSchema, random: Random, given: Floats | None = None, known: Vocabularies | None = None
) -> Iterator[Batch]:
    """Some thousand rows, as ``usual``."""
    long_rows = int(np.clip(_LONG_IDS // max(schema.num_features * _LONG // 4, 1), 1, _BATCH_ROWS))
    plan = [(_BATCH_ROWS, _EXTREME_BAGS[number % len(_EXTREME_BAGS)]) for number in range(_EXTREME_BATCHES)]
    for rows, longest in [*plan, *[(long_rows, _LONG)] * _LONG_BATCHES]:
        lengths = _lengths(schema, rows, longest, random)
        dense = _dense(_EXTREME_DENSE, (rows, schema.dense_dim), random)
        if given is not None:
            low, high = _ends(given)
            between = np.clip(low + (high - low) * random.random(dense.shape), low, high).astype(np.float32)
            dense = np.where(random.random((rows, 1)) < 0.5, between, dense)
        drawn = _batch(schema, dense, lengths, _EXTREME_IDS, _EXTREME_WEIGHTS, random)
        yield _with_known(drawn, schema, known or {}, random)


def _with_known(batch: Batch, schema: ModelSchema, known: Vocabularies, random: Random) -> Batch:
    if not known:
        return batch
    values = batch.values.copy()
    ends = np.cumsum(batch.lengths.reshape(schema.num_features, -1).sum(axis=1))
    for feature, every in known.items():
        ids = every[(every >= schema.features[feature].least) & (every < schema.features[feature].rows)]
        own = np.arange(ends[feature - 1] if feature else 0, ends[feature])
        own = own[random.random(len(own)) < 0.5]
        if len(ids):
            values[own] = random.choice(ids, len(own))
    return replace(batch, values=values)


def rows_of(batch: Batch, keep: NDArray[np.bool_]) -> Batch:
    """The rows of a batch for which ``keep`` (B,) is true."""
    bags = np.tile(keep, len(batch.lengths) // batch.rows)
    ids = np.repeat(bags, batch.lengths)
    weights = None if batch.weights is None else batch.weights[ids]
    dense = np.ascontiguousarray(batch.dense[keep])
    return Batch(len(dense), dense, batch.lengths[bags], batch.values[ids], batch.one_hot, weights)


def of_bags(lengths: NDArray[np.integer[Any]], order: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """(N,) positions of the ids of bags that lie end to end, of all or some in another order. ``lengths``: (bags,) as
    they lie."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    ordered = lengths[order]
    ends = np.cumsum(ordered, dtype=np.int64)
    positions: NDArray[np.int64] = np.repeat(starts[order] - (ends - ordered), ordered) + np.arange(ordered.sum())
    return positions


def with_missing(dense: Floats, schema: ModelSchema, random: Random) -> Floats:
    """(B, D), NaN here and there where it is a value."""
    if not schema.nan_columns:
        return dense
    share = random.choice(list(_MISSING), (len(dense), 1), p=list(_MISSING.values()))
    return np.where((random.random(dense.shape) < share) & schema.takes_nan, np.float32(np.nan), dense)


def _ends(given: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(D,) the least and the largest number of each column; 0 where it has none."""
    is_number = ~np.isnan(given)
    low, high = np.where(is_number, given, np.inf).min(axis=0), np.where(is_number, given, -np.inf).max(axis=0)
    has_one = is_number.any(axis=0)
    return np.where(has_one, low, 0).astype(np.float64), np.where(has_one, high, 0).astype(np.float64)


def _batch(schema: ModelSchema, dense: Floats, lengths: Counts, ids: Shares, weights: Shares, random: Random) -> Batch:
    rows = len(dense)
    values = _ids(ids, np.repeat(schema.rows, rows), lengths, random)
    values = _with_negative(values, np.repeat(np.repeat(schema.least, rows), lengths), random).astype(schema.id_dtype)
    given = _weights(weights, schema, rows, lengths, random) if schema.weighted else None
    dense = with_missing(dense, schema, random)
    return Batch(rows, dense, lengths, values, one_hot=bool((lengths == 1).all()), weights=given)


def _lengths(schema: ModelSchema, rows: int, longest: int | None, random: Random) -> Counts:
    bags = schema.num_features * rows
    if longest is None:
        return np.ones(bags, np.int32)
    most = np.where(random.random(bags) < 0.5, _SHORT, longest) if longest == _LONG else longest
    drawn = random.integers(0, most, bags, np.int32, endpoint=True)
    return schema.bags(drawn.reshape(schema.num_features, rows)).ravel()


def _dense(shares: Shares, shape: tuple[int, int], random: Random) -> Floats:
    """Rows of numbers, each of one kind."""
    normal = random.standard_normal(shape)
    drawn = {
        "even": random.random(shape),
        "normal": normal,
        "zeros": np.zeros(shape),
        "tails": random.standard_t(2, shape),
        "lognormal": np.exp(2 * normal) * random.choice([-1.0, 1.0], shape),
        "tens": 10 * normal,
        "hundreds": 100 * normal,
    }
    picked = _picked(shares, drawn, _kinds(shares, shape[0], random)[:, None])
    return np.where(random.random((shape[0], 1)) < 0.5, np.abs(picked), picked).astype(np.float32)


def _ids(shares: Shares, tables: NDArray[np.int64], lengths: Counts, random: Random) -> NDArray[np.int64]:
    """(N,) ids of bags whose tables have so many rows. A lone id is 0 or the last in half of the bags of these
    kinds."""
    rows = np.repeat(tables, lengths)
    even = random.integers(0, rows)
    one = np.repeat(random.integers(0, tables), lengths)
    half = random.random(len(rows)) < 0.5
    place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    single = (place == 0) & (half | np.repeat(lengths > 1, lengths))
    drawn = {
        "even": even,
        "zipf": np.minimum(rows.astype(np.float64) ** random.random(len(rows)) - 1, rows - 1).astype(np.int64),
        "first": np.where(single, 0, even),
        "last": np.where(single, rows - 1, even),
        "firsts": np.where(half, 0, even),
        "lasts": np.where(half, rows - 1, even),
        "repeated": one,
    }
    return _picked(shares, drawn, np.repeat(_kinds(shares, len(lengths), random), lengths))


def _with_negative(ids: NDArray[np.int64], least: NDArray[np.int64], random: Random) -> NDArray[np.int64]:
    """(N,) ids, of which some are below 0 where they may be: a quarter even over what they may be, as many as near to 0
    as the ids before were, and few the least."""
    if not least.any():
        return ids
    kind = random.random(len(ids))
    even = random.integers(least, np.where(least < 0, 0, 1))
    found = np.select([kind < 0.25, kind < 0.5, kind < 0.55], [even, np.maximum(-1 - ids, least), least], ids)
    return np.where(least < 0, found, ids)


def _weights(shares: Shares, schema: ModelSchema, rows: int, lengths: Counts, random: Random) -> Floats:
    """(N,); 1 where a feature takes none."""
    takes = np.repeat([feature.weighted for feature in schema.features], rows)
    kinds = np.repeat(np.where(takes, _kinds(shares, len(lengths), random), "one"), lengths)
    count = len(kinds)
    drawn = {
        "even": 2 * random.random(count),
        "one": np.ones(count),
        "zero": np.zeros(count),
        "normal": random.standard_normal(count),
    }
    return _picked(shares, drawn, kinds).astype(np.float32)


def _kinds(shares: Shares, count: int, random: Random) -> NDArray[Any]:
    """(count,) kinds, each as often as its share."""
    return random.choice(list(shares), count, p=np.array(list(shares.values())) / sum(shares.values()))


def _picked(shares: Shares, drawn: Mapping[str, NDArray[Any]], kinds: NDArray[Any]) -> NDArray[Any]:
    """Where a kind stands, what was drawn for it."""
    return np.select([kinds == kind for kind in shares], [drawn[kind] for kind in shares])
