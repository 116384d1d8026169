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

import numpy as np

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
from narsil.artifacts.torchscript import (
    LENGTHS,
    VALUES,
    WEIGHTS,
    Interface,
    forward_of,
    in_order,
    interface_of,
    load_torchscript,
)
from narsil.errors import ArtifactError, first_line

if TYPE_CHECKING:
    from narsil.artifacts.probing import Probed, Takes
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

# By whether ids are int64: how many a request can hold from 0 on, and the least.
_MOST_IDS = {False: 2**31, True: 2**63 - 1}
_LEAST_IDS = {False: -(2**31), True: -(2**63)}
_UNUSED = "none"  # the table of a feature that is never looked up


@dataclass(frozen=True)
class Binding:
    """The names and kinds under which a forward takes its inputs."""

    matrices: tuple[tuple[str, int], ...] | None = None  # (name, width), in the columns' order; None: float_features
    # (name, number of features, whether it takes a weight for each id), in the features' order; None: one group,
    # id_list_features.
    groups: tuple[tuple[str, int, bool], ...] | None = None
    wide_ids: bool = False  # whether ids and lengths have to be int64, else int32


@dataclass(frozen=True)
class ModuleReading:
    """What a model takes, gives and does."""

    schema: ModelSchema
    device: str  # baked in: cpu or cuda:N
    binding: Binding
    readings: Readings | None  # None where the model could not be run here


def derive_schema(
    path: Path, dense_dim: int | Mapping[str, int] | None = None, ids: str = ""
) -> tuple[ModelSchema, str]:
    """The schema of a TorchScript file, and its device (cpu or cuda:N). Raises ArtifactError."""
    return schema_of(load_torchscript(path, "cpu"), path.name, dense_dim, ids)


def schema_of(
    module: Any, name: str = "the module", dense_dim: int | Mapping[str, int] | None = None, ids: str = ""
) -> tuple[ModelSchema, str]:
    """The schema and the device of a loaded ScriptModule. Raises ArtifactError."""
    reading = read_module(module, name, dense_dim, ids=ids)
    return reading.schema, reading.device


def read_module(
    module: Any,
    name: str = "the module",
    dense_dim: int | Mapping[str, int] | None = None,
    interface: Interface | None = None,
    ids: str = "",
) -> ModuleReading:
    """All of it. ``dense_dim``: the number of dense columns, where the model does not say (of the first matrix, or by
    name); ``interface``: the module's, where its graph has been rewritten since; ``ids``: int32 or int64, which it is
    given. Raises ArtifactError."""
    try:
        reading = _read(module, name, dense_dim, interface or interface_of(module, name), ids)
        return replace(reading, schema=replace(reading.schema, ids=ids))
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        # Built as no TorchRec builds it.
        raise ArtifactError(f"{name} is not built as TorchRec's packager builds it: {first_line(error)}") from None


def _read(
    module: Any, name: str, dense_dim: int | Mapping[str, int] | None, interface: Interface, ids: str
) -> ModuleReading:
    tbes = table_operators(module)
    for tbe in tbes:
        check_tables(tbe, name)
        check_table_values(tbe, name)
    _check_dense_values(module, name)
    columns, groups = _inputs(interface, name)
    device = device_of(tbes, name) if tbes else "cpu"
    if not _is_here(device):
        if len(groups) != 1 or len(columns) != 1 or groups[0] + WEIGHTS in interface.reads:
            raise ArtifactError(
                f"{name}: it takes weights, or other inputs than one matrix of numbers and one group of id lists, and "
                f"was packaged for {device}; {_ELSEWHERE}"
            )
        return ModuleReading(_static_schema(tbes, interface, name), device, Binding(), None)
    return _probed(module, tbes, name, interface, columns, groups, device, dense_dim, ids)


