"""Which models are served: an immutable value, swapped as one reference.

Whoever decodes a request reads the catalog once and keeps what it found, so that a swap in the middle changes nothing
for that request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from narsil.engine.served_model import ServedModel
from narsil.errors import ConfigError, ModelNotFound, NoModel

__all__ = ["EMPTY", "Catalog"]

_SHOWN = 80  # characters of a name that a client gave, in an error's text


class Catalog:
    """Served models by name and version. Of one name, the version added last is the one that is meant without a
    version; the name added first is the default."""

    def __init__(self, models: Sequence[ServedModel] = ()) -> None:
        self._models = tuple(models)
        self._by_name: dict[str, dict[str, ServedModel]] = {}
        for model in models:
            versions = self._by_name.setdefault(model.name, {})
            if model.version in versions:
                raise ConfigError(f"version {model.version!r} of {model.name} is served already; give another version")
            versions[model.version] = model

    def __len__(self) -> int:
        return len(self._models)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def find(self, name: str = "", version: str = "") -> ServedModel:
        """The model that a request means; an empty name is the default's, an empty version the newest.

        Raises ModelNotFound, saying what there is, or NoModel where there is nothing.
        """
        if not self._models:
            raise NoModel("this server serves no model now; retry on another one, or later")
        versions = self._by_name.get(name or self._models[0].name)
        if versions is None:
            raise ModelNotFound(
                f"model {name[:_SHOWN]!r} is not served here; this server serves {_some(list(self._by_name))}"
            )
        if not version:
            return next(reversed(versions.values()))
        if version not in versions:
            of = name or self._models[0].name
            verb = "is" if len(versions) == 1 else "are"
            raise ModelNotFound(
                f"version {version[:_SHOWN]!r} of {of} is not served here; {_some(list(versions))} {verb}"
            )
        return versions[version]

    def by_preference(self) -> list[ServedModel]:
        """The default first, and of each name the newest version before the older ones."""
        if not self._models:
            return []
        default = self.find()
        return [default, *(model for model in reversed(self._models) if model is not default)]

    def adding(self, model: ServedModel) -> Catalog:
        """These models and one more. Raises ConfigError where its name and version are taken."""
        return Catalog((*self._models, model))

    def without(self, model: ServedModel) -> Catalog:
        """These models but one."""
        return Catalog([other for other in self._models if other is not model])


def _some(names: Sequence[str]) -> str:
    """At most six names, for an error's text."""
    listed = [repr(name) for name in names]
    return ", ".join(listed) if len(listed) <= 6 else f"{', '.join(listed[:5])} and {len(listed) - 5} others"


EMPTY = Catalog()
