"""The DLRM without its lookup, rebuilt from a TorchScript artifact as a plain module that torch.export takes.

Receives a loaded ScriptModule (TorchRec's own packager's included) and its schema; produces DlrmParts: FP32 linear
layers and the INT8 tables as they lie in memory. ``Core`` is those layers as a module: dense features and pooled
embeddings in, scores out. The lookup stays FBGEMM's operator, called before it.

The pooled embeddings come in the schema's order of features. Where the artifact's tables stand in another, the
columns of the over arch's first layer are moved instead, so that nothing has to be permuted when a request is served.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narsil.artifacts.compiled_info import HOST, INT8, SCALE_BIAS_BYTES
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.torchrec import schema_of, table_operators
from narsil.errors import ArtifactError

__all__ = ["Core", "DlrmParts", "Int8Tables", "Linear", "Precision", "read_parts", "realigned"]

Precision = Literal["fp32", "bf16"]  # of Core; the fused engine has more

_LAYER = re.compile(
    r"(?:.*\.)?(?:(dense_arch)\.model\._mlp\.(\d+)\._linear|(over_arch)\.model\.0\._mlp\.(\d+)\._linear"
    r"|(over_arch)\.model\.(1))\.(weight|bias)"
)
_LEADING_BITS = -(1 << 16)  # of a float32: those that a bfloat16 has
_LAST = 1 << 30  # the number under which over_arch.model.1 sorts: after every layer of its MLP


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


def read_parts(module: Any, schema: ModelSchema, name: str) -> DlrmParts:
    """The parts of a loaded ScriptModule. Raises ArtifactError on what is no DLRM with INT8 tables of one dim."""
    actual, _ = schema_of(module, name)  # also holds every table's rows against the bytes that there are
    if actual != schema:
        raise ArtifactError(f"{name} and its manifest describe different models; package the model again")
    dims, poolings = {feature.dim for feature in schema.features}, {feature.pooling for feature in schema.features}
    if len(dims) != 1:
        raise ArtifactError(f"{name} has tables of {len(dims)} dims; a DLRM that can be compiled has one")
    if len(schema.tasks) != 1:
        raise ArtifactError(f"{name} scores {len(schema.tasks)} tasks; a DLRM that can be compiled scores one")
    tbes = table_operators(module)
    order = _interaction_order(module, tbes, schema, name)
    layers = _layers(module.state_dict(), name)
    over = layers["over_arch"]
    over[0] = Linear(_reordered(over[0].weight, order, dims.copy().pop(), name), over[0].bias)
    parts = DlrmParts(
        tuple(layers["dense_arch"]),
        tuple(over),
        _int8_tables(tbes, schema, name),
        schema.num_features,
        dims.pop(),
        poolings.pop() if len(poolings) == 1 else "mixed",
    )
    _check_chain(parts, name)
    return parts


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


def _layers(state: Mapping[str, Tensor], name: str) -> dict[str, list[Linear]]:
    """The linear layers of each arch, in the order in which they run."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            if tensor.is_floating_point() and tensor.numel() and not re.search(r"\btbes\.|embedding_bag", key):
                raise ArtifactError(f"{name} holds {key}, which a DLRM with dot interaction has no place for")
            continue
        arch, number = match[1] or match[3] or match[5], _LAST if match[6] else int(match[2] or match[4])
        found.setdefault((arch, number), {})[match[7]] = tensor.detach().float().contiguous()
    layers: dict[str, list[Linear]] = {"dense_arch": [], "over_arch": []}
    for (arch, _), pair in sorted(found.items()):
        if set(pair) != {"weight", "bias"}:
            raise ArtifactError(f"{name}: a linear layer of {arch} has no {'bias' if 'weight' in pair else 'weight'}")
        layers[arch].append(Linear(pair["weight"], pair["bias"]))
    if not layers["dense_arch"] or len(layers["over_arch"]) < 2:
        raise ArtifactError(f"{name} lacks the dense or the over arch of a DLRM; only DLRM artifacts can be compiled")
    return layers


