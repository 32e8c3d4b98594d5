"""Health check of the King for containers: exit code 0 if healthy, otherwise 1, and one line why.

    python -m deploy.probe            it makes progress, by the watchdog's rules
    python -m deploy.probe --ready    it also takes posts

Some stalls only show over several looks: restart the King only after a few failures in a row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from common.cli import ConfigFile, Overrides, exit_code, flag, read_options, say
from common.processes import process_identity
from config.load import load_settings
from config.settings import Settings
from deploy.supervisor import Program
from deploy.watchdog import Decision, Observation, decide
from king.status import read_health


def judge(settings: Settings, health: Mapping[str, Any] | None, now: float) -> Decision:
    """Judge one health file, at ``now`` in seconds since the epoch."""
    if health is None:
        return Decision("wait", f"the King has written no {settings.king.health_file}")
    if process_identity(health["pid"]) != health.get("process"):
        return Decision("restart", f"the King is gone (pid {health['pid']})")
    phase, ticks = str(health.get("phase")), health.get("ticks") or {"main": health["updated_at"]}
    serving = phase == "serving"
    moved_at = max(
        health.get(key) or 0.0 for key in ("last_delivery_at", "last_done_at", "started_at")
    )
    waits = serving and not health.get("in_flight") and health.get("queue_depth")
    seen = Observation(
        program=Program("RUNNING", health["pid"], health["process"]),
        seen_s=now - (health.get("started_at") or now),
        phase=phase,
        tick_ages={name: now - tick for name, tick in ticks.items()},
        overdue_s=(health.get("oldest_in_flight_s") or 0.0) if serving else 0.0,
        starved_s=now - moved_at if waits else 0.0,
        backlog=health.get("queue_depth"),
    )
    return decide(seen, settings)


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: ConfigFile = None
    overrides: Overrides
    ready: Annotated[bool, flag("--ready", "also exit with 1 while the King takes no posts")] = (
        False
    )


def run(arguments: Sequence[str] | None) -> int:
    """Look once; return the exit code."""
    line = read_options(CommandLine, "python -m deploy.probe", arguments, about=__doc__)
    settings = load_settings(line.config, line.overrides)
    health = read_health(settings.king.health_file)
    decision = judge(settings, health, time.time())
    phase = health and health.get("phase")
    well = health is not None and decision.action not in ("restart", "alarm")
    if well and line.ready and phase != "serving":
        say(f"not ready: the King is {phase}\n")
        return 1
    say(f"{'well' if well else 'not well'}: {decision.reason}\n")
    return 0 if well else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Look once; 0 well, 2 the configuration is wrong, 1 not well, or anything else."""
    return exit_code("probe", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
