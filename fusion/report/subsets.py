"""GAP of every subset of the modalities: the same model, shown only these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from common.post import MODALITIES, Features, Modality
from fusion.infer.inferer import Inferer
from fusion.metrics.ranking import GapMeter


@dataclass(frozen=True)
class SubsetGap:
    """GAP where only some modalities are shown.

    Attributes:
        gap: Over all posts; one that has none of these modalities gets what the model says of a
            post of which it knows nothing.
        posts: Posts that have at least one of them.
        gap_of_posts: Over just these.
    """

    modalities: tuple[Modality, ...]
    gap: float
    posts: int
    gap_of_posts: float

    @property
    def name(self) -> str:
        return "+".join(self.modalities)


def subsets_of(modalities: Iterable[Modality]) -> list[tuple[Modality, ...]]:
    """Return all subsets but the empty one, the small ones first."""
    chosen = frozenset(modalities)
    ordered = [m for m in MODALITIES if m in chosen]
    return [some for size in range(1, len(ordered) + 1) for some in combinations(ordered, size)]


def measure_subsets(
    posts: Iterable[tuple[Inferer, Sequence[Features], npt.NDArray[np.floating]]],
    modalities: Iterable[Modality],
    advance: Callable[[int], None] = lambda _: None,
) -> list[SubsetGap]:
    """Measure GAP for every subset of the modalities; return the best first.

    Memory holds the 20 best scores of each post and subset. Posts come in chunks of features, each
    with the inferer that scores it, and with its targets ``(posts, classes)``; ``advance`` is told
    of the posts of each chunk when they are done.
    """
    subsets = subsets_of(modalities)
    every = [GapMeter() for _ in subsets]
    present = [GapMeter() for _ in subsets]
    counts = np.zeros(len(subsets), dtype=np.int64)
    for inferer, features, targets in posts:
        have = [frozenset(m for m in MODALITIES if _has(post, m)) for post in features]
        for i, shown in enumerate(subsets):
            hidden = frozenset(MODALITIES) - frozenset(shown)
            scores = inferer.scores(features, without=hidden)
            some = np.array([bool(mine.intersection(shown)) for mine in have])
            every[i].add(scores, targets)
            present[i].add(scores[some], targets[some])
            counts[i] += int(some.sum())
        advance(len(features))
    gaps = [
        SubsetGap(shown, every[i].value(), int(counts[i]), present[i].value())
        for i, shown in enumerate(subsets)
    ]
    return sorted(gaps, key=lambda subset: (-subset.gap, len(subset.modalities)))


def _has(post: Features, modality: Modality) -> bool:
    array = post.arrays.get(modality)
    return array is not None and len(array) > 0
