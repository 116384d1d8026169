"""Rows that are not a tensor's first axis, constants that forward makes for every row, and attention: the program gives
what torch gives, in the reference and in the fused engine, and what mixes rows on the way is refused."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F
    from torch import Tensor, nn

from narsil.artifacts.branches import branch_on_rows
from narsil.backends.fused import ForwardLibrary
from tests.integration.test_program_composed import WIDTH, in_the_engine, library  # noqa: F401 - a fixture
from tests.integration.test_program_readers import readings_of, seeded

pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS, DIM = 6, 4


def numbers(*shape: int, seed: int = 3) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 2


def fields(x: Any) -> Any:
    return x.view(-1, FIELDS, DIM)


def first(x: Any) -> Any:
    """(6, B, 4)."""
    return fields(x).transpose(0, 1)


def around(forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What is done to (6, B, 4), with the rows first again."""
    return lambda x: forward(first(x)).transpose(0, 1)


TOKEN, PLACES, HEADS = numbers(1, 1, DIM), numbers(FIELDS, DIM), numbers(2, DIM, 2)
BY_FIELD, BY_WEIGHTS = numbers(FIELDS, DIM, 3), numbers(FIELDS)
HIDDEN = torch.ones(FIELDS, FIELDS, dtype=torch.bool).triu(1)


class Attention(nn.Module):
    """Attention of the fields to each other; ``first``: rows are the second axis."""

    def __init__(self, rows_first: bool = True, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=rows_first)
        self.weights = weights
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Any) -> Any:
        x = x.view(-1, 6, 4)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        made, weights = self.attention(x, x, x, need_weights=True)
        made = made if self.attention.batch_first else made.transpose(0, 1)
        return torch.cat([made.flatten(1), weights.flatten(1)], 1) if self.weights else made


class Encoder(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 5, batch_first=True, **how)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Any) -> Any:
        return self.layer(x.view(-1, 6, 4))


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **how: Any) -> None:
        super().__init__()
        self.cells = kind(DIM, 5, batch_first=True, **how)

    def forward(self, x: Any) -> Any:
        return self.cells(x.view(-1, 6, 4))[0]


def attended(x: Any, **how: Any) -> Any:
    heads = fields(x).view(-1, FIELDS, 2, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads * 1.5, heads - 1, **how)


