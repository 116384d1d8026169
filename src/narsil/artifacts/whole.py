"""How the inductor engine runs a program as a whole: its lookups, and what the compiled code takes and gives.

Receives a manifest's values, which are hostile; produces a Whole whose lookups stay inside tables.bin for every id that
the schema lets in. Imports no torch. compile/whole.py makes it, backends/inductor.py runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from narsil.artifacts.plan import Stream
from narsil.artifacts.schema import ModelSchema
from narsil.errors import ArtifactError
from narsil.program.bounds import id_least, id_limit
from narsil.program.steps import ID_FUNCTIONS, IdExpression

__all__ = ["Call", "Whole", "WholeTable", "expression_of", "row_bytes"]

_AGAIN = "compile the model again"
_MOST = 1 << 48
_DEPTH = 64  # of expressions
_OF_ARRAYS = ("take", "search", "search_right")


@dataclass(frozen=True)
class WholeTable:
    """Where a table lies in tables.bin, and whose bags are pooled in it."""

    start: int  # bytes
    rows: int
    dim: int
    kind: int  # FBGEMM's SparseType: 0 FP32, 1 FP16, 2 INT8, 3 INT4, 4 INT2
    feature: int  # position in the request


@dataclass(frozen=True)
class Call:
    """One call of FBGEMM's lookup, whose result is one of the code's inputs: (B, sum of dims)."""

    mean: bool
    stream: int
    row_alignment: int  # bytes
    tables: tuple[WholeTable, ...]

    @property
    def width(self) -> int:
        """Numbers that it gives for a row."""
        return sum(table.dim for table in self.tables)


@dataclass(frozen=True)
class Whole:
    """A program for the inductor engine."""

    dense: bool  # whether the code takes the dense columns, before what the calls give
    calls: tuple[Call, ...]
    streams: tuple[Stream, ...]
    lengths: bool = False  # whether it takes the lengths of all bags, (B, T), behind the dense columns

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Whole:
        """The inverse of to_dict. Raises ArtifactError on what is none; ``check`` looks at the numbers."""
        try:
            calls = tuple(
                Call(**{**call, "tables": tuple(WholeTable(**table) for table in call["tables"])})
                for call in data["calls"]
            )
            return cls(**{**data, "calls": calls, "streams": tuple(Stream(**stream) for stream in data["streams"])})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the manifest's lookups are damaged ({error}); {_AGAIN}") from None

    def check(self, schema: ModelSchema, tables_bytes: int) -> None:
        """Raises ArtifactError unless every id that the schema lets in leads to a row inside of tables.bin."""
        if type(self.lengths) is not bool:
            raise ArtifactError(f"the manifest's lookups are damaged; {_AGAIN}")
        if (
            type(self.dense) is not bool
            or (self.dense and not schema.dense_dim)
            or not (self.dense or self.calls or self.lengths)
        ):
            raise ArtifactError(f"the manifest's schema and lookups differ; {_AGAIN}")
        streams = [(expression_of(stream.ids), expression_of(stream.weights)) for stream in self.streams]
        for call in self.calls:
            whole = all(type(number) is int for number in (call.stream, call.row_alignment))
            if (
                type(call.mean) is not bool
                or not whole
                or not 0 <= call.stream < len(streams)
                or not 1 <= call.row_alignment <= 1 << 24
                or not call.tables
            ):
                raise ArtifactError(f"the manifest has an impossible lookup; {_AGAIN}")
            for table in call.tables:
                _check_table(table, call, streams[call.stream][0], schema, tables_bytes)


def _check_table(table: WholeTable, call: Call, ids: Any, schema: ModelSchema, tables_bytes: int) -> None:
    numbers = (table.start, table.rows, table.dim, table.kind, table.feature)
    if not all(type(number) is int and 0 <= number < _MOST for number in numbers):
        raise ArtifactError(f"the manifest has an impossible table; {_AGAIN}")
    if table.kind > 4 or not table.rows or not table.dim or table.feature >= schema.num_features:
        raise ArtifactError(f"the manifest has an impossible table; {_AGAIN}")
    feature = schema.features[table.feature]
    if table.start + table.rows * row_bytes(table.dim, table.kind, call.row_alignment) > tables_bytes:
        raise ArtifactError(f"the table of {feature.name} would end beyond tables.bin ({tables_bytes} bytes); {_AGAIN}")
    expression = IdExpression("ids") if ids is None else ids
    if not isinstance(expression, IdExpression):
        raise ArtifactError(f"a stream of the manifest is no expression; {_AGAIN}")
    try:
        limit = id_limit(expression, table.rows, feature.rows)
        least = id_least(expression, table.rows, feature.rows, feature.least) if limit == feature.rows else 0
    except Exception as error:  # of whatever a function makes of what it is not made for
        raise ArtifactError(f"a stream of the manifest is no expression ({error}); {_AGAIN}") from None
    if limit < feature.rows or least > feature.least:
        raise ArtifactError(f"ids of {feature.name} would lead outside of its table of {table.rows} rows; {_AGAIN}")


def row_bytes(dim: int, kind: int, alignment: int) -> int:
    """From one row to the next, as FBGEMM has them."""
    used = (4 * dim, 2 * dim, dim + 4, -(-dim // 2) + 4, -(-dim // 4) + 4)[kind]
    return -(-used // alignment) * alignment


def expression_of(data: Any, depth: int = 0) -> Any:
    """The expression that a manifest has as nested lists; None for none. Raises ArtifactError on what is none."""
    if isinstance(data, str) and data in ("ids", "weights"):
        return IdExpression(data)
    if isinstance(data, list | tuple) and data and isinstance(data[0], str) and depth < _DEPTH:
        if data[0] in ID_FUNCTIONS and data[0] not in _OF_ARRAYS:
            return IdExpression(data[0], tuple(expression_of(item, depth + 1) for item in data[1:]))
    elif data is None or type(data) in (int, float, bool):
        return data
    raise ArtifactError(f"a stream of the manifest is no expression; {_AGAIN}")
