"""structlog set-up: JSON lines, or pretty on a terminal, always on standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import structlog
from structlog.typing import EventDict

# What a terminal obeys instead of showing it: control characters but for line ends and tabs, what
# turns the direction of text around, and halves of surrogate pairs, which cannot be written at all.
_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return an untrusted text with its control characters made visible, for a terminal."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def open_standard_streams() -> None:
    """Give the standard streams that are closed a place, ``/dev/null``.

    Else the next files and sockets that are opened become them, and are written into; processes
    that are started would inherit them. Python has None in place of such a stream.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def configure_logs(format: Literal["auto", "json", "pretty"] = "auto", level: str = "info") -> None:
    """Set up structlog for this process; safe to call again."""
    open_standard_streams()
    pretty = format == "pretty" or (format == "auto" and sys.stderr.isatty())
    renderers: list[structlog.typing.Processor] = (
        [_visible_values, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if pretty
        else [structlog.processors.JSONRenderer(ensure_ascii=False), _visible_line]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=lambda *_: _StandardError(),
        cache_logger_on_first_use=False,
    )


def _visible_values(_logger: object, _name: str, event: EventDict) -> EventDict:
    return {key: visible(text) if isinstance(text, str) else text for key, text in event.items()}


def _visible_line(_logger: object, _name: str, line: Any) -> str:
    return visible(line)  # in JSON the same escapes mean the same characters


class _StandardError:
    """A logger that drops what cannot be written: a full disk must not end a thread."""

    def msg(self, message: str) -> None:
        # Asked at each event: who redirects standard error gets what is logged from then on.
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            # In one write, with PYTHONUNBUFFERED too: other processes write to the same file.
            structlog.WriteLogger(sys.stderr).msg(message)

    debug = info = warning = error = critical = exception = msg
