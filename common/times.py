"""Moments as Unix seconds: what people type, and what databases hold."""

from __future__ import annotations

from datetime import datetime, timezone

from bson import ObjectId

from common.errors import ConfigError, replaced

_MILLISECONDS_FROM = 1e11  # as seconds that would be the year 5138

_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def since_time(text: str | None, now_s: float, option: str = "--since") -> float | None:
    """Read ``30m``, ``2h``, ``7d`` or an ISO date, the value of an option, into Unix seconds."""
    if text is None:
        return None
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :]
    if unit in _UNITS_S:
        try:
            return now_s - float(number) * _UNITS_S[unit]
        except ValueError:
            pass
    with replaced(
        ConfigError(f"{option} {text}: write it as 30m, 2h, 7d, or as a date 2026-01-31[T12:00]"),
        ValueError,
    ):
        date = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()


def plain(value: object) -> str:
    """Return what JSON lacks as text, for its ``default``: a date in ISO form, with its zone."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).isoformat()
    return str(value)


def moment_of(value: object) -> float | None:
    """Read a date, ISO text, ObjectId or Unix time (seconds, milliseconds) into Unix seconds."""
    if isinstance(value, ObjectId):
        return value.generation_time.timestamp()
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    seconds = float(value)
    return seconds / 1000 if seconds >= _MILLISECONDS_FROM else seconds
