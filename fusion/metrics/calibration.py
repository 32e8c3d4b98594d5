"""Calibration and thresholds, fitted on validation posts and kept in the bundle.

Calibration makes scores probabilities, by one rising map that all tags share: it leaves the order
of scores as it is, and needs no positives of rare tags. A tag's threshold is the calibrated score
from which on it is given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from config.section import Section
from config.train import CalibrationName
from fusion.metrics.ranking import cuts

FloatArray: TypeAlias = npt.NDArray[np.float64]

# Temperatures between which the best one is searched. At the ends logits are times or over 50:
# nearly all scores are 0 and 1, or 0.5.
_COLDEST, _HOTTEST = 0.02, 50.0
# They stand in bundle.yaml as text. Half gives coarser steps; double makes the file longer.
_MOST_KNOTS = 1000
_PASSES = 30  # over all levels at once, before what is left is pooled one by one
_TINY = 2.0**-53  # as near to 1 as a float64 comes
# A lower threshold would give a tag to nearly every post, a higher one to nearly none, when they
# are fitted to few posts.
_LOWEST, _HIGHEST = 0.05, 0.95


class Temperature(Section):
    """A temperature that logits are divided by: above 1 the model was too sure."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(gt=0)

    def apply(self, scores: npt.ArrayLike) -> FloatArray:
        return _sigmoid(_logits(scores) / self.temperature)


class Isotonic(Section):
    """Straight lines between knots: the rising map with the least squared error."""

    kind: Literal["isotonic"] = "isotonic"
    scores: tuple[float, ...] = Field(min_length=1)
    """Of the knots, rising."""
    values: tuple[float, ...] = Field(min_length=1)
    """Calibrated scores of the knots; never falling, in [0, 1]."""

    @model_validator(mode="after")
    def _rising(self) -> Isotonic:
        if len(self.scores) != len(self.values):
            raise ValueError("scores and values must be equally many")
        if (np.diff(self.scores) <= 0).any() or (np.diff(self.values) < 0).any():
            raise ValueError("scores must rise and values must not fall")
        if not 0 <= self.values[0] <= self.values[-1] <= 1:
            raise ValueError("values must be in [0, 1]")
        return self

    def apply(self, scores: npt.ArrayLike) -> FloatArray:
        return np.interp(np.asarray(scores, dtype=np.float64), self.scores, self.values)


Calibration: TypeAlias = Annotated[Temperature | Isotonic, Field(discriminator="kind")]


def calibrated(calibration: Calibration | None, scores: npt.ArrayLike) -> FloatArray:
    """Return scores as they leave the model or, with a calibration, as probabilities."""
    if calibration is None:
        return np.asarray(scores, dtype=np.float64)
    return calibration.apply(scores)


def fit_calibration(
    name: CalibrationName, scores: npt.ArrayLike, targets: npt.ArrayLike
) -> Calibration | None:
    """Return the calibration of a kind, fitted to scores in [0, 1] and the truth; None for none."""
    if name == "temperature":
        return Temperature(temperature=fit_temperature(scores, targets))
    return fit_isotonic(scores, targets) if name == "isotonic" else None


