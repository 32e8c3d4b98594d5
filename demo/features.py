"""Stages: the words in pictures, and the features of every post, by the daemon's own code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from common.post import Post
from config.settings import Settings
from demo.layout import Layout
from demo.parallel import map_items
from demo.posts.plan import Split
from fusion.data.data_file import read_whole_posts

# Loaded once in each process of `map_items`: its extractors, and what they need.
_loaded: Any = None


def read_pictures(layout: Layout, settings: Settings, splits: tuple[Split, ...]) -> None:
    """Write each split's data file again, with `ocr` filled in: for vocabulary and features."""
    posts = [(split, post) for split in splits for post in read_whole_posts(layout.posts(split))]
    texts = map_items("words in pictures", _read, [p for _, p in posts], _load_ocr, (settings,))
    words = {(split, p.post_id): text for (split, p), text in zip(posts, texts, strict=True)}
    for split in splits:
        entries = json.loads(layout.posts(split).read_text(encoding="utf-8"))
        for entry in entries:
            entry["ocr"] = words[split, entry["post_id"]]
        content = json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
        layout.read(split).write_text(content, encoding="utf-8")


def _load_ocr(settings: Settings) -> None:
    global _loaded  # noqa: PLW0603
    from extractors.suite import ExtractorSuite

    suite = ExtractorSuite(settings.features, names=("ocr",), threads=1)
    suite.load()
    _loaded = settings, suite


def _read(post: Post) -> str:
    from extractors.media.decode import decode_media

    settings, suite = _loaded
    lines = []
    for media in post.media:
        if media.kind == "image" or (media.kind == "video" and settings.features.ocr.frames):
            decoded = decode_media(media.kind, media.source, settings.features, settings.decode)
            lines.append(str(suite.run("ocr", [decoded.pictures])[0]).strip())
    return "\n".join(line for line in lines if line)


def extract_features(layout: Layout, settings: Settings) -> None:
    """Extract all splits; the online posts from their raw media, words in pictures included."""
    files = (layout.read("train"), layout.read("valid"), layout.posts("online"))
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
