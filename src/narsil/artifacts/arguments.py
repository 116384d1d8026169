"""Schema files: which argument of a model's forward is what, for models that say nothing of it themselves.

Receives the JSON beside a model (NAME.schema.json, or schema.json in its folder), read as hostile input; produces an
Arguments. Imports no torch. Whether the model does what the file says is for whoever loads it to find out.

    format      narsil.schema/1
    dense_dim, features, tasks, widths    as in a manifest's schema
    inputs      one object for each argument, in the model's order:
      name        the argument's; of a dict its key; of an exported program the program's own name for it
      holds       dense, ids, weights, lengths or offsets
      features    of which features, in this order; absent: of all
      layout      flat: (N,) ids, or (T x B,) lengths, key-major
                  by_feature: (T, B) lengths or offsets, each feature's offsets from 0 on; or ids, one a row
                  by_row: (B, T) ids, one a row of each feature
                  list: a list of one tensor a feature, TorchScript alone
      type        int32 or int64 (what is meant if nothing is said)
                  Features without lengths or offsets have one id a row: ids of (B,), or (B x T,) key-major, where flat
      last        whether offsets end with the number of ids, as include_last_offset has it; false if nothing is said
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from narsil.artifacts.files import check_readable, unreadable
from narsil.artifacts.schema import ModelSchema
from narsil.errors import ArtifactError, first_line
from narsil.names import MOST_CHARACTERS, is_label

__all__ = [
    "FILL_IN",
    "FORMAT",
    "Argument",
    "Arguments",
    "arguments_of",
    "fill_in",
    "read_schema_file",
    "schema_file_of",
    "unfilled",
    "unknown_content",
]

FORMAT = "narsil.schema/1"
FILL_IN = "FILL IN"  # begins what a draft has where a person must say
_MAX_BYTES = 16 << 20
_KEYS = frozenset({"format", "dense_dim", "features", "tasks", "inputs"})
_INPUT_KEYS = frozenset({"name", "holds", "features", "layout", "type", "last"})
_HOLDS = ("dense", "ids", "weights", "lengths", "offsets")
_LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "dense": ("flat",),
    "ids": ("flat", "list", "by_row", "by_feature"),
    "weights": ("flat", "list"),
    "lengths": ("flat", "by_feature", "list"),
    "offsets": ("flat", "by_feature", "list"),
}


@dataclass(frozen=True)
class Argument:
    """One argument of a forward."""

    name: str
    holds: Literal["dense", "ids", "weights", "lengths", "offsets"]
    features: tuple[int, ...]  # positions in the schema
    layout: Literal["flat", "by_feature", "by_row", "list"] = "flat"
    wide: bool = True  # int64, else int32
    last: bool = False


@dataclass(frozen=True)
class Arguments:
    """What a schema file says."""

    schema: ModelSchema
    inputs: tuple[Argument, ...]

    def to_list(self) -> list[dict[str, Any]]:
        """The inputs, as they stand in a file."""
        names = [feature.name for feature in self.schema.features]
        return [
            {
                "name": item.name,
                "holds": item.holds,
                "features": [names[at] for at in item.features],
                "layout": item.layout,
                "type": "int64" if item.wide else "int32",
                "last": item.last,
            }
            for item in self.inputs
        ]


def schema_file_of(model: Path) -> Path | None:
    """The schema file that belongs to a model's file; None where there is none."""
    for name in (f"{model.stem}.schema.json", "schema.json"):
        if (model.parent / name).is_file():
            return model.parent / name
    return None


def read_schema_file(file: Path) -> Arguments:
    """What a schema file says. Raises ArtifactError on anything missing, unknown or of a wrong type."""
    check_readable(file)
    try:
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise ArtifactError(f"{file} is {size} bytes; a schema file has at most {_MAX_BYTES}")
        data: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError(f"{file} is no schema file: its format field must be {FORMAT!r}")
    if open_ends := unfilled(data):
        where, what = next(iter(open_ends.items()))
        raise ArtifactError(f"{file}: {where} is still to be filled in: {what}")
    if set(data) - {"widths"} != _KEYS:
        odd = sorted((set(data) - {"widths"}) ^ _KEYS)
        raise ArtifactError(f"{file}: a schema file has {', '.join(sorted(_KEYS))}, not {odd[0][:64]!r} or without it")
    try:
        schema = ModelSchema.from_dict({key: data[key] for key in data if key not in ("format", "inputs")})
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}") from None
    if any(feature.least for feature in schema.features):
        raise ArtifactError(f"{file}: ids of models with a schema file begin at 0; leave least out of its features")
    return arguments_of(file, schema, data["inputs"])


