"""The DLRM as torch modules, under TorchRec's names and without TorchRec.

Receives a DlrmConfig; produces ``Dlrm`` (FP32, trainable: its state_dict is a checkpoint that ``narsil package
dlrm --checkpoint`` takes) and ``PredictModule`` (INT8 tables, scriptable: the interface of TorchRec's inference
packager). Submodule paths and the order of operators follow TorchRec's artifact, so that whatever reads one reads
the other.
"""

# mypy: allow-subclassing-any
# No `from __future__ import annotations`: TorchScript reads the annotations of forward as types.
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from narsil.dataflow import Floats
from narsil.packaging.dlrm import DlrmConfig, DlrmWeights, check_weights

__all__ = ["DenseArch", "Dlrm", "OverArch", "PredictModule", "as_tensor", "fp32_model", "fp32_scores"]


class Perceptron(nn.Module):
    """One linear layer and its ReLU."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self._linear = nn.Linear(in_size, out_size)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, in) -> (B, out)."""
        return torch.relu(self._linear(inputs))


class Mlp(nn.Module):
    """Perceptrons one after the other."""

    def __init__(self, in_size: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        widths = (in_size, *sizes)
        self._mlp = nn.Sequential(*[Perceptron(widths[n], widths[n + 1]) for n in range(len(sizes))])

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, in) -> (B, sizes[-1])."""
        return self._mlp(inputs)


class DenseArch(nn.Module):
    """Projects the dense features into the embeddings' space."""

    def __init__(self, config: DlrmConfig) -> None:
        super().__init__()
        self.model = Mlp(config.dense_features, config.dense_arch)

    def forward(self, dense: Tensor) -> Tensor:
        """(B, D) -> (B, dim)."""
        return self.model(dense)


class OverArch(nn.Module):
    """Scores a row from its dense embedding and its interactions."""

    def __init__(self, config: DlrmConfig) -> None:
        super().__init__()
        hidden = config.over_arch[:-1]
        self.model = nn.Sequential(Mlp(config.over_in, hidden), nn.Linear(hidden[-1], config.over_arch[-1]))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, dim + pairs) -> (B, 1) logits."""
        return self.model(inputs)


class InteractionArch(nn.Module):
    """Dot products of every pair among the dense embedding and the T sparse ones."""

    def __init__(self, config: DlrmConfig) -> None:
        super().__init__()
        # Row-major pairs i < j: the order in which the over arch's first layer was trained.
        first, second = torch.triu_indices(config.tables + 1, config.tables + 1, offset=1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """(B, dim), (B, T, dim) -> (B, dim + pairs)."""
        combined = torch.cat([dense.unsqueeze(1), sparse], dim=1)
        products = torch.bmm(combined, combined.transpose(1, 2))
        return torch.cat([dense, products[:, self.first, self.second]], dim=1)


class Bags(nn.Module):
    """One FP32 EmbeddingBag per table."""

    def __init__(self, config: DlrmConfig) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict(
            {
                table: nn.EmbeddingBag(rows, config.dim, mode=config.pooling, include_last_offset=True)
                for table, rows in zip(config.names_of_tables, config.rows_per_table, strict=True)
            }
        )

    def forward(self, lengths: Tensor, values: Tensor) -> Tensor:
        """(T * B,) key-major lengths, (N,) values -> (B, T, dim)."""
        tables = list(self.embedding_bags.values())
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
        rows = lengths.numel() // len(tables)
        pooled = []
        for number, table in enumerate(tables):
            offsets = ends[number * rows : (number + 1) * rows + 1]
            ids = values[int(offsets[0]) : int(offsets[-1])].long()
            pooled.append(table(ids, offsets - offsets[0]))
        return torch.stack(pooled, dim=1)


class Fp32SparseArch(nn.Module):
    """Holds the tables under TorchRec's path."""

    def __init__(self, config: DlrmConfig) -> None:
        super().__init__()
        self.embedding_bag_collection = Bags(config)

    def forward(self, lengths: Tensor, values: Tensor) -> Tensor:
        """As Bags.forward."""
        return self.embedding_bag_collection(lengths, values)


