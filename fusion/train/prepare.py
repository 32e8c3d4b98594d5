"""Labels, posts and the kind of their features: all that a training needs before its model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from lightning_fabric import Fabric

from common.errors import ConfigError, FeatureError, MediaError, told
from common.files import write_whole
from common.post_set import PostSet
from common.progress import progress_bar
from config.labels import LabelMap
from config.train import TrainSettings
from fusion.data.dataset import FeatureFiles, PostDataset, find_manifest
from fusion.data.loading import default_loaders
from fusion.data.posts import PostList, Skip
from fusion.models.base import Collate, FeatureManifest, InputSchema
from fusion.train.distributed import all_ranks, gathered, on_this_host
from fusion.train.trainer import TrainData

Item = TypeVar("Item")
T = TypeVar("T")

# Tags named in one warning: about two lines of a terminal.
_SHOWN_TAGS = 10
# Threads that read feature files, which is waiting for the disk; more wait for Python's lock.
_READERS = 8
# Posts between two moves of the progress bar; their futures are all that is held in memory.
_AT_ONCE = 256


@dataclass(frozen=True)
class Prepared:
    """The input of a training, read and checked; ``notes`` are lines for the person at work."""

    labels: LabelMap
    manifest: FeatureManifest
    schema: InputSchema
    posts: PostList
    valid: PostList | None
    loaders: int
    reader: FeatureFiles
    notes: tuple[str, ...] = ()
    test: PostList | None = None

    def data(
        self, settings: TrainSettings, posts: PostList, held_out: HeldOut, learned_from: PostSet
    ) -> TrainData:
        """Return posts to train on, and to validate on, as the trainer takes them."""
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
            valid=build(held_out.posts) if held_out.posts else None,
            collate=Collate(self.schema),
            train_count=len(posts),
            learned_from=learned_from | PostSet(posts.hashes),
            seen=held_out.seen,
            loaders=self.loaders,
        )


@dataclass(frozen=True)
class HeldOut:
    """The posts that are validated on.

    Attributes:
        posts: Those that no part was trained on; where there are none, all; None without.
        seen: Parts were trained on all of them: figures of them say nothing of new posts.
        note: A line for the person at the terminal; empty where no post was trained on.
    """

    posts: PostList | None
    seen: bool = False
    note: str = ""

    @classmethod
    def of(cls, posts: PostList | None, learned: npt.NDArray[np.bool_]) -> HeldOut:
        """Leave out the posts that a part was trained on, bool ``(posts,)``."""
        count = int(learned.sum())
        if posts is None or not count:
            return cls(posts)
        by = "the weights of features, or of the model itself, were trained on them"
        if count < len(posts):
            note = f"{count} of {len(posts)} posts are left out of validation: {by}"
            return cls(posts.take(np.flatnonzero(~learned)), note=note)
        note = (
            f"all {count} validation posts are training posts: {by}; their figures say nothing "
            "about new posts, and no thresholds are fitted"
        )
        return cls(posts, seen=True, note=note)


def rows_learned_from(
    settings: TrainSettings,
    fabric: Fabric,
    prepared: Prepared,
    posts: PostList | None,
    earlier: PostSet,
) -> npt.NDArray[np.bool_]:
    """Return a mask of the posts that a part was trained on, bool ``(posts,)``.

    Parts are the extractors, by the feature files, and a model trained on ``earlier``.
    """
    if posts is None:
        return np.zeros(0, np.bool_)
    streams, reader = frozenset(prepared.manifest.dims), prepared.reader

    def learned(row: int) -> bool:
        record = posts[row]
        return reader.has_learned(record.post_id, record.features, streams)

    learned_rows = earlier.holds(posts.hashes)
    progress = settings.trainer.progress and fabric.is_global_zero
    rows, title = range(len(posts)), f"look at {posts.paths[0].name}"
    check = partial(by_item, fabric, rows, learned, title, progress=progress)
    for part in gathered(fabric, all_ranks(fabric, check)):
        for row, learned_from in part:
            learned_rows[row] |= learned_from
    return learned_rows


def prepare(settings: TrainSettings, reader: FeatureFiles, fabric: Fabric) -> Prepared:
    """Read labels and data files, and find out what the features are."""
    data, progress = settings.data, settings.trainer.progress and fabric.is_global_zero
    skipped = Skipped(
        settings.trainer.save_dir / "log" / "skipped.jsonl",
        enabled=fabric.is_global_zero and data.skip_bad,
    )
    with skipped:
        read = partial(_read, settings, reader, skipped, fabric, progress=progress)
        prepared = all_ranks(fabric, read)
        if not data.skip_bad:
            return prepared
        check = partial(_readable, fabric, skipped=skipped, progress=progress)
        build = partial(
            PostDataset, reader=reader, manifest=prepared.manifest, schema=prepared.schema
        )
        posts = check(build(prepared.posts))
        valid, test = (
            None if p is None else check(build(p)) for p in (prepared.valid, prepared.test)
        )
    notes = (skipped.summary, *_without_positives(prepared.labels, posts))
    notes = tuple(note for note in notes if note)
    return replace(prepared, posts=posts, valid=valid, test=test, notes=notes)


def _read(
    settings: TrainSettings,
    reader: FeatureFiles,
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
    valid, test = (None if p is None else posts_of(p) for p in (data.valid, data.test))
    manifest = find_manifest(posts, reader, data)
    return Prepared(
        labels=labels,
        manifest=manifest,
        schema=InputSchema.of(manifest, settings.model.tokens, len(labels)),
        posts=posts,
        valid=valid,
        test=test,
        loaders=loaders_of(data.loaders, fabric),
        reader=reader,
        notes=tuple(_without_positives(labels, posts)),
    )


def loaders_of(setting: int | None, fabric: Fabric) -> int:
    """Return the processes that read for one of training, by ``data.loaders`` or the machine."""
    return default_loaders(fabric.device.type, on_this_host()) if setting is None else setting


def _without_positives(labels: LabelMap, posts: PostList) -> list[str]:
    names = [labels.names[i] for i in np.flatnonzero(posts.positives() == 0)]
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN_TAGS])
    more = f" and {len(names) - _SHOWN_TAGS} more" if len(names) > _SHOWN_TAGS else ""
    return [f"{posts.paths[0]}: no post has {shown}{more}; these tags will not be learned"]


class Skipped:
    """The list of posts that are left out, JSON lines ``{post_id, file, kind, reason}``.

    Its file appears when the block ends, however it ends; not in processes where it is disabled.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path, self._enabled = path, enabled
        self._counts: Counter[str] = Counter()
        self._lines: list[str] = []

    def add(self, file: Path, post_id: str | None, kind: str, reason: str) -> None:
        self._counts[kind] += 1
        if self._enabled:
            entry = {"post_id": post_id, "file": str(file), "kind": kind, "reason": reason}
            self._lines.append(json.dumps(entry, ensure_ascii=False) + "\n")

    @property
    def summary(self) -> str:
        """Return one line for a person; empty where nothing was skipped."""
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self._counts.items()))
        count = self._counts.total()
        return f"skipped {count} posts ({kinds}); listed in {self.path}" if count else ""

    def __enter__(self) -> Skipped:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            with told(f"{self.path}: cannot be written"):
                write_whole(self.path, "".join(self._lines).encode("utf-8", "surrogatepass"))


