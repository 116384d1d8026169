"""What a program cannot say for every row is not read: the reader stops there, and names the operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

from narsil.errors import ArtifactError
from narsil.program.reading import merged, record
from tests.integration.test_program_readers import ROWS, WIDTH, W, readings_of, refused

pytestmark = pytest.mark.filterwarnings("ignore")

FIVE = torch.randn(ROWS[0], WIDTH)  # as many rows as the first recording has


def changed_view(x: Any) -> Any:
    doubled = x * 2
    doubled[:, :2].add_(1)
    return doubled


def changed_source(x: Any) -> Any:
    doubled = x * 2
    view = doubled[:, :2]
    doubled.mul_(3)
    return view


def changed_constant(x: Any) -> Any:
    made = torch.zeros(WIDTH)
    first = x + made
    made.add_(1)
    return first + made


class Counting(torch.nn.Module):  # type: ignore[name-defined]
    """Scores otherwise each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        return x * self.calls


# name -> (module, what the sentence says)
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "softmax over rows": (lambda x: torch.softmax(x, 0), "aten._softmax: it goes over the rows"),
    "mean over rows": (lambda x: x - x.mean(0), "aten.mean: it goes over the rows"),
    "mean over all": (lambda x: x - x.mean(), "aten.mean"),
    "sum over rows": (lambda x: x + x.sum(0, keepdim=True), "aten.sum: it goes over the rows"),
    "amax over rows": (lambda x: x - x.amax((0, 1)), "aten.amax: it goes over the rows"),
    "cumsum over rows": (lambda x: x.cumsum(0), "aten.cumsum"),
    "sorted rows": (lambda x: x.sort(0)[0], "aten.sort"),
    "flipped rows": (lambda x: x.flip(0), "aten.flip"),
    "rolled rows": (lambda x: x.roll(1, 0), "aten.roll"),
    "batch norm in training": (
        lambda x: F.batch_norm(x, torch.zeros(WIDTH), torch.ones(WIDTH), training=True),
        "put the model into eval mode",
    ),
    "rows as columns": (lambda x: x @ x.t() @ x, "aten.mm"),
    "first rows": (lambda x: x - x[:1], "aten.slice: it takes some rows"),
    "a hundred rows": (lambda x: x[:100], "aten.slice: it takes some rows"),
    "all rows but one": (lambda x: x[1:] - x[:-1], "aten.slice: it takes some rows"),
    "every other row": (lambda x: x[::2], "aten.slice: it takes some rows"),
    "one row": (lambda x: x - x[0], "aten.select: it takes some rows"),
    "rows by places": (lambda x: x[torch.tensor([0, 0, 0, 0, 0])], "aten.index: it takes rows by their number"),
    "index_select of rows": (lambda x: x.index_select(0, torch.tensor([1])), "aten.index_select: it takes rows"),
    "rows chunked": (lambda x: x.chunk(2)[0] * 1, "aten.split"),
    "rows on another axis": (lambda x: x.unsqueeze(0) * 2, "it is rows that are not the first axis"),
    "rows laid out anew": (lambda x: x.view(WIDTH, -1).sum(0), "not laid out row by row"),
    "rows as columns by view": (lambda x: x.view(2, -1, 3).mean(0), "not laid out row by row"),
    "sum of folded rows": (lambda x: x.view(-1, 3).sum(0), "laid out as more than one"),
    "softmax of folded rows": (lambda x: x.view(-1).softmax(0), "aten._softmax: it goes over the rows"),
    "how many rows there are": (lambda x: x / x.shape[0], "follows from how many rows there are"),
    "how many, as a float": (lambda x: x * float(x.shape[0]), "follows from how many rows there are"),
    "how many, as a tensor": (lambda x: x * torch.tensor(x.shape[0]), "follows from how many rows there are"),
    "how many, in a constant": (lambda x: x * torch.full((WIDTH,), x.shape[0]), "follows from how many rows"),
    "how many, in alpha": (lambda x: torch.add(x, x, alpha=x.shape[0]), "follows from how many rows there are"),
    "numbers of the rows": (lambda x: x + torch.arange(x.shape[0])[:, None], "aten.arange"),
    "a column that follows from the rows": (lambda x: x[:, x.shape[0] - 5], "follows from how many rows"),
    "columns that follow from the rows": (lambda x: x[:, x.shape[0] - 4 :] * 2, "follows from how many rows"),
    "a view that is changed": (changed_view, "aten.add_: it changes a tensor in place"),
    "a view of what is changed": (changed_source, "aten.mul_: it changes a tensor in place"),
    "a constant that is changed": (changed_constant, "changes in place"),
    "a buffer that counts": (Counting(), "changes in place"),
    "copied into": (lambda x: (x * 1).copy_(x.flip(0)), "aten.flip"),
    "filled": (lambda x: (x * 1).index_fill_(1, torch.tensor([0]), 3.0), "aten.index_fill_"),
    "random": (lambda x: x + torch.rand_like(x), "aten.rand_like"),
    "dropout in training": (lambda x: F.dropout(x, 0.5, training=True), "aten."),
    "a number of data": (lambda x: x * x[0, 0].abs().clamp(0, 0).item(), "leaves the tensors"),
    "a branch on data": (lambda x: x * 2 if float(x.sum()) > 1e9 else x, "leaves the tensors"),
    "a branch on a truth": (lambda x: x * 2 if (x > 1e9).any() else x, "leaves the tensors"),
    "how many data are": (lambda x: x + len(torch.nonzero(x > 1e9)), "aten.nonzero: a size follows"),
    "chosen data": (lambda x: x + x.masked_select(x > 1e9).numel(), "aten.masked_select: a size follows"),
    "bits": (lambda x: x.view(torch.int32).float(), "it reads the bits of numbers as others"),
    "32 of 64 bits": (lambda x: (x.long() * 2**33).int().float(), "32 bits of 64"),
    "an operation without a step": (lambda x: x.cumprod(0), "aten.cumprod: no step for it"),
    "a constant alone": (lambda x: W, "it is a constant of the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_row_says_alone_is_not_read(name: str) -> None:
    forward, why = REFUSED[name]
    refused(forward, why)


def test_a_constant_of_as_many_rows_as_the_probe_has_is_no_rows_own() -> None:
    readings = readings_of(lambda x: x[:, :5] * FIVE[:, 0])
    assert readings.program is not None  # (5,): one number a column, for every row
    inputs = [{"x": torch.randn(ROWS[0], WIDTH)} for _ in range(2)]
    recording = merged(*(record(lambda batch: batch["x"] + FIVE, each) for each in inputs))
    from narsil.program.reading import read

    found = read(recording, (5, 5), {}, lambda weights, position: pytest.fail("no lookup"), ("x",), {})
    assert found.program is None
    assert "belongs to certain rows" in found.problem


def test_a_model_that_branches_is_refused() -> None:
    def branching(x: Any) -> Any:
        return x.relu() if x.shape[0] > 6 else x

    with pytest.raises(ArtifactError, match="branch on data or on sizes"):
        readings_of(branching)

    def others(x: Any) -> Any:
        return x.relu() if x.shape[0] > 6 else x.tanh()

    with pytest.raises(ArtifactError, match=r"does aten\.tanh for some rows and aten\.relu for others"):
        readings_of(others)


def test_outputs_that_change_places_are_refused() -> None:
    def swapped(x: Any) -> Any:
        one, other = x.relu(), x.tanh()
        return {"a": one, "b": other} if x.shape[0] == 5 else {"a": other, "b": one}

    with pytest.raises(ArtifactError, match="other operations"):
        readings_of(swapped)


def test_what_no_output_comes_of_is_no_fault() -> None:
    def idle(x: Any) -> Any:
        torch.erf(x).sum(0)
        return x * 2

    assert readings_of(idle).program is not None
