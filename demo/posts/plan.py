"""The plan of a demo post: tags, and what each modality carries. Pure and deterministic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from demo.posts.taxonomy import CAPACITY, CHANNELS, CUES, TAGS, Channel, Evidence

Split: TypeAlias = Literal["train", "valid", "online"]

SPLITS: tuple[Split, ...] = ("train", "valid", "online")
DATA_FILE = "posts.json"
TAG_COUNTS = (0.25, 0.35, 0.25, 0.15)
"""Share of the posts with one, two, three and four tags."""
NEUTRAL = {"image": 0.45, "video": 0.4, "audio": 0.35, "text": 0.7, "ocr": 0.2}
"""Chance that a modality that no tag needs is there all the same, with nothing to tell."""
LONE_CUE = 0.08
"""Chance of each cue of a two-modality tag to appear without its partner."""


@dataclass(frozen=True, slots=True)
class PostPlan:
    """Contents of one post.

    Attributes:
        tags: In label order.
        contents: Modality -> keys of the evidence it carries; absent when the post lacks it.
        noise: Strength of what disturbs the media, in [0, 1].
        seed: Entropy of everything drawn for this post.
    """

    post_id: str
    tags: tuple[str, ...]
    contents: dict[Channel, tuple[str, ...]]
    noise: float
    seed: tuple[int, ...] = field(repr=False)


def plan_posts(
    posts: int, seed: int, split: Split = "train", *, noise: float = 0.0, missing: float = 0.0
) -> list[PostPlan]:
    """Plan a number of posts of a split; splits of one seed share no post.

    `noise`, 0 to 1, is the strength of what disturbs the media and, times 0.2, the chance that a
    piece of evidence is left out; `missing` the chance that a needed modality is left out.
    """
    entropy = (seed, SPLITS.index(split))
    deck = _Deck(np.random.default_rng((*entropy, 0)))
    plans = []
    for i in range(posts):
        rng = np.random.default_rng((*entropy, 1, i))
        count = 1 + int(rng.choice(len(TAG_COUNTS), p=TAG_COUNTS))
        tags = deck.draw(count)
        contents = _contents(tags, rng, noise, missing)
        plans.append(PostPlan(f"{split}-{i:05d}", tags, contents, noise, (*entropy, 2, i)))
    return plans


class _Deck:
    """A deck of tags, dealt equally often; one that does not fit waits for the next post."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._cards: list[str] = []

    def draw(self, count: int) -> tuple[str, ...]:
        """Draw up to ``count`` different tags whose evidence fits into one post; at least one."""
        while len(self._cards) < 2 * len(TAGS):
            self._cards += [str(tag) for tag in self._rng.permutation(list(TAGS))]
        room = dict(CAPACITY)
        drawn: list[str] = []
        for tag in list(self._cards):
            if len(drawn) == count:
                break
            if tag not in drawn and all(room[e.channel] > 0 for e in TAGS[tag]):
                drawn.append(tag)
                self._cards.remove(tag)
                for evidence in TAGS[tag]:
                    room[evidence.channel] -= 1
        return tuple(tag for tag in TAGS if tag in drawn)


def _contents(
    tags: tuple[str, ...], rng: np.random.Generator, noise: float, missing: float
) -> dict[Channel, tuple[str, ...]]:
    carried: dict[Channel, list[str]] = {channel: [] for channel in CHANNELS}
    for tag in tags:
        for evidence in TAGS[tag]:
            carried[evidence.channel].append(evidence.key)
    for cue in rng.permutation(np.arange(len(CUES))):
        _add_lone_cue(carried, CUES[cue], rng)
    contents: dict[Channel, tuple[str, ...]] = {}
    for channel in CHANNELS:
        chance, lost = rng.random(2)
        shown = [key for key in carried[channel] if rng.random() >= 0.2 * noise]
        is_present = lost >= missing if carried[channel] else chance < NEUTRAL[channel]
        if is_present:
            contents[channel] = tuple(shown)
    if not contents:
        contents["text"] = ()
    return contents


def _add_lone_cue(
    carried: dict[Channel, list[str]], cue: Evidence, rng: np.random.Generator
) -> None:
    [pair] = [pair for pair in TAGS.values() if cue in pair and len(pair) == 2]
    partner = pair[1 - pair.index(cue)]
    keys = carried[cue.channel]
    is_lone = rng.random() < LONE_CUE
    fits = len(keys) < CAPACITY[cue.channel] and cue.key not in keys
    if is_lone and fits and partner.key not in carried[partner.channel]:
        keys.append(cue.key)
