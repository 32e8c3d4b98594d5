"""A small corpus with sound and broken media, and the settings that its extraction needs."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.media import (
    grey_steps,
    noise,
    quadrants,
    solid,
    tone,
    write_jpeg,
    write_png,
    write_video,
    write_wav,
)
from tests.support.tiny_models import tiny_features


def write_lines(path: Path, entries: Iterable[Mapping[str, Any] | str]) -> Path:
    """A posts file; texts are written as they are."""
    lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_config(folder: Path, **features: Any) -> Path:
    """Settings of five small extractors with random weights, one process."""
    content = {
        "fetch": {"spool": str(folder / "spool")},
        "features": tiny_features(**features).model_dump(mode="json"),
        "decode": {"processes": 1},
        "workers": {"extractors": [{"threads": 1}]},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def write_corpus(folder: Path) -> Path:
    """Eight lines: four sound posts, a broken picture, a lost file, no post, and one again."""
    media = folder / "media"
    media.mkdir(parents=True)
    write_jpeg(media / "a.jpg", quadrants(80, 60))
    write_png(media / "b.png", noise(70, 90))
    (media / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    write_wav(media / "s.wav", tone(duration_s=1.5))
    write_video(media / "v.mp4", grey_steps(10), audio=tone(duration_s=0.4), audio_rate_hz=16000)
    posts: list[Mapping[str, Any] | str] = [
        {"post_id": "all", "text": "a cat 猫", "ocr": "SALE", "images": ["media/a.jpg"],
         "videos": ["media/v.mp4"], "audios": ["media/s.wav"]},
        {"post_id": "two", "text": "", "images": ["media/b.png", "media/broken.jpg"]},
        {"post_id": "words", "text": "only words here"},
        {"post_id": "broken", "text": "t", "images": ["media/broken.jpg"]},
        '{"post_id": "half',
        {"post_id": "lost", "images": ["media/none.jpg"], "videos": ["media/v.mp4"]},
        {"post_id": "words", "text": "the same ID again"},
        {"post_id": "a/b ü", "text": "an odd name", "audios": ["media/s.wav"]},
    ]  # fmt: skip
    return write_lines(folder / "posts.jsonl", posts)


def write_pictures(folder: Path, count: int) -> Path:
    """Posts of one small picture each."""
    media = folder / "media"
    media.mkdir(parents=True)
    posts = []
    for i in range(count):
        write_png(media / f"{i}.png", solid(16 + i % 7, 16, (i % 256, 3 * i % 256, 90)))
        posts.append({"post_id": f"p{i:03}", "images": [f"media/{i}.png"]})
    return write_lines(folder / "posts.jsonl", posts)


def files(root: Path) -> dict[str, bytes]:
    """Every file of a root that a reader looks at, by its path."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def feature_files(root: Path) -> dict[str, bytes]:
    """The feature files of a root, by their paths."""
    return {name: content for name, content in files(root).items() if name.endswith("tensors")}
