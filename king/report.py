"""The summary line of every post; never payloads, arrays or URLs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import structlog

from king.jobs import Dead, Rejected, Retry, Settled, Tagged, Unreadable, WriteRefused, message_key
from workers.protocol import Failure

log = structlog.get_logger()


def finished(outcome: Tagged | Retry | Dead) -> None:
    """An attempt has ended and its outcome is written."""
    started = outcome.started
    line = log.bind(
        post_id=started.post_id,
        attempt=started.attempt,
        timings_ms=dict(outcome.timings_ms),
        total_ms=round((time.time() - started.received_at) * 1000),
    )
    if isinstance(outcome, Tagged):
        line.info(
            "king.post_tagged",
            tags=[tag.name for tag in outcome.tags.tags],
            modalities=dict(outcome.statuses),
            **_failures({str(m): f for m, f in outcome.failures.items()}),
        )
    elif isinstance(outcome, Retry):
        due_in_s = round(max(outcome.due_at - time.time(), 0.0), 2)
        line.warning("king.post_retry", due_in_s=due_in_s, error=_one_line(outcome.failure))
    else:
        line.error("king.post_failed", error=_one_line(outcome.failure))


def buried(verdict: Rejected) -> None:
    """A post failed before its attempt began."""
    log.error(
        "king.post_failed",
        post_id=verdict.post_id,
        attempt=verdict.attempts,
        error=_one_line(verdict.failure),
    )


def settled(verdict: Settled) -> None:
    """A message asked for what is done, or will be done anyway."""
    log.info("king.message_settled", post_id=verdict.post_id, reason=verdict.reason)


def unrecorded(verdict: WriteRefused, again_in_s: float) -> None:
    """The database refused to write a job; its post waits, and no other."""
    log.error(
        "king.job_refused",
        post_id=verdict.post_id,
        reason=verdict.reason,
        retry_in_s=again_in_s,
    )


def unreadable(outcome: Unreadable) -> None:
    """A message named no post."""
    log.error(
        "king.message_refused",
        dead_letter=message_key(outcome.payload),
        error=_one_line(outcome.failure),
    )


def _failures(failures: Mapping[str, Failure]) -> dict[str, dict[str, str]]:
    if not failures:
        return {}
    return {"failures": {name: _one_line(failure) for name, failure in failures.items()}}


def _one_line(failure: Failure) -> str:
    return f"{failure.stage}: {failure.type}: {failure.message}"
