"""Counts of numbers in fixed classes: of any number of values, the same few bytes."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Histogram:
    """How many values lie in each class.

    Attributes:
        edges: Ascending; class i holds values of ``edges[i - 1]`` up to below ``edges[i]``, the
            first all below, the last all from the last edge on.
    """

    edges: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0
    lowest: float | None = None
    highest: float | None = None

    def __post_init__(self) -> None:
        """Begin with no values."""
        self.counts = [0] * (len(self.edges) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_right(self.edges, value)] += 1
        self.total += value
        self.lowest = value if self.lowest is None else min(self.lowest, value)
        self.highest = value if self.highest is None else max(self.highest, value)

    def as_dict(self) -> dict[str, object]:
        """``{values, lowest, mean, highest, edges, counts}``."""
        values = sum(self.counts)
        return {
            "values": values,
            "lowest": self.lowest,
            "mean": round(self.total / values, 3) if values else None,
            "highest": self.highest,
            "edges": list(self.edges),
            "counts": self.counts,
        }


TEXT_EDGES = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
BYTE_EDGES = tuple(10**i * k for i in range(3, 9) for k in (1, 3))
SECOND_EDGES = (1, 3, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
SIDE_EDGES = (64, 128, 240, 360, 480, 720, 1080, 1440, 2160, 4320)
