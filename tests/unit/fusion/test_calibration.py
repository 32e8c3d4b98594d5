"""Calibration and thresholds: how they are fitted, kept in the bundle, and applied to scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

from fusion.bundle.bundle import load_bundle
from fusion.infer.inferer import Inferer
from fusion.metrics import ranking as metrics
from fusion.metrics.calibration import (
    Isotonic,
    Temperature,
    best_f1_threshold,
    calibrated,
    fit_calibration,
    fit_isotonic,
    fit_temperature,
    fit_thresholds,
    precision_threshold,
)
from tests.support.fusion import support


def overconfident(count: int = 4000, factor: float = 2.5) -> tuple[Any, Any]:
    """Scores whose logits are ``factor`` times those that the truth was drawn from."""
    chance = np.random.default_rng(0)
    logits = chance.normal(-1, 2, (count, 3))
    truth = chance.random(logits.shape) < 1 / (1 + np.exp(-logits))
    return (1 / (1 + np.exp(-factor * logits))).astype(np.float32), truth


def cross_entropy(temperature: float, scores: Any, truth: Any) -> float:
    p = np.clip(scores.astype(np.float64), 1e-12, 1 - 1e-12)
    x = np.log(p / (1 - p)) / temperature
    return float((np.logaddexp(0, x) - truth * x).mean())


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_the_temperature_has_the_least_cross_entropy(factor: float) -> None:
    """As scipy's minimiser finds it, near the factor that the logits were spoilt by."""
    scores, truth = overconfident(factor=factor)
    temperature = fit_temperature(scores, truth)
    best = minimize_scalar(
        cross_entropy,
        bounds=(0.02, 50),
        args=(scores, truth),
        method="bounded",
        options={"xatol": 1e-7},
    )
    assert temperature == pytest.approx(best.x, rel=1e-4)
    assert temperature == pytest.approx(factor, rel=0.05)
    assert cross_entropy(temperature, scores, truth) <= best.fun + 1e-9


def test_a_temperature_keeps_the_order_and_the_middle() -> None:
    given_scores = np.array([0.0, 1e-30, 0.2, 0.5, 0.8, 1.0], np.float32)
    applied = Temperature(temperature=3).apply(given_scores)
    assert (np.diff(applied) >= 0).all()
    assert applied[3] == 0.5
    logit = np.log(0.8 / 0.2) / 3
    assert applied[4] == pytest.approx(1 / (1 + np.exp(-logit)))
    assert np.isfinite(applied).all()
    same = Temperature(temperature=1).apply(given_scores)
    np.testing.assert_allclose(same, given_scores, rtol=1e-6, atol=1e-11)


def test_a_temperature_of_one_sided_truth_stays_within_its_bounds() -> None:
    """The cross entropy of perfect scores has no minimum; the bound is taken."""
    assert fit_temperature([0.1, 0.9], [0, 1]) == pytest.approx(0.02)
    assert fit_temperature([0.9, 0.1], [0, 1]) == pytest.approx(50)


def test_isotonic_equals_sklearn_on_what_it_was_fitted_to_and_beside_it() -> None:
    chance = np.random.default_rng(1)
    for size in (1, 2, 30, 400, 20_000):
        scores = chance.random((size, 3)).round(2 if size == 30 else 9)  # many ties at 30
        truth = chance.random(scores.shape) < scores**2
        theirs = IsotonicRegression(out_of_bounds="clip").fit(scores.ravel(), truth.ravel())
        ours = fit_isotonic(scores, truth)
        for at in (scores.ravel(), np.linspace(0, 1, 500)):
            np.testing.assert_allclose(ours.apply(at), theirs.predict(at), atol=2e-6)


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40))
def test_isotonic_equals_sklearn_on_anything(pairs: list[tuple[int, bool]]) -> None:
    """Runs of ties, all true, all false, one post."""
    scores = np.array([s / 12 for s, _ in pairs])
    truth = np.array([t for _, t in pairs])
    theirs = IsotonicRegression(out_of_bounds="clip").fit(scores, truth).predict(scores)
    np.testing.assert_allclose(fit_isotonic(scores, truth).apply(scores), theirs, atol=1e-6)


def test_isotonic_of_many_blocks_is_thinned_and_stays_near() -> None:
    """A bundle does not hold ten thousand knots; what is left is within a thousandth."""
    scores = np.linspace(0, 1, 20_000)
    truth = scores**2  # rising targets: every level is a block
    isotonic = fit_isotonic(scores, truth)
    assert len(isotonic.scores) == 1000
    np.testing.assert_allclose(isotonic.apply(scores), truth, atol=1e-3)


def test_calibration_makes_scores_as_often_right_as_they_say() -> None:
    """The error of ten bins falls to under a fifth, on posts that were not fitted to."""
    scores, truth = overconfident()
    fit, check = slice(0, 2000), slice(2000, None)

    def error(given_scores: Any) -> float:
        bins = np.minimum((given_scores * 10).astype(int), 9).ravel()
        sums = np.bincount(bins, given_scores.ravel() - truth[check].ravel(), minlength=10)
        return float(np.abs(sums).sum() / given_scores.size)

    before = error(scores[check])
    for name in ("temperature", "isotonic"):
        calibration = fit_calibration(name, scores[fit], truth[fit])
        assert error(calibrated(calibration, scores[check])) < before / 5, name
    assert fit_calibration("none", scores, truth) is None
    np.testing.assert_array_equal(calibrated(None, scores), scores)


