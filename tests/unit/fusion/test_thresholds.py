"""Thresholds at their edges, and the way from the training's to those that tags are given by."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.metrics import ranking as metrics
from fusion.metrics.calibration import (
    best_f1_threshold,
    fit_calibration,
    fit_thresholds,
    precision_threshold,
)


def test_a_tag_that_no_post_has() -> None:
    """Alone it has nothing to fit; among others it takes the threshold of all together."""
    assert best_f1_threshold([0.9, 0.1], [0, 0]) == 0.5
    assert precision_threshold([0.9, 0.1], [0, 0], 0.5) == 1.0
    scores = np.array([[0.9, 0.8], [0.8, 0.1], [0.2, 0.6], [0.1, 0.1]])
    targets = np.array([[1, 0], [1, 0], [0, 0], [0, 0]])
    for precision in (None, 0.9):
        fitted = fit_thresholds(scores, targets, min_positives=1, precision=precision)
        common = fit_thresholds(scores, targets, min_positives=99, precision=precision)
        assert fitted[1] == common[1] == common[0]
        assert fitted[0] == pytest.approx(0.5)
    nothing = np.zeros((4, 2))
    assert fit_thresholds(scores, nothing, min_positives=1).tolist() == [0.5, 0.5]
    assert fit_thresholds(scores, nothing, min_positives=1, precision=0.9).tolist() == [1, 1]


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_scores_that_are_all_equal(score: float) -> None:
    """Nothing can be parted: F1 gives all or nothing, a precision only where all are right."""
    scores = np.full(8, score)
    half, every = np.arange(8) % 2, np.ones(8, int)
    found = best_f1_threshold(scores, half)
    assert 0.05 <= found <= 0.95
    assert (found <= score) == (score >= 0.05), "given to all where it can be told from nothing"
    assert precision_threshold(scores, half, 0.9) == 1.0
    if score >= 0.1:
        assert precision_threshold(scores, every, 0.9) <= score


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
@pytest.mark.parametrize("truth", [0, 1])
@pytest.mark.parametrize("score", [0.0, 0.4, 1.0])
def test_calibration_of_what_says_nothing(kind: str, truth: int, score: float) -> None:
    """One score, one truth: the map is finite, stays in [0, 1], and goes the right way."""
    scores, targets = np.full((6, 2), score), np.full((6, 2), truth)
    calibration = fit_calibration(kind, scores, targets)  # type: ignore[arg-type]
    assert calibration is not None
    found = calibration.apply(np.array([0.0, 0.2, score, 0.9, 1.0]))
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= 1)).all()
    if kind == "isotonic":
        np.testing.assert_array_equal(found, np.full(5, truth, np.float32))


def test_a_threshold_lies_between_what_it_parts() -> None:
    """The best F1 by trying every threshold, and midway between the two scores beside it."""
    chance = np.random.default_rng(0)
    for _ in range(20):
        scores, targets = chance.random(40), chance.random(40) < 0.4
        found = best_f1_threshold(scores, targets)
        tried = [metrics.f1_scores(scores[:, None], targets[:, None], t).micro for t in scores]
        here = metrics.f1_scores(scores[:, None], targets[:, None], found).micro
        assert here >= max(tried) - 1e-12 or found in (0.05, 0.95)
    assert best_f1_threshold([0.9, 0.8, 0.3, 0.2], [1, 1, 0, 0]) == pytest.approx(0.55)
    assert best_f1_threshold([0.9, 0.8], [0, 0]) == 0.5


def test_rare_tags_take_the_common_threshold() -> None:
    scores = np.array([[0.9, 0.2], [0.8, 0.1], [0.3, 0.15], [0.2, 0.05]])
    targets = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    fitted = fit_thresholds(scores, targets, min_positives=2)
    assert fitted[0] == pytest.approx(0.55)
    assert fitted[1] == pytest.approx(best_f1_threshold(scores, targets), abs=1e-6)
    own = fit_thresholds(scores, targets, min_positives=1)
    assert own[1] == pytest.approx(0.175)
