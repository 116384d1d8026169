"""A DLRM's scores in float64, and how far those of a forward in other kinds of number lie from them: what its rounding
explains, by arithmetic alone.

Receives the weights that an artifact was packaged from, and its tables' bytes; nothing here comes from what compiling
made, nor from the limit that a compile is judged by. Each rounding is an error of its own, evenly spread over one step,
so that its variance is a twelfth of the step's square; variances add up through sums and products (see
artifacts/packed.py for the steps of each kind). A forward that keeps to its kinds deviates as predicted: one that
leaves out a column, a table or a bias does so by far more, and one that is not in its kinds by far less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.dataflow import Batch
from narsil.packaging.dlrm import DlrmConfig

__all__ = ["Float64Dlrm", "Rounded", "assert_explained"]

Doubles = NDArray[np.float64]

LEVELS = {("int8", True): 127, ("int8", False): 255, ("int16", True): 4095, ("int16", False): 8191}
DIGITS = {"fp32": 24, "bf16": 8}


@dataclass(frozen=True)
class Rounded:
    """True values, and the variance of another forward's around them."""

    value: Doubles
    variance: Doubles


class Float64Dlrm:
    """The forward of a packaged DLRM."""

    def __init__(self, config: DlrmConfig, weights: Mapping[str, Any], script: Path) -> None:
        self.config = config
        self.layers = [
            (weights[f"{name}.weight"].astype(np.float64), weights[f"{name}.bias"].astype(np.float64))
            for name, _, _ in config.linears
        ]
        self.tables = _tables(config, script)

    def scores(self, batch: Batch, kinds: Sequence[str], kept: str = "fp32") -> Rounded:
        """(B,) scores, where the layers but the last are of these kinds, in the order in which they run.

        ``kept`` is the kind of number of what enters and leaves the interaction and leaves layers of bf16.
        """
        dense = len(self.config.dense_arch)
        hidden = Rounded(batch.dense.astype(np.float64), np.zeros(batch.dense.shape))
        for number, kind in enumerate(kinds):
            if number == dense:
                hidden = _joined([hidden, *self._pooled(batch)], kept)
            hidden = _relu(self._layer(number, hidden, kind, signed=number in (0, dense)))
            if kind == "bf16":
                hidden = _rounded(hidden, kept)
        logit = self._layer(len(self.layers) - 1, hidden, "fp32", signed=False)
        value = 1 / (1 + np.exp(-logit.value[:, 0]))
        return _in_fp32(value, logit.variance[:, 0] * (value * (1 - value)) ** 2, value)

    def _layer(self, number: int, given: Rounded, kind: str, *, signed: bool) -> Rounded:
        """in . weights + bias in a kind of number."""
        weight, bias = self.layers[number]
        inputs = given.variance + _variance(_input_steps(given.value, kind, signed=signed))
        weights = _variance(_weight_steps(weight, kind, signed=signed))
        value = given.value @ weight.T + bias
        variance = inputs @ (weight**2 + weights).T + given.value**2 @ weights.T
        return _in_fp32(value, variance, np.sqrt(given.value**2 @ (weight**2).T * weight.shape[1] / 2))

    def _pooled(self, batch: Batch) -> list[Rounded]:
        """(B, dim) of each feature."""
        lengths = batch.lengths.reshape(len(self.tables), batch.rows)
        found, first = [], 0
        for table, counts in zip(self.tables, lengths, strict=True):
            stops = np.cumsum(counts, dtype=np.int64)
            ids = batch.values[first : first + stops[-1]]
            sums = np.concatenate([np.zeros((1, table.shape[1])), np.cumsum(table[ids], axis=0)])
            shares = np.maximum(counts, 1)[:, None] if self.config.pooling == "mean" else 1.0
            values = (sums[stops] - sums[stops - counts]) / shares
            found.append(_in_fp32(values, np.zeros(values.shape), values))
            first += stops[-1]
        return found


def _input_steps(value: Doubles, kind: str, *, signed: bool) -> Doubles:
    """Of numbers, or of integers of the row's largest."""
    if kind in DIGITS:
        return _float_steps(value, kind)
    return np.broadcast_to(np.abs(value).max(axis=1, keepdims=True) / LEVELS[kind, signed], value.shape)


