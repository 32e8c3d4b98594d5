"""Agreement of two models on the same posts, added batch by batch, with labels or without.

Tags are compared by name, so the models may know different ones. A score that is not known is NaN:
documents have the scores of the tags that were given, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusion.metrics.ranking import GapMeter

# Posts whose tags differ that are named: a person reads some of them, and asks for others by tag.
_NAMED_POSTS = 20


class Scored(NamedTuple):
    """One model's scores and tags of some posts, ``(posts, classes)`` in the order of its names."""

    scores: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.bool_]


class Agreement:
    """Counts and sums over posts; `result` turns them into figures."""

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys([*first, *second]))
        column_of = {name: i for i, name in enumerate(self.names)}
        self._columns = [np.array([column_of[n] for n in each], int) for each in (first, second)]
        classes = len(self.names)
        self._posts = self._same = self._labelled = 0
        self._predicted = np.zeros((2, classes), np.int64)
        self._both = np.zeros(classes, np.int64)
        self._pairs = np.zeros(classes, np.int64)
        self._differences = np.zeros(classes)
        self._moments = np.zeros(6)
        self._meters = (GapMeter(), GapMeter())
        self._differing: list[dict[str, Any]] = []

    def add(
        self,
        post_ids: Sequence[str],
        first: Scored,
        second: Scored,
        targets: npt.NDArray[np.bool_] | None = None,
        labelled: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the next posts.

        Args:
            post_ids: Their IDs.
            first: Of the first model.
            second: Of the second.
            targets: bool ``(posts, names)``, in the order of `names`.
            labelled: bool ``(posts,)``: those that GAP is of.
        """
        pairs = zip((first, second), self._columns, strict=True)
        one, other = (self._spread(each, columns) for each, columns in pairs)
        self._posts += len(post_ids)
        self._predicted += [one.predicted.sum(axis=0), other.predicted.sum(axis=0)]
        both, differ = one.predicted & other.predicted, one.predicted != other.predicted
        self._both += both.sum(axis=0)
        changed = differ.any(axis=1)
        self._same += int((~changed).sum())
        for row in np.flatnonzero(changed)[: _NAMED_POSTS - len(self._differing)]:
            only = [a.predicted[row] & ~b.predicted[row] for a, b in ((one, other), (other, one))]
            first_only, second_only = ([self.names[i] for i in np.flatnonzero(o)] for o in only)
            self._differing.append(
                {
                    "post_id": post_ids[row],
                    "only_first": first_only,
                    "only_second": second_only,
                }
            )
        self._add_scores(one.scores, other.scores)
        if targets is not None and labelled is not None and labelled.any():
            self._labelled += int(labelled.sum())
            for meter, each in zip(self._meters, (one, other), strict=True):
                # A tag that a model does not know, or did not give, is behind all others.
                meter.add(np.nan_to_num(each.scores[labelled], nan=0.0), targets[labelled])

    def _add_scores(self, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> None:
        known = ~(np.isnan(x) | np.isnan(y))
        self._pairs += known.sum(axis=0)
        self._differences += np.where(known, y - x, 0.0).sum(axis=0)
        x, y = x[known], y[known]
        self._moments += [
            *(np.abs(y - x).sum(), x.sum(), y.sum()),
            *((x * x).sum(), (y * y).sum(), (x * y).sum()),
        ]

    def _spread(self, model: Scored, columns: npt.NDArray[np.int64]) -> Scored:
        """Return a model's columns in the order of `names`."""
        shape = (len(model.scores), len(self.names))
        scores, predicted = np.full(shape, np.nan), np.zeros(shape, np.bool_)
        scores[:, columns], predicted[:, columns] = model.scores, model.predicted
        return Scored(scores, predicted)

    def result(self) -> dict[str, Any]:
        """Return the figures; None where there are too few scores or labels for one."""
        n = int(self._pairs.sum())
        only = self._predicted - self._both
        order = np.argsort(-only.sum(axis=0), kind="stable")
        return {
            "posts": self._posts,
            "same_tags": self._same,
            "tags_given": {
                "first": int(self._predicted[0].sum()),
                "second": int(self._predicted[1].sum()),
                "both": int(self._both.sum()),
                "only_first": int(only[0].sum()),
                "only_second": int(only[1].sum()),
            },
            "scores": {
                "compared": n,
                "mean_abs_difference": float(self._moments[0] / n) if n else None,
                "correlation": self._correlation(n),
            },
            "labelled": self._labelled,
            "gap": [meter.value() for meter in self._meters] if self._labelled else None,
            "tags": [
                {
                    "name": self.names[i],
                    "first": int(self._predicted[0, i]),
                    "second": int(self._predicted[1, i]),
                    "only_first": int(only[0, i]),
                    "only_second": int(only[1, i]),
                    "mean_difference": (
                        float(self._differences[i] / self._pairs[i]) if self._pairs[i] else None
                    ),
                }
                for i in order
            ],
            "differing_posts": self._differing,
        }

    def _correlation(self, n: int) -> float | None:
        """Return Pearson's correlation of all pairs of scores."""
        if n < 2:
            return None
        x, y, xx, yy, xy = (float(value) / n for value in self._moments[1:])
        variance = (xx - x * x) * (yy - y * y)
        return (xy - x * y) / math.sqrt(variance) if variance > 1e-18 else None
