"""Packs FP32 linear layers in the kinds of number that the fused forward multiplies: see artifacts/packed.py."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.packed import PANEL, PER_DWORD, LayerShape, Packed, rounded_up
from narsil.dataflow import Floats

__all__ = ["pack", "pack_logit"]

_MOST_SUM = 2**31 - 1
_LEAST_STEP = 1e-30  # of a weight: smaller ones round to zero


class HasWeights(Protocol):
    """A linear layer's FP32 weights; see core.Linear."""

    @property
    def weight(self) -> Any:
        """(out, in) tensor."""

    @property
    def bias(self) -> Any:
        """(out,) tensor."""


def pack(linear: HasWeights, kind: str, *, signed: bool) -> Packed:
    """One layer but the logit's; ``signed``: whether its input may be negative."""
    weight = np.asarray(linear.weight, np.float32)
    shape = LayerShape(weight.shape[1], weight.shape[0], kind, signed)
    wide = np.zeros((rounded_up(shape.outputs, PANEL), shape.dwords * PER_DWORD[kind]), np.float32)
    wide[: shape.outputs, : shape.inputs] = weight
    bias = np.zeros(len(wide), np.float32)
    bias[: shape.outputs] = np.asarray(linear.bias, np.float32)
    scale, excess = np.zeros(0, np.float32), np.zeros(0, np.int32)
    if kind == "fp32":
        codes: NDArray[Any] = wide
    elif kind == "bf16":
        codes = _bf16(wide)
    else:
        steps = _steps(wide, shape)
        codes = np.rint(wide / steps[:, None]).astype(np.int8 if kind == "int8" else np.int16)
        scale = steps.astype(np.float32)
        excess = (shape.shift * codes.astype(np.int32).sum(axis=1)).astype(np.int32)
    dwords = np.ascontiguousarray(codes).view(np.uint32).reshape(-1, PANEL, shape.dwords)
    return Packed(shape, np.ascontiguousarray(dwords.transpose(0, 2, 1)), bias, scale, excess)


def pack_logit(linear: HasWeights) -> Packed:
    """The over arch's last layer, of one output."""
    weight = np.asarray(linear.weight, np.float32)
    shape = LayerShape(weight.shape[1], 1, "fp32", signed=False)
    wide = np.zeros(rounded_up(shape.inputs, 16), np.float32)
    wide[: shape.inputs] = weight[0]
    bias = np.zeros(16, np.float32)
    bias[0] = float(linear.bias[0])
    return Packed(shape, wide, bias, np.zeros(0, np.float32), np.zeros(0, np.int32))


def _steps(wide: Floats, shape: LayerShape) -> NDArray[np.float64]:
    """(outputs,) float64: what one step of each output's weights is worth."""
    exact = wide.astype(np.float64)
    largest = np.abs(exact).max(axis=1)
    if shape.kind == "int8":
        steps = largest / 127
    else:
        # No sum may leave 32 bits, whatever the input: inputs that are never negative meet either the positive or the
        # negative weights at worst. Rounding adds at most half a step for each input.
        positive, negative = np.maximum(exact, 0).sum(axis=1), np.maximum(-exact, 0).sum(axis=1)
        worst = positive + negative if shape.signed else np.maximum(positive, negative)
        steps = np.maximum(worst / (_MOST_SUM // shape.levels - shape.inputs), largest / (2**15 - 1))
    result: NDArray[np.float64] = np.maximum(steps, _LEAST_STEP)
    return result.astype(np.float32).astype(np.float64)  # as forward.cpp will read it


def _bf16(values: Floats) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded
