"""From which score on a tag is given: one threshold per tag, fitted on validation posts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LOWEST, HIGHEST = 0.05, 0.95


def best_f1_threshold(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """The threshold with the best F1, midway between the scores on its two sides.

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
    order = np.argsort(-numbers, kind="stable")
    ranked, ordered = truth[order], numbers[order]
    # A cut lies behind the last of each run of equal scores.
    cuts = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    found = np.cumsum(ranked)[cuts]
    f1 = 2 * found / (cuts + 1 + truth.sum())
    cut = int(cuts[int(f1.argmax())])
    below = ordered[cut + 1] if cut + 1 < len(ordered) else 0.0
    return float(np.clip((ordered[cut] + below) / 2, LOWEST, HIGHEST))


def fit_thresholds(
    scores: npt.ArrayLike, targets: npt.ArrayLike, *, min_positives: int
) -> npt.NDArray[np.float32]:
    """A threshold for each tag by its best F1.

    Tags with fewer than ``min_positives`` positives take the one that is best for all tags
    together: a threshold fitted to two posts says nothing.

    Args:
        scores: Floats ``(samples, classes)`` in [0, 1].
        targets: ``(samples, classes)`` of 0 and 1.
        min_positives: Positives that a threshold of its own takes.

    Returns:
        float32 ``(classes,)``, with six decimals, as they are written in the bundle.
    """
    numbers, truth = np.asarray(scores), np.asarray(targets).astype(np.bool_)
    common = best_f1_threshold(numbers, truth)
    enough = truth.sum(axis=0) >= min_positives
    fitted = [
        best_f1_threshold(numbers[:, i], truth[:, i]) if enough[i] else common
        for i in range(truth.shape[1])
    ]
    return np.array([round(t, 6) for t in fitted], dtype=np.float32)
