"""The hostile files of one run: each crafted one once, the rest sound ones damaged at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.post import MEDIA_KINDS, MediaKind
from fuzzing.hostile_media import SOUNDS, VIDEOS
from fuzzing.hostile_pictures import PICTURES
from fuzzing.mutate import mutate
from fuzzing.seeds import Seed

_CRAFTED: tuple[tuple[MediaKind, Mapping[str, Callable[[], bytes]]], ...] = (
    ("image", PICTURES),
    ("video", VIDEOS),
    ("audio", SOUNDS),
)
_WRONG_KIND = 0.08


@dataclass(frozen=True)
class Case:
    """One hostile file.

    Attributes:
        name: What was done to what.
        kind: What its post says it is.
        path: Where the server has it; the extension may be another format's.
    """

    name: str
    kind: MediaKind
    path: str
    content: bytes


class Cases:
    """The files of a seed, by number; made when they are asked for."""

    def __init__(self, seeds: Sequence[Seed], seed: int, count: int) -> None:
        self._seeds = seeds
        self._seed = seed
        crafted = [(kind, name, make) for kind, some in _CRAFTED for name, make in some.items()]
        random.Random(seed).shuffle(crafted)
        # A short run takes a part of the crafted ones, not nothing but crafted ones.
        self._crafted = crafted[: max(count // 2, min(count, 1))]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Case:
        rng = random.Random(f"{self._seed}/{number}")
        # Spread over the run: a crafted file must not be met before the memory is measured only.
        step = max(1, self.count // max(1, len(self._crafted)))
        place, rest = divmod(number, step)
        if rest == 0 and place < len(self._crafted):
            kind, name, make = self._crafted[place]
            return Case(name, kind, f"{number}{rng.choice(('', '.jpg', '.mp4'))}", make())
        return self._damaged(number, rng)

    def _damaged(self, number: int, rng: random.Random) -> Case:
        seed, other = rng.choice(self._seeds), rng.choice(self._seeds)
        done, content = mutate(seed.content, other.content, rng)
        kind, extension = seed.kind, seed.name.rpartition(".")[2]
        if done == "wrong extension":
            extension = other.name.rpartition(".")[2]
            kind = other.kind
        elif rng.random() < _WRONG_KIND:
            kind = rng.choice(MEDIA_KINDS)
        return Case(f"{seed.name}: {done}", kind, f"{number}.{extension}", content)
