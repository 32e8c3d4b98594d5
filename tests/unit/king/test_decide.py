"""The decision on a claim, seen from the job alone: one row for each case."""

import pytest

from king.jobs import Job, decide
from tests.support.king.store_rig import NOW, claim, context

RUNNING = Job("p", "running", 1, owner="k2", lease_until=NOW + 9)


@pytest.mark.parametrize(
    ("job", "message", "decision"),
    [
        (None, {}, "new"),
        (Job("p", "running", 1, owner="k1", lease_until=NOW - 9), {}, "resume"),
        (RUNNING, {}, "elsewhere"),
        (RUNNING, {"force": True}, "elsewhere"),
        (Job("p", "running", 1, owner="k2", lease_until=NOW - 9), {}, "take"),
        (Job("p", "running", 1, owner="dead", lease_until=NOW + 9), {}, "take"),
        (Job("p", "running", 3, owner="dead", lease_until=NOW + 9), {}, "exhausted"),
        (Job("p", "waiting", 1, due_at=NOW + 9), {}, "waiting"),
        (Job("p", "waiting", 1, due_at=NOW + 9), {"force": True}, "take"),
        (Job("p", "waiting", 1, due_at=NOW - 9), {}, "take"),
        (Job("p", "queued", 2, due_at=NOW + 900), {}, "take"),
        (Job("p", "queued", 3), {}, "exhausted"),
        (Job("p", "dead", 3), {}, "restart"),
        (Job("p", "dead", 3), {"redelivered": True}, "dead"),
        (Job("p", "dead", 3), {"redelivered": True, "force": True}, "restart"),
    ],
)
def test_jobs_decide_on_claims(job: Job | None, message: dict[str, bool], decision: str) -> None:
    """King k1 claims, with three attempts at a post; the King named dead is known to be dead."""
    rules = context(is_dead=lambda owner: owner == "dead")
    assert decide(job, claim("p", **message), rules) == decision


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1e300, "x", b"x", [1], {"a": 1}])
def test_job_of_any_shape_is_read(odd: object) -> None:
    """An operator may have written into it: what cannot be takes its default."""
    job = Job.of({"_id": "p", **dict.fromkeys(Job("p", "dead", 1).as_document(), odd)})
    assert (job.state, job.attempts, job.lease_until) == ("dead", 0, 0.0)
    assert job.owner is None or isinstance(job.owner, str)
