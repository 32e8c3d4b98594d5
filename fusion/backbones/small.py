"""Small backbones for a platform without one, trained on posts whose media are held in memory.

A minute of sound takes 1.5 MB: enough for tens of thousands of posts.
The demo trains those of motion and sound here, `train_net.py` those of sound and text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, MediaError
from common.post import MediaKind, Post
from common.post_set import PostSet
from common.progress import notice
from config.features import AsrSettings, FeatureSettings
from config.labels import LabelMap
from config.settings import DecodeSettings
from extractors.media.decode import decode_media
from extractors.parts import LogMelPatches
from fusion.backbones.media import Kind, MediaDataset, collate_media, targets_of
from fusion.backbones.model import MediaTagger, create_backbone, save_weights
from fusion.backbones.text import TextTagger, make_tokenizer, save_text, text_dataset
from fusion.train.trainer import TrainData

BackboneName: TypeAlias = Literal["video", "audio", "text"]

_KINDS: dict[BackboneName, Kind] = {"video": "clip", "audio": "patch"}
_MEDIA: dict[BackboneName, tuple[MediaKind, ...]] = {
    "video": ("video",),
    "audio": ("video", "audio"),
}


@dataclass(frozen=True)
class SmallBackbone:
    """The input of one training.

    Attributes:
        valid: Without any, the last epoch is the best.
        features: Its extractor's section gives architecture and size.
        weights: Start of the weights; see `create_backbone`.
        max_items: Media of a post in training, and in validation.
        decoded: Is told how many posts of how many are decoded.
        skip: `Skipped.add`, for media that cannot be decoded; None ends the training there.
    """

    name: BackboneName
    train: Sequence[Post]
    valid: Sequence[Post]
    labels: LabelMap
    features: FeatureSettings
    decode: DecodeSettings
    weights: str = "scratch"
    dropout: float = 0.2
    augment: bool = True
    max_items: tuple[int, int] = (6, 16)
    seed: int = 0
    decoded: Callable[[int, int], None] = lambda done, total: None
    skip: Callable[[Path, str, str, str], None] | None = None

    def parts(
        self, learned_from: PostSet, *, seen: bool = False
    ) -> tuple[TrainData, Callable[[], Any], Callable[[Any, Path], None]]:
        """Return the posts ready to be trained on, and functions that build and save the model."""
        make = self._text if self.name == "text" else self._visual
        train, valid, build, save = make()
        data = TrainData(train, valid, collate_media, len(train), learned_from, seen=seen)
        return data, build, partial(save, learned_from=learned_from)

    def _visual(self) -> tuple[Any, ...]:
        section, kind = getattr(self.features, self.name), _KINDS[self.name]
        side = 0 if kind == "patch" else section.image_size
        size = (side, side) if side else LogMelPatches.shape
        chance = self.seed if self.augment else None

        def dataset(posts: Sequence[Post], most: int, seed: int | None) -> MediaDataset:
            items, truth = self._items(posts), truth_of(posts, self.labels)
            ids = [post.post_id for post in posts]
            return MediaDataset.of_arrays(kind, items, truth, ids, max_items=most, seed=seed)

        def build() -> MediaTagger:
            backbone = create_backbone(section.arch, kind, size, self.weights)
            return MediaTagger(backbone, size, len(self.labels), self.dropout, kind)

        def save(tagger: MediaTagger, out: Path, learned_from: PostSet) -> None:
            about = {"arch": section.arch, "kind": kind, "height": size[0], "width": size[1]}
            save_weights(tagger.backbone, out, "backbone", about, learned_from)

        # A video without sound is no sound.
        media = "sound" if self.name == "audio" else " or ".join(_MEDIA[self.name])
        train = dataset(self.train, self.max_items[0], chance)
        if not len(train):
            raise ConfigError(f"no post to train on has {media}")
        valid = dataset(self.valid, self.max_items[1], None) if self.valid else None
        if valid is not None and not len(valid):  # few posts, whose videos may all be silent
            notice(f"{self.name}: no validation post has {media}: trained without validation")
            valid = None
        return train, valid, build, save

    def _text(self) -> tuple[Any, ...]:
        """Return the same; a post gives two texts, its own and its pictures', with all its tags."""

        def texts(posts: Sequence[Post]) -> tuple[list[str], npt.NDArray[np.float32], list[str]]:
            both = [(t, i) for i, p in enumerate(posts) for t in (p.text, p.ocr or "") if t.strip()]
            if not both:
                raise ConfigError("no post to train on has a text")
            rows = [i for _, i in both]
            ids = [posts[i].post_id for i in rows]
            return [t for t, _ in both], truth_of(posts, self.labels)[rows], ids

        learned, truth, ids = texts(self.train)
        tokenizer = make_tokenizer(learned, self.features.text.max_tokens)
        train = text_dataset(tokenizer, learned, truth, ids)
        valid = text_dataset(tokenizer, *texts(self.valid)) if self.valid else None

        def build() -> TextTagger:
            return TextTagger(len(tokenizer), len(self.labels))

        def save(tagger: TextTagger, out: Path, learned_from: PostSet) -> None:
            save_text(tagger, tokenizer, out, learned_from)

        return train, valid, build, save

    def _items(self, posts: Sequence[Post]) -> list[npt.NDArray[Any]]:
        """Return the extractor's input for each post, decoded as the daemon does."""
        # Only what this backbone looks at: nothing for OCR or ASR.
        ocr = self.features.ocr.model_copy(update={"enabled": False})
        features = self.features.model_copy(update={"ocr": ocr, "asr": AsrSettings()})
        items = []
        for done, post in enumerate(posts, 1):
            arrays: list[npt.NDArray[Any]] = []
            for media in post.media:
                if media.kind not in _MEDIA[self.name]:
                    continue
                try:
                    decoded = decode_media(media.kind, media.source, features, self.decode)
                except MediaError as error:
                    if self.skip is None:
                        raise MediaError(f"post {post.post_id}: {media.source}: {error}") from error
                    self.skip(Path(media.source), post.post_id, "media", str(error))
                    continue
                array = decoded.sound if self.name == "audio" else decoded.frames
                if array is not None:
                    arrays.append(array if self.name == "audio" else array[None])
            items.append(np.concatenate(arrays) if arrays else np.empty((0,)))
            self.decoded(done, len(posts))
        return items


def truth_of(posts: Sequence[Post], labels: LabelMap) -> npt.NDArray[np.float32]:
    """Return the true tags as float32 ``(posts, classes)`` of 0 and 1."""
    tags = [labels.encode(post.labels, where=f"post {post.post_id}") for post in posts]
    return targets_of(tags, len(labels))
