"""Drafts a schema file for a model that has none: what its graph tells, tried out, and marks where a person must say.

Receives a file; produces the content of NAME.schema.json. The graph tells which arguments lead to lookups
(tracing.py). What it leaves open, kinds, layouts and the number of features, is tried: a draft holds where the reader
of programs (signatures.py) finds every feature looked up in a table. From these come rows, dims and pooling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from narsil.artifacts.arguments import FORMAT, Argument, Arguments, fill_in, unknown_content
from narsil.artifacts.exported import Exported, load_exported
from narsil.artifacts.forwards import Loaded, called_in_order
from narsil.artifacts.given import given
from narsil.artifacts.package_drafts import draft_package, short_name
from narsil.artifacts.probing import outputs_of
from narsil.artifacts.pt2 import is_package, is_pt2
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.artifacts.signatures import probe_batch, read_arguments
from narsil.artifacts.torchscript import load_torchscript
from narsil.artifacts.tracing import Traced, lookups_of_program, lookups_of_script
from narsil.program.bounds import id_limit
from narsil.program.reader import Readings
from narsil.program.steps import of_feature

__all__ = ["draft"]

_MOST_TRIED = 4000  # forwards
_MOST_COLUMNS = 256  # of the widths that are tried where no weight tells one
_MOST_FEATURES = 64  # of a matrix of ids whose width is unknown
_MOST_IDS = {False: 2**31, True: 2**63 - 1}


@dataclass(frozen=True)
class Input:
    """What is known of an argument. None: nothing."""

    name: str
    floating: bool | None = None
    wide: bool | None = None  # of whole numbers
    sizes: tuple[int | None, ...] | None = None  # of its axes; None: any number
    is_list: bool = False


def draft(path: Path) -> dict[str, Any]:
    """The content of a schema file. Raises ArtifactError where the model cannot be loaded, or needs none."""
    if is_package(path):
        return draft_package(path)
    if is_pt2(path):
        exported = load_exported(path)
        inputs = [_of_program(exported, name) for name in exported.names]
        traced = lookups_of_program(exported.program, exported.names)
        named = {tensor.data_ptr(): (key, tensor.shape) for key, tensor in exported.program.state_dict.items()}
        return _Drafting(Loaded(exported, 1, ""), inputs, traced, named, path.name).run()
    module = load_torchscript(path, "cpu")
    taken, forward = called_in_order(module, path.name)
    inputs = [Input(name, is_list=is_list) for name, is_list in taken]
    weights = (*module.named_parameters(), *module.named_buffers())
    named = {tensor.data_ptr(): (key, tensor.shape) for key, tensor in weights}
    return _Drafting(Loaded(forward, 1, ""), inputs, lookups_of_script(module), named, path.name).run()


def _of_program(exported: Exported, name: str) -> Input:
    import torch

    node = next(node for node in exported.program.graph.nodes if node.name == name)
    kind = node.meta["val"].dtype
    sizes = tuple(low if low == high else None for low, high in exported.sizes[name])
    return Input(name, kind.is_floating_point, kind == torch.int64, sizes)


@dataclass(frozen=True)
class _Guess:
    """A draft that is tried."""

    features: int
    inputs: tuple[Argument, ...]
    columns: int


class _Drafting:
    def __init__(
        self,
        loaded: Loaded,
        inputs: Sequence[Input],
        traced: Sequence[Traced],
        named: Mapping[int, tuple[str, Sequence[int]]],
        name: str,
    ) -> None:
        """``named``: where a weight lies -> its name and shape."""
        self.loaded, self.inputs, self.traced, self.named, self.name = loaded, inputs, traced, named, name
        self.ids = self._leading("ids")
        self.bags = [each for each in self._leading("offsets") if each not in self.ids]
        self.weights = [each for each in self._leading("weights") if each not in self.ids]
        taken = {each.name for each in (*self.ids, *self.bags, *self.weights)}
        self.dense = [each for each in inputs if each.name not in taken]

    def _leading(self, part: str) -> list[Input]:
        names = {name for each in self.traced for name in getattr(each, part)}
        return [each for each in self.inputs if each.name in names]

    def run(self) -> dict[str, Any]:
        """The content."""
        if len(self.dense) <= 1 and not any(each.floating is False for each in self.dense):
            for guess in itertools.islice(self._guesses(), _MOST_TRIED):
                if (readings := self._holds(guess)) is not None:
                    return self._written(guess, readings)
        return self._unknown()

    def _holds(self, guess: _Guess) -> Readings | None:
        """What the model does, where every feature of a guess is looked up in a table."""
        schema = _schema_of(guess)
        try:
            self.loaded.forward([given(item, probe_batch(schema, 5), schema) for item in guess.inputs])
            readings = read_arguments(self.loaded, Arguments(schema, guess.inputs), self.name)
        except Exception:  # whatever a model raises where it is given what it does not take
            return None
        looked_up = {feature for lookup in readings.lookups for feature in lookup.features}
        return None if readings.unknown_ids or len(looked_up) < guess.features else readings

    def _guesses(self) -> Iterator[_Guess]:
        for features, wide, columns in itertools.product(self._counts(), (True, False), self._widths()):
            if wide is False and all(each.wide is not None for each in (*self.ids, *self.bags)):
                continue
            options = [list(self._arguments(each, features, wide)) for each in self.inputs]
            for chosen in itertools.product(*options):
                yield _Guess(features, chosen, columns)

    def _counts(self) -> list[int]:
        """Numbers of features that there may be, the likeliest first."""
        if len(self.ids) != 1:
            return [len(self.ids)]
        (ids,) = self.ids
        if ids.sizes is not None and len(ids.sizes) == 2:
            return [size for size in ids.sizes if size is not None]
        likely = list(range(len(self.traced), 0, -1))
        return likely if ids.sizes is not None or ids.is_list else [*likely, *range(len(likely) + 1, _MOST_FEATURES)]

    def _widths(self) -> list[int]:
        """Numbers of dense columns that there may be."""
        if not self.dense:
            return [0]
        sizes = self.dense[0].sizes
        if sizes is not None:
            return [size for size in sizes[1:] if size is not None] or [1]
        shapes = [shape for _, shape in self.named.values()]
        tables = [shape[1] for shape in shapes if len(shape) == 2]
        inner = sorted({size for shape in shapes for size in shape})
        less = {size - count * dim for size in inner for dim in set(tables) for count in range(len(self.traced) + 1)}
        likely = [*inner, *sorted(size for size in less if size > 0 and size not in inner)]
        return [*likely, *(width for width in range(1, _MOST_COLUMNS) if width not in likely)]

    def _arguments(self, item: Input, features: int, wide: bool) -> Iterator[Argument]:
        """What an input may be."""
        wide = wide if item.wide is None else item.wide
        every = tuple(range(features))
        if item in self.dense:
            yield Argument(item.name, "dense", every)
        elif item in self.ids:
            own = every if len(self.ids) == 1 else (self.ids.index(item),)
            for layout in self._layouts(item, ("flat", "by_row", "by_feature") if not self.bags else ("flat",)):
                yield Argument(item.name, "ids", own, layout, wide)
        elif item in self.weights:
            own = every if len(self.weights) == 1 else self._features_of(item, "weights")
            yield Argument(item.name, "weights", own, "list" if item.is_list else "flat")
        else:
            own = every if len(self.bags) == 1 else self._features_of(item, "offsets")
            summed = any(each.summed for each in self.traced if item.name in each.offsets)
            for layout in self._layouts(item, ("flat", "by_feature")):
                if summed:
                    yield Argument(item.name, "lengths", own, layout, wide)
                    continue
                for last in (False, True):
                    yield Argument(item.name, "offsets", own, layout, wide, last)

    def _layouts(self, item: Input, some: Sequence[Any]) -> Sequence[Any]:
        if item.is_list:
            return ("list",)
        if item.sizes is None:
            return some
        return [layout for layout in some if (layout == "flat") == (len(item.sizes) == 1)]

    def _features_of(self, item: Input, part: str) -> tuple[int, ...]:
        """Those whose lookups an input leads to."""
        found = [number for number, each in enumerate(self.traced) if item.name in getattr(each, part)]
        if len(self.ids) > 1:
            names = [each.name for each in self.ids]
            found = [names.index(name) for number in found for name in self.traced[number].ids if name in names]
        return tuple(dict.fromkeys(found))

    def _written(self, guess: _Guess, readings: Readings) -> dict[str, Any]:
        features = [self._feature(number, guess, readings) for number in range(guess.features)]
        assert readings.recording is not None  # noqa: S101 - what has been read was recorded
        outputs = outputs_of(readings.recording, self.name)
        found = Arguments(replace(_schema_of(guess), features=tuple(features)), guess.inputs)
        content: dict[str, Any] = {
            "format": FORMAT,
            "dense_dim": self._columns(guess),
            "features": [*map(_plain, features), *self._more(guess)],
            "tasks": list(outputs),
        }
        if set(outputs.values()) != {1}:
            content["widths"] = list(outputs.values())
        return {**content, "inputs": [_short(item, found.schema) for item in found.to_list()]}

    def _more(self, guess: _Guess) -> list[dict[str, str]]:
        """A mark where the model takes more features, or fewer, as well."""
        one_more = replace(guess, features=guess.features + 1)
        every = tuple(range(guess.features + 1))
        ids = [item for item in guess.inputs if item.holds == "ids"]
        if len(ids) != 1 or ids[0].layout not in ("by_row", "by_feature") or self.ids[0].sizes is not None:
            return []
        inputs = tuple(replace(item, features=every) if item.holds == "ids" else item for item in guess.inputs)
        if self._holds(replace(one_more, inputs=inputs)) is None:
            return []
        told = f"the other features: the model runs with {guess.features} and with others; give an entry for each"
        return [{"name": fill_in(told)}]

    def _columns(self, guess: _Guess) -> Any:
        """The number of dense columns, where it is the only one."""
        known = not self.dense or self.dense[0].sizes is not None
        if known or self._holds(replace(guess, columns=guess.columns + 1)) is None:
            return guess.columns
        return fill_in(f"the number of dense columns; the model runs with {guess.columns} and with others")

    def _feature(self, number: int, guess: _Guess, readings: Readings) -> Feature:
        wide = next(item.wide for item in guess.inputs if item.holds == "ids" and number in item.features)
        weighted = any(item.holds == "weights" and number in item.features for item in guess.inputs)
        found = [
            (id_limit(of_feature(lookup.ids, number), table.rows, _MOST_IDS[wide]), table, lookup.pooling)
            for lookup in readings.lookups
            for feature, table in zip(lookup.features, lookup.tables, strict=True)
            if feature == number
        ]
        limit, table, pooling = min(found, key=lambda each: each[0])
        key, _ = self.named.get(table.data.ctypes.data, (f"table_{number}", ()))
        name = short_name(key)
        own = next(item for item in guess.inputs if item.holds == "ids" and number in item.features)
        if own.features == (number,):
            told = own.name
        else:
            told = name.removeprefix("t_") + (f"_{number}" if self._is_shared(readings) else "")
        return Feature(told, name, max(limit, 1), table.dim, pooling, weighted)

    def _is_shared(self, readings: Readings) -> bool:
        """Whether several features are looked up in one table."""
        places = {
            (feature, table.data.ctypes.data)
            for lookup in readings.lookups
            for feature, table in zip(lookup.features, lookup.tables, strict=True)
        }
        return len({place for _, place in places}) < len({feature for feature, _ in places})

    def _unknown(self) -> dict[str, Any]:
        """What is left where nothing that was tried holds."""
        holds = {"ids": self.ids, "offsets": self.bags, "weights": self.weights, "dense": self.dense}
        inputs = []
        for item in self.inputs:
            guess = next(kind for kind, every in holds.items() if item in every)
            what = "dense, ids, weights, lengths or offsets"
            inputs.append({"name": item.name, "holds": fill_in(f"{what} (it looks like {guess})")})
            if item.wide is not None and not item.floating:
                inputs[-1]["type"] = "int64" if item.wide else "int32"
        return unknown_content(inputs)


def _schema_of(guess: _Guess) -> ModelSchema:
    bags = {at for item in guess.inputs if item.holds in ("lengths", "offsets") for at in item.features}
    weighted = {at for item in guess.inputs if item.holds == "weights" for at in item.features}
    features = tuple(
        Feature(f"f{at}", f"t{at}", 1, 1, weighted=at in weighted, single=at not in bags)
        for at in range(guess.features)
    )
    return ModelSchema(guess.columns, features)


def _plain(feature: Feature) -> dict[str, Any]:
    told = {"name": feature.name, "table": feature.table, "rows": feature.rows, "dim": feature.dim}
    return {**told, "pooling": feature.pooling, **({"weighted": True} if feature.weighted else {})}


def _short(item: dict[str, Any], schema: ModelSchema) -> dict[str, Any]:
    """An input without what goes without saying."""
    usual = {"features": [feature.name for feature in schema.features], "layout": "flat", "last": False}
    kept = {key: value for key, value in item.items() if key not in usual or value != usual[key]}
    for key in ("type", "features") if item["holds"] == "dense" else ("type",) if item["holds"] == "weights" else ():
        kept.pop(key, None)
    return kept
