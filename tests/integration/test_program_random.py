"""Random small models: what is read of one computes what it does, for whatever rows, or it is not read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

from narsil.errors import ArtifactError
from tests.integration.test_program_readers import WIDTH, readings_of

pytestmark = pytest.mark.filterwarnings("ignore")

Values = list[Any]  # what the model has made so far
# What an operation raises on a shape that it does not take.
FAILS = (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError)


@dataclass(frozen=True)
class Draw:
    """The numbers by which an operation is chosen; an operation takes what it needs of them."""

    seed: int
    pick: int
    axis: int
    other: int
    size: int

    def constant(self, *shape: int) -> Any:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed))


def _axis(x: Any, draw: Draw) -> int:
    """Any axis: the rows' too at times, so that mixing them is tried."""
    return 0 if x.dim() == 1 or draw.axis == 0 else 1 + draw.axis % (x.dim() - 1)


def _factor(x: Any, draw: Draw) -> tuple[int, ...]:
    """A shape of as many numbers a row, or one that folds rows."""
    size = x[0].numel()
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    first = divisors[draw.pick % len(divisors)]
    shapes = [(-1, first, size // first), (-1, first), (-1, 1, size), (-1, size), (first, -1)]
    return shapes[draw.size % len(shapes)]


def _linear(x: Any, y: Any, draw: Draw) -> Any:
    return F.linear(x, draw.constant(1 + draw.size % 5, x.shape[-1]) * 0.3, None if draw.pick % 2 else draw.constant(1))


def _reduced(x: Any, y: Any, draw: Draw) -> Any:
    function = [torch.sum, torch.mean, torch.amax, torch.amin][draw.pick % 4]
    return function(x, dim=_axis(x, draw), keepdim=bool(draw.size % 2))


def _unary(x: Any, y: Any, draw: Draw) -> Any:
    every: list[Callable[[Any], Any]] = [
        *(torch.relu, torch.sigmoid, torch.tanh, F.silu, F.gelu, torch.abs, torch.neg, F.leaky_relu),
        *(lambda v: v.clamp(-0.5, 0.5), lambda v: v.clamp(min=0.1), lambda v: torch.log1p(v.abs())),
        *(torch.nan_to_num, lambda v: 1 - v, lambda v: v / 3, lambda v: v.double().float()),
        *(lambda v: (v > 0.1).float(), lambda v: v.contiguous(), lambda v: torch.exp(-v.abs())),
    ]
    return every[draw.pick % len(every)](x)


def _binary(x: Any, y: Any, draw: Draw) -> Any:
    every = [torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: a / (b.abs() + 1)]
    return every[draw.pick % len(every)](x, y)


def _with_constant(x: Any, y: Any, draw: Draw) -> Any:
    shapes = [x.shape[1:], (1, *x.shape[1:]), x.shape[-1:], (1,), (), x.shape[1:], x.shape[-1:], (5,)]
    return _binary(x, draw.constant(*shapes[draw.size % len(shapes)]), draw)


def _where(x: Any, y: Any, draw: Draw) -> Any:
    return torch.where(x > draw.constant(1).item(), x, y)


def _joined(x: Any, y: Any, draw: Draw) -> Any:
    return torch.cat([x, y], _axis(x, draw)) if draw.pick % 2 else torch.stack([x, y], draw.axis % (x.dim() + 1))


def _sliced(x: Any, y: Any, draw: Draw) -> Any:
    axis = _axis(x, draw)
    pick: list[Any] = [slice(None)] * axis
    ends = [slice(draw.pick % 3, None, 1 + draw.size % 2), slice(None, -1), draw.other % x.shape[axis], slice(-2, None)]
    return x[(*pick, ends[draw.size % 4])]


def _indexed(x: Any, y: Any, draw: Draw) -> Any:
    axis = _axis(x, draw)
    places = torch.tensor([draw.pick % x.shape[axis], draw.other % x.shape[axis]])
    return x[(*[slice(None)] * axis, places)] if draw.size % 2 else x.index_select(axis, places)


def _split(x: Any, y: Any, draw: Draw) -> Any:
    axis = _axis(x, draw)
    parts = [x.split(2, axis), x.chunk(2, axis), x.unbind(axis)][draw.pick % 3]
    return parts[draw.other % len(parts)]


def _shaped(x: Any, y: Any, draw: Draw) -> Any:
    every = [
        *(lambda: x.reshape(_factor(x, draw)), lambda: x.flatten(1), x.flatten),
        *(lambda: x.unsqueeze(draw.axis % (x.dim() + 1)), lambda: x.squeeze(_axis(x, draw))),
        *(lambda: x.transpose(_axis(x, draw), draw.other % x.dim()), lambda: x.movedim(-1, 1)),
        *(lambda: x.unsqueeze(1).expand(-1, 2, *[-1] * (x.dim() - 1)), lambda: x.reshape(x.shape[0], -1)),
    ]
    return every[draw.pick % len(every)]()


def _product(x: Any, y: Any, draw: Draw) -> Any:
    x, y = (value if value.dim() == 3 else value.reshape(value.shape[0], 1, -1) for value in (x, y))
    return torch.bmm(x, y.transpose(1, 2)) if draw.pick % 3 else x @ draw.constant(x.shape[-1], 2)


def _normed(x: Any, y: Any, draw: Draw) -> Any:
    if draw.pick % 3 == 0:
        return F.softmax(x, _axis(x, draw))
    if draw.pick % 3 == 1:
        return F.layer_norm(x, x.shape[-1:], draw.constant(x.shape[-1]))
    return F.batch_norm(x, draw.constant(x.shape[1]), draw.constant(x.shape[1]).abs() + 1, training=draw.size == 0)


def _in_place(x: Any, y: Any, draw: Draw) -> Any:
    every = [
        *(lambda: x.add_(1), lambda: x.mul_(0.5), x.relu_, lambda: x.clamp_(-1, 1), lambda: x[:, :1].add_(1)),
        *(lambda: x.sub_(y), lambda: x.copy_(y), x.view(-1)[0].zero_),
    ]
    return every[draw.pick % len(every)]()


def _mixing(x: Any, y: Any, draw: Draw) -> Any:
    every = [
        *(lambda: x.flip(0), lambda: x.roll(1, 0), lambda: x - x.mean(), lambda: x.cumsum(_axis(x, draw))),
        *(lambda: x * x.shape[0], lambda: x.sort(_axis(x, draw))[0], lambda: x[: x.shape[0]], lambda: x[:3]),
        *(lambda: x / x.norm(), lambda: x + torch.arange(x.shape[0]).view(-1, *[1] * (x.dim() - 1))),
    ]
    return every[draw.pick % len(every)]()


USUAL = (
    *(_linear, _reduced, _unary, _unary, _binary, _with_constant, _where, _joined, _sliced, _indexed, _split),
    *(_shaped, _shaped, _product, _normed),
)
OPERATIONS = (*USUAL, *USUAL, _in_place, _mixing)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(range(len(OPERATIONS))),
        st.integers(0, 20),
        st.integers(0, 20),
        st.builds(Draw, *[st.integers(0, 30)] * 5),
    ),
    min_size=2,
    max_size=8,
)


