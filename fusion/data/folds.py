"""Parts of a data set that resemble the whole: what k-fold training leaves out in turn."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt


def stratified_folds(
    ends: npt.ArrayLike, labels: npt.ArrayLike, classes: int, folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """Share posts out so that every part has its share of the posts and of each tag's posts.

    The rarest tag's posts are dealt first, each to the part that lacks it most; then those of the
    tag that is rarest among the rest, and so on.

    Args:
        ends: ``(posts + 1,)``: the labels of post i are ``labels[ends[i]:ends[i + 1]]``.
        labels: Indices of tags; one that stands twice counts once.
        classes: Number of tags.
        folds: Number of parts; at least 2, and at most as many as there are posts.
        seed: Of the order in which posts are dealt.

    Returns:
        The part of each post, from 0; ``(posts,)``.

    Raises:
        ValueError: There are fewer posts than parts, or fewer than two parts.

    Source: Sechidis et al., On the stratification of multi-label data, 2011, algorithm 1.
    """
    bounds, flat = np.asarray(ends, np.int64), np.asarray(labels, np.int64)
    posts = len(bounds) - 1
    if not 2 <= folds <= posts:
        raise ValueError(f"{posts} posts cannot be shared out to {folds} folds")
    chance = np.random.default_rng(seed)
    tags = [np.unique(flat[bounds[i] : bounds[i + 1]]).tolist() for i in range(posts)]
    of_tag: list[list[int]] = [[] for _ in range(classes)]
    for post in chance.permutation(posts).tolist():
        for tag in tags[post]:
            of_tag[tag].append(post)
    left = np.array([len(some) for some in of_tag], dtype=np.int64)
    lacking = _Lacking(left, posts, folds)
    part = np.full(posts, -1, dtype=np.int64)
    queue = [(int(count), tag) for tag, count in enumerate(left) if count]
    heapq.heapify(queue)
    while queue:
        count, tag = heapq.heappop(queue)
        if count != left[tag]:  # posts were dealt with another tag since
            if left[tag]:
                heapq.heappush(queue, (int(left[tag]), tag))
            continue
        for post in of_tag[tag]:
            if part[post] < 0:
                part[post] = lacking.deal(tag, tags[post], float(chance.random()))
                left[tags[post]] -= 1
    for post in np.flatnonzero(part < 0).tolist():  # without tags
        part[post] = lacking.deal(None, [], float(chance.random()))
    return part


class _Lacking:
    """What each part still lacks."""

    def __init__(self, counts: npt.NDArray[np.int64], posts: int, folds: int) -> None:
        self._posts = np.full(folds, posts / folds)  # (folds,)
        self._tags = np.repeat(counts[None, :] / folds, folds, axis=0)  # (folds, classes)

    def deal(self, tag: int | None, tags: list[int], chance: float) -> int:
        """The part that a post goes to: the one that lacks the tag most, and then posts most."""
        wanted = self._posts if tag is None else self._tags[:, tag]
        best = np.flatnonzero(wanted >= wanted.max() - 1e-9)
        best = best[self._posts[best] >= self._posts[best].max() - 1e-9]
        chosen = int(best[int(chance * len(best))])
        self._posts[chosen] -= 1
        self._tags[chosen, tags] -= 1
        return chosen