def _reordered(weight: Tensor, order: Sequence[int], dim: int, name: str) -> Tensor:
    """The over arch's first weight for embeddings in the schema's order, where the module has them in ``order``."""
    vectors = len(order) + 1
    pairs = vectors * (vectors - 1) // 2
    if weight.shape[1] != dim + pairs:
        raise ArtifactError(
            f"{name}: the over arch takes {weight.shape[1]} columns where dot interaction of {vectors} vectors of "
            f"{dim} gives {dim + pairs}; only a DLRM with dot interaction can be compiled"
        )
    if list(order) == sorted(order):
        return weight
    place = torch.tensor([0, *(position + 1 for position in order)])
    upper, right = torch.triu_indices(vectors, vectors, offset=1)
    column = torch.zeros(vectors, vectors, dtype=torch.int64)
    column[upper, right] = torch.arange(pairs)
    low, high = torch.minimum(place[upper], place[right]), torch.maximum(place[upper], place[right])
    moved = weight.clone()
    moved[:, dim + column[low, high]] = weight[:, dim:]
    return moved


def _interaction_order(module: Any, tbes: Sequence[Any], schema: ModelSchema, name: str) -> list[int]:
    """The features, as positions in the schema, in the order in which forward multiplies them.

    Where tables differ in pooling, TorchRec looks them up in groups and then picks them by name.
    """
    picked = [
        [value.node().inputsAt(1).toIValue() for value in joined.inputs()]
        for node in module.graph.nodes()
        if node.kind() == "prim::CallMethod" and node.s("name") == "to_dict"
        for joined in _lists_of_items(node.output())
    ]
    if not picked and len(tbes) == 1:
        picked = [[feature for table in tbes[0].feature_names_per_table for feature in table]]
    if len(picked) != 1 or sorted(picked[0]) != sorted(schema.index):
        raise ArtifactError(f"{name} joins its embeddings in an order that is not plain to see; it cannot be compiled")
    return [schema.index[feature] for feature in picked[0]]


def _lists_of_items(named: Any) -> list[Any]:
    """The lists that are made of a dict's items alone."""
    lists = [use.user for item in named.uses() for use in item.user.output().uses()]
    return [
        node
        for position, node in enumerate(lists)
        if node.kind() == "prim::ListConstruct"
        and node not in lists[:position]
        and all(value.node().kind() == "aten::__getitem__" for value in node.inputs())
    ]


def _int8_tables(tbes: Sequence[Any], schema: ModelSchema, name: str) -> Int8Tables:
    """The tables of all groups, their offsets in the schema's order."""
    offsets: dict[int, int] = {}
    alignments = {max(int(tbe.row_alignment), 1) for tbe in tbes}
    start = 0
    for tbe in tbes:
        if set(tbe.weights_tys.tolist()) != {INT8} or int(tbe.scale_bias_size_in_bytes) != 4:
            raise ArtifactError(
                f"{name}: tables are not INT8 with FP16 scale and bias; package the model with INT8 tables"
            )
        if set(tbe.weights_placements.tolist()) != {HOST}:
            raise ArtifactError(f"{name}: tables do not lie in host memory; package the model with --device cpu")
        features = [schema.index[feature] for table in tbe.feature_names_per_table for feature in table]
        offsets |= {position: start + at for position, at in zip(features, tbe.weights_offsets.tolist(), strict=True)}
        start += tbe.weights_host.numel()
    if len(alignments) != 1:
        raise ArtifactError(f"{name}: its groups of tables differ in alignment; package the model again")
    data = tbes[0].weights_host if len(tbes) == 1 else torch.cat([tbe.weights_host for tbe in tbes])
    return Int8Tables(data, tuple(offsets[position] for position in range(len(offsets))), alignments.pop())


def _check_chain(parts: DlrmParts, name: str) -> None:
    """Raises ArtifactError unless each layer takes what the one before it gives."""
    for layers, end in ((parts.dense, parts.dim), (parts.over, 1)):
        widths = [int(linear.weight.shape[0]) for linear in layers]
        takes = [int(linear.weight.shape[1]) for linear in layers[1:]]
        if widths[:-1] != takes or widths[-1] != end:
            raise ArtifactError(f"{name}: layers of {widths} outputs and {takes} inputs, ending in {end}, do not chain")


def _layer(linear: Linear, kind: torch.dtype) -> nn.Linear:
    layer = nn.Linear(linear.weight.shape[1], linear.weight.shape[0], device="meta")
    layer.weight = nn.Parameter(linear.weight.to(kind), requires_grad=False)
    layer.bias = nn.Parameter(linear.bias.to(kind), requires_grad=False)
    return layer
