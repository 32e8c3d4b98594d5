"""Posts that cannot be learned from, left out: counted, and listed in ``log/skipped.jsonl``."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TextIO

import numpy as np
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, Dataset, Subset

from common.errors import ConfigError, FeatureError
from common.files import part_of, publish
from common.progress import progress_bar
from fusion.data.dataset import PostDataset
from fusion.data.posts import PostList
from fusion.train.distributed import gathered

_AT_ONCE = 64


class Skipped:
    """The list of posts that are left out; the file appears when it is whole.

    Args:
        path: JSON lines ``{post_id, file, kind, reason}``; what is there is replaced.
        enabled: False in the processes of a distributed run that do not write.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path, self._enabled = path, enabled
        self._part = part_of(path)
        self._counts: Counter[str] = Counter()
        self._file: TextIO | None = None

    def add(self, file: Path, post_id: str | None, kind: str, reason: str) -> None:
        """List one post.

        Raises:
            ConfigError: The list cannot be written.
        """
        self._counts[kind] += 1
        if self._enabled:
            entry = {"post_id": post_id, "file": str(file), "kind": kind, "reason": reason}
            self._write(json.dumps(entry, ensure_ascii=False) + "\n")

    @property
    def summary(self) -> str:
        """One line for a person; empty where nothing was skipped."""
        count = sum(self._counts.values())
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self._counts.items()))
        return f"skipped {count} posts ({kinds}); listed in {self.path}" if count else ""

    def __enter__(self) -> Skipped:
        """Begin an empty list."""
        self._write("")
        return self

    def __exit__(self, *_: object) -> None:
        """Put the file in its place, also when a mistake ended the run: it tells why.

        Raises:
            ConfigError: It cannot be written.
        """
        if self._file is None:
            return
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            publish(self._part, self.path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._part.open("w", encoding="utf-8", errors="surrogatepass")
            self._file.write(text)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path}: cannot be written: {error}")


def readable(
    fabric: Fabric, dataset: PostDataset, skipped: Skipped, *, loaders: int, progress: bool
) -> PostList:
    """The posts whose features can be read; every feature file is read once.

    Args:
        fabric: Every process reads a part of the files.
        dataset: The posts and what their features must be.
        skipped: Is told of the others.
        loaders: Processes that read.
        progress: Show a bar.

    Raises:
        ConfigError: No post is left.
    """
    posts = dataset.posts
    rows = range(fabric.global_rank, len(posts), fabric.world_size)
    reasons: DataLoader[list[str | None]] = DataLoader(
        Subset(_Reasons(dataset), rows),  # type: ignore[arg-type]
        batch_size=_AT_ONCE,
        collate_fn=list,
        num_workers=loaders,
        multiprocessing_context="spawn" if loaders else None,
    )
    bad: list[tuple[int, str]] = []
    at = 0
    with progress_bar(f"check {posts.path.name}", len(rows), enabled=progress) as bar:
        for part in reasons:
            bad += [(rows[at + n], reason) for n, reason in enumerate(part) if reason is not None]
            at += len(part)
            bar.advance(len(part))
    everyone = sorted(found for part in gathered(fabric, bad) for found in part)
    for row, reason in everyone:
        skipped.add(posts.path, posts[row].post_id, "features", reason)
    if len(everyone) == len(posts):
        raise ConfigError(
            f"{posts.path}: features of no post can be used; the first: {everyone[0][1]}"
        )
    return posts.take(np.delete(np.arange(len(posts)), [row for row, _ in everyone]))


class _Reasons(Dataset[str | None]):
    """Why a post's features cannot be used; None where they can."""

    def __init__(self, posts: PostDataset) -> None:
        self._posts = posts

    def __len__(self) -> int:
        return len(self._posts)

    def __getitem__(self, row: int) -> str | None:
        try:
            self._posts[row]
        except FeatureError as error:
            return str(error)
        return None
