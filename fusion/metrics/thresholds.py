"""From which score on a tag is given: one threshold per tag, fitted on validation posts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LOWEST, HIGHEST = 0.05, 0.95


def best_f1_threshold(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Return the threshold with the best F1, midway between the scores on its two sides.

    Args:
        scores: Floats ``(samples,)`` in [0, 1].
        targets: ``(samples,)`` of 0 and 1.

    Returns:
        Within [0.05, 0.95]; 0.5 where there is no positive.
    """
    numbers = np.asarray(scores, dtype=np.float64).ravel()
    truth = np.asarray(targets).astype(np.bool_).ravel()
    if not truth.any():
        return 0.5
    thresholds, given, right = _cuts(numbers, truth)
    f1 = 2 * right / (given + truth.sum())
    return float(np.clip(thresholds[int(f1.argmax())], LOWEST, HIGHEST))


def precision_threshold(scores: npt.ArrayLike, targets: npt.ArrayLike, precision: float) -> float:
    """Return the lowest threshold at which this share of the given tags is right.

    Args:
        scores: Floats ``(samples,)`` in [0, 1].
        targets: ``(samples,)`` of 0 and 1.
        precision: Wanted share of right ones.

    Returns:
        Within [0.05, 1], midway between the scores on its two sides; 1 where no threshold gives
        the precision: the tag is then all but never given.
    """
    numbers = np.asarray(scores, dtype=np.float64).ravel()
    truth = np.asarray(targets).astype(np.bool_).ravel()
    if not truth.any():
        return 1.0
    thresholds, given, right = _cuts(numbers, truth)
    fit = np.flatnonzero((right >= precision * given) & (thresholds >= LOWEST))
    return float(thresholds[fit[-1]]) if len(fit) else 1.0


def _cuts(
    numbers: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Falling thresholds between the scores, how many lie over each, and how many of them are true.

    The last lies midway to 0.
    """
    order = np.argsort(-numbers, kind="stable")
    ranked, ordered = truth[order], numbers[order]
    # A cut lies behind the last of each run of equal scores.
    cuts = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    below = np.append(ordered, 0.0)[cuts + 1]
    return (ordered[cuts] + below) / 2, cuts + 1, np.cumsum(ranked)[cuts]


def fit_thresholds(
    scores: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    min_positives: int,
    precision: float | None = None,
) -> npt.NDArray[np.float32]:
    """Return a threshold for each tag, by its best F1 or for a wanted precision.

    Tags with fewer than ``min_positives`` positives take the one that is best for all tags
    together: a threshold fitted to two posts says nothing.

    Args:
        scores: Floats ``(samples, classes)`` in [0, 1].
        targets: ``(samples, classes)`` of 0 and 1.
        min_positives: Positives that a threshold of its own takes.
        precision: As in `precision_threshold`; None takes the best F1.

    Returns:
        float32 ``(classes,)``, with six decimals, as they are written in the bundle.
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
