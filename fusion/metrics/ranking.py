"""Ranking and threshold metrics of multi-label predictions, in numpy, over whole sets.

GAP is what models are chosen by. Scores are floats ``(samples, classes)``, higher is more likely;
targets hold 0 and 1 in the same shape. Every metric raises ValueError for another shape, a score
that is NaN, or another target. No metric depends on the order of samples or classes: equal scores
count as one threshold, or as the mean over their orders.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]

# Posts whose scores are ranked at once: it bounds the memory of the copies; double would double it.
_ROWS_AT_ONCE = 8192


def _checked(scores: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
    """Return scores as floats and targets as booleans, both ``(samples, classes)``."""
    values, truth = np.asarray(scores), np.asarray(targets)
    if values.ndim != 2 or values.shape != truth.shape:
        raise ValueError(
            f"scores {values.shape} and targets {truth.shape} must both be (samples, classes)"
        )
    numbers = values.astype(np.float64) if values.dtype.kind != "f" else values
    if np.isnan(numbers).any():
        raise ValueError(f"{int(np.isnan(numbers).sum())} scores are NaN")
    if truth.dtype.kind != "b" and not np.isin(truth, (0, 1)).all():
        raise ValueError("targets must be 0 or 1")
    return numbers, truth.astype(np.bool_)


class GapMeter:
    """GAP@k over a set, added batch by batch; the value depends on no order, of posts or of tags.

    The denominator counts all positives of the set, those outside the top k too. Equal scores
    count as one threshold; of scores that are equal at a sample's k-th place each counts in part,
    as if all their orders were averaged.

    Source: google/youtube-8m, eval_util.py and average_precision_calculator.py, which shuffles
    equal scores.
    """

    def __init__(self, top_k: int = 20) -> None:
        self._top_k = top_k
        self._chosen: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        self._positives = 0

    def add(self, scores: npt.ArrayLike, targets: npt.ArrayLike) -> None:
        """Take the next samples of the set, scores and targets ``(samples, classes)``."""
        numbers, truth = _checked(scores, targets)
        self._positives += int(truth.sum())
        top_k = min(self._top_k, numbers.shape[1])
        for start in range(0, len(numbers) if top_k else 0, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            some, true = numbers[rows], truth[rows]
            last = -np.partition(-some, top_k - 1, axis=1)[:, top_k - 1 : top_k]  # (rows, 1)
            above = some > last
            places = (top_k - above.sum(axis=1)).astype(np.float64)  # left for those at the edge
            hits = places * _share_at(some, true, last)
            ones = np.ones(int(above.sum()))
            self._chosen.append((some[above], ones, true[above].astype(np.float64)))
            self._chosen.append((last[:, 0], places, hits))

    def value(self) -> float:
        """Return GAP of everything added so far, in [0, 1]; 0 where the set has no positive."""
        if not self._positives or not self._chosen:
            return 0.0
        scores, places, hits = (np.concatenate(each) for each in zip(*self._chosen, strict=True))
        levels, level = np.unique(-scores, return_inverse=True)
        hits_of_level = np.bincount(level, weights=hits, minlength=len(levels))
        places_of_level = np.bincount(level, weights=places, minlength=len(levels))
        precision = np.cumsum(hits_of_level) / np.cumsum(places_of_level)
        return float((hits_of_level * precision)[hits_of_level > 0].sum() / self._positives)


def _share_at(scores: FloatArray, truth: BoolArray, edge: FloatArray) -> FloatArray:
    """Return the share of positives among each row's scores at its edge ``(rows, 1)``."""
    tied = scores == edge
    shares: FloatArray = (tied & truth).sum(axis=1) / tied.sum(axis=1)
    return shares


def global_average_precision(
    scores: npt.ArrayLike, targets: npt.ArrayLike, top_k: int = 20
) -> float:
    """Return GAP@k: average precision of the pooled ``top_k`` predictions of every sample."""
    meter = GapMeter(top_k)
    meter.add(scores, targets)
    return meter.value()


def hit_at_one(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Share of the samples whose highest score is a positive; of equal ones each counts in part."""
    numbers, truth = _checked(scores, targets)
    if not numbers.size:
        return 0.0
    return float(_share_at(numbers, truth, numbers.max(axis=1, keepdims=True)).mean())


def precision_at_equal_recall(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return PERR: precision in each sample's top n, its number of labels; 0 without labels.

    Of scores that are equal at the n-th place each counts in part.

    Source: google/youtube-8m, eval_util.py.
    """
    numbers, truth = _checked(scores, targets)
    if not numbers.size:
        return 0.0
    label_counts = truth.sum(axis=1, keepdims=True)  # (samples, 1)
    last = np.take_along_axis(-np.sort(-numbers, axis=1), np.maximum(label_counts - 1, 0), axis=1)
    above = numbers > last
    hits = (above & truth).sum(axis=1)
    hits = hits + (label_counts[:, 0] - above.sum(axis=1)) * _share_at(numbers, truth, last)
    return float(
        np.where(label_counts[:, 0] > 0, hits / np.maximum(label_counts[:, 0], 1), 0.0).mean()
    )


class Cuts(NamedTuple):
    """The places where a falling threshold takes in further scores; arrays ``(cuts,)``.

    ``scores`` are the different ones, ``predicted`` the decisions at or above each, ``right`` the
    true ones among these.
    """

    scores: FloatArray
    predicted: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]