def unfilled(data: Any, where: str = "") -> dict[str, str]:
    """Place in a schema file -> what a person must say there, of all that a draft has left open."""
    if isinstance(data, str) and data.startswith(FILL_IN):
        return {where: data.removeprefix(FILL_IN).lstrip(": ")[:200]}
    found: dict[str, str] = {}
    if isinstance(data, dict):
        for key, value in data.items():
            found |= unfilled(value, f"{where}.{key}" if where else str(key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            found |= unfilled(value, f"{where}[{number}]")
    return found


def fill_in(what: str) -> str:
    """A mark where a person must say what nothing tells; a schema file with one is refused."""
    return f"{FILL_IN}: {what}"


def unknown_content(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """A schema file of inputs alone."""
    feature = {
        "name": fill_in("one such entry for each feature, in the order of the ids; here its name"),
        "table": fill_in("the name of its table"),
        "rows": fill_in("the ids that it takes are below this number"),
        "dim": fill_in("the numbers in a row of its table"),
        "pooling": "sum",
    }
    return {
        "format": FORMAT,
        "dense_dim": fill_in("the number of dense columns, 0 where there are none"),
        "features": [feature],
        "tasks": [fill_in("the names of the scores that it returns; default where it returns a tensor")],
        "inputs": inputs,
    }


def arguments_of(file: Path, schema: ModelSchema, data: Any) -> Arguments:
    """The inputs that a file lists. Raises ArtifactError on anything missing, unknown or of a wrong type."""
    if not isinstance(data, list) or not data:
        raise ArtifactError(f"{file}: inputs must be a list of objects, one for each argument of the model")
    inputs = tuple(_argument(file, schema, item) for item in data)
    _check_all(file, schema, inputs)
    bags = {at for item in inputs if item.holds in ("lengths", "offsets") for at in item.features}
    features = tuple(replace(feature, single=at not in bags) for at, feature in enumerate(schema.features))
    return Arguments(replace(schema, features=features), inputs)


def _argument(file: Path, schema: ModelSchema, item: Any) -> Argument:
    if not isinstance(item, dict) or not {"name", "holds"} <= set(item) <= _INPUT_KEYS:
        raise ArtifactError(f"{file}: an input has name and holds, and may have features, layout, type and last")
    name, holds = item["name"], item["holds"]
    if not isinstance(name, str) or not is_label(name):
        raise ArtifactError(f"{file}: the name of an input is no printable text of 1 to {MOST_CHARACTERS} characters")
    if holds not in _HOLDS:
        raise ArtifactError(f"{file}: input {name} holds {str(holds)[:64]!r}; it must be one of {', '.join(_HOLDS)}")
    layout, kind, last = item.get("layout", "flat"), item.get("type", "int64"), item.get("last", False)
    if layout not in _LAYOUTS[holds]:
        raise ArtifactError(
            f"{file}: input {name} has the layout {str(layout)[:64]!r}; {holds} are {' or '.join(_LAYOUTS[holds])}"
        )
    if kind not in ("int32", "int64") or not isinstance(last, bool):
        raise ArtifactError(f"{file}: input {name}: type is int32 or int64, and last is true or false")
    given = item.get("features", [feature.name for feature in schema.features])
    if (
        not isinstance(given, list)
        or (not given and holds != "dense")
        or not all(isinstance(one, str) for one in given)
    ):
        raise ArtifactError(f"{file}: the features of input {name} must be a list of their names")
    unknown = [one for one in given if one not in schema.index]
    if unknown or len(set(given)) != len(given):
        raise ArtifactError(f"{file}: input {name} has the feature {(unknown or given)[0][:64]!r} twice, or it is none")
    return Argument(name, holds, tuple(schema.index[one] for one in given), layout, kind == "int64", last)


def _check_all(file: Path, schema: ModelSchema, inputs: tuple[Argument, ...]) -> None:
    """Every number that a request brings must reach the model once."""
    names = [item.name for item in inputs]
    if len(set(names)) != len(names):
        raise ArtifactError(f"{file}: two inputs share one name")
    if sum(item.holds == "dense" for item in inputs) != bool(schema.dense_dim):
        raise ArtifactError(f"{file}: a model of {schema.dense_dim} dense columns has one input that holds them")
    for holds in (("ids",), ("lengths", "offsets")):
        found = sorted(feature for item in inputs if item.holds in holds for feature in item.features)
        wanted = (1,) if holds == ("ids",) else (0, 1)
        odd = next((at for at in range(schema.num_features) if found.count(at) not in wanted), None)
        if odd is not None:
            raise ArtifactError(
                f"{file}: the {' or '.join(holds)} of feature {schema.features[odd].name} are in "
                f"{found.count(odd)} inputs where one is expected"
            )
    bags = {at for item in inputs if item.holds in ("lengths", "offsets") for at in item.features}
    for item in inputs:
        if item.holds == "ids" and item.layout in ("by_row", "by_feature") and bags & set(item.features):
            odd = min(bags & set(item.features))
            raise ArtifactError(
                f"{file}: the ids of feature {schema.features[odd].name} are laid out {item.layout}, one a row, and "
                "have lengths or offsets beside them; leave these out, or the layout"
            )
        if item.holds == "weights" and set(item.features) - bags:
            odd = min(set(item.features) - bags)
            raise ArtifactError(
                f"{file}: feature {schema.features[odd].name} has weights, and neither lengths nor offsets; give either"
            )
    weighted = {feature for item in inputs if item.holds == "weights" for feature in item.features}
    told = {at for at, feature in enumerate(schema.features) if feature.weighted}
    if weighted != told:
        raise ArtifactError(f"{file}: the features that are weighted and those of inputs that hold weights differ")
