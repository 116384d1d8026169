"""Packed layers: the numbers that forward.cpp multiplies, and the file that holds them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil.artifacts.packed import PANEL, LayerShape, fits, kinds_here, read_packed, write_packed
from narsil.compile.packing import pack, pack_logit
from narsil.dataflow import Floats
from narsil.errors import ArtifactError

ALL = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c", "fma", "avx512_bf16", "avx512_vnni")
MOST_INPUTS = 1 << 16  # of a layer in integers


@dataclass
class Linear:
    weight: Floats
    bias: Floats


def linear(outputs: int, inputs: int, seed: int = 0) -> Linear:
    random = np.random.default_rng(seed)
    return Linear(
        random.standard_normal((outputs, inputs)).astype(np.float32), random.standard_normal(outputs).astype(np.float32)
    )


def unpacked(packed) -> np.ndarray:
    """(outputs, inputs) in the kind's own type."""
    shape = packed.shape
    types = {"fp32": np.float32, "bf16": np.uint16, "int16": np.int16, "int8": np.int8}
    by_output = np.ascontiguousarray(packed.weights.transpose(0, 2, 1)).reshape(-1, shape.dwords)
    return by_output.view(types[shape.kind])[: shape.outputs, : shape.inputs]


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 3), (32, 5), (33, 64), (100, 415)])
@pytest.mark.parametrize("signed", [True, False])
def test_integer_weights_are_near_their_numbers(outputs, inputs, signed):
    layer = linear(outputs, inputs)
    for kind, most in (("int8", 1 / 127), ("int16", 1 / 1000)):
        packed = pack(layer, kind, signed=signed)
        found = unpacked(packed) * packed.scale[:outputs, None]
        largest = np.abs(layer.weight).max(axis=1, keepdims=True)
        assert (np.abs(found - layer.weight) <= 0.51 * most * largest).all()


def test_fp32_weights_are_kept_and_bf16_ones_rounded_to_even():
    layer = linear(40, 7)
    layer.weight[0, :3] = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    np.testing.assert_array_equal(unpacked(pack(layer, "fp32", signed=False)), layer.weight)
    assert unpacked(pack(layer, "bf16", signed=False))[0, :3].tolist() == [0x3F80, 0x3F82, 0x3F81]


@given(
    inputs=st.sampled_from([1, 2, 3, 64, 65, 1000, 4099, MOST_INPUTS]),
    weights=st.sampled_from(["normal", "positive", "negative", "equal", "one large", "tiny", "large"]),
    signed=st.booleans(),
    kind=st.sampled_from(["int8", "int16"]),
    seed=st.integers(0, 99),
)
def test_no_input_can_overflow_the_sums(inputs, weights, signed, kind, seed):
    layer = linear(3, inputs, seed)
    changes: dict[str, Any] = {
        "positive": np.abs,
        "negative": lambda weight: -np.abs(weight),
        "equal": np.ones_like,
        "one large": lambda weight: np.where(np.arange(inputs) == 0, 1e30, weight),
        "tiny": lambda weight: weight * 1e-44,
        "large": lambda weight: weight * 1e37,
    }
    layer.weight = changes.get(weights, np.copy)(layer.weight).astype(np.float32)
    packed = pack(layer, kind, signed=signed)
    codes = unpacked(packed).astype(np.int64)
    most = {"int8": 127, "int16": 2**15 - 1}[kind]
    assert np.abs(codes).max() <= most
    lowest, highest = np.minimum(codes, 0).sum(axis=1), np.maximum(codes, 0).sum(axis=1)
    if signed:
        lowest, highest = lowest - highest, highest - lowest
    assert (highest * packed.shape.levels < 2**31).all()
    assert (lowest * packed.shape.levels >= -(2**31)).all()


def test_a_layer_of_too_many_inputs_for_exact_sums_is_no_integers():
    for kind in ("int8", "int16"):
        assert fits(kind, MOST_INPUTS)
        assert not fits(kind, MOST_INPUTS + 1)
        with pytest.raises(ArtifactError, match=f"65537 inputs are too many for {kind}"):
            LayerShape(MOST_INPUTS + 1, 1, kind, signed=False).check()
    assert fits("fp32", MOST_INPUTS + 1)
    assert fits("bf16", MOST_INPUTS + 1)


def test_an_output_without_weights_is_its_bias():
    layer = linear(2, 8)
    layer.weight[1] = 0
    for kind in ("int8", "int16"):
        packed = pack(layer, kind, signed=True)
        assert not unpacked(packed)[1].any()
        assert np.isfinite(packed.scale).all()


def test_bytes_that_may_be_negative_are_shifted_and_what_that_adds_is_known():
    layer = linear(33, 10)
    packed = pack(layer, "int8", signed=True)
    np.testing.assert_array_equal(packed.excess[:33], 128 * unpacked(packed).astype(np.int32).sum(axis=1))
    assert not pack(layer, "int8", signed=False).excess.any()


def layers() -> list:
    kinds = ("fp32", "bf16", "int16", "int8")
    return [
        *(pack(linear(70, 11 + n, n), kind, signed=n == 0) for n, kind in enumerate(kinds)),
        pack_logit(linear(1, 70)),
    ]


def test_the_file_gives_back_what_was_written():
    written, file = layers(), io.BytesIO()
    write_packed(written, file)
    found = read_packed([layer.shape for layer in written], np.frombuffer(file.getvalue(), np.uint8))
    for ours, theirs in zip(written, found, strict=True):
        assert ours.shape == theirs.shape
        for name in ("weights", "bias", "scale", "excess"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert found[0].weights.shape == (-(-70 // PANEL), 11, PANEL)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (LayerShape(11, 71, "fp32", True), None),
        (LayerShape(11, 170, "fp32", True), "has .* bytes where"),
        (LayerShape(0, 70, "fp32", True), "impossible sizes"),
        (LayerShape(-1, 70, "fp32", True), "impossible sizes"),
        (LayerShape(1 << 60, 70, "fp32", True), "impossible sizes"),
        (LayerShape("11", 70, "fp32", True), "impossible sizes"),  # type: ignore[arg-type]
        (LayerShape(11, 70, "fp64", True), "unknown kinds"),
        (LayerShape(11, 70, "fp32", 1), "unknown kinds"),  # type: ignore[arg-type]
    ],
)
def test_shapes_that_the_bytes_do_not_hold_are_refused(shape, says):
    written, file = layers(), io.BytesIO()
    write_packed(written, file)
    shapes = [shape, *(layer.shape for layer in written[1:])]
    data = np.frombuffer(file.getvalue(), np.uint8)
    if says is None:  # 71 outputs fill the same panels as 70
        read_packed(shapes, data)
        return
    with pytest.raises(ArtifactError, match=says):
        read_packed(shapes, data)


def test_a_processor_has_the_kinds_that_its_flags_say():
    assert kinds_here(ALL) == ("fp32", "bf16", "int16", "int8")
    assert kinds_here(ALL[:-1]) == ("fp32", "bf16")
    assert kinds_here(ALL[:-2]) == ("fp32",)
    assert kinds_here(ALL[1:]) == ()
    assert kinds_here(()) == ()
