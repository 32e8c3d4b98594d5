"""structlog set-up: JSON lines, or pretty on a terminal, always on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog


def configure_logs(format: Literal["auto", "json", "pretty"] = "auto", level: str = "info") -> None:
    """Set up structlog for this process; safe to call again."""
    pretty = format == "pretty" or (format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if pretty
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        # Asked at each event: who redirects standard error gets what is logged from then on.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
