"""Packed linear layers as the fused forward multiplies them, and weights.bin, the file that holds them.

Receives the layers' shapes from a manifest and the file's bytes, both hostile; produces Packed arrays as views of the
bytes. `compile/packing.py` makes them. Imports no torch. Kinds, what a multiplication costs beside FP32's, and what it
rounds:

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.dataflow import Floats
from narsil.errors import ArtifactError

__all__ = [
    "KINDS",
    "PANEL",
    "PER_DWORD",
    "LayerShape",
    "Packed",
    "fits",
    "kinds_here",
    "read_leading",
    "read_packed",
    "rounded_up",
    "write_arrays",
    "write_packed",
]

KINDS = ("fp32", "bf16", "int16", "int8")  # by forward.cpp's numbers
PANEL = 32  # outputs side by side
PER_DWORD = {"fp32": 1, "bf16": 2, "int16": 2, "int8": 4}

_SHIFT = 128  # int8: what makes bytes of an input that may be negative
_LEVELS_INT8 = {True: 127, False: 255}  # by whether the input may be negative
_LEVELS_INT16 = {True: 4095, False: 8191}
_MOST_INPUTS = 1 << 16  # beyond, sums of int8 could leave 32 bits, and int16 weights would have too few levels left
_ALIGN = 64
_MOST_SIZE = 1 << 24


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
            return (
                (np.float32, (rounded_up(self.inputs, 16),)),
                (np.float32, (16,)),
                (np.float32, (0,)),
                (np.int32, (0,)),
            )
        width = rounded_up(self.outputs, PANEL)
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


def write_packed(layers: Sequence[Packed], file: Any) -> None:
    """weights.bin: each layer's weights, bias, scale and excess, each from a multiple of 64 bytes on."""
    for layer in layers:
        write_arrays((layer.weights, layer.bias, layer.scale, layer.excess), file)


def write_arrays(arrays: Sequence[NDArray[Any]], file: Any) -> None:
    """Arrays one after the other, each from a multiple of 64 bytes on."""
    for array in arrays:
        data = array.tobytes()
        file.write(data)
        file.write(bytes(rounded_up(len(data), _ALIGN) - len(data)))


def read_packed(shapes: Sequence[LayerShape], data: NDArray[np.uint8]) -> tuple[Packed, ...]:
    """A DLRM's layers in the bytes of a weights.bin, as views; the last is the logit's. Raises ArtifactError where
    there are more or fewer bytes than the shapes have."""
    layers, used = _read(shapes, data, logit=len(shapes) - 1)
    if used != data.size:
        raise _wrong_size(data, used)
    return layers


def read_leading(shapes: Sequence[LayerShape], data: NDArray[np.uint8]) -> tuple[tuple[Packed, ...], int]:
    """(the layers that a plan's weights.bin begins with, as views; the bytes that they take). Raises ArtifactError
    where there are fewer."""
    return _read(shapes, data, logit=-1)


def _read(shapes: Sequence[LayerShape], data: NDArray[np.uint8], logit: int) -> tuple[tuple[Packed, ...], int]:
    for shape in shapes:
        shape.check()
    parts = [shape.parts(logit=number == logit) for number, shape in enumerate(shapes)]
    needed = sum(rounded_up(_bytes(kind, size), _ALIGN) for part in parts for kind, size in part)
    if needed > data.size:
        raise _wrong_size(data, needed)
    layers, at = [], 0
    for shape, part in zip(shapes, parts, strict=True):
        arrays: list[NDArray[Any]] = []
        for kind, size in part:
            count = _bytes(kind, size)
            arrays.append(data[at : at + count].view(kind).reshape(size))
            at += rounded_up(count, _ALIGN)
        layers.append(Packed(shape, *arrays))
    return tuple(layers), needed


def _wrong_size(data: NDArray[np.uint8], needed: int) -> ArtifactError:
    return ArtifactError(f"weights.bin has {data.size} bytes where its layers have {needed}; compile the model again")


def _bytes(kind: type[Any], size: tuple[int, ...]) -> int:
    total = np.dtype(kind).itemsize
    for extent in size:
        total *= extent
    return total


def rounded_up(value: int, step: int) -> int:
    """The least multiple of ``step`` that is no less than ``value``."""
    return -(-value // step) * step
