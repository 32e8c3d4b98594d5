"""The 24 demo tags, and which evidence each of them needs.

group          evidence                          can be seen in
pictures       an object that is drawn           image
motion         how the object moves              video (never in one frame)
sound          what the sound is                 audio, a video's sound track
text           what the text talks about         text
words          the words on a sign               ocr (the sign's look says nothing)
together       two cues of two modalities        both of them; either alone is no tag
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Channel: TypeAlias = Literal["image", "video", "audio", "text", "ocr"]

CHANNELS: tuple[Channel, ...] = ("image", "video", "audio", "text", "ocr")

CAPACITY: dict[Channel, int] = {"image": 2, "video": 1, "audio": 2, "text": 2, "ocr": 2}
"""Most pieces of evidence that one modality of one post carries."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that can be seen, heard or read.

    Attributes:
        key: What the maker of that modality is asked for.
    """

    channel: Channel
    key: str


def _one(channel: Channel, key: str) -> tuple[Evidence, ...]:
    return (Evidence(channel, key),)


TAGS: dict[str, tuple[Evidence, ...]] = {
    "sunshine": _one("image", "sun"),
    "house": _one("image", "house"),
    "forest": _one("image", "tree"),
    "fishing": _one("image", "fish"),
    "rocket launch": _one("video", "up"),
    "snowfall": _one("video", "down"),
    "race": _one("video", "right"),
    "earthquake": _one("video", "shake"),
    "church bell": _one("audio", "bell"),
    "siren": _one("audio", "siren"),
    "drums": _one("audio", "drums"),
    "birdsong": _one("audio", "birds"),
    "travel": _one("text", "travel"),
    "food": _one("text", "food"),
    "fitness": _one("text", "fitness"),
    "finance": _one("text", "finance"),
    "sale": _one("ocr", "sale"),
    "menu": _one("ocr", "menu"),
    "news": _one("ocr", "news"),
    "warning": _one("ocr", "warning"),
    "storm": (Evidence("image", "cloud"), Evidence("audio", "rain")),
    "dance class": (Evidence("video", "swing"), Evidence("text", "lesson")),
    "giveaway": (Evidence("text", "follow"), Evidence("ocr", "prize")),
    "carousel": (Evidence("video", "orbit"), Evidence("audio", "music box")),
}
"""Tag -> its evidence, in label order."""

CUES: tuple[Evidence, ...] = tuple(
    cue for evidence in TAGS.values() if len(evidence) > 1 for cue in evidence
)
"""Evidence that alone means nothing; it also appears alone, so that a model must look at both."""
