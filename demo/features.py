"""Stage: features of every post, by the same code as the daemon's, into feature files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.post import Post
from config.settings import Settings
from demo.layout import Layout
from demo.parallel import map_items
from fusion.data.data_file import read_whole_posts

_runner: Any = None
_layout: Layout | None = None


def extract_features(layout: Layout, settings: Settings) -> None:
    """Extract all splits; the online posts from their raw media, words in pictures included.

    Raises:
        ConfigError: A backbone is missing.
        NothingUsable: No modality of a post can be used.
    """
    files = (layout.read("train"), layout.read("valid"), layout.posts("online"))
    extract_posts(layout, settings, [post for file in files for post in read_whole_posts(file)])


def extract_posts(layout: Layout, settings: Settings, posts: Sequence[Post]) -> None:
    """Write the feature files of posts.

    Raises:
        ConfigError: A backbone is missing.
        NothingUsable: No modality of a post can be used.
    """
    map_items("features", _extract, posts, _setup, (layout, settings))


def _setup(layout: Layout, settings: Settings) -> None:
    global _runner, _layout  # noqa: PLW0603  loaded once in each process
    import torch

    from workers.local import local_runner

    torch.set_num_threads(1)
    _layout = layout
    _runner = local_runner(settings, fuse=False)
    _runner.start()


def _extract(post: Post) -> None:
    from extractors.feature_file import write_features

    if _layout is None:
        raise RuntimeError("_setup comes first")
    write_features(_layout.features, _runner.run(post).features, dict(_runner.fingerprints))
