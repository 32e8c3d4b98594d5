"""The agreement of two models, held against numpy and the metrics of whole sets."""

import numpy as np
import pytest

from fusion.metrics.agreement import Agreement, Scored
from fusion.metrics.ranking import global_average_precision

NAMES = ("cat", "dog", "sea")


def scored(rng: np.random.Generator, posts: int = 40) -> Scored:
    scores = rng.random((posts, len(NAMES)))
    return Scored(scores, scores > 0.6)


def batches(agreement: Agreement, one: Scored, other: Scored, truth: np.ndarray) -> Agreement:
    """Add all in batches of 7."""
    for start in range(0, len(truth), 7):
        rows = slice(start, start + 7)
        agreement.add(
            [f"p{i}" for i in range(len(truth))[rows]],
            Scored(one.scores[rows], one.given[rows]),
            Scored(other.scores[rows], other.given[rows]),
            truth[rows],
            np.logical_or.reduce(truth[rows], axis=1),
        )
    return agreement


def test_figures_are_those_of_the_whole_set() -> None:
    rng = np.random.default_rng(1)
    one, other, truth = scored(rng), scored(rng), rng.random((40, 3)) > 0.7
    found = batches(Agreement(NAMES, NAMES), one, other, truth).result()
    assert found["posts"] == 40
    assert found["same_tags"] == (one.given == other.given).all(axis=1).sum()
    assert found["tags_given"] == {
        "first": one.given.sum(),
        "second": other.given.sum(),
        "both": (one.given & other.given).sum(),
        "only_first": (one.given & ~other.given).sum(),
        "only_second": (~one.given & other.given).sum(),
    }
    pair = one.scores.ravel(), other.scores.ravel()
    assert found["scores"]["compared"] == 120
    assert found["scores"]["mean_abs_difference"] == pytest.approx(np.abs(pair[0] - pair[1]).mean())
    assert found["scores"]["correlation"] == pytest.approx(np.corrcoef(*pair)[0, 1])
    labelled = truth.any(axis=1)
    assert found["labelled"] == labelled.sum()
    for gap, each in zip(found["gap"], (one, other), strict=True):
        expected = global_average_precision(each.scores[labelled], truth[labelled])
        assert gap == pytest.approx(expected)
    by_name = {tag["name"]: tag for tag in found["tags"]}
    for i, name in enumerate(NAMES):
        differences = other.scores[:, i] - one.scores[:, i]
        assert by_name[name]["mean_difference"] == pytest.approx(differences.mean())
        assert by_name[name]["only_first"] == (one.given & ~other.given)[:, i].sum()
    changes = [tag["only_first"] + tag["only_second"] for tag in found["tags"]]
    assert changes == sorted(changes, reverse=True)
    post = found["differing_posts"][0]
    row = int(post["post_id"][1:])
    assert post["only_first"] == [
        name for name, only in zip(NAMES, one.given[row] & ~other.given[row], strict=True) if only
    ]


def test_models_with_other_tags_are_compared_by_name() -> None:
    one = Scored(np.array([[0.9, 0.2]]), np.array([[True, False]]))
    other = Scored(np.array([[0.7, 0.8]]), np.array([[True, True]]))
    agreement = Agreement(("cat", "dog"), ("sea", "cat"))
    assert agreement.names == ("cat", "dog", "sea")
    agreement.add(["p"], one, other, np.array([[False, False, True]]), np.array([True]))
    found = agreement.result()
    assert list(found["tags_given"].values()) == [1, 2, 1, 0, 1]
    assert found["scores"] == {
        "compared": 1,
        "mean_abs_difference": pytest.approx(0.1),
        "correlation": None,
    }
    assert found["differing_posts"] == [{"post_id": "p", "only_first": [], "only_second": ["sea"]}]
    # The first does not know the label: third of three. The second has it behind a wrong tag.
    assert found["gap"] == [pytest.approx(1 / 3), pytest.approx(1 / 2)]


def test_nothing_is_said_without_scores_or_labels() -> None:
    found = Agreement((), ()).result()
    assert (found["posts"], found["gap"], found["scores"]["correlation"]) == (0, None, None)
