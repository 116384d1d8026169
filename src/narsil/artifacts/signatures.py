"""What a model with a schema file does, read from its operations, and held against what the file says.

Receives a forward and an Arguments; produces a ModuleReading, or refuses where the file lies: a table that the model
looks a feature up in lets in fewer ids, has another dim, or is pooled otherwise. Where an operation keeps the lookups
from being read, nothing is held against them here: rows of first and of last ids are scored in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narsil.artifacts.arguments import Argument, Arguments
from narsil.artifacts.forwards import Loaded, forward_from
from narsil.artifacts.given import given
from narsil.artifacts.probing import ROWS, outputs_of
from narsil.artifacts.pt2 import is_package
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.torchrec import Binding, ModuleReading
from narsil.dataflow import Batch
from narsil.errors import ArtifactError, last_line
from narsil.program.bounds import id_limit
from narsil.program.ragged import IDS, WEIGHTS
from narsil.program.reading import Readings, merged, read, record
from narsil.program.recording import Recording
from narsil.program.steps import Table, of_feature
from narsil.program.values import Known, PerId, Structure

__all__ = ["check_readings", "probe_batch", "read_arguments", "reading_of"]

GROUP = "id_list_features"  # what a program calls the one group of a model that has no names for groups
_MOST_IDS = {False: 2**31, True: 2**63 - 1}  # that a request can hold, by whether its ids are int64


def read_arguments(loaded: Loaded, arguments: Arguments, name: str) -> Readings:
    """What a model does. Raises ArtifactError where it fails, does other operations for other rows, or gives what is
    not laid out by rows."""
    schema = arguments.schema
    batches = [probe_batch(schema, rows) for rows in ROWS]

    def called(inputs: Mapping[str, Any]) -> Any:
        return loaded.forward(_joined(arguments, inputs))

    try:
        recorded = [record(called, _apart(arguments, batch)) for batch in batches]
    except ArtifactError:
        raise
    except Exception as error:  # whatever a model raises
        raise ArtifactError(f"{name}: forward does not run on bags of 0 to 3 ids: {last_line(error)}") from None
    recording = merged(*recorded)
    outputs_of(recording, name)
    lengths = tuple(batch.lengths.reshape(schema.num_features, -1).astype(np.int64) for batch in batches)
    groups = {GROUP: (lengths[0], lengths[1])} if schema.features else {}
    columns = [item.name for item in arguments.inputs if item.holds == "dense"]
    readings = read(recording, ROWS, groups, _no_table, columns, _known(arguments, recording, batches))
    if readings.program is not None and loaded.branch:
        return replace(readings, program=None, problem=loaded.branch)
    return readings


def reading_of(path: Path, arguments: Arguments) -> ModuleReading:
    """The same of a file, held against its schema file. Raises ArtifactError where they differ."""
    if is_package(path):
        raise ArtifactError(
            f"{path} is a package of AOTInductor's, which is compiled already; serve it as it is, or compile the "
            "torch.export program that it was made of"
        )
    readings = read_arguments(forward_from(path, arguments), arguments, path.name)
    check_readings(readings, arguments.schema, path.name)
    return ModuleReading(arguments.schema, "cpu", Binding(), readings)


def probe_batch(schema: ModelSchema, rows: int) -> Batch:
    """Random columns and bags of 0 to 3 of the id 0; every feature has one that is not empty."""
    random = np.random.default_rng(rows)
    lengths = random.integers(0, 4, (schema.num_features, rows)).astype(np.int32)
    if schema.num_features:
        lengths[np.arange(schema.num_features), random.integers(0, rows, schema.num_features)] += 1
    lengths = schema.bags(lengths)
    dense = random.standard_normal((rows, schema.dense_dim)).astype(np.float32)
    values = np.zeros(int(lengths.sum()), schema.id_dtype)
    weights = random.random(len(values), np.float32) if schema.weighted else None
    return Batch(rows, dense, lengths.ravel(), values, one_hot=False, weights=weights)


def _no_table(weights: torch.Tensor, position: int) -> Table:
    raise ArtifactError("a lookup's tables are none that this model may have; package the model again")


def _parts(item: Argument) -> list[str]:
    """The names of an argument's tensors."""
    return [f"{item.name}.{at}" for at in range(len(item.features))] if item.layout == "list" else [item.name]


def _apart(arguments: Arguments, batch: Batch) -> dict[str, torch.Tensor]:
    """All tensors of a batch's arguments, by name."""
    found: dict[str, torch.Tensor] = {}
    for item in arguments.inputs:
        made = given(item, batch, arguments.schema)
        found |= zip(_parts(item), made if item.layout == "list" else [made], strict=True)
    return found


def _joined(arguments: Arguments, inputs: Mapping[str, Any]) -> list[Any]:
    """The inverse of _apart."""
    made = []
    for item in arguments.inputs:
        tensors = [inputs[part] for part in _parts(item)]
        made.append(tensors if item.layout == "list" else tensors[0])
    return made


def _known(arguments: Arguments, recording: Recording, batches: list[Batch]) -> dict[int, Known]:
    """What the inputs of ids and of bags are, by number of the tensor: of ids and weights, where each stands."""
    places = [_apart(arguments, _numbered(batch)) for batch in batches]
    found: dict[int, Known] = {}
    for item in arguments.inputs:
        for part in _parts(item):
            number = recording.inputs[part]
            if item.holds in ("lengths", "offsets"):
                found[number] = Structure(GROUP)
            elif item.holds != "dense":
                first, second = (each[part].long() for each in places)
                found[number] = PerId(GROUP, WEIGHTS if item.holds == "weights" else IDS, (first, second))
    return found


def _numbered(batch: Batch) -> Batch:
    """The batch with each id's own place in the place of the id, and of its weight."""
    places = np.arange(len(batch.values))
    return Batch(batch.rows, batch.dense, batch.lengths, places, batch.one_hot, places.astype(np.float64))


def check_readings(readings: Readings, schema: ModelSchema, name: str) -> None:
    """Raises ArtifactError where a schema says other things of a feature than its lookups do."""
    for lookup in readings.lookups:
        for position, table in zip(lookup.features, lookup.tables, strict=True):
            feature = schema.features[position]
            limit = id_limit(of_feature(lookup.ids, position), table.rows, _MOST_IDS[True])
            if feature.rows > limit:
                raise ArtifactError(
                    f"{name} and its schema file differ: the file lets ids of {feature.name} up to {feature.rows - 1} "
                    f"in, and the model leads those from {limit} on outside of a table of {table.rows} rows; give the "
                    f"feature {max(limit, 1)} rows"
                )
            if (feature.dim, feature.pooling) != (table.dim, lookup.pooling):
                raise ArtifactError(
                    f"{name} and its schema file differ: the file has {feature.pooling} over rows of {feature.dim} for "
                    f"{feature.name}, and the model takes the {lookup.pooling} of rows of {table.dim}; mend the file"
                )
