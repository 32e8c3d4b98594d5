"""Stage: the features of every post, by the daemon's own code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.post import Post
from config.settings import Settings
from demo.layout import Layout
from demo.parallel import map_items
from demo.posts.plan import SPLITS
from fusion.data.data_file import read_whole_posts

# Loaded once in each process of `map_items`: its extractors, and what they need.
_loaded: Any = None


def extract_features(layout: Layout, settings: Settings) -> None:
    """Extract all splits from their raw media, words in pictures included."""
    files = map(layout.posts, SPLITS)
    extract_posts(layout, settings, [post for file in files for post in read_whole_posts(file)])


def extract_posts(layout: Layout, settings: Settings, posts: Sequence[Post]) -> None:
    map_items("features", _extract, posts, _load_runner, (layout, settings))


def _load_runner(layout: Layout, settings: Settings) -> None:
    global _loaded  # noqa: PLW0603
    import torch

    from extractors.learned import learned_from
    from workers.local import local_runner

    torch.set_num_threads(1)
    runner = local_runner(settings, fuse=False)
    runner.start()
    _loaded = layout, runner, learned_from(settings.features)


def _extract(post: Post) -> None:
    from extractors.feature_file import write_features
    from extractors.learned import streams_of_post

    layout, runner, learned = _loaded
    features, streams = runner.run(post).features, streams_of_post(post.post_id, learned)
    write_features(layout.features, features, dict(runner.fingerprints), streams)