def cuts(scores: FloatArray, truth: BoolArray) -> Cuts:
    """Return the cuts of scores and their truth, both ``(decisions,)``, at least one."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # A cut lies behind the last of each run of equal scores.
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    return Cuts(ranked[ends], ends + 1, np.cumsum(truth[order])[ends])


def average_precisions(scores: npt.ArrayLike, targets: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Average precision of every class, untruncated; tied scores count as one threshold.

    NaN for a class without positives.
    """
    numbers, truth = _checked(scores, targets)
    result = np.full(numbers.shape[1], np.nan)
    for column in np.flatnonzero(truth.any(axis=0)):
        _, predicted, right = cuts(numbers[:, column], truth[:, column])
        recall_steps = np.diff(right, prepend=0) / right[-1]
        result[column] = float((recall_steps * (right / predicted)).sum())
    return result


def mean_average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return the mean of the average precisions of the classes that have positives."""
    per_class = average_precisions(scores, targets)
    known = per_class[~np.isnan(per_class)]
    return float(known.mean()) if len(known) else 0.0


class F1(NamedTuple):
    """F1 over all decisions, and its mean over the classes that have positives."""

    micro: float
    macro: float


def f1_scores(scores: npt.ArrayLike, targets: npt.ArrayLike, thresholds: npt.ArrayLike = 0.5) -> F1:
    """Return micro and macro F1; a class is predicted where its score reaches its threshold.

    Thresholds are one number, or ``(classes,)``.
    """
    numbers, truth = _checked(scores, targets)
    predicted = numbers >= np.asarray(thresholds)
    both = (predicted & truth).sum(axis=0)
    total = predicted.sum(axis=0) + truth.sum(axis=0)  # (classes,)
    per_class = 2 * both / np.maximum(total, 1)
    known = truth.any(axis=0)
    micro = float(2 * both.sum() / total.sum()) if total.sum() else 0.0
    return F1(micro=micro, macro=float(per_class[known].mean()) if known.any() else 0.0)


class Accuracy(NamedTuple):
    """Share of right decisions, near 1 wherever tags are rare, and of samples.

    Of a sample the set of tags is right to the last one.
    """

    decisions: float
    samples: float


def accuracy(
    scores: npt.ArrayLike, targets: npt.ArrayLike, thresholds: npt.ArrayLike = 0.5
) -> Accuracy:
    """Return the accuracy by decisions and by samples; arguments as of `f1_scores`."""
    numbers, truth = _checked(scores, targets)
    if not numbers.size:
        return Accuracy(0.0, 0.0)
    right = (numbers >= np.asarray(thresholds)) == truth
    return Accuracy(float(right.mean()), float(right.all(axis=1).mean()))


class PrecisionRecall(NamedTuple):
    """A precision-recall curve: one point for each different score, from the highest down."""

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    thresholds: FloatArray


def precision_recall(scores: npt.ArrayLike, targets: npt.ArrayLike) -> PrecisionRecall:
    """Return the curve of one class, or of all decisions together; arguments of any shape.

    Its arrays are ``(points,)``; empty where there is no score, recall 0 without positives.
    """
    numbers, truth = _checked(*(np.asarray(v).reshape(-1, 1) for v in (scores, targets)))
    if not len(numbers):
        return PrecisionRecall(np.empty(0), np.empty(0), np.empty(0))
    points = cuts(numbers[:, 0], truth[:, 0])
    return PrecisionRecall(
        points.right / points.predicted, points.right / max(1, int(points.right[-1])), points.scores
    )


TITLES = {
    "gap": "GAP@20",
    "map": "mAP",
    "hit_at_1": "Hit@1",
    "perr": "PERR",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "accuracy": "accuracy of decisions",
    "accuracy_exact": "posts wholly right",
}
"""Names of the `summary`'s metrics on a report's page, in their order there."""


AT_THRESHOLDS = ("f1_micro", "f1_macro", "accuracy", "accuracy_exact")
"""Metrics of `summary` that change with the thresholds."""


def summary(
    scores: npt.ArrayLike, targets: npt.ArrayLike, thresholds: npt.ArrayLike = 0.5
) -> dict[str, float]:
    """Return the metrics that are logged and stored in a bundle."""
    f1 = f1_scores(scores, targets, thresholds)
    right = accuracy(scores, targets, thresholds)
    return {
        "gap": global_average_precision(scores, targets),
        "hit_at_1": hit_at_one(scores, targets),
        "perr": precision_at_equal_recall(scores, targets),
        "map": mean_average_precision(scores, targets),
        "f1_micro": f1.micro,
        "f1_macro": f1.macro,
        "accuracy": right.decisions,
        "accuracy_exact": right.samples,
    }
