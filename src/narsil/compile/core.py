"""The DLRM without its lookup, rebuilt from a TorchScript artifact as a plain module that torch.export takes.

Receives a loaded ScriptModule (TorchRec's own packager's included) and its schema; produces DlrmParts: FP32 linear
layers and the INT8 tables as they lie in memory. ``Core`` is those layers as a module: dense features and pooled
embeddings in, scores out. The lookup stays FBGEMM's operator, called before it.

What the module computes is read from its operations (see compile/dlrm.py), never from the names of its weights. The
pooled embeddings come in the schema's order of features. Where the artifact's tables stand in another, the columns of
the over arch's first layer are moved instead, so that nothing has to be permuted when a request is served.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from narsil.artifacts.compiled_info import INT8, SCALE_BIAS_BYTES
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.torchrec import ModuleReading, read_module
from narsil.compile.dlrm import Dlrm, NoDlrm, recognised
from narsil.errors import ArtifactError
from narsil.program import steps

__all__ = [
    "Core",
    "DlrmParts",
    "Int8Tables",
    "Linear",
    "NoDlrm",
    "Precision",
    "program_of",
    "read_model",
    "read_parts",
    "realigned",
]

Precision = Literal["fp32", "bf16"]  # of Core; the fused engine has more

_LEADING_BITS = -(1 << 16)  # of a float32: those that a bfloat16 has


@dataclass(frozen=True)
class Linear:
    """One linear layer in FP32."""

    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)


@dataclass(frozen=True)
class Int8Tables:
    """The INT8 tables as FBGEMM's operator takes them. An INT8 row is scale and bias in FP16, then dim bytes."""

    data: Tensor  # (bytes,) uint8: all tables
    offsets: tuple[int, ...]  # (T,) byte at which each feature's table begins, in the schema's order
    row_alignment: int  # bytes; rows are padded to a multiple of it


@dataclass(frozen=True)
class DlrmParts:
    """What an artifact holds. Layers in the order in which they run; the last of ``over`` gives the logit."""

    dense: tuple[Linear, ...]
    over: tuple[Linear, ...]
    int8: Int8Tables
    tables: int  # T
    dim: int
    pooling: str  # sum, mean, or mixed: as the schema says of each feature

    @property
    def dense_dim(self) -> int:
        """D."""
        return int(self.dense[0].weight.shape[1])


class Core(nn.Module):
    """Dense arch, interaction and over arch.

    What bf16 rounds was chosen by what it costs the scores of a trained model. The dot products and the layers of the
    over arch but the last two multiply in bf16 and sum in FP32: two thirds of the arithmetic. The dense arch, the last
    hidden layer and the logit stay in FP32. The dense vector enters the over arch as two bf16 vectors, its leading
    bits and what they leave; both meet the same weights, so that their sum counts.
    """

    def __init__(self, parts: DlrmParts, precision: Precision) -> None:
        super().__init__()
        self.kind = torch.bfloat16 if precision == "bf16" else torch.float32
        self.split = precision == "bf16"
        self.dim = parts.dim
        self.vectors = parts.tables + 1
        first = parts.over[0]
        if self.split:
            first = Linear(torch.cat([first.weight[:, : self.dim], first.weight], dim=1), first.bias)
        low, high = (first, *parts.over[1:-2]), parts.over[-2:] if len(parts.over) > 2 else parts.over[-1:]
        self.dense = nn.ModuleList(_layer(linear, torch.float32) for linear in parts.dense)
        self.over = nn.ModuleList(_layer(linear, self.kind) for linear in low)
        self.hidden = nn.ModuleList(_layer(linear, torch.float32) for linear in high[:-1])
        self.last = _layer(high[-1], torch.float32)
        # Row-major pairs i < j of the flattened products: one gather, which Inductor fuses with the concatenation.
        upper, right = torch.triu_indices(self.vectors, self.vectors, offset=1)
        self.register_buffer("pairs", upper * self.vectors + right)

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """(B, D) float32, (B, T * dim) float32 -> (B,) float32 scores."""
        hidden = dense
        for layer in self.dense:
            hidden = torch.relu(layer(hidden))
        combined = torch.cat([hidden, pooled], dim=1).to(self.kind).view(-1, self.vectors, self.dim)
        products = torch.bmm(combined, combined.transpose(1, 2)).flatten(1)[:, self.pairs]
        parts = [hidden, products]
        if self.split:
            # By its bits: Inductor takes a cast there and back for nothing, and would find that nothing is left.
            leading = (hidden.view(torch.int32) & _LEADING_BITS).view(torch.float32)
            parts = [leading.to(self.kind), (hidden - leading).to(self.kind), products]
        hidden = torch.cat(parts, dim=1)
        for layer in self.over:
            hidden = torch.relu(layer(hidden))
        hidden = hidden.float()
        for layer in self.hidden:
            hidden = torch.relu(layer(hidden))
        return torch.sigmoid(self.last(hidden)).squeeze(1)


