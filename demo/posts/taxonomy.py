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
    """One thing that can be seen, heard or read: what the maker of a modality is asked for."""

    channel: Channel
    key: str


TAGS: dict[str, tuple[Evidence, ...]] = {
    "sunshine": (Evidence("image", "sun"),),
    "house": (Evidence("image", "house"),),
    "forest": (Evidence("image", "tree"),),
    "fishing": (Evidence("image", "fish"),),
    "rocket launch": (Evidence("video", "up"),),
    "snowfall": (Evidence("video", "down"),),
    "race": (Evidence("video", "right"),),
    "earthquake": (Evidence("video", "shake"),),
    "church bell": (Evidence("audio", "bell"),),
    "siren": (Evidence("audio", "siren"),),
    "drums": (Evidence("audio", "drums"),),
    "birdsong": (Evidence("audio", "birds"),),
    "travel": (Evidence("text", "travel"),),
    "food": (Evidence("text", "food"),),
    "fitness": (Evidence("text", "fitness"),),
    "finance": (Evidence("text", "finance"),),
    "sale": (Evidence("ocr", "sale"),),
    "menu": (Evidence("ocr", "menu"),),
    "news": (Evidence("ocr", "news"),),
    "warning": (Evidence("ocr", "warning"),),
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