def _weight_steps(weight: Doubles, kind: str, *, signed: bool) -> Doubles:
    """Of numbers, none in FP32, or of integers: int8 by the output's largest, int16 by what its 32-bit sums leave."""
    if kind == "fp32":
        return np.zeros(weight.shape)
    if kind == "bf16":
        return _float_steps(weight, kind)
    steps = np.abs(weight).max(axis=1) / 127
    if kind == "int16":
        positive, negative = np.maximum(weight, 0).sum(axis=1), np.maximum(-weight, 0).sum(axis=1)
        worst = positive + negative if signed else np.maximum(positive, negative)
        steps = np.maximum(worst / ((2**31 - 1) // LEVELS[kind, signed] - weight.shape[1]), steps * 127 / (2**15 - 1))
    return np.broadcast_to(steps[:, None], weight.shape)


def _float_steps(value: Doubles, kind: str) -> Doubles:
    """From one number of so many binary digits to the next."""
    return np.ldexp(1.0, np.frexp(value)[1] - DIGITS[kind]) * (value != 0)


def _variance(steps: Doubles) -> Doubles:
    return steps**2 / 12


def _in_fp32(value: Doubles, variance: Doubles, size: Doubles) -> Rounded:
    """The result of sums in FP32 that are about as large as ``size``."""
    return Rounded(value, variance + _variance(_float_steps(size, "fp32")))


def _rounded(given: Rounded, kind: str) -> Rounded:
    """As numbers of this kind."""
    return Rounded(given.value, given.variance + _variance(_float_steps(given.value, kind)))


def _joined(vectors: Sequence[Rounded], kept: str) -> Rounded:
    """(B, dim + pairs): the dense vector, which comes first, then the products of all pairs."""
    dense, taken = vectors[0], [_rounded(one, kept) for one in vectors]
    value = np.stack([one.value for one in taken], axis=1)
    variance = np.stack([one.variance for one in taken], axis=1)
    upper, right = np.triu_indices(value.shape[1], k=1)
    products = (value @ value.transpose(0, 2, 1))[:, upper, right]
    crossed = value**2 @ variance.transpose(0, 2, 1)
    size = np.sqrt((value**2 @ (value**2).transpose(0, 2, 1))[:, upper, right])
    pairs = _rounded(_in_fp32(products, (crossed + crossed.transpose(0, 2, 1))[:, upper, right], size), kept)
    return Rounded(
        np.concatenate([dense.value, pairs.value], axis=1), np.concatenate([dense.variance, pairs.variance], axis=1)
    )


def _relu(given: Rounded) -> Rounded:
    return Rounded(np.maximum(given.value, 0), given.variance * (given.value > 0))


def _tables(config: DlrmConfig, script: Path) -> list[Doubles]:
    """(rows, dim) of each feature's table, out of the bytes that the artifact holds."""
    from narsil.artifacts.tbe import table_operators
    from narsil.artifacts.torchscript import load_torchscript

    (operator,) = table_operators(load_torchscript(script, "cpu"))
    data, found = operator.weights_host.numpy(), []
    width = -(-(config.dim + 4) // operator.row_alignment) * operator.row_alignment
    for rows, start in zip(config.rows_per_table, operator.weights_offsets.tolist(), strict=True):
        stored = data[start : start + rows * width].reshape(rows, width)
        head = stored[:, :4].copy().view(np.float16).astype(np.float64)
        found.append(stored[:, 4 : 4 + config.dim] * head[:, :1] + head[:, 1:])
    return found


def assert_explained(found: NDArray[np.float32], true: Rounded, *, least: float = 0.2) -> None:
    """The scores deviate as much as rounding makes them: none by more than sixteen times what is predicted on average
    and, where they are many enough to have one, their average by at most twice that and at least ``least`` of it."""
    deviation, predicted = found - true.value, float(np.sqrt(true.variance.mean()))
    assert np.isfinite(found).all()
    assert float(np.abs(deviation).max()) <= 16 * predicted
    if len(found) >= 100:
        assert least * predicted <= float(np.sqrt((deviation**2).mean())) <= 2 * predicted
