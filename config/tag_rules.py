"""Rules of serving: how many tags a post gets, and their names and IDs on the platform.

The file in ``fusion.tags`` may hide or rename a bundle's tags, or map several to one tag of the
platform. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from common.errors import ConfigError, told
from config.labels import LabelMap
from config.load import did_you_mean, read_yaml, validate
from config.section import Section
from config.settings import FusionSettings, TagSettings

TagId: TypeAlias = int | str


def _name(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("must be a tag's name as text, in quotes")  # noqa: TRY004 - for pydantic
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def _names(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise ValueError("must be a list of the bundle's tags")  # noqa: TRY004 - for pydantic
    return names


def _id(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise ValueError("must be a whole number or text")
    return value


_Name = Annotated[str, BeforeValidator(_name)]
_Names = Annotated[tuple[_Name, ...], BeforeValidator(_names)]


class PlatformTag(Section):
    """A tag of the platform, which takes the place of some of the bundle's."""

    id: Annotated[TagId | None, BeforeValidator(_id)] = None
    """The ID in the result; null: that of the first of these tags."""
    tags: Annotated[_Names, Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"tags": value}


class TagFile(Section):
    """The content of the file that ``fusion.tags`` names."""

    hide: _Names = ()
    """Tags that no post is given."""
    rename: dict[_Name, _Name] = Field(default_factory=dict)
    """A bundle's name -> the name in the result; the ID stays."""
    map: dict[_Name, PlatformTag] = Field(default_factory=dict)
    """The platform's name -> the bundle's tags that become it, as a list or with an ``id``."""

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield each tag of the bundle that the file names, after the key that names it."""
        yield from (("hide", name) for name in self.hide)
        yield from (("rename", name) for name in self.rename)
        yield from ((f"map.{new}", name) for new, tag in self.map.items() for name in tag.tags)


@dataclass(frozen=True)
class ServedTag:
    """A tag that posts can get, and the classes of the bundle that it stands for."""

    id: TagId
    name: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class TagRules:
    """Say how many tags a post gets, and their names; by default all, by the bundle's names."""

    min_tags: int = 0
    max_tags: int | None = None
    near_misses: int = 0
    file: TagFile = field(default_factory=TagFile)
    where: str = "tags"

    @classmethod
    def read(cls, settings: TagSettings) -> TagRules:
        """Read the file of the settings; ConfigError names what is wrong in one line."""
        key = "fusion.tags" if isinstance(settings, FusionSettings) else "tags"
        if settings.tags is None:
            return cls(settings.min_tags, settings.max_tags, settings.near_misses)
        with told(f"{key}", ConfigError):
            file = validate(TagFile, read_yaml(settings.tags), str(settings.tags))
        where, numbers = f"{key}: {settings.tags}", (settings.min_tags, settings.max_tags)
        return cls(*numbers, settings.near_misses, file, where)

    @property
    def digest(self) -> str | None:
        """Return eight digits that change with the rules; None without rules.

        Results carry them: their version is the bundle's, whatever the rules.
        """
        if (self.min_tags, self.max_tags, self.file) == (0, None, TagFile()):
            return None
        content = {
            "min_tags": self.min_tags,
            "max_tags": self.max_tags,
            "hide": sorted(self.file.hide),
            "rename": self.file.rename,
            "map": {name: [t.id, sorted(t.tags)] for name, t in self.file.map.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def served(self, labels: LabelMap) -> tuple[ServedTag, ...]:
        """Return the tags that posts can get, in the order of the first class of each.

        Tags with the same name become one.

        Raises:
            ConfigError: The bundle lacks a tag that the file names, the file names one twice,
                all are hidden, or two would have the same ID.
        """
        keys: dict[str, str] = {}
        for key, name in self.file.named():
            if name in keys:
                raise ConfigError(
                    f"{self.where}: {keys[name]}, {key}: both name {name!r}: keep one"
                )
            keys[name] = key
            if name not in labels.index:
                hint = did_you_mean(name, labels.names)
                raise ConfigError(f"{self.where}: {key}: the bundle has no tag {name!r}{hint}")
        names = dict(self.file.rename)
        names |= {name: new for new, tag in self.file.map.items() for name in tag.tags}
        hidden, classes = frozenset(self.file.hide), dict[str, list[int]]()
        for i, name in enumerate(labels.names):
            if name not in hidden:
                classes.setdefault(names.get(name, name), []).append(i)
        served = [
            ServedTag(self._id(name, of, labels), name, tuple(of)) for name, of in classes.items()
        ]
        if not served:
            raise ConfigError(f"{self.where}: hide: names every tag of the bundle")
        by_id: dict[TagId, str] = {}
        for tag in served:
            if tag.id in by_id:
                raise ConfigError(
                    f"{self.where}: {by_id[tag.id]!r} and {tag.name!r} would both have the id "
                    f"{tag.id!r}: give one of them another by map"
                )
            by_id[tag.id] = tag.name
        return tuple(served)

    def _id(self, name: str, classes: list[int], labels: LabelMap) -> TagId:
        """Return the ID in the file, or that of the bundle's tag of this name, or of the first."""
        mapped = self.file.map.get(name)
        if mapped is not None and mapped.id is not None:
            return mapped.id
        own = labels.index.get(name)
        return own if own in classes else classes[0]
