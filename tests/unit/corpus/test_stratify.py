"""Groups of posts and how they are dealt."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.build.index import Groups
from corpus.build.sides import GroupTags, SideCounts, stratify


def _rows(groups: list[int], tags: list[list[int]], classes: int) -> GroupTags:
    """Groups 0 to n - 1 of posts, with the tags of each post."""
    counts = [Counter[int]() for _ in range(max(groups) + 1)]
    for group, listed in zip(groups, tags, strict=True):
        counts[group].update(listed)
    pairs = [np.array(sorted(each.items()), np.int32).reshape(-1, 2) for each in counts]
    return GroupTags.of([groups.count(i) for i in range(len(counts))], pairs, classes)


def _numbers(groups: Groups) -> np.ndarray:
    """Number of each post's set, counted from 0 in the order of the first posts."""
    roots = [groups.root(post) for post in range(len(groups))]
    return np.unique(roots, return_inverse=True)[1]


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
    _, wanted = connected_components(graph, directed=False)
    found = _numbers(groups)
    assert len(set(zip(found, wanted, strict=True))) == len(set(wanted))
    firsts = [int(np.flatnonzero(found == number)[0]) for number in range(found.max() + 1)]
    assert firsts == sorted(firsts)


def _error(rows: GroupTags, side: np.ndarray, shares: tuple[float, ...]) -> float:
    """Σ over sides and tags of the squared distance from the target."""
    total = 0.0
    for number, share in enumerate(shares):
        held = np.zeros(rows.classes)
        for group in np.flatnonzero(side == number):
            tags, counts = rows.row(int(group))
            held[tags] += counts
        total += float(((held - share * rows.totals()) ** 2).sum())
    return total


@pytest.mark.parametrize("seed", range(4))
def test_small_cases_come_near_the_best_of_all(seed: int) -> None:
    """Against every possible dealing of nine groups: close to the best, far from the mean."""
    random = np.random.default_rng(seed)
    groups = sorted(random.integers(0, 9, 40).tolist())
    groups = np.unique(groups, return_inverse=True)[1].tolist()
    tags = [random.choice(4, size=random.integers(1, 3), replace=False).tolist() for _ in groups]
    rows = _rows(groups, tags, 4)
    shares = (0.5, 0.5)
    count = len(rows.sizes)
    errors = [_error(rows, np.array(s), shares) for s in product(range(2), repeat=count)]
    found = _error(rows, stratify(rows, shares, seed), shares)
    assert found <= np.quantile(errors, 0.1)


def test_frequent_tags_are_dealt_evenly() -> None:
    """Long-tailed tags, groups of all sizes: under 10% off for tags with 50 posts or more."""
    classes, random = 24, np.random.default_rng(24)
    chance = 1 / np.arange(1, classes + 1)
    chance /= chance.sum()
    tags = [
        sorted(set(random.choice(classes, random.integers(1, 5), p=chance).tolist()))
        for _ in range(3000)
    ]
    groups = Groups(3000)
    for _ in range(300):
        groups.join(random.integers(0, 3000, 2).tolist())
    groups.join(random.integers(0, 3000, 60).tolist())
    number = _numbers(groups)
    rows = _rows(number.tolist(), tags, classes)
    side = stratify(rows, (0.8, 0.1, 0.1), 0)[number]
    truth = np.zeros((3000, classes))
    for row, listed in zip(truth, tags, strict=True):
        row[listed] = 1
    frequent = truth.sum(axis=0) >= 50
    assert frequent.sum() > 10
    train = truth[side == 0].mean(axis=0)[frequent]
    for other in (1, 2):
        own = truth[side == other].mean(axis=0)[frequent]
        assert np.abs(own / train - 1).max() < 0.1
    assert np.abs(np.bincount(side) / 3000 - [0.8, 0.1, 0.1]).max() < 0.01


def test_a_giant_group_goes_where_there_is_room() -> None:
    """A group of 40% cannot lie in a side of 10%."""
    groups = [0] * 40 + list(range(1, 61))
    rows = _rows(groups, [[i % 3] for i in range(100)], 3)
    side = stratify(rows, (0.8, 0.1, 0.1), 0)
    assert side[0] == 0
    assert np.bincount(side[np.array(groups)]).tolist() == [80, 10, 10]


def test_what_the_sides_hold_counts() -> None:
    """Nine groups of thirty lie on the small side already: it gets no more of the tag."""
    rows = _rows(list(range(21)), [[0]] * 21, 1)
    settled = SideCounts(np.array([[0], [9]]), np.array([0, 9]))
    assert (stratify(rows, (0.9, 0.1), 3, settled) == 0).all()
    settled.add(rows, np.zeros(21, np.int64))
    assert settled.tags.tolist() == [[21], [9]]
    assert settled.posts.tolist() == [21, 9]


def test_the_seed_fixes_the_split() -> None:
    rows = _rows(list(range(30)), [[i % 5, 5 + i % 2] for i in range(30)], 7)
    first, again, other = (stratify(rows, (0.7, 0.3), seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
