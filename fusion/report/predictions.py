"""Posts whose true tags are known with the predictions for them, and the counts of a report."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import told
from fusion.metrics import ranking as metrics

SCORES = "scores.npz"

# Pairs of tags in the table of confusions: more are single posts, in most data sets.
_CONFUSIONS = 40
# The logarithm of 0 is no number; scores nearer to 0 and 1 are as bad as this one.
_TINY = 1e-12


@dataclass(frozen=True)
class Predictions:
    """Scores and the truth of posts, all ``(posts, classes)``.

    Attributes:
        raw: Scores as they leave the model.
        scores: Scores as the bundle gives them: calibrated, where it has a calibration.
        thresholds: float32 ``(classes,)``, on ``scores``.
    """

    post_ids: tuple[str, ...]
    names: tuple[str, ...]
    raw: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    targets: npt.NDArray[np.bool_]
    thresholds: npt.NDArray[np.float32]

    @property
    def predicted(self) -> npt.NDArray[np.bool_]:
        """Return where a tag is given, bool ``(posts, classes)``."""
        return self.scores >= self.thresholds

    def save(self, path: Path) -> None:
        """Write everything as numpy arrays, readable without pickle."""
        arrays: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("post_ids", "names"):
            arrays[key] = np.array(arrays[key], dtype=np.str_)
        np.savez_compressed(path, **{**arrays, "targets": self.targets.astype(np.uint8)})

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what `save` wrote; docs/training.md shows users how."""
        with (
            told(f"{path}: cannot be read as scores", OSError, ValueError, KeyError),
            np.load(path, allow_pickle=False) as file,
        ):
            arrays: dict[str, Any] = {field.name: file[field.name] for field in fields(cls)}
        for key in ("post_ids", "names"):
            arrays[key] = tuple(arrays[key].tolist())
        return cls(**{**arrays, "targets": arrays["targets"].astype(np.bool_)})


class TagRow(NamedTuple):
    """One tag: posts that have it, posts that it is given to, and what came of that.

    None stands where nothing can be said: AP and recall of a tag that no post has, precision of one
    that is never given, F1 where both. The names of the fields are keys of ``report.json``.
    """

    id: int
    name: str
    support: int
    ap: float | None
    threshold: float
    given: int
    precision: float | None
    recall: float | None
    f1: float | None


def tag_rows(predictions: Predictions) -> list[TagRow]:
    """Return a row for each tag, in label order."""
    predicted, truth = predictions.predicted, predictions.targets
    aps = metrics.average_precisions(predictions.scores, truth)
    sums = (each.sum(axis=0).tolist() for each in (truth, predicted, predicted & truth))

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return [
        TagRow(
            id=i,
            name=predictions.names[i],
            support=support,
            ap=None if np.isnan(aps[i]) else float(aps[i]),
            threshold=float(predictions.thresholds[i]),
            given=gave,
            precision=share(right, gave),
            recall=share(right, support),
            f1=share(2 * right, gave + support),
        )
        for i, (support, gave, right) in enumerate(zip(*sums, strict=True))
    ]


class Confusion(NamedTuple):
    """One tag that was missed where another was wrongly given.

    ``share`` is of the posts in which the missed tag was missed. The names of the fields
    are keys of ``report.json``.
    """

    missed: int
    given: int
    posts: int
    share: float


def confusion_counts(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Count posts in which the row's tag was missed and the column's wrongly given."""
    predicted, truth = predictions.predicted, predictions.targets
    missed = (truth & ~predicted).astype(np.float32)
    wrong = (predicted & ~truth).astype(np.float32)
    # In float32, which counts exactly to 16 million: integer matrices multiply slowly.
    counts: npt.NDArray[np.int64] = np.rint(missed.T @ wrong).astype(np.int64)
    return counts


def confusions(predictions: Predictions) -> list[Confusion]:
    """Return the pairs of tags that are mistaken for one another most often."""
    counts = confusion_counts(predictions)
    misses = (predictions.targets & ~predictions.predicted).sum(axis=0)
    order = np.argsort(-counts, axis=None, kind="stable")[:_CONFUSIONS]
    rows, columns = np.unravel_index(order, counts.shape)
    return [
        Confusion(int(i), int(j), int(counts[i, j]), float(counts[i, j] / misses[i]))
        for i, j in zip(rows, columns, strict=True)
        if counts[i, j]
    ]


class Mistake(NamedTuple):
    """One tag of one post, wrongly given or missed; the loss is its cross entropy."""

    row: int
    tag: int
    score: float
    loss: float


def worst(predictions: Predictions, most: int) -> dict[str, list[Mistake]]:
    """Return the tags of the highest loss, ``wrongly given`` and ``missed``, ``most`` of each."""
    predicted, truth = predictions.predicted, predictions.targets
    mistakes: dict[str, list[Mistake]] = {}
    for kind, where in (("wrongly given", predicted & ~truth), ("missed", truth & ~predicted)):
        rows, tags = np.nonzero(where)
        scores = predictions.scores[rows, tags].astype(np.float64)
        losses = -np.log(np.maximum(1 - scores if kind == "wrongly given" else scores, _TINY))
        mistakes[kind] = [
            Mistake(int(rows[i]), int(tags[i]), float(scores[i]), float(losses[i]))
            for i in np.argsort(-losses, kind="stable")[:most]
        ]
    return mistakes
