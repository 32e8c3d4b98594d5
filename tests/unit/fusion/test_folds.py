"""Parts of a data set: of equal size, alike in their tags, and the pool they are cut from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import ConfigError
from fusion.data.posts import PostList, stratified_folds
from tests.support.fusion import support


def tagged(posts: int, classes: int, seed: int) -> tuple[Any, Any, npt.NDArray[np.bool_]]:
    """Posts with 0 to 3 tags, some tags far rarer than others: ends, labels, and the matrix."""
    chance = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    rows = [
        chance.choice(classes, chance.integers(0, 4), replace=False, p=share / share.sum())
        for _ in range(posts)
    ]
    truth = np.zeros((posts, classes), np.bool_)
    for row, tags in zip(truth, rows, strict=True):
        row[tags] = True
    return np.cumsum([0, *map(len, rows)]), np.concatenate(rows), truth


@pytest.mark.parametrize(("posts", "classes", "folds"), [(400, 24, 5), (600, 60, 3), (40, 6, 2)])
def test_every_part_is_like_the_whole(posts: int, classes: int, folds: int) -> None:
    """Sizes differ by one or two; of each tag a part has its share, off by less than two posts."""
    ends, labels, truth = tagged(posts, classes, posts)
    part = stratified_folds(ends, labels, classes, folds, seed=1)
    sizes = np.bincount(part, minlength=folds)
    assert sizes.sum() == posts
    assert sizes.max() - sizes.min() <= 2
    counts = np.stack([truth[part == i].sum(axis=0) for i in range(folds)])  # (folds, classes)
    off = np.abs(counts - truth.sum(axis=0) / folds)
    assert off.max() < 2
    random = np.random.default_rng(0).permutation(posts) % folds
    by_chance = np.stack([truth[random == i].sum(axis=0) for i in range(folds)])
    assert off.mean() < 0.5 * np.abs(by_chance - truth.sum(axis=0) / folds).mean()


def test_parts_depend_on_the_seed_alone() -> None:
    """The same seed deals the same way, which resuming needs; another one does not."""
    ends, labels, _ = tagged(200, 12, 3)
    first, again, other = (stratified_folds(ends, labels, 12, 4, seed=s) for s in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any()


def test_posts_without_tags_and_repeated_tags() -> None:
    """Both are dealt evenly; a tag that appears twice on a post counts once."""
    part = stratified_folds(np.zeros(11, int), [], 3, 2, seed=0)
    assert sorted(np.bincount(part).tolist()) == [5, 5]
    part = stratified_folds([0, 2, 4, 6, 8], [1, 1, 1, 1, 1, 1, 1, 1], 3, 2, seed=0)
    assert np.bincount(part).tolist() == [2, 2]


@pytest.mark.parametrize(("posts", "folds"), [(3, 4), (5, 1)])
def test_parts_that_cannot_be(posts: int, folds: int) -> None:
    with pytest.raises(ValueError, match=f"{posts} posts cannot be split into {folds} folds"):
        stratified_folds(np.arange(posts + 1), np.zeros(posts, int), 1, folds, seed=0)


@pytest.fixture
def lists(tmp_path: Path) -> tuple[PostList, PostList]:
    paths = [support.write_posts(tmp_path, name, n, n) for name, n in (("a", 9), ("b", 5))]
    first, second = (PostList.read(path, support.LABELS) for path in paths)
    return first, second


def test_a_pool_is_its_lists_one_after_another(lists: tuple[PostList, PostList]) -> None:
    """Posts, targets, counts and keys are those of the lists, in every selection."""
    pool, rows = PostList.joined(lists), [13, 0, 9, 8, 4]
    both = [record.post_id for some in lists for record in some]
    targets = np.concatenate([some.targets() for some in lists])
    assert [record.post_id for record in pool] == both
    np.testing.assert_array_equal(pool.targets(), targets)
    np.testing.assert_array_equal(pool.positives(), targets.sum(axis=0))
    some = pool.take(rows)
    assert [record.post_id for record in some] == [both[i] for i in rows]
    np.testing.assert_array_equal(some.targets(), targets[rows])
    np.testing.assert_array_equal(some.positives(), targets[rows].sum(axis=0))
    assert [record.post_id for record in some[1:3]] == [both[0], both[9]]
    assert some.take([2])[0].post_id == both[9]
    assert some.entry(0)["post_id"] == both[13]
    ends, labels = some.label_rows()
    assert set(labels[ends[1] : ends[2]]) == set(np.flatnonzero(targets[0]))
    assert PostList.joined(lists).digest() == pool.digest() != some.digest()


def test_a_post_in_two_files_is_refused(lists: tuple[PostList, PostList], tmp_path: Path) -> None:
    """It would be learned in one fold as what it is judged by in another."""
    entries = json.loads(lists[1].paths[0].read_text())
    entries[2]["post_id"] = "a4"
    file = tmp_path / "c.json"
    file.write_text(json.dumps(entries))
    again = PostList.read(file, support.LABELS)
    with pytest.raises(ConfigError, match=r"post 'a4' is in .*a\.json and in .*c\.json"):
        PostList.joined((lists[0], again))
