"""Which texts of a post are embedded: what was written, and what was read in its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from workers.protocol import Modality


def read_text(ocr: str | None, read: Mapping[int, str]) -> str | None:
    """What the pictures say: as the post brings it along, or as read file by file; None: nothing.

    Args:
        ocr: The post's own, which stands for what would be read.
        read: Index of the media file ─► what was read in it.
    """
    if ocr is not None:
        return ocr
    lines = (read[i].strip() for i in sorted(read))
    return "\n".join(line for line in lines if line) or None


def embedded_texts(
    text: str, read: str | None, mode: Literal["append", "separate"]
) -> dict[Modality, str]:
    """Modality ─► the text that stands for it; a modality without text is left out."""
    if mode == "append":
        both = "\n".join(part for part in (text.strip(), read or "") if part)
        found: dict[Modality, str] = {"text": both}
    else:
        found = {"text": text, "ocr": read or ""}
    return {modality: each for modality, each in found.items() if each.strip()}
