"""Linear layers in the kinds of number that forward.cpp multiplies, and the file that holds them.

Receives FP32 layers; produces Packed arrays and weights.bin, which is mapped again when a model is served. Imports no
torch. Kinds, what a multiplication costs beside FP32's, and what it rounds:

    fp32    1     nothing
    bf16    1/2   input and weights to 8 significant bits
    int16   1/2   input to 13 bits of the row's largest number, weights to what 32-bit sums leave room for, about 11
                  bits of the output's largest weight: finer than bf16 at its speed
    int8    1/4   input to 8 bits of the row's largest number, weights to 8 bits of the output's largest

Inputs are quantized row by row when a request is served, so that no calibration is needed, no input is clipped, and a
row's score does not depend on the others in its batch. Sums are exact in int8 and int16, and FP32 in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from narsil.dataflow import Floats
from narsil.errors import ArtifactError

__all__ = ["KINDS", "PANEL", "LayerShape", "Packed", "kinds_here", "pack", "pack_logit", "read_packed", "write_packed"]

KINDS = ("fp32", "bf16", "int16", "int8")  # by forward.cpp's numbers
PANEL = 32  # outputs side by side
PER_DWORD = {"fp32": 1, "bf16": 2, "int16": 2, "int8": 4}

_SHIFT = 128  # int8: what makes bytes of an input that may be negative
_LEVELS_INT8 = {True: 127, False: 255}  # by whether the input may be negative
_LEVELS_INT16 = {True: 4095, False: 8191}
_MOST_SUM = 2**31 - 1
_MOST_INPUTS = 1 << 16  # beyond, sums of int8 could leave 32 bits, and int16 weights would have too few levels left
_LEAST_STEP = 1e-30  # of a weight: smaller ones round to zero
_ALIGN = 64
_MOST_SIZE = 1 << 24


class HasWeights(Protocol):
    """A linear layer's FP32 weights; see core.Linear."""

    @property
    def weight(self) -> Any:
        """(out, in) tensor."""

    @property
    def bias(self) -> Any:
        """(out,) tensor."""


@dataclass(frozen=True)
class LayerShape:
    """One linear layer, as it stands in the manifest."""

    inputs: int
    outputs: int
    kind: str
    signed: bool  # whether its input may be negative: the first layer of each arch

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def check(self) -> None:
        """Raises ArtifactError on values that no layer has."""
        sizes = (self.inputs, self.outputs)
        if not all(type(size) is int and 1 <= size <= _MOST_SIZE for size in sizes):
            raise ArtifactError("the manifest's layers have impossible sizes; compile the model again")
        if self.kind not in KINDS or type(self.signed) is not bool:
            raise ArtifactError("the manifest's layers are of unknown kinds; compile the model again")
        if not fits(self.kind, self.inputs):
            raise ArtifactError(f"{self.inputs} inputs are too many for {self.kind}; compile the model again")

    @property
    def dwords(self) -> int:
        """Of one input row."""
        return -(-self.inputs // PER_DWORD[self.kind])

    @property
    def shift(self) -> int:
        """Added to the input's integers."""
        return _SHIFT if self.kind == "int8" and self.signed else 0

    @property
    def levels(self) -> int:
        """The integer that a row's largest number becomes."""
        return {"int8": _LEVELS_INT8, "int16": _LEVELS_INT16}.get(self.kind, {}).get(self.signed, 0)

    def parts(self, *, logit: bool) -> tuple[tuple[type[Any], tuple[int, ...]], ...]:
        """Type and shape of weights, bias, scale and excess."""
        if logit:
            return (np.float32, (_up(self.inputs, 16),)), (np.float32, (16,)), (np.float32, (0,)), (np.int32, (0,))
        width = _up(self.outputs, PANEL)
        scaled = width if self.kind in ("int8", "int16") else 0
        return (
            (np.uint32, (width // PANEL, self.dwords, PANEL)),
            (np.float32, (width,)),
            (np.float32, (scaled,)),
            (np.int32, (scaled,)),
        )


@dataclass(frozen=True)
class Packed:
    """One layer as forward.cpp reads it; see there for the order."""

    shape: LayerShape
    weights: NDArray[Any]  # (panels, dwords, 32) uint32; of the logit (inputs up to a multiple of 16,) float32
    bias: Floats
    scale: Floats  # empty in floating kinds
    excess: NDArray[np.int32]  # empty in floating kinds


def kinds_here(flags: Sequence[str]) -> tuple[str, ...]:
    """The kinds that a processor with these flags multiplies; none where forward.cpp does not run at all."""
    have = set(flags)
    if not {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c", "fma"} <= have:
        return ()
    kinds = ["fp32"]
    if "avx512_bf16" in have:
        kinds.append("bf16")
    if "avx512_vnni" in have:
        kinds += ["int16", "int8"]
    return tuple(kinds)


def fits(kind: str, inputs: int) -> bool:
    """Whether a layer of so many inputs can be of a kind."""
    return kind not in ("int8", "int16") or inputs <= _MOST_INPUTS


def pack(linear: HasWeights, kind: str, *, signed: bool) -> Packed:
    """One layer but the logit's; ``signed``: whether its input may be negative."""
    weight = np.asarray(linear.weight, np.float32)
    shape = LayerShape(weight.shape[1], weight.shape[0], kind, signed)
    wide = np.zeros((_up(shape.outputs, PANEL), shape.dwords * PER_DWORD[kind]), np.float32)
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
    wide = np.zeros(_up(shape.inputs, 16), np.float32)
    wide[: shape.inputs] = weight[0]
    bias = np.zeros(16, np.float32)
    bias[0] = float(linear.bias[0])
    return Packed(shape, wide, bias, np.zeros(0, np.float32), np.zeros(0, np.int32))


def write_packed(layers: Sequence[Packed], file: Any) -> None:
    """weights.bin: each layer's weights, bias, scale and excess, each from a multiple of 64 bytes on."""
    for layer in layers:
        for array in (layer.weights, layer.bias, layer.scale, layer.excess):
            data = array.tobytes()
            file.write(data)
            file.write(bytes(_up(len(data), _ALIGN) - len(data)))


def read_packed(shapes: Sequence[LayerShape], data: NDArray[np.uint8]) -> tuple[Packed, ...]:
    """The layers in the bytes of a weights.bin, as views; the last is the logit's. Raises ArtifactError where there are
    more or fewer bytes than the shapes have."""
    for shape in shapes:
        shape.check()
    needed = sum(
        _up(_bytes(kind, size), _ALIGN)
        for number, shape in enumerate(shapes)
        for kind, size in shape.parts(logit=number == len(shapes) - 1)
    )
    if needed != data.size:
        raise ArtifactError(
            f"weights.bin has {data.size} bytes where its layers have {needed}; compile the model again"
        )
    layers, at = [], 0
    for number, shape in enumerate(shapes):
        arrays: list[NDArray[Any]] = []
        for kind, size in shape.parts(logit=number == len(shapes) - 1):
            count = _bytes(kind, size)
            arrays.append(data[at : at + count].view(kind).reshape(size))
            at += _up(count, _ALIGN)
        layers.append(Packed(shape, *arrays))
    return tuple(layers)


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


def _bytes(kind: type[Any], size: tuple[int, ...]) -> int:
    total = np.dtype(kind).itemsize
    for extent in size:
        total *= extent
    return total


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
