"""Paths and sizes of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from demo.posts.make import DATA_FILE
from demo.posts.plan import Split

READ_FILE = "posts_read.json"
"""The data file next to `DATA_FILE` whose posts also carry what was read in their pictures."""


@dataclass(frozen=True)
class Layout:
    """The folders and files under ``workshop/demo``."""

    root: Path

    def posts(self, split: Split) -> Path:
        """Return the data file of a split, as it was made."""
        return self.root / "posts" / split / DATA_FILE

    def read(self, split: Split) -> Path:
        """Return the data file of a split, with the words of its pictures."""
        return self.root / "posts" / split / READ_FILE

    @property
    def stamps(self) -> Path:
        """Return the folder of the stamps, one per stage."""
        return self.root / "stamps"

    @property
    def features(self) -> Path:
        """Root of the feature files."""
        return self.root / "features"

    @property
    def training(self) -> Path:
        """Return checkpoints and log of the fusion training."""
        return self.root / "training"

    @property
    def daemon_log(self) -> Path:
        """Standard error of the daemon."""
        return self.root / "daemon.log"

    @property
    def report(self) -> Path:
        """Return the result, machine-readable."""
        return self.root / "report.json"


@dataclass(frozen=True)
class Sizes:
    """Number of posts and length of the trainings.

    Attributes:
        posts: Of each split.
        epochs: Of each backbone.
        batch_size: Posts in a batch of each backbone's training.
        learning_rate: Of each backbone.
        fusion_epochs: Of the fusion model.
    """

    posts: Mapping[Split, int] = field(
        default_factory=lambda: {"train": 1300, "valid": 150, "online": 60}
    )
    epochs: Mapping[str, int] = field(
        default_factory=lambda: {"video": 5, "image": 10, "audio": 4, "text": 6}
    )
    batch_size: Mapping[str, int] = field(
        default_factory=lambda: {"video": 16, "image": 32, "audio": 32, "text": 32}
    )
    learning_rate: float = 3e-3
    fusion_epochs: int = 14
