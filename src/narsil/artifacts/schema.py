"""What a model takes and gives: the schema every request is held against.

Receives nothing but plain values (from a manifest or from an artifact's own attributes); imports neither torch
nor onnx, so that clients can use it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from narsil.errors import ArtifactError, ConfigError, first_line
from narsil.names import MOST_CHARACTERS, is_label

Pooling = Literal["sum", "mean"]

_MOST = 2**63 - 1  # rows and dims are int64
_MOST_WIDTH = 2**31 - 1  # of a task, which the wire has as uint32


def _shown(value: object) -> str:
    """A value out of a manifest, for an error."""
    return repr(value)[:128]


@dataclass(frozen=True)
class Feature:
    """One sparse feature and the table it looks its ids up in. Valid ids are least .. rows - 1."""

    name: str
    table: str
    rows: int
    dim: int
    pooling: Pooling = "sum"
    weighted: bool = False
    group: str = ""  # the key of its id lists in the model's input; empty where the model has one such group alone
    least: int = 0  # below 0 where the model takes negative ids, as hashes of strings are, to its table
    single: bool = False  # whether each of its bags must hold exactly one id

    def __post_init__(self) -> None:
        for value in (self.name, self.table, *([self.group] if self.group != "" else [])):
            if not is_label(value):
                raise ArtifactError(
                    f"feature, table or group name {_shown(value)} is no printable text of 1 to {MOST_CHARACTERS} "
                    "characters"
                )
        for label, number in (("rows", self.rows), ("dim", self.dim)):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= _MOST:
                raise ArtifactError(f"feature {self.name}: {label} must be a positive integer, not {_shown(number)}")
        if type(self.least) is not int or not -(2**63) <= self.least <= 0:
            raise ArtifactError(f"feature {self.name}: least must be an int64 of at most 0, not {_shown(self.least)}")
        if self.pooling not in ("sum", "mean"):
            raise ArtifactError(f"feature {self.name}: pooling must be sum or mean, not {_shown(self.pooling)}")
        if not isinstance(self.single, bool):
            raise ArtifactError(f"feature {self.name}: single must be true or false, not {_shown(self.single)}")
        if not isinstance(self.weighted, bool):
            raise ArtifactError(f"feature {self.name}: weighted must be true or false, not {_shown(self.weighted)}")


@dataclass(frozen=True)
class ModelSchema:
    """The shape of a request: D dense columns, T sparse features in their key-major order, and the tasks scored.

    ``widths`` may be given empty, which means a 1 for every task; it is as long as ``tasks`` from then on.
    """

    dense_dim: int
    features: tuple[Feature, ...]
    tasks: tuple[str, ...] = ("default",)
    widths: tuple[int, ...] = ()  # numbers that each task gives for a row
    # (input of the model, width) of each part of the dense columns, in order; empty where all are float_features'.
    matrices: tuple[tuple[str, int], ...] = ()
    nan_columns: tuple[int, ...] = ()  # of the D, rising: those in which NaN is a value, that of a missing number
    # int32 or int64: what the model was said to be given, where it takes both; clients need not know.
    ids: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.dense_dim, bool) or not isinstance(self.dense_dim, int) or self.dense_dim < 0:
            raise ArtifactError(f"dense_dim must be an integer of at least 0, not {_shown(self.dense_dim)}")
        if not self.features and not self.dense_dim:
            raise ArtifactError("the model has neither dense columns nor sparse features; nothing tells its rows")
        self._check_groups()
        if self.ids not in ("", "int32", "int64"):
            raise ArtifactError(f"ids must be int32 or int64, not {_shown(self.ids)}")
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ArtifactError("two sparse features share one name")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks) or not all(map(is_label, self.tasks)):
            raise ArtifactError(
                f"tasks must be printable texts of 1 to {MOST_CHARACTERS} characters, at least one and no two alike"
            )
        if not self.widths:
            object.__setattr__(self, "widths", (1,) * len(self.tasks))
        if len(self.widths) != len(self.tasks) or not all(
            type(width) is int and 1 <= width <= _MOST_WIDTH for width in self.widths
        ):
            raise ArtifactError(
                f"widths must be positive integers, one for each of {len(self.tasks)} tasks, not {_shown(self.widths)}"
            )

        if any(type(column) is not int for column in self.nan_columns) or any(
            not low < high for low, high in itertools.pairwise((-1, *self.nan_columns, self.dense_dim))
        ):
            raise ArtifactError(
                f"nan_columns must be rising numbers of dense columns, 0 to {self.dense_dim - 1}, not "
                f"{_shown(self.nan_columns)}"
            )

    def _check_groups(self) -> None:
        """Raises ArtifactError where groups lie in pieces, or matrices do not make up the columns."""
        groups = [group for group, _ in itertools.groupby(feature.group for feature in self.features)]
        if len(set(groups)) != len(groups) or (len(groups) > 1 and "" in groups):
            raise ArtifactError("the features of a group must follow each other, and each must name its group")
        for key, width in self.matrices:
            if not is_label(key) or type(width) is not int or width < 0:
                raise ArtifactError(f"matrices must be names and widths, not {_shown((key, width))}")
        if self.matrices and sum(width for _, width in self.matrices) != self.dense_dim:
            raise ArtifactError(f"the widths of the matrices do not add up to {self.dense_dim} dense columns")
        if len(dict(self.matrices)) != len(self.matrices):
            raise ArtifactError("two matrices share one name")

    @cached_property
    def groups(self) -> tuple[tuple[str, slice], ...]:
        """(group, positions of its features), in order."""
        found: dict[str, slice] = {}
        for position, feature in enumerate(self.features):
            start = found[feature.group].start if feature.group in found else position
            found[feature.group] = slice(start, position + 1)
        return tuple(found.items())

    @property
    def given_widths(self) -> int | dict[str, int]:
        """How many dense columns there are, as artifacts.torchrec.read_module takes it."""
        return dict(self.matrices) if self.matrices else self.dense_dim

    @property
    def plain(self) -> bool:
        """Whether a request has float_features and one group of id lists, as most models'."""
        return not self.matrices and all(not feature.group for feature in self.features)

    @property
    def num_features(self) -> int:
        """T."""
        return len(self.features)

    @cached_property
    def outputs(self) -> dict[str, int]:
        """Task -> the numbers that it gives for a row, in order."""
        return dict(zip(self.tasks, self.widths, strict=True))

    def picking(self, tasks: Sequence[str]) -> ModelSchema:
        """The same with these of its tasks alone, in this order. Raises ConfigError on one that it has not."""
        for task in tasks:
            if task not in self.outputs:
                raise ConfigError(f"the model has no task {_shown(task)}; it has {', '.join(self.tasks)}")
        return replace(self, tasks=tuple(tasks), widths=tuple(self.outputs[task] for task in tasks))

    def taking_nan(self, columns: Sequence[int]) -> ModelSchema:
        """The same with these columns as those in which NaN is a value."""
        return replace(self, nan_columns=tuple(columns))

    @cached_property
    def takes_nan(self) -> NDArray[np.bool_]:
        """(D,) whether NaN is a value of each dense column."""
        return np.isin(np.arange(self.dense_dim), self.nan_columns)

    @cached_property
    def index(self) -> dict[str, int]:
        """Feature name -> its position 0 .. T - 1 in key-major order."""
        return {feature.name: position for position, feature in enumerate(self.features)}

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(T,) int64: the number of rows of each feature's table."""
        return np.array([feature.rows for feature in self.features], dtype=np.int64)

    @cached_property
    def least(self) -> NDArray[np.int64]:
        """(T,) int64: the least id of each feature, 0 of most."""
        return np.array([feature.least for feature in self.features], dtype=np.int64)

    @cached_property
    def max_least(self) -> int:
        """Ids from it on, up to ``min_rows``, are valid for every feature."""
        return int(self.least.max(initial=-(2**63)))

    @cached_property
    def min_rows(self) -> int:
        """The smallest table's rows: ids below it, from 0 on, are valid for every feature."""
        return int(self.rows.min(initial=_MOST))

    @cached_property
    def singles(self) -> NDArray[np.bool_]:
        """(T,) bool: the features of which each bag must hold exactly one id."""
        return np.array([feature.single for feature in self.features], dtype=np.bool_)

    def bags(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """(T, B) lengths of bags that a request may have: 1 where a feature takes no other."""
        return np.where(self.singles[:, None], 1, lengths).astype(np.int32)

    @cached_property
    def id_dtype(self) -> np.dtype[Any]:
        """int32 where every id fits it, else int64."""
        narrow = int(self.rows.max(initial=0)) <= 2**31 and int(self.least.min(initial=0)) >= -(2**31)
        return np.dtype(np.int32 if narrow else np.int64)

    @cached_property
    def weighted(self) -> bool:
        """Whether any feature's bags take a weight per id."""
        return any(feature.weighted for feature in self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in manifest.json."""
        plain = {
            "dense_dim": self.dense_dim,
            "features": [_plain(feature) for feature in self.features],
            "tasks": list(self.tasks),
        }
        # As before there were any, where they say nothing.
        if set(self.widths) != {1}:
            plain["widths"] = list(self.widths)
        if self.matrices:
            plain["matrices"] = [list(part) for part in self.matrices]
        if self.nan_columns:
            plain["nan_columns"] = list(self.nan_columns)
        if self.ids:
            plain["ids"] = self.ids
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSchema:
        """The inverse of to_dict. Raises ArtifactError on anything missing, unknown or of a wrong type."""
        try:
            if set(data) - {"widths", "matrices", "nan_columns", "ids"} != {"dense_dim", "features", "tasks"}:
                raise ArtifactError(f"a schema has dense_dim, features and tasks, not {_shown(sorted(data))}")
            widths = data.get("widths", [])
            return cls(
                dense_dim=data["dense_dim"],
                features=tuple(Feature(**feature) for feature in data["features"]),
                tasks=tuple(data["tasks"]) if isinstance(data["tasks"], list) else (),
                widths=tuple(widths) if isinstance(widths, list) else (widths,),
                matrices=tuple((key, width) for key, width in data.get("matrices", [])),
                nan_columns=tuple(data.get("nan_columns", [])),
                ids=data.get("ids", ""),
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the schema is damaged: {first_line(error)}") from None


def _plain(feature: Feature) -> dict[str, Any]:
    """A feature's values; its group, its least id and that it takes single ids where they say something."""
    values = asdict(feature)
    return {key: value for key, value in values.items() if value or key not in ("group", "least", "single")}
