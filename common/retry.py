"""The retry policy: which failures cost an attempt, how many attempts there are, and the delays.

Every path that works on posts (the daemon, HTTP, the offline commands) uses `RetryPolicy`; every
other loop that tries again takes its delays from `backoff_s`. Nothing here reads a clock or sleeps.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings import this module, and need no numpy
    from common.post import Failure

# Reconnections to the broker or the database: everything waits for them, so they start at a
# quarter of a second and never pause for more than five. At half of these, many Kings press a
# server that is just coming up; at double, the queue stands still for ten seconds after a restart.
_RECONNECT_BASE_S = 0.25
_RECONNECT_MAX_S = 5.0

# The first pause before a post with a partial result is tried again. Five of them cover an outage
# of a day; at half, half of that; at double, a host that was down for minutes is missed for hours.
_PARTIAL_BASE_S = 3600.0

_RANDOM = random.Random()  # noqa: S311 - jitter


def backoff_s(attempt: int, base_s: float, max_s: float) -> float:
    """Return the longest delay after an attempt (1 is the first): doubled, up to `max_s`."""
    exponent = min(max(attempt, 1) - 1, 60)  # 2 ** 60 is past every limit, and does not overflow
    return float(min(max_s, base_s * 2.0**exponent))


def reconnect_delay_s(failures: int) -> float:
    """Return the delay before the next try to reach a server.

    Between half and all of the limit: a delay near zero would only press the server.
    """
    return backoff_s(failures, _RECONNECT_BASE_S, _RECONNECT_MAX_S) * _RANDOM.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts at one post before it is a dead letter, and the longest delay between two.

    Full jitter (a uniform draw between zero and the limit) spreads the retries of posts that failed
    together. Source: AWS Architecture Blog, "Exponential Backoff And Jitter" (2015).
    """

    attempts: int
    base_s: float
    max_s: float

    def is_last(self, attempt: int) -> bool:
        """Return True when no attempt follows this one; the first is 1."""
        return attempt >= self.attempts

    def tries_again(self, failure: Failure, attempt: int) -> bool:
        """Return True when another attempt follows one that ended with `failure`."""
        return failure.retryable and not self.is_last(attempt)

    def delay_s(self, attempt: int, rng: random.Random = _RANDOM) -> float:
        """Draw the delay after a failed attempt, between zero and its limit."""
        return rng.uniform(0.0, self.longest_delay_s(attempt))

    def longest_delay_s(self, attempt: int) -> float:
        """Return the limit of the delay after a failed attempt."""
        return backoff_s(attempt, self.base_s, self.max_s)

    @staticmethod
    def costs_attempt(stage: str, failure: Failure) -> bool:
        """Return True when a step's failure ends the whole attempt, and not one modality alone.

        Retryable failures do: a dead worker, a media host that is down, a full disk say nothing
        about the post. Without an answer from the cache a post simply goes on. Failures of the
        fusion, which has no modality to lose, always end the attempt and do not come here.
        """
        return failure.retryable and stage != "lookup"

    def partial_delay_s(self, attempts: int) -> float | None:
        """Return the pause before the next attempt at a partial result; None when there is none.

        A post gets `attempts` more of them, one at a time, and the pauses double.
        """
        if attempts >= 2 * self.attempts:
            return None
        return backoff_s(attempts - self.attempts + 1, _PARTIAL_BASE_S, math.inf)
