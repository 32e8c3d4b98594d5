"""Groups of posts and how they are dealt."""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.build.index import Groups
from corpus.build.sides import Group, Ints, Sides, deal


def _groups(numbers: list[int], tags: list[list[int]]) -> list[Group]:
    """Groups 0 to n - 1 of posts, with the tags of each post; the largest first."""
    counts = [Counter[int]() for _ in range(max(numbers) + 1)]
    for number, listed in zip(numbers, tags, strict=True):
        counts[number].update(listed)
    groups = []
    for number, each in enumerate(counts):
        pairs = np.array(sorted(each.items()), np.int32).reshape(-1, 2)
        groups.append(Group(number, numbers.count(number), pairs[:, 0], pairs[:, 1]))
    return sorted(groups, key=lambda group: -group.size)


def _totals(groups: list[Group], classes: int) -> Ints:
    totals = np.zeros(classes, np.int64)
    for group in groups:
        totals[group.tags] += group.counts
    return totals


def _dealt(
    groups: list[Group],
    shares: tuple[float, ...],
    classes: int,
    settled: Sequence[Sequence[int]] | None = None,
) -> tuple[np.ndarray, Sides]:
    """Side of each group; posts of each tag, one each, may lie on the sides already."""
    before = np.array(settled or np.zeros((len(shares), classes)), np.int64)
    tags = np.vstack([before, _totals(groups, classes)])
    posts = np.append(before.sum(axis=1), sum(group.size for group in groups))
    sides = Sides(shares, tags, posts, len(groups))
    deal(lambda: groups, sides)
    return np.array(sides.side), sides


def _numbers(groups: Groups) -> np.ndarray:
    """Number of each post's set, counted from 0 in the order of the first posts."""
    return np.unique([groups.root(post) for post in range(len(groups))], return_inverse=True)[1]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
@settings(deadline=None)
def test_groups_are_the_connected_components(links: list[tuple[int, int]]) -> None:
    """The same sets as scipy finds, in the order of their first posts."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups = Groups(20)
    for link in links:
        groups.join(link)
    rows, columns = ([link[i] for link in links] for i in (0, 1))
    graph = coo_array((np.ones(len(links)), (rows, columns)), shape=(20, 20))
    _, theirs = connected_components(graph, directed=False)
    ours = _numbers(groups)
    assert len(set(zip(ours, theirs, strict=True))) == len(set(theirs))
    firsts = [int(np.flatnonzero(ours == number)[0]) for number in range(ours.max() + 1)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("seed", range(4))
def test_small_cases_come_near_the_best_of_all(seed: int) -> None:
    """Against every possible dealing of nine groups: close to the best, far from the mean."""
    random = np.random.default_rng(seed)
    numbers = np.unique(random.integers(0, 9, 40), return_inverse=True)[1].tolist()
    tags = [random.choice(4, size=random.integers(1, 3), replace=False).tolist() for _ in numbers]
    groups = _groups(numbers, tags)
    truth = np.zeros((len(groups), 4))  # (groups, classes)
    for group in groups:
        truth[group.number, group.tags] = group.counts

    def error(side: np.ndarray) -> float:
        held = np.stack([truth[side == number].sum(axis=0) for number in range(2)])
        return float(((held - truth.sum(axis=0) / 2) ** 2).sum())

    errors = [error(np.array(side)) for side in product(range(2), repeat=len(groups))]
    assert error(_dealt(groups, (0.5, 0.5), 4)[0]) <= np.quantile(errors, 0.1)


def test_frequent_tags_are_dealt_evenly() -> None:
    """Long-tailed tags, groups of all sizes: under 10% off for tags with 50 posts or more."""
    posts, classes, random = 3000, 24, np.random.default_rng(24)
    chance = 1 / np.arange(1, classes + 1)
    chance /= chance.sum()
    tags = [
        sorted(set(random.choice(classes, random.integers(1, 5), p=chance).tolist()))
        for _ in range(posts)
    ]
    groups = Groups(posts)
    for _ in range(300):
        groups.join(random.integers(0, posts, 2).tolist())
    groups.join(random.integers(0, posts, 60).tolist())
    number = _numbers(groups)
    side = _dealt(_groups(number.tolist(), tags), (0.8, 0.1, 0.1), classes)[0][number]
    truth = np.zeros((posts, classes))
    for row, listed in zip(truth, tags, strict=True):
        row[listed] = 1
    frequent = truth.sum(axis=0) >= 50
    assert frequent.sum() > 10
    for each in range(3):
        own = truth[side == each].mean(axis=0)[frequent]
        assert np.abs(own / truth.mean(axis=0)[frequent] - 1).max() < 0.1
    assert np.abs(np.bincount(side) / posts - [0.8, 0.1, 0.1]).max() < 0.01


def test_a_giant_group_goes_where_there_is_room() -> None:
    """A group of 40% cannot lie in a side of 10%."""
    numbers = [0] * 40 + list(range(1, 61))
    side, sides = _dealt(_groups(numbers, [[i % 3] for i in range(100)]), (0.8, 0.1, 0.1), 3)
    assert side[0] == 0
    assert sides.posts.tolist() == [80, 10, 10]


def test_what_the_sides_hold_counts() -> None:
    """Nine groups of thirty lie on the small side already, and a closed side gets nothing."""
    groups = _groups(list(range(21)), [[0]] * 21)
    side, sides = _dealt(groups, (0.9, 0.1, 0.0), 1, settled=[[0], [9], [50]])
    assert (side == 0).all()
    assert sides.tags.tolist() == [[21], [9], [50]]
    assert sides.posts.tolist() == [21, 9, 50]