class Dlrm(nn.Module):
    """The FP32 model: what a trainer trains, and what served scores are held against."""

    def __init__(self, config: DlrmConfig) -> None:
        super().__init__()
        self.sparse_arch = Fp32SparseArch(config)
        self.dense_arch = DenseArch(config)
        self.inter_arch = InteractionArch(config)
        self.over_arch = OverArch(config)

    def forward(self, dense: Tensor, lengths: Tensor, values: Tensor) -> Tensor:
        """(B, D) float32, (T * B,) key-major lengths, (N,) ids -> (B,) logits."""
        embedded = self.dense_arch(dense)
        sparse = self.sparse_arch(lengths, values)
        return self.over_arch(self.inter_arch(embedded, sparse)).squeeze(1)


class QuantizedBags(nn.Module):
    """All tables in FBGEMM's one fused operator."""

    def __init__(self, tbe: nn.Module, tables: int, dim: int) -> None:
        super().__init__()
        self.tbes = nn.ModuleList([tbe])
        self.tables = tables
        self.dim = dim

    def forward(self, lengths: Tensor, values: Tensor) -> Tensor:
        """(T * B,) key-major lengths, (N,) values -> (B, T, dim)."""
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths).to(values.dtype)
        pooled: Tensor = torch.empty(0)
        for tbe in self.tbes:  # exactly one; TorchScript unrolls the loop
            pooled = tbe(values, offsets)
        return pooled.reshape([-1, self.tables, self.dim])


class QuantizedSparseArch(nn.Module):
    """Holds the fused tables under TorchRec's path."""

    def __init__(self, tbe: nn.Module, tables: int, dim: int) -> None:
        super().__init__()
        self.embedding_bag_collection = QuantizedBags(tbe, tables, dim)

    def forward(self, lengths: Tensor, values: Tensor) -> Tensor:
        """As QuantizedBags.forward."""
        return self.embedding_bag_collection(lengths, values)


class QuantizedDlrm(nn.Module):
    """The DLRM over INT8 tables."""

    def __init__(self, config: DlrmConfig, tbe: nn.Module) -> None:
        super().__init__()
        self.sparse_arch = QuantizedSparseArch(tbe, config.tables, config.dim)
        self.dense_arch = DenseArch(config)
        self.inter_arch = InteractionArch(config)
        self.over_arch = OverArch(config)

    def forward(self, dense: Tensor, lengths: Tensor, values: Tensor) -> Tensor:
        """(B, D), (T * B,), (N,) -> (B, 1) logits."""
        embedded = self.dense_arch(dense)
        sparse = self.sparse_arch(lengths, values)
        return self.over_arch(self.inter_arch(embedded, sparse))


class PredictModule(nn.Module):
    """What model_default.pt holds: the named tensors of a request in, one score per row and task out."""

    def __init__(self, config: DlrmConfig, tbe: nn.Module, device: str) -> None:
        super().__init__()
        self._module = QuantizedDlrm(config, tbe)
        # The key-major order of the sparse features, where TorchRec's modules keep it too; derive_schema reads it.
        self.id_list_features_keys = list(config.names_of_features)
        self.device = torch.device(device)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """float_features (B, D), id_list_features.lengths (T * B,) and .values (N,) -> default (B,) on the CPU."""
        dense = batch["float_features"].to(self.device, non_blocking=True)
        lengths = batch["id_list_features.lengths"].to(self.device, non_blocking=True)
        values = batch["id_list_features.values"].to(self.device, non_blocking=True)
        scores = torch.sigmoid(self._module(dense, lengths, values))
        return {"default": scores.reshape([scores.size(0)]).to(torch.device("cpu")).float()}


def load_weights(module: nn.Module, weights: DlrmWeights) -> None:
    """Copies the tensors that the module has by name."""
    state: Mapping[str, Any] = module.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name in weights:
                tensor.copy_(as_tensor(weights[name]))


def as_tensor(array: Floats) -> Tensor:
    """The same numbers, in the same memory where torch can take it."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def fp32_model(config: DlrmConfig, weights: DlrmWeights) -> Dlrm:
    """The FP32 model over the weights as they lie in memory. Raises as check_weights does."""
    check_weights(config, weights)
    with torch.device("meta"):
        model = Dlrm(config)
    model.inter_arch = InteractionArch(config)  # which has numbers of its own
    model.load_state_dict({name: as_tensor(array) for name, array in weights.items()}, assign=True)
    model.eval()
    return model


def fp32_scores(model: Dlrm, dense: Any, lengths: Any, values: Any) -> Floats:
    """(B,) scores for numpy inputs shaped as in Dlrm.forward."""
    with torch.inference_mode():
        logits = model(torch.as_tensor(dense), torch.as_tensor(lengths), torch.as_tensor(values))
        scores: Floats = torch.sigmoid(logits).numpy()
    return scores
