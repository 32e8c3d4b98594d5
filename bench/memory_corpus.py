"""Synthetic posts for `corpus_memory.py`: few words, a tiny picture, a short sound and video."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.post import Features
from demo.posts.taxonomy import TAGS
from extractors.feature_file import feature_path, features_bytes

_WORDS = ["cat", "dog", "house", "tree", "river", "song", "night", "train", "market", "bread"]


@dataclass(frozen=True)
class Corpus:
    """Synthetic posts.

    Attributes:
        urls: Posts file with pictures on the server.
        local: Posts file with a local picture, sound and video in every post.
        features: Root of small feature files.
        config: Settings with tiny models.
    """

    folder: Path
    size: int
    urls: Path
    local: Path
    features: Path
    config: Path


def make(folder: Path, size: int, url: str, *, with_features: bool) -> Corpus:
    """Write the files of a corpus."""
    folder.mkdir(parents=True)
    write_media(folder / "m")
    corpus = Corpus(
        folder,
        size,
        folder / "urls.jsonl",
        folder / "local.jsonl",
        folder / "features",
        folder / "settings.yaml",
    )
    rng = np.random.default_rng(1)
    names = list(TAGS)
    with corpus.urls.open("w") as urls, corpus.local.open("w") as local:
        for i in range(size):
            post = {
                "post_id": f"p{i:07}",
                "labels": [names[k] for k in sorted({int(k) for k in rng.integers(0, 24, 2)})],
                "text": f"{' '.join(_WORDS[int(k)] for k in rng.integers(0, 10, 5))} {i:x}",
                "ocr": "",
                "images": [f"{url}/{i}.png"],
                "videos": [],
                "audios": [],
                "author": f"a{i}",
            }
            urls.write(json.dumps(post) + "\n")
            post |= {"images": ["m/p.png"], "videos": ["m/v.mp4"], "audios": ["m/s.wav"]}
            local.write(json.dumps(post) + "\n")
    if with_features:
        write_features(corpus)
        write_earlier(corpus, url)
    return corpus


def write_media(folder: Path) -> None:
    """Write one picture, one sound, one video, as small as they may be."""
    import cv2

    from demo.posts.encode import write_sound, write_video

    folder.mkdir()
    picture = np.full((16, 16, 3), 90, np.uint8)
    cv2.imwrite(str(folder / "p.png"), picture)
    write_sound(folder / "s.wav", np.zeros(16_000, np.float32), 16_000)
    write_video(folder / "v.mp4", [picture] * 4, 4)


def write_features(corpus: Corpus) -> None:
    """Write a feature file of a few bytes for each post."""
    text = np.ones((1, 8), np.float16)
    for i in range(corpus.size):
        post_id = f"p{i:07}"
        path = feature_path(corpus.features, post_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        features = Features(post_id=post_id, arrays={"text": text}, statuses={"text": "ok"})
        path.write_bytes(features_bytes(features, {"text": "0" * 16}))


def write_earlier(corpus: Corpus, url: str) -> None:
    """Write a manifest of all media, near-duplicates of every tenth post, and a split of half."""
    folder = corpus.folder
    with (
        (folder / "known.jsonl").open("w") as media,
        (folder / "duplicates.jsonl").open("w") as same,
        (folder / "split.jsonl").open("w") as sides,
    ):
        for i in range(corpus.size):
            ok = {"source": f"{url}/{i}.png", "path": f"{i}.png", "kind": "image", "status": "ok"}
            media.write(json.dumps({**ok, "sha256": f"{i:064x}"}) + "\n")
            if i % 10 == 9:
                members = [f"p{i - 1:07}", f"p{i:07}"]
                same.write(json.dumps({"kind": "near_text", "members": members}) + "\n")
            if i < corpus.size // 2:
                side = {9: "test", 8: "valid"}.get(i // 10 % 10, "train")
                sides.write(json.dumps({"post_id": f"p{i:07}", "side": side, "group": i}) + "\n")
