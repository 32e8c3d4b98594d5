"""The retry policy, held against the formula written out by hand and a table of failures."""

import random

import pytest

from common.post import Failure
from common.retry import RetryPolicy, backoff_s, reconnect_delay_s
from config.settings import KingSettings


@pytest.mark.parametrize(
    ("attempt", "limit_s"), [(1, 2), (2, 4), (3, 8), (8, 256), (9, 300), (10_000, 300), (0, 2)]
)
def test_limit_doubles_up_to_the_maximum(attempt: int, limit_s: float) -> None:
    """Each failed attempt doubles the longest delay, and no attempt number overflows."""
    assert backoff_s(attempt, base_s=2, max_s=300) == limit_s


def test_jitter_of_posts_is_full() -> None:
    """Delays are spread over the whole of zero to the limit, so that posts do not come in step."""
    policy = KingSettings(backoff_s=2, backoff_max_s=300).retry
    rng = random.Random(7)
    delays = [policy.delay_s(3, rng) for _ in range(4000)]
    assert 0 <= min(delays) < 0.1
    assert 7.9 < max(delays) <= 8
    assert sum(delays) / len(delays) == pytest.approx(4, abs=0.15)


def test_reconnections_are_quick_but_not_at_once() -> None:
    """Between half and all of a limit that grows from a quarter of a second to five."""
    for failures, limit_s in ((1, 0.25), (2, 0.5), (50, 5.0)):
        assert limit_s / 2 <= reconnect_delay_s(failures) <= limit_s


@pytest.mark.parametrize(
    ("stage", "type_", "retryable", "costs"),
    [
        ("lookup", "WorkerDied", True, False),
        ("lookup", "CacheUnavailable", True, False),
        ("fetch", "WorkerDied", True, True),
        ("fetch", "FetchRetryable", True, True),
        ("fetch", "FetchRefused", False, False),
        ("decode", "WorkerDied", True, True),
        ("decode", "MediaError", False, False),
        ("extract", "OutOfMemoryError", True, True),
        ("extract", "FeatureError", False, False),
    ],
)
def test_failures_that_cost_attempts(stage: str, type_: str, retryable: bool, costs: bool) -> None:
    failure = Failure(stage, type_, "x", retryable=retryable)
    assert RetryPolicy.costs_attempt(stage, failure) is costs


def test_posts_tagged_in_part_are_left_alone_longer_each_time_and_then_for_good() -> None:
    """As many attempts again, an hour after the first five, then two, four, eight and sixteen."""
    policy = RetryPolicy(attempts=5, base_s=1, max_s=10)
    hours = [None if (s := policy.partial_delay_s(n)) is None else s / 3600 for n in range(1, 12)]
    assert hours == [1, 1, 1, 1, 1, 2, 4, 8, 16, None, None]
    assert RetryPolicy(1, 1, 10).partial_delay_s(1) == 3600
    assert RetryPolicy(1, 1, 10).partial_delay_s(2) is None


def test_the_last_attempt_is_not_followed_by_another() -> None:
    """Nor is a failure that no attempt can change."""
    policy = RetryPolicy(attempts=3, base_s=1, max_s=10)
    passing, final = Failure("fetch", "E", "x", retryable=True), Failure("fetch", "E", "x")
    assert [policy.tries_again(passing, attempt) for attempt in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        False,
    ]
    assert not policy.tries_again(final, 1)
