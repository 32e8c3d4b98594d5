"""Metrics against golden vectors, scikit-learn and slow implementations of our own."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    hamming_loss,
    precision_recall_curve,
)

from fusion.metrics import ranking as metrics
from tests.support.fusion import support

SCORES = [[0.9, 0.1, 0.6], [0.2, 0.8, 0.7]]
TARGETS = [[1, 0, 1], [0, 1, 0]]


def case(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    chance = np.random.default_rng(seed)
    shape = (int(chance.integers(1, 40)), int(chance.integers(1, 60)))
    scores = chance.permutation(shape[0] * shape[1]).reshape(shape) / (shape[0] * shape[1])
    targets = (chance.random(shape) < chance.uniform(0, 0.5)).astype(int)
    return scores, targets, int(chance.integers(1, 30))


def test_gap_of_the_golden_vectors() -> None:
    assert metrics.global_average_precision(SCORES, TARGETS, 2) == pytest.approx(0.916667, abs=1e-6)
    assert metrics.global_average_precision(SCORES, TARGETS, 1) == pytest.approx(0.666667, abs=1e-6)


def test_gap_agrees_with_a_slow_implementation() -> None:
    for seed in range(60):
        scores, targets, top_k = case(seed)
        gap = metrics.global_average_precision(scores, targets, top_k)
        slow = support.plain_gap(zip(scores.tolist(), targets.tolist(), strict=True), top_k)
        assert gap == pytest.approx(slow, abs=1e-12), seed


def test_no_order_changes_a_metric() -> None:
    """Of batches, of samples or of classes, where nearly every score is tied."""
    chance = np.random.default_rng(5)
    scores = chance.integers(0, 4, (50, 30)) / 4
    targets = chance.random((50, 30)) < 0.1
    meter = metrics.GapMeter()
    for start, end in ((0, 7), (7, 8), (8, 31), (31, 50)):
        meter.add(scores[start:end], targets[start:end])
    assert meter.value() == metrics.global_average_precision(scores, targets)
    figures = metrics.summary(scores, targets)
    for _ in range(5):
        rows, columns = chance.permutation(50), chance.permutation(30)
        other = metrics.summary(scores[rows][:, columns], targets[rows][:, columns])
        assert other == pytest.approx(figures, abs=1e-12)


def test_ties_count_as_the_mean_of_their_orders() -> None:
    """A model that scores everything alike gains nothing from where the positives stand."""
    targets = np.zeros((200, 40))
    targets[:, :4] = 1  # first in every row: a stable sort would put them all on top
    same = np.full((200, 40), 0.5)
    assert metrics.global_average_precision(same, targets, 20) == pytest.approx(0.1 * 0.5)
    assert metrics.hit_at_one(same, targets) == pytest.approx(0.1)
    assert metrics.precision_at_equal_recall(same, targets) == pytest.approx(0.1)
    # 0.9 is in the top 2; of the two at 0.5 one is, and half of it is a positive.
    gap = metrics.global_average_precision([[0.9, 0.5, 0.5, 0.1]], [[1, 1, 0, 0]], 2)
    assert gap == pytest.approx((1 + 0.5 * 1.5 / 2) / 2)


def test_gap_counts_positives_outside_the_top_k() -> None:
    scores, targets = [[0.9, 0.8, 0.1]], [[1, 0, 1]]
    assert metrics.global_average_precision(scores, targets, 1) == pytest.approx(0.5)


def test_gap_without_positives_is_zero() -> None:
    assert metrics.global_average_precision([[0.5, 0.1]], [[0, 0]]) == 0.0
    assert metrics.global_average_precision(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0


@pytest.mark.parametrize(
    ("scores", "targets", "says"),
    [
        ([[np.nan, 0.1]], [[0, 1]], "NaN"),
        ([[0.5, 0.1]], [[0, 2]], "0 or 1"),
        ([0.5, 0.1], [0, 1], "samples, classes"),
        ([[0.5, 0.1]], [[0], [1]], "samples, classes"),
    ],
)
def test_what_is_no_score_is_refused(scores: list[Any], targets: list[Any], says: str) -> None:
    """A NaN or a wrong shape must never become a number that looks like a result."""
    for metric in (
        metrics.global_average_precision,
        metrics.hit_at_one,
        metrics.mean_average_precision,
        metrics.summary,
    ):
        with pytest.raises(ValueError, match=says):
            metric(scores, targets)


def test_average_precision_agrees_with_scikit_learn() -> None:
    for seed in range(10):
        scores, targets, _ = case(seed)
        if seed % 2:
            scores = np.round(scores, 1)
        precisions = metrics.average_precisions(scores, targets)
        known = targets.any(axis=0)
        assert np.isnan(precisions[~known]).all()
        theirs = [
            average_precision_score(targets[:, i], scores[:, i]) for i in np.flatnonzero(known)
        ]
        np.testing.assert_allclose(precisions[known], theirs, atol=1e-12)
        if known.any():
            assert metrics.mean_average_precision(scores, targets) == pytest.approx(np.mean(theirs))


def test_f1_agrees_with_scikit_learn() -> None:
    chance = np.random.default_rng(3)
    scores, targets = chance.random((80, 9)), (chance.random((80, 9)) < 0.3).astype(int)
    targets[:, 4] = 0
    thresholds = chance.random(9)
    f1 = metrics.f1_scores(scores, targets, thresholds)
    predicted = (scores >= thresholds).astype(int)
    assert f1.micro == pytest.approx(f1_score(targets, predicted, average="micro"))
    per_class = f1_score(targets, predicted, average=None, zero_division=0)
    assert f1.macro == pytest.approx(np.delete(per_class, 4).mean())


def test_hit_at_one_and_perr_by_hand() -> None:
    scores = [[0.9, 0.8, 0.1], [0.9, 0.8, 0.1], [0.5, 0.4, 0.3]]
    targets = [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert metrics.hit_at_one(scores, targets) == pytest.approx(1 / 3)
    assert metrics.precision_at_equal_recall(scores, targets) == pytest.approx(1 / 3)


def test_accuracy_agrees_with_scikit_learn() -> None:
    chance = np.random.default_rng(4)
    scores, targets = chance.random((90, 5)), (chance.random((90, 5)) < 0.3).astype(int)
    thresholds = chance.uniform(0.5, 0.9, 5)
    predicted = (scores >= thresholds).astype(int)
    shares = metrics.accuracy(scores, targets, thresholds)
    assert shares.decisions == pytest.approx(1 - hamming_loss(targets, predicted), abs=1e-12)
    assert shares.samples == pytest.approx(accuracy_score(targets, predicted), abs=1e-12)
    assert 0 < shares.samples < shares.decisions < 1
    assert metrics.accuracy(np.empty((0, 3)), np.empty((0, 3))) == metrics.Accuracy(0.0, 0.0)


def test_the_precision_recall_curve_agrees_with_scikit_learn() -> None:
    """Every point of it, with and without ties, of one class and of all decisions."""
    chance = np.random.default_rng(6)
    for shape, step in (((200,), 1e-9), ((200,), 0.1), ((30, 7), 0.05)):
        scores = np.round(chance.random(shape) / step) * step
        targets = chance.random(shape) < 0.3
        curve = metrics.precision_recall(scores, targets)
        precision, recall, thresholds = precision_recall_curve(targets.ravel(), scores.ravel())
        np.testing.assert_allclose(curve.thresholds, thresholds[::-1])
        np.testing.assert_allclose(curve.precision, precision[:-1][::-1], atol=1e-12)
        np.testing.assert_allclose(curve.recall, recall[:-1][::-1], atol=1e-12)
    assert len(metrics.precision_recall([], []).recall) == 0
    assert metrics.precision_recall([0.5, 0.4], [0, 0]).recall.tolist() == [0, 0]


def test_the_summary_is_its_parts() -> None:
    chance = np.random.default_rng(8)
    scores, targets = chance.random((60, 6)), chance.random((60, 6)) < 0.3
    thresholds = chance.random(6)
    f1 = metrics.f1_scores(scores, targets, thresholds)
    right = metrics.accuracy(scores, targets, thresholds)
    figures = metrics.summary(scores, targets, thresholds)
    assert figures.keys() == metrics.TITLES.keys()
    assert figures == {
        "gap": metrics.global_average_precision(scores, targets),
        "hit_at_1": metrics.hit_at_one(scores, targets),
        "perr": metrics.precision_at_equal_recall(scores, targets),
        "map": metrics.mean_average_precision(scores, targets),
        "f1_micro": f1.micro,
        "f1_macro": f1.macro,
        "accuracy": right.decisions,
        "accuracy_exact": right.samples,
    }
