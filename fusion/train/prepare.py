"""What is known before a model is made: labels, posts, and what their features are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from common.errors import ConfigError
from config.labels import LabelMap
from config.train import TrainSettings
from fusion.data.collate import Collate
from fusion.data.dataset import FeatureReader, PostDataset, find_manifest
from fusion.data.loading import default_loaders
from fusion.data.posts import PostList, Skip
from fusion.data.schema import FeatureManifest, InputSchema
from fusion.train import distributed as processes
from fusion.train.skipping import Skipped, readable
from fusion.train.trainer import TrainData

_SHOWN_TAGS = 10


@dataclass(frozen=True)
class Prepared:
    """What is known before a model is made.

    Attributes:
        posts: To learn from.
        valid: None without validation.
        notes: Lines for the person at the terminal.
    """

    labels: LabelMap
    manifest: FeatureManifest
    schema: InputSchema
    posts: PostList
    valid: PostList | None
    loaders: int
    reader: FeatureReader
    notes: tuple[str, ...] = ()

    def data(
        self, settings: TrainSettings, posts: PostList | None = None, valid: PostList | None = None
    ) -> TrainData:
        """Posts as the trainer takes them; others than its own where they are given."""
        posts, valid = (posts, valid) if posts is not None else (self.posts, self.valid)
        # Loader processes would each keep a cache of their own.
        cache_mb = 0 if self.loaders else settings.data.cache_mb // 2
        build = partial(
            PostDataset,
            reader=self.reader,
            manifest=self.manifest,
            schema=self.schema,
            cache_mb=cache_mb,
        )
        return TrainData(
            train=build(posts),
            valid=None if valid is None else build(valid),
            collate=Collate(self.schema),
            train_count=len(posts),
            loaders=self.loaders,
        )


def prepare(settings: TrainSettings, reader: FeatureReader, fabric: Fabric) -> Prepared:
    """Read labels and data files, and find out what the features are.

    Raises:
        ConfigError: A file is missing, empty or wrong, or names a label that is not in the map.
        FeatureError: Features are missing or broken.
    """
    data, progress = settings.data, settings.trainer.progress and fabric.is_global_zero
    skipped = Skipped(
        settings.trainer.save_dir / "log" / "skipped.jsonl",
        enabled=fabric.is_global_zero and data.skip_bad,
    )
    with skipped:
        read = partial(_read, settings, reader, skipped, fabric, progress=progress)
        found = processes.agree(fabric, read)
        if not data.skip_bad:
            return found
        check = partial(readable, fabric, skipped=skipped, loaders=found.loaders, progress=progress)
        build = partial(PostDataset, reader=reader, manifest=found.manifest, schema=found.schema)
        posts = check(build(found.posts))
        valid = None if found.valid is None else check(build(found.valid))
    notes = (skipped.summary, *_without_positives(found.labels, posts))
    return replace(found, posts=posts, valid=valid, notes=tuple(n for n in notes if n))


def _read(
    settings: TrainSettings,
    reader: FeatureReader,
    skipped: Skipped,
    fabric: Fabric,
    *,
    progress: bool,
) -> Prepared:
    data = settings.data
    labels = LabelMap.load(data.labels)

    def posts_of(path: Path) -> PostList:
        skip: Skip | None = partial(skipped.add, path) if data.skip_bad else None
        return PostList.read(path, labels, skip=skip, progress=progress)

    posts = posts_of(data.train)
    if len(posts) < 2:
        raise ConfigError(f"{data.train}: training takes at least two posts")
    valid = posts_of(data.valid) if data.valid is not None else None
    manifest = find_manifest(posts, reader, data)
    loaders = data.loaders
    if loaders is None:
        loaders = default_loaders(fabric.device.type, processes.on_this_host())
    return Prepared(
        labels=labels,
        manifest=manifest,
        schema=InputSchema.of(manifest, settings.model.tokens, len(labels)),
        posts=posts,
        valid=valid,
        loaders=loaders,
        reader=reader,
        notes=tuple(_without_positives(labels, posts)),
    )


def _without_positives(labels: LabelMap, posts: PostList) -> list[str]:
    names = [labels.names[i] for i in np.flatnonzero(posts.positives() == 0)]
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN_TAGS])
    more = f" and {len(names) - _SHOWN_TAGS} more" if len(names) > _SHOWN_TAGS else ""
    return [f"{posts.path}: no post has {shown}{more}; these tags will not be learned"]
