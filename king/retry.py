"""When to try again: exponential back-off with full jitter; pure, no clock and no sleep.

Full jitter (a uniform draw between zero and the limit) spreads the retries of posts that failed
together, so that they do not fail together again.

Source: AWS Architecture Blog, "Exponential Backoff And Jitter" (2015).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from config.settings import KingSettings


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Limits of the delays between tries.

    Attributes:
        base_s: Limit of the first delay.
        max_s: Limit that no delay exceeds.
    """

    base_s: float
    max_s: float

    @classmethod
    def of(cls, settings: KingSettings) -> BackoffPolicy:
        """The policy for posts."""
        return cls(base_s=settings.backoff_s, max_s=settings.backoff_max_s)

    def limit_s(self, attempt: int) -> float:
        """Longest delay after a failed attempt; the first attempt is 1."""
        exponent = min(max(attempt, 1) - 1, 60)  # 2 ** 60 is past every limit and no overflow
        return float(min(self.max_s, self.base_s * 2.0**exponent))

    def delay_s(self, attempt: int, rng: random.Random) -> float:
        """A delay drawn between zero and `limit_s`."""
        return rng.uniform(0.0, self.limit_s(attempt))


RECONNECT = BackoffPolicy(base_s=0.25, max_s=5.0)
"""Between tries to reach the broker or the database: short, since everything waits for them."""