class Model:
    """Operations over what was made before; one that a shape does not let run is passed over, and so is what gives
    nothing."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps
        self.left_out: set[int] | None = None

    def __call__(self, x: Any) -> Any:
        values: Values = [x]
        fails = set()
        for number, (which, one, other, draw) in enumerate(self.steps):
            if self.left_out is not None and number in self.left_out:
                continue
            try:
                made = OPERATIONS[which](values[-1 - one % len(values)], values[-1 - other % len(values)], draw)
            except FAILS:
                if self.left_out is not None:
                    raise
                fails.add(number)
                continue
            values.append(made)
        if self.left_out is None:
            self.left_out = fails
        return values[-1]


def trimmed(steps: Any) -> Model:
    """A model of the operations that run on 5, on 7 and on 11 rows."""
    model = Model(steps)
    left_out: set[int] = set()
    for rows in (5, 7, 11):
        trial = Model(steps)
        trial(torch.randn(rows, WIDTH))
        left_out |= trial.left_out or set()
    model.left_out = left_out
    return model


@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(STEPS)
def test_a_program_never_computes_anything_else(steps: Any) -> None:
    model = trimmed(steps)
    try:
        readings = readings_of(model)
    except ArtifactError:
        event("branches")
        return
    if readings.program is None:
        event("not read")
        return
    event("read")
    for rows in (11, 3):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
        expected = model(x.clone())
        found = readings.program.reference({"x": x.numpy()}, {})["default"]
        assert found.shape == tuple(expected.shape)
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        np.testing.assert_allclose(found / scale, expected.double().numpy() / scale, rtol=1e-4, atol=1e-4)
