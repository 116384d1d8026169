"""Which models are served: an immutable value, swapped as one reference.

Whoever decodes a request reads the catalog once and keeps what it found, so that a swap in the middle changes nothing
for that request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from narsil.engine.served_model import ServedModel
from narsil.errors import ConfigError, ModelNotFound, NoModel

__all__ = ["EMPTY", "Catalog", "Routes"]

_SHOWN = 80  # characters of a name that a client gave, in an error's text
_GOLDEN = 0x9E3779B97F4A7C15  # of 2**64


@dataclass(frozen=True)
class Routes:
    """Of one name: labels that stand for versions, and how requests that give no version are split."""

    labels: Mapping[str, str] = field(default_factory=dict)  # label -> version
    split: Mapping[str, float] = field(default_factory=dict)  # label or version -> share, above 0; none: the newest


class _Split:
    """Versions of one name and their shares, dealt out."""

    def __init__(self, parts: Sequence[tuple[ServedModel, float]]) -> None:
        self.parts = tuple(parts)
        self._total = sum(share for _, share in parts)
        self._turns = count()  # its next() is atomic

    def next(self) -> ServedModel:
        """By multiples of the golden ratio, so that every stretch of requests has about its shares; model.hpp deals
        alike."""
        left = (next(self._turns) * _GOLDEN % (1 << 64) >> 11) * 2.0**-53 * self._total
        for model, share in self.parts:
            left -= share
            if left < 0:
                return model
        return self.parts[-1][0]


class Catalog:
    """Served models by name and version, and routes by name. Of one name, the version added last is the one that is
    meant without a version, where no route says otherwise; the name added first is the default."""

    def __init__(self, models: Sequence[ServedModel] = (), routes: Mapping[str, Routes] | None = None) -> None:
        self._models = tuple(models)
        self._routes = dict(routes or {})
        self._by_name: dict[str, dict[str, ServedModel]] = {}
        for model in models:
            versions = self._by_name.setdefault(model.name, {})
            if model.version in versions:
                raise ConfigError(f"version {model.version!r} of {model.name} is served already; give another version")
            versions[model.version] = model
        self._labels: dict[str, dict[str, ServedModel]] = {}  # of each name, those of what is served
        self._splits: dict[str, _Split] = {}
        for name, versions in self._by_name.items():
            routed = self._routes.get(name, Routes())
            labels = {label: versions[version] for label, version in routed.labels.items() if version in versions}
            found = (
                (versions.get(of) if of not in routed.labels else labels.get(of), share)
                for of, share in routed.split.items()
            )
            # The share of what is not served goes to the others.
            parts = [(model, share) for model, share in found if model is not None]
            self._labels[name] = labels
            if parts:
                self._splits[name] = _Split(parts)

    def __len__(self) -> int:
        return len(self._models)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def find(self, name: str = "", version: str = "") -> ServedModel:
        """The model that a name means: an empty one the default's; an empty version the one with the largest share of
        the name's requests, or else the newest. A version may be a label.

        Raises ModelNotFound, saying what there is, or NoModel where there is nothing.
        """
        name = self._named(name)
        if version:
            return self._version(name, version)
        split = self._splits.get(name)
        if split is not None:
            return max(split.parts, key=lambda part: part[1])[0]
        return next(reversed(self._by_name[name].values()))

    def route(self, name: str = "", version: str = "") -> ServedModel:
        """The model that is to score a request, as `find`, but that one without a version is dealt out as the name's
        split says."""
        split = None if version else self._splits.get(self._named(name))
        return self.find(name, version) if split is None else split.next()

    def routes(self) -> list[tuple[str, str, list[tuple[ServedModel, float]]]]:
        """(name, label or empty, the models that it leads to and their shares), all that is served."""
        found = [(name, "", list(split.parts)) for name, split in self._splits.items()]
        for name, labels in self._labels.items():
            found += [(name, label, [(model, 1.0)]) for label, model in labels.items()]
        return found

    def _named(self, name: str) -> str:
        """The name, or the default one. Raises ModelNotFound or NoModel."""
        if not self._models:
            raise NoModel("this server serves no model now; retry on another one, or later")
        name = name or self._models[0].name
        if name not in self._by_name:
            raise ModelNotFound(
                f"model {name[:_SHOWN]!r} is not served here; this server serves {_some(list(self._by_name))}"
            )
        return name

    def _version(self, name: str, version: str) -> ServedModel:
        """By the version's name, or else by a label."""
        versions, labels = self._by_name[name], self._labels[name]
        found = versions.get(version) or labels.get(version)
        if found is None:
            there = [*versions, *labels]
            verb = "is" if len(there) == 1 else "are"
            raise ModelNotFound(f"version {version[:_SHOWN]!r} of {name} is not served here; {_some(there)} {verb}")
        return found

    def by_preference(self) -> list[ServedModel]:
        """The default first, and of each name the newest version before the older ones."""
        if not self._models:
            return []
        default = self.find()
        return [default, *(model for model in reversed(self._models) if model is not default)]

    def adding(self, model: ServedModel, replacing: ServedModel | None = None) -> Catalog:
        """These models and one more, in the place of another where one is given. Raises ConfigError where its name and
        version are taken."""
        if replacing not in self._models:
            return Catalog((*self._models, model), self._routes)
        return Catalog([model if other is replacing else other for other in self._models], self._routes)

    def without(self, model: ServedModel) -> Catalog:
        """These models but one."""
        return Catalog([other for other in self._models if other is not model], self._routes)

    def routing(self, name: str, routes: Routes) -> Catalog:
        """These models, with other routes for one name."""
        return Catalog(self._models, {**self._routes, name: routes})


def _some(names: Sequence[str]) -> str:
    """At most six names, for an error's text."""
    listed = [repr(name) for name in names]
    return ", ".join(listed) if len(listed) <= 6 else f"{', '.join(listed[:5])} and {len(listed) - 5} others"


EMPTY = Catalog()