def _readable(
    fabric: Fabric, dataset: PostDataset, skipped: Skipped, *, progress: bool
) -> PostList:
    """Return the posts whose features can be read; each process reads a part of the files."""
    posts = dataset.posts
    file = posts.paths[0]

    rows, title = range(len(posts)), f"check {file.name}"
    bad = reasons(fabric, rows, dataset.__getitem__, title, progress=progress)
    for row, why in bad:
        skipped.add(file, posts[row].post_id, "features", why)
    if len(bad) == len(posts):
        raise ConfigError(f"{file}: features of no post can be used; the first: {bad[0][1]}")
    return posts.take(np.delete(np.arange(len(posts)), [row for row, _ in bad]))


def reasons(
    fabric: Fabric,
    items: Sequence[Item],
    use: Callable[[Item], object],
    title: str,
    *,
    progress: bool,
) -> list[tuple[Item, str]]:
    """Return the items that cannot be used, and why, in order; each process tries a part."""

    def reason(item: Item) -> str | None:
        try:
            use(item)
        except (FeatureError, MediaError) as error:
            return str(error)
        return None

    parts = gathered(fabric, by_item(fabric, items, reason, title, progress=progress))
    reason_of = {item: why for part in parts for item, why in part if why is not None}
    return [(item, reason_of[item]) for item in items if item in reason_of]


def by_item(
    fabric: Fabric, items: Sequence[Item], work: Callable[[Item], T], title: str, *, progress: bool
) -> list[tuple[Item, T]]:
    """Return this process's part of the items with what ``work`` gives for each, in order."""
    mine = items[fabric.global_rank :: fabric.world_size]
    results: list[tuple[Item, T]] = []
    shown = progress_bar(title, len(mine), enabled=progress)
    with shown as bar, ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(mine), _AT_ONCE):
            some = mine[start : start + _AT_ONCE]
            results += zip(some, readers.map(work, some), strict=True)
            bar.advance(len(some))
    return results