def _inputs(interface: Interface, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the inputs of columns, the groups of id lists), in a request's order. Raises ArtifactError on what a request
    cannot bring."""
    groups = in_order(interface.features)
    listed = {group + part for group in groups for part in (LENGTHS, VALUES, WEIGHTS)}
    # A model of one id a feature may leave the lengths alone.
    reads = interface.reads | {group + LENGTHS for group in groups}
    columns = in_order(key for key in interface.reads - listed if not key.endswith((LENGTHS, WEIGHTS)))
    wanted = {group + part for group in groups for part in (LENGTHS, VALUES)} | set(columns)
    weights = {group + WEIGHTS for group in groups} & interface.reads
    if odd := sorted(reads ^ (wanted | weights)):
        raise ArtifactError(
            f"{name}: forward reads {odd[0]} alone, where id lists are X{LENGTHS} and X{VALUES} together, and "
            f"X{WEIGHTS} beside them; name the model's inputs so"
        )
    return columns, groups


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
    columns: Sequence[str],
    groups: Sequence[str],
    device: str,
    given: int | Mapping[str, int] | None,
    ids: str,
) -> ModuleReading:
    from narsil.artifacts.probing import Takes, lone_columns, probe

    forward = forward_of(module, device)
    taken = {group: (len(interface.features[group]), group + WEIGHTS in interface.reads) for group in groups}
    widths = _widths(interface, columns, given, name)
    unknown = [key for key in columns if key not in widths]
    if len(unknown) > 1:
        found_widths = lone_columns(
            forward, Takes(None, taken, device, widths, interface.joined), unknown, _table_of(tbes, name)
        )
        if found_widths is None:
            told = ",".join(f"{key}=N" for key in unknown)
            raise ArtifactError(
                f"{name}: how many columns {' and '.join(unknown)} have is not plain to see; give their numbers with "
                f"--dense-dim {told}"
            )
        widths |= found_widths
    sought = next((key for key in columns if key not in widths), columns[0] if columns else None)
    width = widths.pop(sought, None) if sought is not None else None
    takes = Takes(sought, taken, device, widths, interface.joined)
    takes, found = _probed_in_some_form(forward, takes, width, _table_of(tbes, name), name)
    if ids == "int64" and not found.wide_ids:
        found = probe(forward, takes, found.dense_dim, _table_of(tbes, name), name, wide_ids=True)
    one_each, wide = takes.one_each, None
    if ids == "int32" and found.wide_ids:
        raise ArtifactError(f"{name}: forward takes int64 ids alone; leave out --ids, or give int64")
    if not ids and not found.wide_ids and (found.readings.unknown_ids or _all_narrow(found.readings)):
        with contextlib.suppress(ArtifactError):
            wide = probe(forward, takes, found.dense_dim, _table_of(tbes, name), name, wide_ids=True)
    if wide is not None and not wide.readings.unknown_ids:
        found = _chosen(found, wide, interface, name)
    if found.readings.unknown_ids:
        raise ArtifactError(
            f"{name}: what becomes of the ids on their way to a table is not known ({found.readings.unknown_ids}), "
            f"so that "
            "ids could be read out of bounds; look ids up as they are, or bound them with a remainder or a clamp"
        )
    features: list[Feature] = []
    if interface.joined:
        names = [name for group in groups for name in interface.features[group]]
        owners = [group for group in groups for _ in interface.features[group]]
        made = _features(names, found.readings.lookups, found.wide_ids, name)
        features += [
            replace(feature, weighted=taken[group][1], group=group) for feature, group in zip(made, owners, strict=True)
        ]
    for group in () if interface.joined else groups:
        lookups = [lookup for lookup in found.readings.lookups if lookup.group == group]
        made = _features(interface.features[group], lookups, found.wide_ids, name)
        shown = group if len(groups) > 1 else ""
        features += [replace(feature, weighted=taken[group][1], group=shown) for feature in made]
    if twice := _shared(features):
        raise ArtifactError(f"{name}: two groups of id lists have a feature {twice}; give features names of their own")
    tasks, outputs = tuple(found.outputs), tuple(found.outputs.values())
    matrices = tuple((key, found.dense_dim if key == sought else widths[key]) for key in columns)
    lone = len(columns) < 2 and "embedding_features" not in columns
    from narsil.program.missing import caught_columns

    readings = found.readings
    problem = branch_on_rows(module) or ("it takes one id of each feature alone" if one_each else "")
    if readings.program is not None and problem:
        readings = replace(readings, program=None, problem=problem)
    schema = ModelSchema(
        sum(part for _, part in matrices),
        tuple(features),
        tasks,
        outputs,
        () if lone else matrices,
        () if readings.program is None else caught_columns(readings.program, columns),
    )
    binding = Binding(matrices, tuple((group, *taken[group]) for group in groups), found.wide_ids)
    return ModuleReading(schema, device, binding, readings)


def _probed_in_some_form(
    forward: Any, takes: Takes, width: int | None, table_of: Any, name: str
) -> tuple[Takes, Probed]:
    """A model on bags of any length, or where it takes none, on one id of each feature."""
    from narsil.artifacts.probing import probe

    try:
        return takes, probe(forward, takes, width, table_of, name)
    except ArtifactError as error:
        single = replace(takes, one_each=True)
        try:
            return single, probe(forward, single, width, table_of, name)
        except ArtifactError:
            raise error from None


def _shared(features: Sequence[Feature]) -> str | None:
    names = [feature.name for feature in features]
    return next((name for name in names if names.count(name) > 1), None)


def _widths(
    interface: Interface, columns: Sequence[str], given: int | Mapping[str, int] | None, name: str
) -> dict[str, int]:
    """The matrices whose width is known. ``given``: of the first one, or by name."""
    widths = dict(interface.widths)
    if isinstance(given, Mapping):
        if odd := sorted(set(given) - set(columns)):
            raise ArtifactError(
                f"{name}: forward takes no numbers as {odd[0]}, whose width is given; it takes {', '.join(columns)}"
            )
        widths |= given
    elif given is not None and columns:
        widths[columns[0]] = given
    return widths


def _chosen(narrow: Probed, wide: Probed, interface: Interface, name: str) -> Probed:
    """Of a model that takes int32 and int64 ids alike, the reading with which ids reach farther. Raises ArtifactError
    where the same ids lead to other rows, since nothing says which it was trained with."""
    if narrow.readings.unknown_ids or not _wraps(narrow.readings):
        return wide
    found = _differs(narrow.readings, wide.readings)
    if found is not None:
        group, feature = found
        names = [each for features in interface.features.values() for each in features]
        shown = names[feature] if interface.joined else interface.features[group][feature]
        raise ArtifactError(
            f"{name}: what forward does to the ids of {shown} wraps around where they are int32, and leads to other "
            "rows where they are int64; nothing says which it was trained with: say it with --ids int32 or int64, or "
            "convert ids in the model before that, with ids.long() or ids.int()"
        )
    return narrow


def _wraps(readings: Readings) -> bool:
    """Whether something that is done to ids wraps around in 32 bits."""
    from narsil.program.ragged import functions_of

    return any("to_int32" in functions_of(lookup.ids) for lookup in readings.lookups)


def _all_narrow(readings: Readings) -> list[tuple[int, int]]:
    """(lookup, its feature) that any int32 leads into its table, by what is done to it."""
    from narsil.program.bounds import id_limit
    from narsil.program.steps import of_feature

    return [
        (number, feature)
        for number, lookup in enumerate(readings.lookups)
        if not lookup.ids.is_plain
        for feature, table in zip(lookup.features, lookup.tables, strict=True)
        if id_limit(of_feature(lookup.ids, feature), table.rows, _MOST_IDS[False]) == _MOST_IDS[False]
    ]


def _differs(narrow: Readings, wide: Readings) -> tuple[str, int] | None:
    """(group, feature) whose int32 ids lead to other rows where they come as int64; None where there is none among
    those that are tried."""
    from narsil.program.bounds import id_least
    from narsil.program.ragged import functions_of
    from narsil.program.steps import evaluate_ids, of_feature

    most = _MOST_IDS[False]
    drawn = np.random.default_rng(0).integers(0, most, 4096)
    tried = np.concatenate([np.arange(1024), drawn, drawn >> 8, most - 1 - np.arange(1024)])
    tried = np.concatenate([tried, -1 - tried])
    for number, feature in _all_narrow(narrow):
        one, other = narrow.lookups[number], wide.lookups[number]
        if "several" in functions_of(of_feature(one.ids, feature)):
            return one.group, feature  # which is not tried
        least = id_least(
            of_feature(one.ids, feature), one.tables[one.features.index(feature)].rows, most, _LEAST_IDS[False]
        )
        admitted = tried[tried >= least]  # the magnitude of the least int32 is none
        as_narrow, as_wide = (evaluate_ids(of_feature(each.ids, feature), admitted, None) for each in (one, other))
        if not np.array_equal(as_narrow, as_wide):
            return one.group, feature
    return None


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
    from narsil.program.bounds import id_least, id_limit
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
    least = dict.fromkeys(found, _LEAST_IDS[wide])
    for lookup in lookups:
        for feature, table in zip(lookup.features, lookup.tables, strict=True):
            own = id_least(of_feature(lookup.ids, feature), table.rows, found[feature][0], _LEAST_IDS[wide])
            least[feature] = max(least[feature], own)
    features = []
    for position, feature_name in enumerate(names):
        if position not in found:
            features.append(Feature(feature_name, _UNUSED, _MOST_IDS[wide], 1, least=_LEAST_IDS[wide]))
            continue
        limit, table, pooling = found[position]
        features.append(Feature(feature_name, table.name, limit, table.dim, pooling, least=least[position]))
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
    dense_dim = next(iter(interface.widths.values()), None)
    if dense_dim is None or not interface.tasks:
        raise ArtifactError(
            f"{name}: the number of its dense features, or its tasks, are not plain to see; {_ELSEWHERE}"
        )
    return ModelSchema(dense_dim, tuple(tables[key] for key in keys), interface.tasks)


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
