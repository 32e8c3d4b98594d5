"""Stage: small backbones, trained on the demo posts' own media; no hub is asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from common.post import MediaKind, Post
from common.post_set import PostSet
from config.labels import LabelMap
from config.settings import Settings
from config.train import OptimizerSettings, TrainerSettings
from demo.layout import Layout, Sizes
from demo.parallel import run_jobs, tell
from demo.training import targets_of
from fusion.data.data_file import read_whole_posts

Visual: TypeAlias = Literal["image", "video", "audio"]
Backbone: TypeAlias = Literal["image", "video", "audio", "text"]

_KINDS: dict[Visual, Literal["picture", "clip", "patch"]] = {
    "image": "picture",
    "video": "clip",
    "audio": "patch",
}
_MEDIA: dict[Visual, tuple[MediaKind, ...]] = {
    "image": ("image",),
    "video": ("video",),
    "audio": ("video", "audio"),
}
_PATCH = (96, 64)
# The loss is the mean over 24 classes; so this is a norm of 5, or of 1, for their sum. Without a
# limit the first steps of the clips' recurrence can spoil its weights.
_CLIP, _TEXT_CLIP = 5 / 24, 1 / 24


def outputs(settings: Settings) -> tuple[Path, ...]:
    """Return the files and folders that this stage makes."""
    features = settings.features
    return tuple(
        Path(section.weights)
        for section in (features.video, features.image, features.audio, features.text)
    )


def train_backbones(layout: Layout, settings: Settings, sizes: Sizes, labels: LabelMap) -> None:
    """Train all four side by side, the longest first."""
    names: tuple[Backbone, ...] = ("image", "video", "audio", "text")
    run_jobs({name: (train_backbone, (name, layout, settings, sizes, labels)) for name in names})


def train_backbone(
    name: Backbone, layout: Layout, settings: Settings, sizes: Sizes, labels: LabelMap
) -> None:
    """Train one backbone, by the training loop of `train_net.py`."""
    from fusion.backbones.media import collate_media
    from fusion.backbones.training import train_model
    from fusion.train import distributed
    from fusion.train.checkpoint import signature
    from fusion.train.trainer import TrainData

    optimizer = OptimizerSettings(learning_rate=sizes.learning_rate, gradient_clip=_CLIP)
    if name == "text":
        optimizer = OptimizerSettings(
            learning_rate=1.5e-3,
            weight_decay=0.01,
            schedule="one_cycle",
            warm_up=0.3,
            gradient_clip=_TEXT_CLIP,
        )
    trainer = TrainerSettings(
        epochs=sizes.epochs[name],
        batch_size=sizes.batch_size[name],
        n_gpu=0,
        # In full precision whatever the CPU has: the same seed gives the same backbone.
        precision="fp32",
        threads=1,
        fix_random_seed=True,
        save_dir=layout.training / name,
        tensorboard=False,
        progress=False,
    )

    def work(fabric: Any) -> None:
        learned = PostSet.of(post.post_id for post in read_whole_posts(layout.read("train")))
        parts = _text if name == "text" else _visual
        train, valid, build, save = parts(cast("Visual", name), layout, settings, labels)
        train_model(
            fabric,
            TrainData(train, valid, collate_media, len(train), learned),
            build,
            partial(save, learned_from=learned),
            (Path(getattr(settings.features, name).weights),),
            trainer_settings=trainer,
            optimizer=optimizer,
            name=name,
            signature=signature({"stage": name}),
            seed=trainer.seed,
            on_epoch_end=lambda epoch, _: tell(name, epoch, trainer.epochs, "epochs"),
        )

    distributed.run(trainer, work)


def _visual(name: Visual, layout: Layout, settings: Settings, labels: LabelMap) -> tuple[Any, ...]:
    """Return training and validation posts, and functions that build and save the model."""
    from fusion.backbones.media import MediaDataset
    from fusion.backbones.model import MediaTagger, create_backbone, save_weights

    def dataset(file: Path, max_items: int, seed: int | None) -> MediaDataset:
        posts = read_whole_posts(file)
        items = _items(name, posts, settings)
        truth = targets_of(posts, labels)
        return MediaDataset.of_arrays(_KINDS[name], items, truth, max_items=max_items, seed=seed)

    arch, kind = getattr(settings.features, name).arch, _KINDS[name]
    side = 0 if name == "audio" else getattr(settings.features, name).image_size
    size = (side, side) if side else _PATCH

    def build() -> MediaTagger:
        return MediaTagger(
            create_backbone(arch, kind, size, "scratch"), size, len(labels), 0.2, kind
        )

    def save(tagger: MediaTagger, out: Path, learned_from: PostSet) -> None:
        about = {"arch": arch, "kind": kind, "height": size[0], "width": size[1]}
        save_weights(tagger.backbone, out, "backbone", about, learned_from)

    train, valid = dataset(layout.read("train"), 6, 0), dataset(layout.read("valid"), 16, None)
    return train, valid, build, save


def _text(name: Backbone, layout: Layout, settings: Settings, labels: LabelMap) -> tuple[Any, ...]:
    """Return the same; a post gives two texts, its own and its pictures', each with all its tags.

    Without validation: the last epoch is the best.
    """
    from fusion.backbones.text import TextTagger, make_tokenizer, save_text, text_dataset

    posts = read_whole_posts(layout.read("train"))
    texts = [
        (text, row)
        for row, post in enumerate(posts)
        for text in (post.text, post.ocr or "")
        if text.strip()
    ]
    tokenizer = make_tokenizer([t for t, _ in texts], settings.features.text.max_tokens)
    truth = targets_of(posts, labels)[[row for _, row in texts]]
    train = text_dataset(tokenizer, [t for t, _ in texts], truth)

    def build() -> TextTagger:
        return TextTagger(len(tokenizer), len(labels))

    def save(tagger: TextTagger, out: Path, learned_from: PostSet) -> None:
        save_text(tagger, tokenizer, out, learned_from)

    return train, None, build, save


def _items(name: Visual, posts: Sequence[Post], settings: Settings) -> list[npt.NDArray[Any]]:
    """Return the extractor's input for each post, decoded as the daemon does."""
    from extractors.media.decode import decode_media

    # Only what this backbone looks at: no pictures for OCR.
    ocr = settings.features.ocr.model_copy(update={"enabled": False})
    features = settings.features.model_copy(update={"ocr": ocr})
    items = []
    for i in range(len(posts)):
        arrays: list[npt.NDArray[Any]] = []
        for media in posts[i].media:
            if media.kind in _MEDIA[name]:
                decoded = decode_media(media.kind, media.source, features, settings.decode)
                array = {
                    "video": None if decoded.frames is None else decoded.frames[None],
                    "image": decoded.image,
                    "audio": decoded.sound,
                }[name]
                arrays += [] if array is None else [array]
        items.append(np.concatenate(arrays) if arrays else np.empty((0,)))
        tell(name, i + 1, len(posts), "decoding")
    return items
