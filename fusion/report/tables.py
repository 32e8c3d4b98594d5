"""The numbers of a report: what stands in ``report.json``, and what the charts show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion.metrics import ranking as metrics
from fusion.metrics.calibration import Reliability, reliability
from fusion.report.judged import Judged

_CONFUSIONS = 40


@dataclass(frozen=True)
class TagRow:
    """One tag.

    Attributes:
        support: Posts that have it.
        ap: Average precision; None where no post has it.
        given: Posts that it is given to.
        precision: Share of these that have it; None where it is never given.
        recall: Share of the posts that have it to which it is given; None where there are none.
        f1: None where it is neither given nor there.
    """

    id: int
    name: str
    support: int
    ap: float | None
    threshold: float
    given: int
    precision: float | None
    recall: float | None
    f1: float | None


def tag_rows(judged: Judged) -> list[TagRow]:
    """A row for each tag, in label order."""
    given, truth = judged.given, judged.targets
    aps = metrics.average_precisions(judged.scores, truth)
    counts = zip(
        truth.sum(axis=0).tolist(),
        given.sum(axis=0).tolist(),
        (given & truth).sum(axis=0).tolist(),
        strict=True,
    )
    return [
        TagRow(
            id=i,
            name=judged.names[i],
            support=support,
            ap=None if np.isnan(aps[i]) else float(aps[i]),
            threshold=float(judged.thresholds[i]),
            given=gave,
            precision=_share(right, gave),
            recall=_share(right, support),
            f1=_share(2 * right, gave + support),
        )
        for i, (support, gave, right) in enumerate(counts)
    ]


@dataclass(frozen=True)
class Confusion:
    """One tag that was missed where another was wrongly given.

    Attributes:
        posts: Posts where both happened.
        share: Of the posts in which the missed tag was missed.
    """

    missed: int
    given: int
    posts: int
    share: float


def confusion_counts(judged: Judged) -> npt.NDArray[np.int64]:
    """Posts in which the row's tag was missed and the column's given wrongly; ``(cls, cls)``."""
    given, truth = judged.given, judged.targets
    missed = (truth & ~given).astype(np.float32)
    wrong = (given & ~truth).astype(np.float32)
    # In float32, which counts exactly to 16 million: integer matrices multiply slowly.
    counts: npt.NDArray[np.int64] = np.rint(missed.T @ wrong).astype(np.int64)
    return counts


def confusions(judged: Judged) -> list[Confusion]:
    """The pairs of tags that are mistaken for one another most often."""
    counts = confusion_counts(judged)
    misses = (judged.targets & ~judged.given).sum(axis=0)
    order = np.argsort(-counts, axis=None, kind="stable")[:_CONFUSIONS]
    rows, columns = np.unravel_index(order, counts.shape)
    return [
        Confusion(int(i), int(j), int(counts[i, j]), float(counts[i, j] / misses[i]))
        for i, j in zip(rows, columns, strict=True)
        if counts[i, j]
    ]


def summary(judged: Judged) -> dict[str, float]:
    """The metrics of `fusion.metrics.ranking.summary`, at the thresholds."""
    return metrics.summary(judged.scores, judged.targets, judged.thresholds)


def reliabilities(judged: Judged) -> tuple[Reliability, Reliability]:
    """Scores against the truth before and after the calibration."""
    return reliability(judged.raw, judged.targets), reliability(judged.scores, judged.targets)


def as_json(found: Reliability) -> dict[str, Any]:
    """A reliability as JSON values; None where a bin is empty."""
    return {
        "error": found.error,
        "counts": found.counts.tolist(),
        "scores": [_or_none(x) for x in found.scores],
        "right": [_or_none(x) for x in found.right],
    }


def rows_as_json(rows: list[TagRow] | list[Confusion]) -> list[dict[str, Any]]:
    """Rows as JSON values."""
    return [asdict(row) for row in rows]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
