"""The label map: the taxonomy of the platform, `config/idx2name_*.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common.errors import ConfigError, told
from common.files import read_text


@dataclass(frozen=True)
class LabelMap:
    """Tag names in index order; the position of a name is its tag's ID.

    Attributes:
        where: The file, for messages; empty for a map out of something else.
    """

    names: tuple[str, ...]
    where: str = field(default="", compare=False)

    @cached_property
    def index(self) -> dict[str, int]:
        """Map names to indexes."""
        return {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.names)

    def encode(self, labels: Iterable[str], *, where: str = "labels") -> list[int]:
        """Return indices of label names; ConfigError when one is not in the map."""
        try:
            return [self.index[label] for label in labels]
        except KeyError as error:
            its_map = f"the label map {self.where}".rstrip()
            raise ConfigError(f"{where}: label {error.args[0]!r} is not in {its_map}") from None

    def as_json(self) -> dict[str, str]:
        """Return the file's content: index as text -> name."""
        return {str(i): name for i, name in enumerate(self.names)}

    @classmethod
    def from_mapping(cls, content: Mapping[str, object], where: str) -> LabelMap:
        """Build from index -> name; ConfigError when indices are not 0 to n-1, or names repeat."""
        with told(f"{where}: every key must be an index", ValueError):
            pairs = sorted((int(key), value) for key, value in content.items())
        names = [name for _, name in pairs]
        if [i for i, _ in pairs] != list(range(len(pairs))) or not pairs:
            raise ConfigError(f"{where}: indices must run from 0 without gaps")
        if not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"{where}: every name must be text")
        texts = [str(name) for name in names]
        twice, count = Counter(texts).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"{where}: name {twice!r} appears twice")
        return cls(tuple(texts), where)

    @classmethod
    def load(cls, path: Path) -> LabelMap:
        """Read a label map; ConfigError when the file is missing or no label map."""
        with told(f"{path}: not a JSON label map", ValueError):
            content = json.loads(read_text(path, missing="no such label map"))
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: must map index to name")
        return cls.from_mapping(content, str(path))
