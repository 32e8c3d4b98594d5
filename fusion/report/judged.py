"""Posts whose true tags are known, and what a model says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError

SCORES = "scores.npz"


@dataclass(frozen=True)
class Judged:
    """Scores beside the truth.

    Attributes:
        post_ids: Of every row.
        names: Of every tag.
        raw: Scores as they leave the model, float32 ``(posts, classes)``.
        scores: Scores as the bundle gives them: calibrated, where it has a calibration; float32
            ``(posts, classes)``.
        targets: bool ``(posts, classes)``.
        thresholds: float32 ``(classes,)``, on ``scores``.
    """

    post_ids: tuple[str, ...]
    names: tuple[str, ...]
    raw: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    targets: npt.NDArray[np.bool_]
    thresholds: npt.NDArray[np.float32]

    @property
    def given(self) -> npt.NDArray[np.bool_]:
        """Where a tag is given; ``(posts, classes)``."""
        return self.scores >= self.thresholds

    def save(self, path: Path) -> None:
        """Write everything as numpy arrays, readable without pickle."""
        np.savez_compressed(
            path,
            post_ids=_texts(self.post_ids),
            names=_texts(self.names),
            raw=self.raw,
            scores=self.scores,
            targets=self.targets.astype(np.uint8),
            thresholds=self.thresholds,
        )

    @classmethod
    def load(cls, path: Path) -> Judged:
        """Read what `save` wrote.

        Raises:
            ConfigError: The file is missing or broken.
        """
        try:
            with np.load(path, allow_pickle=False) as held:
                return cls(
                    tuple(str(i) for i in held["post_ids"]),
                    tuple(str(n) for n in held["names"]),
                    held["raw"],
                    held["scores"],
                    held["targets"].astype(np.bool_),
                    held["thresholds"],
                )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: cannot be read as scores: {error}") from error


def _texts(values: Sequence[str]) -> npt.NDArray[np.str_]:
    return np.array(values, dtype=np.str_)
