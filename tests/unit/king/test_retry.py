"""The back-off policy, held against the formula written out by hand."""

from __future__ import annotations

import random

import pytest

from config.settings import KingSettings
from king.retry import BackoffPolicy


@pytest.mark.parametrize(
    ("attempt", "limit_s"), [(1, 2), (2, 4), (3, 8), (8, 256), (9, 300), (10_000, 300), (0, 2)]
)
def test_limit_doubles_up_to_the_maximum(attempt: int, limit_s: float) -> None:
    """Each failed attempt doubles the longest delay, and no attempt number overflows."""
    assert BackoffPolicy(base_s=2, max_s=300).limit_s(attempt) == limit_s


def test_jitter_is_full() -> None:
    """Delays are spread over the whole of zero to the limit, so that posts do not come in step."""
    policy = BackoffPolicy.of(KingSettings(backoff_s=2, backoff_max_s=300))
    rng = random.Random(7)
    delays = [policy.delay_s(3, rng) for _ in range(4000)]
    assert 0 <= min(delays) < 0.1
    assert 7.9 < max(delays) <= 8
    assert sum(delays) / len(delays) == pytest.approx(4, abs=0.15)
