"""Stage: read the words in the training pictures once, for the vocabulary and the features."""

from __future__ import annotations

import json
from typing import Any

from common.post import Post
from config.settings import Settings
from demo.layout import Layout
from demo.parallel import map_items
from demo.posts.plan import Split
from fusion.data.data_file import read_whole_posts

_reader: Any = None
_settings: Settings | None = None


def read_pictures(layout: Layout, settings: Settings, splits: tuple[Split, ...]) -> None:
    """Write each split's data file again, with `ocr` filled in.

    Raises:
        ConfigError: OCR is not installed, or a data file is wrong.
    """
    posts = [(split, post) for split in splits for post in read_whole_posts(layout.posts(split))]
    texts = map_items("words in pictures", _read, [p for _, p in posts], _setup, (settings,))
    found = {(split, p.post_id): text for (split, p), text in zip(posts, texts, strict=True)}
    for split in splits:
        entries = json.loads(layout.posts(split).read_text(encoding="utf-8"))
        for entry in entries:
            entry["ocr"] = found[split, entry["post_id"]]
        content = json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
        layout.read(split).write_text(content, encoding="utf-8")


def _setup(settings: Settings) -> None:
    global _reader, _settings  # noqa: PLW0603  loaded once in each process
    from extractors.suite import ExtractorSuite

    _settings = settings
    _reader = ExtractorSuite(settings.features, names=("ocr",), threads=1)
    _reader.load()


def _read(post: Post) -> str:
    from extractors.media.decode import decode_media

    if _settings is None:
        raise RuntimeError("_setup comes first")
    lines = []
    for media in post.media:
        if media.kind == "image" or (media.kind == "video" and _settings.features.ocr.frames):
            decoded = decode_media(media.kind, media.source, _settings.features, _settings.decode)
            lines.append(str(_reader.run("ocr", [decoded.pictures])[0]).strip())
    return "\n".join(line for line in lines if line)