# Thresholds


def test_a_precision_threshold_is_the_lowest_that_gives_it() -> None:
    """By trying every threshold: the share of right ones is reached, with the most tags given."""
    chance = np.random.default_rng(0)
    for _ in range(40):
        scores, truth = chance.random(50).round(2), chance.random(50) < 0.5
        threshold = precision_threshold(scores, truth, 0.7)
        tried = [t for t in np.unique(scores) if t > 0.05 and truth[scores >= t].mean() >= 0.7]
        if not tried:
            assert threshold == 1.0
            continue
        given_tags = scores >= threshold
        assert truth[given_tags].mean() >= 0.7
        # Below 0.05 no threshold lies; midway points may fall on either side of it.
        assert given_tags.sum() >= (scores >= min(tried)).sum() - (scores < 0.06).sum()


def test_a_precision_out_of_reach_gives_the_tag_no_more() -> None:
    assert precision_threshold([0.9, 0.8, 0.3], [0, 1, 0], 0.9) == 1.0
    assert precision_threshold([0.9, 0.8], [0, 0], 0.5) == 1.0
    assert precision_threshold([0.9, 0.8, 0.3], [1, 1, 0], 0.9) == pytest.approx(0.55)
    assert precision_threshold([0.9, 0.8, 0.3], [1, 0, 1], 0.6) == pytest.approx(0.15)


# In the bundle

CALIBRATIONS = {
    "temperature": Temperature(temperature=2.5),
    "isotonic": Isotonic(scores=(0.1, 0.6, 0.9), values=(0.05, 0.3, 0.99)),
}


def write(folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    support.write_bundle(folder, **changes)


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_bundle_keeps_and_applies_its_calibration(name: str, tmp_path: Path) -> None:
    calibration = CALIBRATIONS[name]
    write(tmp_path / "plain")
    write(tmp_path / "b", calibration=calibration)
    assert load_bundle(tmp_path / "b").calibration == calibration
    posts = [support.features(f"p{i}", seed=i) for i in range(4)]
    plain = Inferer.load(tmp_path / "plain").predict(posts)
    for before, after in zip(plain, Inferer.load(tmp_path / "b").predict(posts), strict=True):
        np.testing.assert_array_equal(after.scores, calibration.apply(before.scores))
        assert {t.id for t in after.tags} == set(np.flatnonzero(after.scores >= 0.5))


# Thresholds


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
    threshold = best_f1_threshold(scores, half)
    assert 0.05 <= threshold <= 0.95
    assert (threshold <= score) == (score >= 0.05), "given to all where it can be told from nothing"
    assert precision_threshold(scores, half, 0.9) == 1.0
    if score >= 0.1:
        assert precision_threshold(scores, every, 0.9) <= score


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
@pytest.mark.parametrize("truth", [0, 1])
@pytest.mark.parametrize("score", [0.0, 0.4, 1.0])
def test_calibration_of_what_says_nothing(kind: str, truth: int, score: float) -> None:
    """One score, one truth: the map is finite, stays in [0, 1], and goes the right way."""
    scores, targets = np.full((6, 2), score), np.full((6, 2), truth)
    calibration: Any = fit_calibration(kind, scores, targets)  # type: ignore[arg-type]
    scored = calibration.apply(np.array([0.0, 0.2, score, 0.9, 1.0]))
    assert np.isfinite(scored).all()
    assert ((scored >= 0) & (scored <= 1)).all()
    if kind == "isotonic":
        np.testing.assert_array_equal(scored, np.full(5, truth, np.float32))


@pytest.mark.parametrize("precision", [None, 0.9])
def test_rare_tags_take_the_common_threshold(precision: float | None) -> None:
    scores = np.array([[0.9, 0.2], [0.8, 0.1], [0.3, 0.15], [0.2, 0.05]])
    truth = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    fitted = fit_thresholds(scores, truth, min_positives=2, precision=precision)
    common = best_f1_threshold(scores, truth)
    if precision is not None:
        common = precision_threshold(scores, truth, precision)
    assert fitted.tolist() == pytest.approx([0.55, common], abs=1e-6)
    own = fit_thresholds(scores, truth, min_positives=1, precision=precision)
    assert own[1] == pytest.approx(0.175)


def test_a_threshold_lies_between_what_it_parts() -> None:
    """The best F1 by trying every threshold, and midway between the two scores beside it."""
    chance = np.random.default_rng(0)
    for _ in range(20):
        scores, targets = chance.random(40), chance.random(40) < 0.4
        threshold = best_f1_threshold(scores, targets)
        tried = [metrics.f1_scores(scores[:, None], targets[:, None], t).micro for t in scores]
        here = metrics.f1_scores(scores[:, None], targets[:, None], threshold).micro
        assert here >= max(tried) - 1e-12 or threshold in (0.05, 0.95)
    assert best_f1_threshold([0.9, 0.8, 0.3, 0.2], [1, 1, 0, 0]) == pytest.approx(0.55)
    assert best_f1_threshold([0.9, 0.8], [0, 0]) == 0.5
