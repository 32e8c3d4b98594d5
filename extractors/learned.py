"""The posts that the extractors' weights were trained on, as far as the weights record them.

A score on such a post says nothing of new ones, so its feature file names the streams whose weights
were trained on it. Weights that train_net.py makes carry the set: a safetensors file in its
metadata, a transformers folder in ``learned_from.json``. Third-party weights carry none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from common.errors import ConfigError
from common.post import Stream
from common.post_set import PostSet
from config.features import FeatureSettings

KEY = "learned_from"
FILE = f"{KEY}.json"


def learned_from(features: FeatureSettings) -> dict[Stream, PostSet]:
    """Return the posts that the weights of each stream were trained on; others are left out.

    Raises:
        ConfigError: A file of weights cannot be read.
    """
    video, text = _set_of(features.video.weights), features.text
    own: dict[Stream, PostSet] = {
        "video": video,
        "video_lstm": video | _set_of(features.video.lstm.weights),
        "image": _set_of(features.image.weights),
        "audio": _set_of(features.audio.weights),
        "text": _set_of(text.arch if text.weights == "pretrained" else text.weights)
        | _set_of(text.tfidf),
    }
    own["ocr"] = own["text"]  # words in pictures are embedded as texts
    if features.asr.enabled:
        own["asr"] = own["text"] | _set_of(features.asr.weights)
    return {stream: posts for stream, posts in own.items() if len(posts)}


def streams_of_post(post_id: str, learned: Mapping[Stream, PostSet]) -> tuple[Stream, ...]:
    """Return the streams whose weights were trained on a post."""
    return tuple(stream for stream, posts in learned.items() if post_id in posts)


def posts_of_weights(path: Path) -> PostSet:
    """Return the posts that a file or folder of weights was trained on; empty if unrecorded.

    Raises:
        ConfigError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.is_dir():
            file = path / FILE
            texts = [file.read_text(encoding="utf-8")] if file.exists() else []
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as weights:
                texts = [text for text in (weights.metadata() or {}).values() if KEY in text]
        else:
            return PostSet()
        contents = [json.loads(text) for text in texts]
        return PostSet.from_text("".join(content.get(KEY, "") for content in contents))
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as weights: {error}") from error


def _set_of(weights: str | None) -> PostSet:
    path = Path(weights or "pretrained").expanduser()
    return posts_of_weights(path) if path.exists() else PostSet()
