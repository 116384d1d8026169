"""Reads a request's schema out of a TorchScript artifact, as TorchRec's inference packager (or Narsil's) writes it.

Receives a file or a loaded module; produces a ModuleReading. Everything that Narsil does not understand is an
ArtifactError, since a wrong guess would score wrong features or let ids read outside of a table.

What is read, and where from:

    order of the features   the key list that forward's own graph gives to KeyedJaggedTensor      torchscript.py
    tables, rows, dims      attributes of FBGEMM's inference operators                            tbe.py
    which table is whose    the lookups of a forward that is run on probe rows and written down   probing.py, program/
    branches on rows        the graph, inlined                                                    branches.py
    ids a request may hold  what that forward does to ids before it looks them up                 program/bounds.py
    dense columns, scores   the same forward

A model for a device that is not here cannot be run: of such a one the graph alone is read.

Weights that are NaN or infinite are refused here too: a model that holds them scores NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narsil.artifacts.branches import branch_on_rows
from narsil.artifacts.finite import bad_weights, first_bad_row
from narsil.artifacts.schema import Feature, ModelSchema, Pooling
from narsil.artifacts.tbe import (
    POOLING,
    check_table_values,
    check_tables,
    device_of,
    dims_of,
    label,
    table_at,
    table_operators,
)
from narsil.artifacts.torchscript import LENGTHS, VALUES, WEIGHTS, Interface, interface_of, load_torchscript
from narsil.errors import ArtifactError, first_line

if TYPE_CHECKING:
    from narsil.program.reader import Readings
    from narsil.program.steps import Lookup, Table

__all__ = [
    "Binding",
    "ModuleReading",
    "derive_schema",
    "load_torchscript",
    "read_module",
    "schema_of",
    "table_operators",
]

_MOST_IDS = {False: 2**31, True: 2**63 - 1}  # that a request can hold, by whether its ids are int64
_UNUSED = "none"  # the table of a feature that is never looked up


@dataclass(frozen=True)
class Binding:
    """The names and kinds under which a forward takes its inputs."""

    dense: str | None = "float_features"
    sparse: str = "id_list_features"
    wide_ids: bool = False  # whether ids and lengths have to be int64, else int32
    weighted: bool = False  # whether it takes a weight for each id


@dataclass(frozen=True)
class ModuleReading:
    """What a model takes, gives and does."""

    schema: ModelSchema
    device: str  # baked in: cpu or cuda:N
    binding: Binding
    readings: Readings | None  # None where the model could not be run here


def derive_schema(path: Path, dense_dim: int | None = None) -> tuple[ModelSchema, str]:
    """The schema of a TorchScript file, and its device (cpu or cuda:N). Raises ArtifactError."""
    return schema_of(load_torchscript(path, "cpu"), path.name, dense_dim)


def schema_of(module: Any, name: str = "the module", dense_dim: int | None = None) -> tuple[ModelSchema, str]:
    """The schema and the device of a loaded ScriptModule. Raises ArtifactError."""
    reading = read_module(module, name, dense_dim)
    return reading.schema, reading.device


def read_module(
    module: Any, name: str = "the module", dense_dim: int | None = None, interface: Interface | None = None
) -> ModuleReading:
    """All of it. ``dense_dim``: the number of dense columns, where the model does not say; ``interface``: the module's,
    where its graph has been rewritten since. Raises ArtifactError."""
    try:
        return _read(module, name, dense_dim, interface or interface_of(module, name))
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        # Built as no TorchRec builds it.
        raise ArtifactError(f"{name} is not built as TorchRec's packager builds it: {first_line(error)}") from None


def _read(module: Any, name: str, dense_dim: int | None, interface: Interface) -> ModuleReading:
    tbes = table_operators(module)
    for tbe in tbes:
        check_tables(tbe, name)
        check_table_values(tbe, name)
    _check_dense_values(module, name)
    columns, group = _inputs(interface, name)
    device = device_of(tbes, name) if tbes else "cpu"
    if not _is_here(device):
        if group + WEIGHTS in interface.reads:
            raise ArtifactError(f"{name}: it takes weights, and was packaged for {device}; {_ELSEWHERE}")
        return ModuleReading(_static_schema(tbes, interface, name), device, Binding(), None)
    return _probed(module, tbes, name, interface, columns, group, device, dense_dim)


def _inputs(interface: Interface, name: str) -> tuple[str | None, str]:
    """(the input of columns, the group of id lists). Raises ArtifactError on what a request cannot bring."""
    groups = sorted(interface.features)
    columns = sorted(key for key in interface.reads if not key.endswith((LENGTHS, VALUES, WEIGHTS)))
    if len(groups) != 1:
        raise ArtifactError(
            f"{name}: forward reads {len(groups)} groups of id lists"
            + (f" ({', '.join(groups)})" if groups else " (keys that end in .lengths and .values)")
            + "; Narsil serves models with one"
        )
    if len(columns) > 1:
        raise ArtifactError(
            f"{name}: forward reads {' and '.join(columns)}; Narsil serves models with one matrix of numbers: join "
            f"them "
            "into float_features in the model"
        )
    wanted = {groups[0] + LENGTHS, groups[0] + VALUES, *columns, *(interface.reads & {groups[0] + WEIGHTS})}
    if odd := sorted(interface.reads ^ wanted):
        raise ArtifactError(
            f"{name}: forward reads {odd[0]}, which Narsil does not give it: it gives a matrix of numbers, and id "
            f"lists as "
            f"{groups[0]}{LENGTHS}, {groups[0]}{VALUES} and {groups[0]}{WEIGHTS}"
        )
    return (columns[0] if columns else None), groups[0]


def _is_here(device: str) -> bool:
    """Whether a forward can run on the device, which must be in this machine."""
    import torch

    return device == "cpu" or (
        torch.cuda.is_available() and int(device.partition(":")[2] or 0) < torch.cuda.device_count()
    )


def _probed(
    module: Any,
    tbes: Sequence[Any],
    name: str,
    interface: Interface,
    columns: str | None,
    group: str,
    device: str,
    dense_dim: int | None,
) -> ModuleReading:
    from narsil.artifacts.probing import Takes, probe

    names = interface.features[group]
    weighted = group + WEIGHTS in interface.reads
    takes = Takes(columns, {group: (len(names), weighted)}, device)
    given = dense_dim if dense_dim is not None else interface.dense_dim
    found = probe(module, takes, given, _table_of(tbes, name), name)
    if not found.wide_ids and (found.readings.unknown_ids or _takes_all_narrow(found.readings)):
        with contextlib.suppress(ArtifactError):
            wide = probe(module, takes, found.dense_dim, _table_of(tbes, name), name, wide_ids=True)
            found = found if wide.readings.unknown_ids else wide
    if found.readings.unknown_ids:
        raise ArtifactError(
            f"{name}: what becomes of the ids on their way to a table is not known ({found.readings.unknown_ids}), "
            f"so that "
            "ids could be read out of bounds; look ids up as they are, or bound them with a remainder or a clamp"
        )
    features = _features(names, found.readings.lookups, found.wide_ids, name)
    if weighted:
        features = tuple(replace(feature, weighted=True) for feature in features)
    tasks, widths = tuple(found.outputs), tuple(found.outputs.values())
    schema = ModelSchema(dense_dim=found.dense_dim, features=features, tasks=tasks, widths=widths)
    readings = found.readings
    if readings.program is not None and (branch := branch_on_rows(module)):
        readings = replace(readings, program=None, problem=branch)
    return ModuleReading(schema, device, Binding(columns, group, found.wide_ids, weighted), readings)


def _takes_all_narrow(readings: Readings) -> bool:
    """Whether some table is looked up with any int32, and nothing that is done to ids wraps around in 32 bits: the same
    is done to int64, which then reach further."""
    from narsil.program.bounds import id_limit
    from narsil.program.ragged import functions_of
    from narsil.program.steps import of_feature

    wraps = any("to_int32" in functions_of(lookup.ids) for lookup in readings.lookups)
    return not wraps and any(
        not lookup.ids.is_plain
        and id_limit(of_feature(lookup.ids, feature), table.rows, _MOST_IDS[False]) == _MOST_IDS[False]
        for lookup in readings.lookups
        for feature, table in zip(lookup.features, lookup.tables, strict=True)
    )


def _table_of(tbes: Sequence[Any], name: str) -> Any:
    """(a lookup's weights, position of the feature) -> Table."""
    by_place = {
        weights.data_ptr(): tbe
        for tbe in tbes
        for weights in (tbe.weights_host, tbe.weights_dev, tbe.weights_uvm)
        if weights.numel()
    }
    made: dict[tuple[int, int], Table] = {}

    def find(weights: Any, position: int) -> Table:
        place = weights.data_ptr()
        if (place, position) not in made:
            if place not in by_place:
                raise ArtifactError(f"{name}: a lookup's tables are none of the module's; package the model again")
            made[place, position] = table_at(by_place[place], position, name)
        return made[place, position]

    return find


def _features(names: Sequence[str], lookups: Sequence[Lookup], wide: bool, name: str) -> tuple[Feature, ...]:
    """Each feature with the table that bounds its ids: the one of all that it is looked up in that lets in the
    fewest."""
    from narsil.program.bounds import id_limit
    from narsil.program.steps import of_feature

    found: dict[int, tuple[int, Table, Pooling]] = {}
    for lookup in lookups:
        for feature, table in zip(lookup.features, lookup.tables, strict=True):
            limit = id_limit(of_feature(lookup.ids, feature), table.rows, _MOST_IDS[wide])
            if limit < 1:
                raise ArtifactError(
                    f"{name}: what forward does to the ids of {names[feature]} leads outside of its table "
                    f"{table.name} of "
                    f"{table.rows} rows, or cannot be followed; bound them with a remainder or a clamp"
                )
            if feature not in found or limit < found[feature][0]:
                found[feature] = limit, table, lookup.pooling
    features = []
    for position, feature_name in enumerate(names):
        if position not in found:
            features.append(Feature(feature_name, _UNUSED, _MOST_IDS[wide], 1))
            continue
        limit, table, pooling = found[position]
        features.append(Feature(feature_name, table.name, limit, table.dim, pooling))
    return tuple(features)


def _check_dense_values(module: Any, name: str) -> None:
    """Raises ArtifactError where a parameter is NaN or infinite, or a buffer NaN: infinity in one may mask."""
    for key, tensor in module.named_parameters():
        bad = first_bad_row(tensor.detach().float().cpu().numpy()) if tensor.is_floating_point() else None
        if bad is not None:
            raise ArtifactError(bad_weights(name, f"row {bad} of {key}"))
    for key, tensor in module.named_buffers():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ArtifactError(bad_weights(name, key))


def _static_schema(tbes: Sequence[Any], interface: Interface, name: str) -> ModelSchema:
    """The schema of a model that cannot be run here: what its graph and its tables say alone."""
    tables: dict[str, Feature] = {}
    for feature in (feature for tbe in tbes for feature in _features_of(tbe, name)):
        if feature.name in tables:
            raise ArtifactError(f"{name}: feature {feature.name} is looked up in two tables; {_ELSEWHERE}")
        tables[feature.name] = feature
    (keys,) = interface.features.values()
    if sorted(keys) != sorted(tables):
        odd: Mapping[str, Any] = dict.fromkeys(sorted(set(keys) ^ set(tables)))
        raise ArtifactError(f"{name}: forward's features and the tables' differ, first in {next(iter(odd), keys[0])}")
    if interface.dense_dim is None or not interface.tasks:
        raise ArtifactError(
            f"{name}: the number of its dense features, or its tasks, are not plain to see; {_ELSEWHERE}"
        )
    return ModelSchema(interface.dense_dim, tuple(tables[key] for key in keys), interface.tasks)


_ELSEWHERE = "read it where its device is"


def _features_of(tbe: Any, name: str) -> list[Feature]:
    """The features of one operator, in its own order."""
    pooling = POOLING.get(int(tbe.pooling_mode))
    per_table = getattr(tbe, "feature_names_per_table", None)
    if pooling is None or not per_table:
        raise ArtifactError(f"{name}: its tables are not pooled, or do not name their features; {_ELSEWHERE}")
    owners = [(feature, table) for table, features in enumerate(per_table) for feature in features]
    if [table for _, table in owners] != list(tbe.feature_table_map):
        raise ArtifactError(f"{name}: the tables' features and feature_table_map differ; package the model again")
    rows, dims = tbe.rows_per_table.tolist(), dims_of(tbe)
    return [
        Feature(feature, label(tbe, table), int(rows[position]), int(dims[position]), pooling)
        for position, (feature, table) in enumerate(owners)
    ]
