"""Numbers and names as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping

_LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "hi": "Hindi", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "th": "Thai",
    "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip

KIND_NAMES = {
    "exact_media": "the same file",
    "near_image": "pictures that look alike",
    "near_text": "nearly the same text",
}


def languages(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts with names of languages for codes."""
    return {_LANGUAGES.get(code, code): count for code, count in counts.items()}


def size(value: float) -> str:
    """Bytes, to three digits at most."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def seconds(value: float) -> str:
    """A duration."""
    if value < 60:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 3600 else f"{value / 3600:.3g} h"


def plain(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"


def share(part: int, whole: int) -> str:
    """A share in percent; a dash of nothing."""
    return f"{part / whole:.1%}" if whole else "–"
