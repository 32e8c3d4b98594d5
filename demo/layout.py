"""Paths and sizes of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from demo.posts.plan import DATA_FILE, Split


class Layout:
    """The folders and files under ``workshop/demo``; ``training`` has checkpoints and logs."""

    def __init__(self, root: Path) -> None:
        self.root, self.features, self.training = root, root / "features", root / "training"
        self.daemon_log, self.report = root / "daemon.log", root / "report.json"

    def posts(self, split: Split) -> Path:
        """Return the data file of a split, as it was made."""
        return self.root / "posts" / split / DATA_FILE


@dataclass(frozen=True)
class Sizes:
    """Number of posts of each split, and length of the trainings."""

    posts: Mapping[Split, int] = field(
        default_factory=lambda: {"train": 1300, "valid": 150, "online": 60}
    )
    epochs: Mapping[str, int] = field(default_factory=lambda: {"video": 5, "audio": 3})
    batch_size: Mapping[str, int] = field(default_factory=lambda: {"video": 16, "audio": 32})
    learning_rate: float = 3e-3
    fusion_epochs: int = 8