def read_model(module: Any, schema: ModelSchema, name: str) -> ModuleReading:
    """What a loaded ScriptModule does, whose schema must be this one. Raises ArtifactError."""
    reading = read_module(
        module, name, schema.given_widths, ids=schema.ids
    )  # also holds every table's rows against the bytes there are
    if reading.schema != schema:
        raise ArtifactError(f"{name} and its manifest describe different models; package the model again")
    return reading


def program_of(reading: ModuleReading, name: str) -> steps.Program:
    """Its program. Raises ArtifactError where not every operation is known."""
    readings = reading.readings
    if readings is None or readings.program is None:
        problem = "its device is not here" if readings is None else readings.problem
        raise ArtifactError(f"{name} cannot be compiled ({problem}); serve it with the torch backend")
    return readings.program


def read_parts(reading: ModuleReading, name: str) -> DlrmParts:
    """The parts of a model whose every operation is accounted for.

    Raises NoDlrm where it is no DLRM with INT8 tables of one dim, and ArtifactError where it cannot be compiled at all.
    """
    schema = reading.schema
    if schema.widths != (1,):
        raise NoDlrm(f"{name} gives {sum(schema.widths)} numbers for a row, and a DLRM one")
    dlrm = recognised(program_of(reading, name), schema.tasks[0], name)
    for position, (lookup, place) in dlrm.tables.items():
        feature, table = schema.features[position], lookup.tables[place]
        if (feature.pooling, feature.rows, feature.dim) != (lookup.pooling, table.rows, table.dim):
            raise NoDlrm(f"{name} looks {feature.name} up in another table too")
    poolings = {feature.pooling for feature in schema.features}
    return DlrmParts(
        tuple(map(_linear, dlrm.dense)),
        tuple(map(_linear, dlrm.over)),
        _int8_tables(dlrm, name),
        schema.num_features,
        schema.features[0].dim,
        poolings.pop() if len(poolings) == 1 else "mixed",
    )


def _linear(step: steps.Linear) -> Linear:
    """A layer without a bias has one of zeros."""
    bias = np.zeros(len(step.weight), np.float32) if step.bias is None else step.bias
    return Linear(torch.from_numpy(np.array(step.weight, np.float32)), torch.from_numpy(np.array(bias, np.float32)))


def realigned(tables: Int8Tables, rows: Sequence[int], dim: int, alignment: int) -> Int8Tables:
    """The same tables with rows padded to another alignment: FBGEMM's GPU operator wants 16 bytes."""
    used = dim + SCALE_BIAS_BYTES
    before, after = (-(-used // step) * step for step in (tables.row_alignment, alignment))
    data = torch.zeros(sum(rows) * after, dtype=torch.uint8)
    offsets, at = [], 0
    for start, count in zip(tables.offsets, rows, strict=True):
        table = tables.data[start : start + count * before].view(count, before)
        data[at : at + count * after].view(count, after)[:, :used] = table[:, :used]
        offsets.append(at)
        at += count * after
    return Int8Tables(data, tuple(offsets), alignment)


def _int8_tables(dlrm: Dlrm, name: str) -> Int8Tables:
    """The tables of all groups, their offsets in the schema's order."""
    tables = [lookup.tables[position] for _, (lookup, position) in sorted(dlrm.tables.items())]
    for table in tables:
        if table.kind != INT8 or table.scale_bytes != SCALE_BIAS_BYTES:
            raise NoDlrm(f"{name} has tables that are not INT8 with FP16 scale and bias")
        if table.row_bytes != tables[0].row_bytes or table.dim != tables[0].dim:
            raise NoDlrm(f"{name} has tables whose rows differ in size")
    groups = {table.data.ctypes.data: torch.from_numpy(table.data) for table in tables}
    bases = dict(zip(groups, np.cumsum([0, *(data.numel() for data in groups.values())]).tolist(), strict=False))
    offsets = tuple(bases[table.data.ctypes.data] + table.start for table in tables)
    data = next(iter(groups.values())) if len(groups) == 1 else torch.cat(list(groups.values()))
    return Int8Tables(data, offsets, _alignment(tables[0].row_bytes, tables[0].dim))


def _alignment(row_bytes: int, dim: int) -> int:
    """One by which a row of that dim comes to that many bytes."""
    return 1 if row_bytes == dim + SCALE_BIAS_BYTES else row_bytes


def _layer(linear: Linear, kind: torch.dtype) -> nn.Linear:
    layer = nn.Linear(linear.weight.shape[1], linear.weight.shape[0], device="meta")
    layer.weight = nn.Parameter(linear.weight.to(kind), requires_grad=False)
    layer.bias = nn.Parameter(linear.bias.to(kind), requires_grad=False)
    return layer
