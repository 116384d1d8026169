"""Small modules are recorded on a few rows and read; the program then scores other rows as the module does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

from narsil.program.reading import Readings, merged, read, record

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, WIDTH = (5, 7), 6
NONE: dict[int, Any] = {}


def readings_of(forward: Callable[[Any], Any], width: int = WIDTH) -> Readings:
    """What is read of a module that takes (B, width) columns."""
    random = torch.Generator().manual_seed(3)
    inputs = [{"x": torch.randn(rows, width, generator=random)} for rows in ROWS]
    recordings = [record(lambda batch: forward(batch["x"]), each) for each in inputs]

    def no_tables(weights: Any, position: int) -> Any:
        raise AssertionError("there is no lookup")

    return read(merged(*recordings), ROWS, {}, no_tables, ("x",), NONE)


def other_rows(count: int = 11, width: int = WIDTH) -> Any:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)) * 2


def check(forward: Callable[[Any], Any], width: int = WIDTH, tolerance: float = 1e-5) -> None:
    """The program is read whole, and gives what the module gives for other rows, and for one alone."""
    readings = readings_of(forward, width)
    assert readings.program is not None, readings.problem
    for count in (11, 2, 64):
        rows = other_rows(count, width)
        with torch.no_grad():
            expected = forward(rows.clone())
        found = readings.program.reference({"x": rows.numpy()}, {})["default"]
        assert found.shape == tuple(expected.shape)
        np.testing.assert_allclose(found, expected.double().numpy(), rtol=tolerance, atol=tolerance)


def refused(forward: Callable[[Any], Any], why: str = "", width: int = WIDTH) -> None:
    """Some operation of the module is not read, and the sentence says which."""
    readings = readings_of(forward, width)
    assert readings.program is None
    assert why in readings.problem, readings.problem


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return make().eval()


class Statistics(torch.nn.Module):  # type: ignore[name-defined]
    """Batch norm as training leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(self.norm.weight)
        torch.nn.init.uniform_(self.norm.bias)

    def forward(self, x: Any) -> Any:
        return self.norm(x)


W = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(7))
ROW = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
PLACES = torch.tensor([4, 0, 0, 5])
MASK = torch.tensor([True, False, True, True, False, True])

