"""The DLRM's architecture and its FP32 weights, as plain values.

Receives options (or a checkpoint's shapes, see checkpoint.py); produces a DlrmConfig, the names and shapes of its
tensors, and seeded random weights. Owns the defaults of ``narsil package dlrm``. Imports no torch, so that
the command line can show these defaults at once.

Tensors are named as TorchRec's ``DLRM`` names them in its state_dict:

    sparse_arch.embedding_bag_collection.embedding_bags.TABLE.weight      (rows, dim)
    dense_arch.model._mlp.N._linear.{weight,bias}                         (out, in), (out,)
    over_arch.model.0._mlp.N._linear.{weight,bias}                        (out, in), (out,)
    over_arch.model.1.{weight,bias}                                       (1, in), (1,)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.finite import bad_weights, first_bad_row
from narsil.artifacts.schema import Feature, ModelSchema, Pooling
from narsil.dataflow import Floats
from narsil.errors import ArtifactError, ConfigError

__all__ = ["DlrmConfig", "DlrmWeights", "check_weights", "random_weights", "table_key"]

DlrmWeights = Mapping[str, Floats]  # state_dict name -> FP32 array

MAX_TABLES = 4096
_CALIBRATION_ROWS = 512


@dataclass(frozen=True)
class DlrmConfig:
    """A DLRM with dot interaction: T tables of one dim, a dense arch that ends in dim, an over arch that ends in 1.

    Raises ConfigError, naming the option, where the parts do not fit together.
    """

    tables: int = 26  # T; one sparse feature each
    rows: int | tuple[int, ...] = 100_000  # of every table, or of each
    dim: int = 64
    dense_features: int = 13  # D
    dense_arch: tuple[int, ...] = (512, 256, 64)
    over_arch: tuple[int, ...] = (512, 512, 256, 1)
    pooling: Pooling = "sum"
    seed: int = 0
    feature_names: tuple[str, ...] = ()  # in key-major order; none: cat_0 .. cat_{T-1}
    table_names: tuple[str, ...] = ()  # none: t_ before the feature's name

    def __post_init__(self) -> None:
        _whole("tables", self.tables, 1, MAX_TABLES)
        _whole("dim", self.dim, 4, 4096)
        _whole("dense_features", self.dense_features, 1, 1 << 20)
        _whole("seed", self.seed, 0, 2**63 - 1)
        for name, sizes, least in (("dense_arch", self.dense_arch, 1), ("over_arch", self.over_arch, 2)):
            if not isinstance(sizes, tuple) or len(sizes) < least:
                raise ConfigError(f"{name} takes at least {least} layer sizes, not {sizes!r}")
            for size in sizes:
                _whole(name, size, 1, 1 << 20)
        if self.dim % 4:
            raise ConfigError(f"dim must be a multiple of 4, as FBGEMM's INT8 rows are, not {self.dim}")
        if self.dense_arch[-1] != self.dim:
            raise ConfigError(f"dense_arch must end in dim, {self.dim}, not in {self.dense_arch[-1]}")
        if self.over_arch[-1] != 1:
            raise ConfigError(f"over_arch must end in 1, the score, not in {self.over_arch[-1]}")
        if self.pooling not in ("sum", "mean"):
            raise ConfigError(f"pooling must be sum or mean, not {self.pooling!r}")
        self._check_tables()

    def _check_tables(self) -> None:
        rows = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        for count in rows:
            _whole("rows", count, 1, 2**40)
        for name, values in (
            ("rows", rows if isinstance(self.rows, tuple) else ()),
            ("feature_names", self.feature_names),
            ("table_names", self.table_names),
        ):
            if values and len(values) != self.tables:
                raise ConfigError(f"{name} has {len(values)} entries for {self.tables} tables; give one for each")
        if len(set(self.names_of_tables)) != self.tables:
            raise ConfigError("two tables share one name")
        for table in self.names_of_tables:
            if "." in table:
                raise ConfigError(f"table name {table!r} has a dot, which a state_dict's names cannot hold")
        try:
            _ = self.schema
        except ArtifactError as error:
            raise ConfigError(str(error)) from None

    @property
    def rows_per_table(self) -> tuple[int, ...]:
        """The T tables' rows."""
        return self.rows if isinstance(self.rows, tuple) else (self.rows,) * self.tables

    @property
    def names_of_features(self) -> tuple[str, ...]:
        """The T features' names in key-major order."""
        return self.feature_names or tuple(f"cat_{number}" for number in range(self.tables))

    @property
    def names_of_tables(self) -> tuple[str, ...]:
        """The T tables' names in the features' order."""
        return self.table_names or tuple(f"t_{feature}" for feature in self.names_of_features)

    @property
    def interactions(self) -> int:
        """Pairs among the T embeddings and the dense arch's output."""
        return self.tables * (self.tables + 1) // 2

    @property
    def over_in(self) -> int:
        """Columns that enter the over arch: the dense arch's output and the interactions."""
        return self.dim + self.interactions

    @cached_property
    def schema(self) -> ModelSchema:
        """The requests that this DLRM takes."""
        named = zip(self.names_of_features, self.names_of_tables, self.rows_per_table, strict=True)
        return ModelSchema(
            dense_dim=self.dense_features,
            features=tuple(Feature(name, table, rows, self.dim, self.pooling) for name, table, rows in named),
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """State_dict name -> shape of every tensor, tables first and in their order."""
        shapes: dict[str, tuple[int, ...]] = {
            table_key(table): (rows, self.dim)
            for table, rows in zip(self.names_of_tables, self.rows_per_table, strict=True)
        }
        for prefix, in_size, out_size in self.linears:
            shapes[f"{prefix}.weight"] = (out_size, in_size)
            shapes[f"{prefix}.bias"] = (out_size,)
        return shapes

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """(state_dict prefix, in, out) of the linear layers in the order in which they run."""
        layers = []
        width = self.dense_features
        for number, size in enumerate(self.dense_arch):
            layers.append((f"dense_arch.model._mlp.{number}._linear", width, size))
            width = size
        width = self.over_in
        for number, size in enumerate(self.over_arch[:-1]):
            layers.append((f"over_arch.model.0._mlp.{number}._linear", width, size))
            width = size
        layers.append(("over_arch.model.1", width, self.over_arch[-1]))
        return layers

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values, as it stands in manifest.json (names and rows are in the schema)."""
        skip = {"feature_names", "table_names", "rows"}
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skip}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def table_key(table: str) -> str:
    """The state_dict name of a table's weight."""
    return f"sparse_arch.embedding_bag_collection.embedding_bags.{table}.weight"


def check_weights(config: DlrmConfig, weights: DlrmWeights, origin: str = "the set of weights") -> None:
    """Raises ArtifactError where a tensor is missing, foreign, misshapen, not FP32, or holds NaN or infinity."""
    missing = [name for name in config.shapes if name not in weights]
    extra = [name for name in weights if name not in config.shapes]
    if missing:
        raise ArtifactError(f"{origin} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    if extra:
        raise ArtifactError(f"{origin} holds {extra[0]}, which this architecture has no place for")
    for name, shape in config.shapes.items():
        array = weights[name]
        if tuple(array.shape) != shape:
            raise ArtifactError(f"{origin}: {name} has shape {tuple(array.shape)}; the architecture needs {shape}")
        if array.dtype != np.float32:
            raise ArtifactError(f"{origin}: {name} is {array.dtype}; weights must be float32")
        bad = first_bad_row(array)
        if bad is not None:
            raise ArtifactError(bad_weights(origin, f"row {bad} of {name}"))


def random_weights(config: DlrmConfig) -> dict[str, Floats]:
    """Seeded weights under which every id matters: all rows differ, and scores spread over (0, 1).

    Table entries are uniform with variance 1 / sqrt(dim), so that the dot of two embeddings has variance 1; linear
    layers follow He et al. (2015); the last layer is then scaled and shifted so that one-hot rows with dense
    features uniform in [0, 1) have logits of mean 0 and standard deviation 1.
    """
    rng = np.random.default_rng(config.seed)
    weights: dict[str, Floats] = {}
    bound = np.float32(sqrt(3.0 / sqrt(config.dim)))
    for name, shape in config.shapes.items():
        if len(shape) == 2 and ".embedding_bags." in name:
            table = rng.random(shape, dtype=np.float32)
            table -= np.float32(0.5)
            table *= 2 * bound
            weights[name] = table
        elif len(shape) == 2:
            weights[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(sqrt(2.0 / shape[1]))
        else:
            weights[name] = np.zeros(shape, dtype=np.float32)
    logits = _one_hot_logits(config, weights, rng)
    last = config.linears[-1][0]
    spread = max(float(logits.std()), 1e-6)
    weights[f"{last}.weight"] /= np.float32(spread)
    weights[f"{last}.bias"] -= np.float32(logits.mean() / spread)
    return weights


def _one_hot_logits(config: DlrmConfig, weights: DlrmWeights, rng: np.random.Generator) -> NDArray[np.float32]:
    """(_CALIBRATION_ROWS,) logits of random one-hot rows; the DLRM's forward in numpy."""
    hidden = rng.random((_CALIBRATION_ROWS, config.dense_features), dtype=np.float32)
    layers = config.linears
    for prefix, _, _ in layers[: len(config.dense_arch)]:
        hidden = np.maximum(hidden @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"], 0)
    vectors = [hidden]
    for table, rows in zip(config.names_of_tables, config.rows_per_table, strict=True):
        vectors.append(weights[table_key(table)][rng.integers(0, rows, _CALIBRATION_ROWS)])
    stacked = np.stack(vectors, axis=1)  # (B, T + 1, dim)
    upper, right = np.triu_indices(config.tables + 1, k=1)
    hidden = np.concatenate([hidden, (stacked @ stacked.transpose(0, 2, 1))[:, upper, right]], axis=1)
    for prefix, _, _ in layers[len(config.dense_arch) : -1]:
        hidden = np.maximum(hidden @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"], 0)
    last = layers[-1][0]
    return (hidden @ weights[f"{last}.weight"].T + weights[f"{last}.bias"])[:, 0]


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
