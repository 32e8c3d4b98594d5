"""Settings that the trainings of all backbones share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.post import Post
from config.labels import LabelMap
from config.settings import Settings
from demo.layout import Sizes


@dataclass(frozen=True)
class Lesson:
    """Data files and settings of a training.

    Attributes:
        train: Data file of the posts that are learned from.
        valid: Data file of those that choose the best epoch.
    """

    train: Path
    valid: Path
    settings: Settings
    sizes: Sizes
    labels: LabelMap


def targets(posts: Sequence[Post], labels: LabelMap) -> npt.NDArray[np.float32]:
    """Return the true tags, float32 ``(posts, classes)`` of 0 and 1."""
    rows = np.zeros((len(posts), len(labels)), np.float32)
    for row, post in zip(rows, posts, strict=True):
        row[labels.encode(post.labels)] = 1
    return rows