TURNED: dict[str, Callable[[Any], Any]] = {
    "einsum by field": lambda x: torch.einsum("bfd,fde->bfe", fields(x), BY_FIELD),
    "einsum over fields": lambda x: torch.einsum("bfd,f->bd", fields(x), BY_WEIGHTS),
    "einsum of heads": lambda x: torch.einsum("bfd,hde->hbfe", fields(x), HEADS).sum(0),
    "tensordot": lambda x: torch.tensordot(fields(x), BY_FIELD, dims=([1, 2], [0, 1])),
    "heads behind each other": lambda x: torch.cat(torch.stack(fields(x).split(2, 2)).mul(2).unbind(0), 2),
    "a function": around(lambda x: torch.tanh(x) * 2 + PLACES[:, None]),
    "a function of two": around(lambda x: torch.where(x > 0.1, x, x * x)),
    "a softmax over fields": around(lambda x: torch.softmax(x, 0)),
    "a softmax behind": around(lambda x: torch.softmax(x, 2)),
    "sums over fields": lambda x: first(x).sum(0),
    "sums that stay": around(lambda x: x.mean(0, keepdim=True) + x.amax(2, keepdim=True)),
    "a layer": around(lambda x: F.linear(x, BY_FIELD[0].t(), BY_FIELD[0, 0])),
    "a norm": around(lambda x: F.layer_norm(x, (DIM,), TOKEN[0, 0], PLACES[0])),
    "from the left": lambda x: torch.matmul(BY_FIELD.transpose(1, 2), fields(x).permute(1, 2, 0)).permute(2, 0, 1),
    "rows beside rows": lambda x: torch.cat([x, x * 2]).tanh().view(2, -1, WIDTH).permute(1, 0, 2),
    "rows as blocks": lambda x: F.linear(first(x).reshape(-1, DIM), PLACES).view(FIELDS, -1, FIELDS).transpose(0, 1),
    "rows that come back": lambda x: fields(x).permute(2, 0, 1).reshape(DIM, -1).t().reshape(-1, FIELDS, DIM),
    "turned and back": lambda x: x.t().contiguous().t() * 1,
    "rows twice": lambda x: torch.cat([x, x * 2])[: x.shape[0]],
    "rows repeated": lambda x: x.repeat(2, 1, 1)[0] + x.repeat(2, 1)[: x.shape[0]],
    "the second of a stack": lambda x: torch.stack([x, x * 2])[1],
    "unbound": lambda x: x.view(1, -1, WIDTH).unbind(0)[0] + 1,
    "fields first": lambda x: x.view(-1, 2, 12).permute(1, 0, 2).sum(0),
    "a token": lambda x: torch.cat([TOKEN.expand(x.shape[0], -1, -1), fields(x)], 1),
    "a constant again": lambda x: torch.cat([x, BY_WEIGHTS.unsqueeze(0).repeat(x.shape[0], 1)], 1),
    "zeros and ones": lambda x: torch.cat([torch.zeros(x.shape[0], 2), x, x.new_ones(x.shape[0], 1)], 1) * 3,
    "numbers like": lambda x: torch.full_like(x, 0.25) - x + torch.zeros_like(x),
    "a padded row": lambda x: F.pad(x, (2, 1)),
    "below the diagonal": lambda x: torch.bmm(fields(x), fields(x).transpose(1, 2)).tril(-1),
    "windows": lambda x: x.unfold(1, 4, 3),
    "products of several": lambda x: torch.matmul(fields(x).view(-1, 2, 3, DIM), fields(x).view(-1, 2, DIM, 3)),
    "groups": lambda x: F.group_norm(fields(x), 3, BY_WEIGHTS, BY_WEIGHTS * 2),
    "attention": attended,
    "attention by what was": lambda x: attended(x, is_causal=True),
    "attention with a mask": lambda x: attended(x, attn_mask=~HIDDEN),
    "attention with numbers added": lambda x: attended(x, attn_mask=BY_FIELD[..., 0] @ BY_FIELD[..., 1].t(), scale=0.3),
    "heads": seeded(Attention),
    "heads and weights": seeded(lambda: Attention(weights=True)),
    "heads, rows second": seeded(lambda: Attention(rows_first=False)),
    "encoder": seeded(Encoder),
    "encoder, norms first": seeded(lambda: Encoder(norm_first=True, activation="gelu")),
    "gru": seeded(lambda: Recurrent(nn.GRU)),
    "rnn": seeded(lambda: Recurrent(nn.RNN)),
    "lstm": seeded(lambda: Recurrent(nn.LSTM)),
    "lstm both ways": seeded(lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2)),
    "gru both ways": seeded(lambda: Recurrent(nn.GRU, bidirectional=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_rows_at_another_axis(name: str, library: ForwardLibrary | None) -> None:  # noqa: F811 - the fixture
    forward = TURNED[name]
    readings = readings_of(forward, WIDTH)
    assert readings.program is not None, readings.problem
    for scale, count in ((0.1, 1), (1.0, 33), (4.0, 7)):
        rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5)) * scale
        with torch.no_grad():
            expected = forward(rows.clone()).double().numpy()
        found = readings.program.reference({"x": rows.numpy()}, {})["default"]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=4e-6)
        if library is not None:
            ran = in_the_engine(library, readings.program, rows, expected.shape)
            np.testing.assert_allclose(ran, expected, rtol=2e-5, atol=4e-6)


ACROSS: dict[str, Callable[[Any], Any]] = {
    "a softmax": around(lambda x: torch.softmax(x, 1)),
    "a sum": lambda x: x + first(x).sum(1).view(-1),
    "a norm": around(lambda x: F.layer_norm(x, x.shape[1:])),
    "a product": lambda x: torch.bmm(first(x), first(x).transpose(1, 2)).sum(2).t(),
    "rows turned over": around(lambda x: x.flip(1)),
    "rows moved": around(lambda x: x.roll(35, 1)),  # which changes nothing of 5 or 7 rows
    "the first hundred": around(lambda x: torch.ops.aten.slice(x, 1, 0, 100) * 1),
    "their numbers": lambda x: x + torch.arange(x.shape[0])[:, None],
    "another layout": lambda x: x.reshape(WIDTH, -1).t().tanh(),
    "a constant of certain rows": lambda x: x * numbers(len(x), 1),
    "a row for all": around(lambda x: x * x[:, :1]),
    "a row's weights": lambda x: torch.einsum("bfd,cfd->bc", fields(x), fields(x)).sum(1),
}


@pytest.mark.parametrize("name", ACROSS)
def test_what_mixes_rows_on_the_way_is_refused(name: str) -> None:
    assert readings_of(ACROSS[name], WIDTH).program is None


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, 5, batch_first=True), 2)
        self.attention = nn.MultiheadAttention(DIM, 2)
        self.norm = nn.GroupNorm(2, FIELDS)

    def forward(self, x: Tensor) -> Tensor:
        made = self.norm(self.layer(x.view(-1, 6, 4))).transpose(0, 1)
        return self.attention(made, made, made)[0].transpose(0, 1) / math.sqrt(float(made.shape[2]))


def test_torchs_own_blocks_do_not_branch_on_rows() -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Blocks().eval()), file)
    file.seek(0)
    assert branch_on_rows(torch.jit.load(file)) == ""
