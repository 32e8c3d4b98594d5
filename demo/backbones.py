"""Stage: small backbones, trained on the demo posts' own media; no hub is asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.post import MediaKind, Post
from config.labels import LabelMap
from config.settings import Settings
from demo.layout import Layout, Sizes
from demo.lesson import Lesson, targets
from demo.parallel import run_jobs, tell
from fusion.data.data_file import read_whole_posts

Backbone = Literal["video", "image", "audio"]

_KINDS: dict[Backbone, Literal["clip", "picture", "patch"]] = {
    "video": "clip",
    "image": "picture",
    "audio": "patch",
}
_MEDIA: dict[Backbone, tuple[MediaKind, ...]] = {
    "video": ("video",),
    "image": ("image",),
    "audio": ("video", "audio"),
}


def outputs(settings: Settings) -> tuple[Path, ...]:
    """Return the files and folders that this stage makes."""
    features = settings.features
    visual = (features.video.weights, features.image.weights, features.audio.weights)
    return tuple(Path(weights) for weights in (*visual, features.text.weights))


def train_backbones(layout: Layout, settings: Settings, sizes: Sizes, labels: LabelMap) -> None:
    """Train all four side by side, the longest first.

    Raises:
        ConfigError: An architecture is unknown, or a data file is missing.
    """
    from demo.text_backbone import train_text

    lesson = Lesson(layout.read("train"), layout.read("valid"), settings, sizes, labels)
    names: tuple[Backbone, ...] = ("image", "video", "audio")
    jobs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        name: (_train, (name, lesson)) for name in names
    }
    run_jobs({**jobs, "text": (train_text, (lesson,))})


def _train(name: Backbone, lesson: Lesson) -> None:
    from demo.train_backbone import train_backbone

    settings, sizes, labels = lesson.settings, lesson.sizes, lesson.labels
    posts, valid_posts = read_whole_posts(lesson.train), read_whole_posts(lesson.valid)
    section = getattr(settings.features, name)
    train_backbone(
        section.arch,
        _items(name, posts, settings),
        targets(posts, labels),
        _items(name, valid_posts, settings),
        targets(valid_posts, labels),
        kind=_KINDS[name],
        out=Path(section.weights),
        epochs=sizes.epochs[name],
        batch_size=sizes.batch_size[name],
        learning_rate=sizes.learning_rate,
        progress=False,
        watch=partial(tell, name),
        # In full precision whatever the CPU has: the same seed gives the same backbone.
        precision="fp32",
        threads=1,
    )


def _items(name: Backbone, posts: Sequence[Post], settings: Settings) -> list[npt.NDArray[Any]]:
    """Return the extractor's input for each post, decoded as the daemon does."""
    from extractors.media.decode import decode_media

    # Only what this backbone looks at: no pictures for OCR.
    ocr = settings.features.ocr.model_copy(update={"enabled": False})
    features = settings.features.model_copy(update={"ocr": ocr})
    items = []
    for i in range(len(posts)):
        found: list[npt.NDArray[Any]] = []
        for media in posts[i].media:
            if media.kind in _MEDIA[name]:
                decoded = decode_media(media.kind, media.source, features, settings.decode)
                array = {
                    "video": None if decoded.frames is None else decoded.frames[None],
                    "image": decoded.image,
                    "audio": decoded.sound,
                }[name]
                found += [] if array is None else [array]
        items.append(np.concatenate(found) if found else np.empty((0,)))
        tell(name, i + 1, len(posts), "decoding")
    return items