def fit_temperature(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return the temperature with the least cross entropy, within [0.02, 50].

    The cross entropy is convex in 1/T and its slope is known, so its zero is found by halving.
    Scores in [0, 1] and targets may have any shape.

    Source: arXiv 1706.04599, section 4.2.
    """
    logits = _logits(scores).ravel()
    truth = np.asarray(targets, dtype=np.float64).ravel()
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    for _ in range(45):
        middle = (low + high) / 2
        slope = float(((_sigmoid(logits * middle) - truth) * logits).mean())
        low, high = (low, middle) if slope > 0 else (middle, high)
    return round(2 / (low + high), 6)


def fit_isotonic(scores: npt.ArrayLike, targets: npt.ArrayLike) -> Isotonic:
    """Return the rising map of scores with the least squared error, by pooling adjacent violators.

    Beyond 1,000 knots some are left out at equal distances. Arguments may have any shape.

    Source: Barlow et al., Statistical inference under order restrictions, 1972.
    """
    numbers = np.asarray(scores, dtype=np.float64).ravel()
    truth = np.asarray(targets, dtype=np.float64).ravel()
    levels, place = np.unique(numbers, return_inverse=True)
    counts = np.bincount(place).astype(np.float64)
    sums = np.bincount(place, weights=truth).astype(np.float64)
    starts, values = _pooled(sums, counts)
    # A block is flat from its first level to its last; between blocks the map rises straight.
    ends = np.append(starts[1:], len(levels)) - 1
    at = np.stack([starts, ends], axis=1).ravel()  # (2·blocks,)
    distinct = np.append(True, np.diff(at) > 0)
    at, means = at[distinct], np.repeat(values, 2)[distinct]
    if len(at) > _MOST_KNOTS:
        chosen = np.unique(np.linspace(0, len(at) - 1, _MOST_KNOTS).round().astype(np.intp))
        at, means = at[chosen], means[chosen]
    return Isotonic(
        scores=tuple(float(x) for x in levels[at]),
        values=tuple(round(float(np.clip(v, 0, 1)), 9) for v in means),
    )


def _pooled(sums: FloatArray, counts: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Return the first level and the mean of each block, with means that rise."""
    starts = np.arange(len(sums), dtype=np.intp)
    for _ in range(_PASSES):
        # Compared as products: equal means must not differ by rounding.
        rises = sums[1:] * counts[:-1] > sums[:-1] * counts[1:]
        block_starts = np.flatnonzero(np.append(True, rises))
        if len(block_starts) == len(sums):
            break
        # Levels that fall or stay equal are one block in the end.
        starts = starts[block_starts]
        sums, counts = np.add.reduceat(sums, block_starts), np.add.reduceat(counts, block_starts)
    blocks: list[tuple[int, float, float]] = []
    for start, total, weight in zip(starts.tolist(), sums.tolist(), counts.tolist(), strict=True):
        first, own, size = start, total, weight
        while blocks and blocks[-1][1] * size >= own * blocks[-1][2]:
            first, before, more = blocks.pop()
            own, size = own + before, size + more
        blocks.append((first, own, size))
    firsts = np.array([block[0] for block in blocks], dtype=np.intp)
    return firsts, np.array([block[1] / block[2] for block in blocks])


def _logits(scores: npt.ArrayLike) -> FloatArray:
    clipped = np.clip(np.asarray(scores, dtype=np.float64), _TINY, 1 - _TINY)
    logits: FloatArray = np.log(clipped) - np.log1p(-clipped)
    return logits


def _sigmoid(logits: FloatArray) -> FloatArray:
    """Return the sigmoid, without overflow at either end."""
    small = np.exp(-np.abs(logits))
    values: FloatArray = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    return values


class Reliability(NamedTuple):
    """Scores in bins of equal width, each with the mean of its scores and the share that is true.

    Both are NaN where a bin is empty. ``error`` is the expected calibration error: the gaps between
    the two, weighted by the bins' sizes.
    """

    counts: npt.NDArray[np.int64]
    scores: FloatArray
    right: FloatArray
    error: float

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; None where a bin is empty."""
        means = {
            key: [None if np.isnan(x) else float(x) for x in values]
            for key, values in (("scores", self.scores), ("right", self.right))
        }
        return {"error": self.error, "counts": self.counts.tolist(), **means}


def reliability(scores: npt.ArrayLike, targets: npt.ArrayLike, bins: int = 15) -> Reliability:
    """Compare scores in [0, 1] with the truth, both of any shape.

    Source: arXiv 1706.04599, section 2.
    """
    numbers = np.asarray(scores, dtype=np.float64).ravel()
    truth = np.asarray(targets, dtype=np.float64).ravel()
    # A score on an edge belongs to the bin above it.
    place = np.minimum((numbers * bins).astype(np.intp), bins - 1)
    counts = np.bincount(place, minlength=bins)
    some = np.where(counts, counts, np.nan)
    mean = np.bincount(place, weights=numbers, minlength=bins) / some
    right = np.bincount(place, weights=truth, minlength=bins) / some
    gaps = np.where(counts, np.abs(mean - right), 0.0)
    error = float((counts * gaps).sum() / max(1, len(numbers)))
    return Reliability(counts.astype(np.int64), mean, right, error)


def best_f1_threshold(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return the threshold with the best F1, midway between the scores on its two sides.

    It lies within [0.05, 0.95]; 0.5 where there is no positive. Arguments may have any shape.
    """
    points = _thresholds(scores, targets)
    if points is None:
        return 0.5
    thresholds, predicted, right = points
    f1 = 2 * right / (predicted + right[-1])
    return float(np.clip(thresholds[int(f1.argmax())], _LOWEST, _HIGHEST))


def precision_threshold(scores: npt.ArrayLike, targets: npt.ArrayLike, precision: float) -> float:
    """Return the lowest threshold at which this share of the given tags is right.

    It lies within [0.05, 1], midway between the scores on its two sides; 1 where no threshold gives
    the precision: the tag is then all but never given. Arguments may have any shape.
    """
    points = _thresholds(scores, targets)
    if points is None:
        return 1.0
    thresholds, predicted, right = points
    fit = np.flatnonzero((right >= precision * predicted) & (thresholds >= _LOWEST))
    return float(thresholds[fit[-1]]) if len(fit) else 1.0


def _thresholds(
    scores: npt.ArrayLike, targets: npt.ArrayLike
) -> tuple[FloatArray, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """Return falling thresholds midway between the scores, the last midway to 0, and their counts.

    None where nothing is true.
    """
    truth = np.asarray(targets).astype(np.bool_).ravel()
    if not truth.any():
        return None
    points = cuts(np.asarray(scores, dtype=np.float64).ravel(), truth)
    return (points.scores + np.append(points.scores[1:], 0.0)) / 2, points.predicted, points.right


def fit_thresholds(
    scores: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    min_positives: int,
    precision: float | None = None,
) -> npt.NDArray[np.float32]:
    """Return a threshold for each tag, by its best F1 or for a wanted precision.

    Tags with fewer than ``min_positives`` positives take the one that is best for all tags
    together: a threshold fitted to two posts says nothing. Scores and targets are ``(samples,
    classes)``; thresholds have six decimals, as they are written in the bundle.
    """
    numbers, truth = np.asarray(scores), np.asarray(targets).astype(np.bool_)

    def fit(column: npt.ArrayLike, positive: npt.ArrayLike) -> float:
        if precision is None:
            return best_f1_threshold(column, positive)
        return precision_threshold(column, positive, precision)

    common = fit(numbers, truth)
    enough = truth.sum(axis=0) >= min_positives
    fitted = [
        fit(numbers[:, i], truth[:, i]) if enough[i] else common for i in range(truth.shape[1])
    ]
    return np.array([round(t, 6) for t in fitted], dtype=np.float32)
