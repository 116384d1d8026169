"""Branches that no recording of a few rows shows are found in the graph of a scripted model."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F
    from torch import Tensor

from narsil.artifacts.branches import branch_on_rows

pytestmark = pytest.mark.filterwarnings("ignore")


class Base(torch.nn.Module):  # type: ignore[name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)
        self.norm = torch.nn.BatchNorm1d(6)
        self.steps = 3
        self.training_rows = 0


def loaded(module: Any) -> Any:
    """Scripted, saved and loaded, as artifacts are."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module.eval()), file)
    file.seek(0)
    return torch.jit.load(file)


class ManyRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 100 else x


class ManyRowsByLen(Base):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 100:
            x = x * 2
        return x


class ManyNumbers(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.numel() // 6 > 100 else x


class LargeIds(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if int(x.max()) > 1000 else x


class Truth(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if (x > 1000).any() else x


class AtMost(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x[: min(x.shape[0], 100)]


class TruthAsNumber(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * int(x.shape[0] > 100)


class Hundreds(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.shape[0] % 100 // 50)


class InPieces(Base):
    def forward(self, x: Tensor) -> Tensor:
        made = torch.jit.annotate(list[Tensor], [])
        for start in range(0, x.shape[0], 128):
            made.append(x[start : start + 128] * 2)
        return torch.cat(made)


class WhileRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        while rows > 100:
            rows -= 100
            x = x * 2
        return x


class Padded(Base):
    def forward(self, x: Tensor) -> Tensor:
        more = max(0, 4 - x.shape[0])
        return F.pad(x, [0, 0, 0, more])


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.training_rows += 1
        return x * self.training_rows


class Carried(Base):
    def forward(self, x: Tensor) -> Tensor:
        most = 0
        for _ in range(self.steps):
            most = most + x.shape[0]
        return x * 2 if most > 1000 else x


class InAList(Base):
    def forward(self, x: Tensor) -> Tensor:
        sizes: list[int] = []
        sizes.append(x.shape[0])
        return x * 2 if sizes[0] > 1000 else x


class AsATensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(float(x.shape[0] > 100))


class FirstId(Base):
    def forward(self, x: Tensor) -> Tensor:
        first: list[int] = x.long()[0].tolist()
        return x * first[0]


class OfAMethod(Base):
    def many(self, x: Tensor) -> bool:
        return x.size(0) > 100

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.many(x) else x


class Squared(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * ((x.shape[0] - 5) * (x.shape[0] - 7))


FOUND = (
    *(ManyRows, ManyRowsByLen, ManyNumbers, LargeIds, Truth, AtMost, TruthAsNumber, Hundreds, InPieces, WhileRows),
    *(Padded, Counts, Carried, InAList, AsATensor, FirstId, OfAMethod, Squared),
)


@pytest.mark.parametrize("kind", FOUND)
def test_what_follows_from_the_rows_is_found(kind: type[Base]) -> None:
    assert branch_on_rows(loaded(kind())).startswith("forward ")


@pytest.mark.parametrize("kind", [ManyRows, Counts, AtMost])
def test_of_a_module_that_was_scripted_here_too(kind: type[Base]) -> None:
    assert branch_on_rows(torch.jit.script(kind().eval()))


def test_the_sentence_shows_the_line() -> None:
    found = branch_on_rows(loaded(ManyRows()))
    assert "branches on a number that follows from the rows" in found
    assert "x.shape[0] > 100" in found


class Shapes(Base):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.size(0)
        y = x.view(rows, 2, 3).expand(rows, 2, 3).reshape(rows * 2, -1)
        return y.view(-1, x.shape[1])[:rows]


class Checked(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1_000_000:
            raise ValueError(f"{x.shape[0]} rows")
        assert x.dim() == 2
        return x


class OwnSizes(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.layer.weight.shape[0] == 3:
            x = x * self.layer.weight.shape[1]
        for _ in range(self.steps):
            x = x + 1
        return x if self.training else F.linear(x, self.layer.weight)


class Layers(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(self.norm(x), [6])
        x = F.dropout(F.gelu(x), 0.1, self.training)
        return F.softmax(self.layer(x), dim=1) if x.dim() == 2 else x


class Optional(Base):
    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return x if weights is None else x * weights


class Attention(Base):
    """torch's own layers, which branch on the form of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)
        self.groups = torch.nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(x).view(-1, 1, 6)
        return self.attention(x, x, x)[0].flatten(1)


@pytest.mark.parametrize("kind", [Shapes, Checked, OwnSizes, Layers, Optional, Attention])
def test_what_does_not_is_none(kind: type[Base]) -> None:
    assert branch_on_rows(loaded(kind())) == ""
