"""Settings of the watchdog and of the monitor."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from config.base import PositiveInt, Seconds, Section


class WatchdogSettings(Section):
    """The watchdog under supervisord or systemd."""

    stall_s: Seconds = 60
    """A King without progress for so long is restarted; above the time-outs of the broker and the
    database, or a King that waits for one of them may be restarted with them."""
    interval_s: Seconds = 2
    probe_timeout_s: Seconds = 3
    """The watchdog's own questions to the broker and the database may take this long."""
    dump_s: Seconds = 2
    """Time for a stalled King to write its stacks before it is killed."""
    start_timeout_s: Seconds = 900
    """Loading of models may take this long; above workers.start_timeout_s."""
    restarts: PositiveInt = 5
    """Restarts within `restart_window_s`; past them the watchdog only reports."""
    restart_window_s: Seconds = 1800
    rpc_timeout_s: Seconds = 5
    program: str = "king"
    supervisor_url: Annotated[str, Field(pattern=r"^(unix://.|systemd$)")] = (
        "unix://workshop/run/supervisor.sock"
    )
    """supervisord's socket, or ``systemd``: then `program` is the name of a unit."""


class Threshold(Section):
    """From which value on a check warns, and from which it is critical; null never does."""

    warning: Annotated[float, Field(ge=0)] | None = None
    critical: Annotated[float, Field(ge=0)] | None = None


class MonitorSettings(Section):
    """Questions and limits of `scripts/mongo_supervisor/check.py`."""

    backlog_age_s: Annotated[float, Field(ge=0)] = 900
    """Untagged posts older than this are backlog. A post's age is that of `store.fields.created`,
    or of its ObjectId; with 0 every untagged post counts, also where there is neither."""
    scan: PositiveInt = 100_000
    """Untagged posts that one look reads at most."""
    window_s: Seconds = 3600
    """Results of this recent time make the failed ratio."""
    min_results: PositiveInt = 20
    """Fewer results than this make no ratio."""
    overdue_s: Seconds = 120
    """A job that is due for longer than this is overdue: no daemon looks after it."""
    timeout_s: Seconds = 10
    latency_s: Threshold = Threshold(warning=0.5, critical=2)
    backlog: Threshold = Threshold(warning=100, critical=10_000)
    failed_ratio: Threshold = Threshold(warning=0.05, critical=0.25)
    last_tag_age_s: Threshold = Threshold(warning=900, critical=3600)
    """Checked only while posts wait."""
    overdue_jobs: Threshold = Threshold(warning=1, critical=100)
    dead_letters: Threshold = Threshold(warning=100, critical=10_000)
    queue_depth: Threshold = Threshold(warning=10_000, critical=100_000)
    replica_lag_s: Threshold = Threshold(warning=10, critical=60)

    @field_validator("*", mode="before")
    @classmethod
    def _other_half(cls, value: object, info: ValidationInfo) -> object:
        """Keep the default of the value of a threshold that is not set."""
        default = cls.model_fields[str(info.field_name)].default
        if isinstance(default, Threshold) and isinstance(value, dict):
            return {**default.model_dump(), **value}
        return value