READ: dict[str, Callable[[Any], Any]] = {
    # linear layers
    "linear": seeded(lambda: torch.nn.Linear(WIDTH, 3)),
    "linear without bias": seeded(lambda: torch.nn.Linear(WIDTH, 3, bias=False)),
    "mm": lambda x: x.mm(W.t()),
    "matmul": lambda x: x @ W.t(),
    "addmm": lambda x: torch.addmm(W[:, 0], x, W.t()),
    "linear per field": lambda x: F.linear(x.view(-1, 2, 3), W[:, :3]),
    "mlp": seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))),
    "double layer": lambda x: F.linear(x.double(), W.double()),
    # activations
    **{
        f"{function.__name__}": function
        for function in (torch.relu, torch.sigmoid, torch.tanh, F.silu, F.gelu, F.leaky_relu, torch.exp, torch.abs)
    },
    **{f"{function.__name__}": function for function in (torch.neg, torch.sign, torch.floor, F.relu6, F.hardtanh)},
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky relu 0.3": lambda x: F.leaky_relu(x, 0.3),
    "relu_": lambda x: F.relu(x * 2, inplace=True),
    "sigmoid_": lambda x: (x * 2).sigmoid_(),
    "tanh_": lambda x: (x * 2).tanh_(),
    "silu_": lambda x: F.silu(x * 2, inplace=True),
    "leaky relu_": lambda x: F.leaky_relu(x * 2, 0.2, inplace=True),
    "zeros_like": lambda x: torch.where(x > 0.5, x, torch.zeros_like(x)),
    "ones_like": lambda x: x - torch.ones_like(x[:, :2]).sum(1, keepdim=True),
    "full_like": lambda x: x * torch.full_like(x, 0.3),
    "put where a mask is": lambda x: (x * 2).index_put_((x > 0.5,), torch.tensor(0.25)),
    "log of what is positive": lambda x: torch.log(x.abs() + 1),
    "log1p": lambda x: torch.log1p(x.clamp(min=0)),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 1),
    "softplus by hand": lambda x: torch.log(1 + torch.exp(x)),
    # numbers
    "add alpha": lambda x: torch.add(x, 3, alpha=2),
    "rsub": lambda x: 1 - x,
    "rsub of two": lambda x: torch.rsub(x, x * 2),
    "scalars": lambda x: (x * 3 - 0.5) / 4 + 1,
    "divided": lambda x: 2 / (x.abs() + 1),
    "power": lambda x: x**2,
    "power of a number": lambda x: 2.0**x,
    "root": lambda x: x.abs() ** 0.5,
    "remainder": lambda x: torch.remainder(x, 0.7),
    "remainder by less than 0": lambda x: torch.remainder(x, -0.7),
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "clamp min": lambda x: x.clamp(min=0.1),
    "clamp max": lambda x: torch.clamp_max(x, 0.1),
    "clamp_": lambda x: (x * 2).clamp_(max=0.3),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 2.0),
    "hardtanh of one side": lambda x: F.hardtanh(x, max_val=0.5),
    "maximum": lambda x: torch.maximum(x, -x * 0.5),
    "minimum": lambda x: torch.minimum(x, ROW),
    "nan_to_num": lambda x: torch.nan_to_num(torch.log(x), nan=-3.0, neginf=7.0),
    "nan_to_num of half": lambda x: torch.nan_to_num((x / 0).half()).float() / 1e5,
    "where": lambda x: torch.where(x > 0.2, x, ROW),
    "where of numbers": lambda x: torch.where(x > 0.2, 1.0, -2.0),
    "comparisons": lambda x: ((x >= 0.1) & (x < 1) | torch.isnan(x)).float() + (x <= -1).double(),
    "not": lambda x: (~(x > 0)).float(),
    "logical": lambda x: torch.logical_or(torch.logical_not(x > 0), x > 1).float(),
    "masks multiplied": lambda x: ((x > 0) * (x < 1)).float(),
    "isnan": lambda x: torch.isnan(torch.log(x)).float(),
    "counted": lambda x: (x > 0).sum(1, keepdim=True),
    "whole numbers": lambda x: (x.long() * 3 + 1).float(),
    "in place, twice": lambda x: (x * 1).add_(1).mul_(ROW).sub_(0.5).div_(3),
    # constants
    "a row": lambda x: x * ROW + ROW,
    "(1, d)": lambda x: (x - ROW.view(1, -1)) / ROW.abs().view(1, -1),
    "a column broadcast": lambda x: x[:, :1] * ROW,
    "a constant made each time": lambda x: x + torch.arange(WIDTH),
    "a list": lambda x: x + torch.tensor([1.0, 2, 3, 4, 5, 6]),
    # norms
    "batch norm": seeded(Statistics),
    "layer norm": seeded(lambda: torch.nn.LayerNorm(WIDTH)),
    "layer norm without weights": lambda x: F.layer_norm(x, (WIDTH,)),
    "layer norm of two axes": lambda x: F.layer_norm(x.view(-1, 2, 3), (2, 3)),
    "layer norm of fields": lambda x: F.layer_norm(x.view(-1, 2, 3), (3,)),
    "layer norm folded": lambda x: F.layer_norm(x.view(-1, 3), (3,)).view(-1, 6),
    "softmax": lambda x: torch.softmax(x, dim=1),
    "softmax of fields": lambda x: torch.softmax(x.view(-1, 2, 3), dim=1),
    "softmax of the last": lambda x: F.softmax(x.view(-1, 2, 3), dim=-1),
    # moved
    "cat": lambda x: torch.cat([x, x * 2, x[:, :1]], dim=1),
    "cat of the last axis": lambda x: torch.cat([x.view(-1, 2, 3), x.view(-1, 2, 3)], -1),
    "cat of a middle axis": lambda x: torch.cat([x.view(-1, 2, 3), x.view(-1, 2, 3) * 2], 1),
    "stack": lambda x: torch.stack([x, x * 2], dim=1),
    "stack behind": lambda x: torch.stack([x, x * 2], dim=-1),
    "slice": lambda x: x[:, 1:5],
    "slice with steps": lambda x: x[:, 1::2],
    "slice from behind": lambda x: x[:, -4:-1],
    "all rows": lambda x: x[:] * x[0:],
    "rows by their number": lambda x: x[: x.shape[0]] * 2,
    "select": lambda x: x[:, 2],
    "select from behind": lambda x: x.select(1, -1),
    "index": lambda x: x[:, PLACES],
    "index by a list": lambda x: x[:, [3, 3, -1]],
    "index by a mask": lambda x: x[:, MASK],
    "index of two axes": lambda x: x.view(-1, 2, 3)[:, [0, 1], [2, 0]],
    "index_select": lambda x: torch.index_select(x, 1, PLACES),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "split": lambda x: torch.cat(x.split(4, dim=1)[::-1], 1),
    "split by sizes": lambda x: x.split([1, 3, 2], 1)[1],
    "chunk": lambda x: x.chunk(4, 1)[2],
    "unbind": lambda x: x.view(-1, 2, 3).unbind(1)[1],
    "transpose": lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6),
    "permute": lambda x: x.view(-1, 1, 2, 3).permute(0, 3, 1, 2),
    "flatten": lambda x: x.view(-1, 2, 3).flatten(1),
    "folded and back": lambda x: torch.relu(x.view(-1, 3) * ROW[:3]).view(-1, 2, 3),
    "folded through a layer": lambda x: F.linear(x.reshape(-1, 3), W[:, :3]).reshape(x.shape[0], -1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1) * 2,
    "expand by the rows": lambda x: x[:, :1].expand(x.shape[0], 4),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "bmm": lambda x: torch.bmm(x.view(-1, 2, 3), x.view(-1, 3, 2)),
    "bmm of itself": lambda x: torch.bmm(x.view(-1, 2, 3), x.view(-1, 2, 3).transpose(1, 2)).flatten(1),
    "matmul by a weight": lambda x: torch.matmul(x.view(-1, 2, 3), W[:, :3].t()),
    "pairs": lambda x: (x[:, :, None] * x[:, None, :])[:, [0, 1], [3, 2]],
    # reduced
    "sum": lambda x: x.sum(1),
    "sum kept": lambda x: x.sum(-1, keepdim=True),
    "sum of two axes": lambda x: x.view(-1, 2, 3).sum((1, 2)),
    "mean": lambda x: x.mean(dim=1),
    "mean kept": lambda x: x.view(-1, 2, 3).mean(1, keepdim=True),
    "amax": lambda x: x.amax(1),
    "amin kept": lambda x: x.view(-1, 2, 3).amin(2, True),
    "norm by hand": lambda x: x / x.pow(2).sum(1, keepdim=True).sqrt(),
    # kinds
    "double": lambda x: x.double() * 2,
    "to float": lambda x: x.to(torch.float64).float(),
    "truth": lambda x: x.bool().float(),
    "clone, detach": lambda x: x.clone().detach().contiguous(),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_computes_what_the_module_does(name: str) -> None:
    check(READ[name])


@pytest.mark.parametrize("name", READ)
def test_of_a_traced_module_the_same_is_read(name: str) -> None:
    with torch.no_grad():
        check(torch.jit.trace(READ[name], other_rows(3), check_trace=False))


ROUNDED = {
    "half": lambda x: (x.half() * 3 + 1).float(),
    "bfloat16": lambda x: (x.bfloat16() * 3 + 1).float(),
    "half layer": lambda x: F.linear(x.half(), W.half()).float(),
    "bfloat16 layer": lambda x: torch.relu(F.linear(x.bfloat16(), W.bfloat16())).float(),
    "half cat": lambda x: torch.cat([x.half(), (x * 2).half()], 1).float(),
    "half output": lambda x: torch.sigmoid(x).half(),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_rounded_to_16_bits_is_rounded_in_the_program(name: str) -> None:
    check(ROUNDED[name], tolerance=2e-2 if "bfloat16" in name else 2e-3)
    readings = readings_of(ROUNDED[name])
    assert readings.program is not None
    found = readings.program.reference({"x": other_rows().numpy()}, {})["default"]
    kind = torch.bfloat16 if "bfloat16" in name else torch.float16
    assert torch.equal(torch.from_numpy(found), torch.from_numpy(found).to(kind).double())
