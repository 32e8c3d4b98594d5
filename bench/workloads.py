"""Posts, models and settings of the benches of the daemon; made here, so that nothing is prepared.

``demo``       the demo's posts and encoders; the networks that it trains have random weights
``realistic``  a clip of 20 s with sound, two JPEGs of 1280x960 with a line of words, and a text;
               the preset ``small``
``tiny``       a few of the demo's posts and the smallest encoders: for the tests

The fusion model has random weights and the default's size; every score becomes a tag.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from clips import CLIPS, write_clip

from config.load import load_settings
from config.settings import Settings
from demo.posts.make import make_posts
from demo.posts.plan import DATA_FILE, plan_posts
from tests.support.tiny_models import tiny_bundle, tiny_features
from workers.sample_posts import texture

ROOT = Path(__file__).resolve().parents[1]
WorkloadName = Literal["demo", "realistic", "tiny"]
CLIPS_720P = ("720p, key 2 s", "720p, key 5 s")
"""Of `realistic` where it is compared with others."""
MIXED_CLIPS = (*CLIPS_720P, "1080p, key 2 s", "360p, key 2 s")
_MADE = {"demo": 24, "realistic": 6, "tiny": 8}  # distinct posts; more repeat them
_WORDS = ("sun", "rain", "goal", "song", "dog", "cake", "train", "vote")


@dataclass(frozen=True)
class Workload:
    """Posts and the settings that they are tagged with.

    Attributes:
        settings: Without URLs of servers; the bundle exists.
        entries: Posts as in a data file; paths of media are relative to `folder`.
    """

    settings: Settings
    entries: Sequence[Mapping[str, Any]]
    folder: Path

    def documents(self, prefix: str, number: int, url: str) -> list[dict[str, Any]]:
        """Return that many posts as the database holds them; their IDs begin with the prefix."""
        made = []
        for i in range(number):
            entry = self.entries[i % len(self.entries)]
            media = {k: [f"{url}/{p}" for p in entry[k]] for k in ("images", "videos", "audios")}
            made.append({"_id": f"{prefix}-{i:06d}", "text": entry["text"], **media})
        return made


def workload(
    name: WorkloadName, folder: Path, *, clips: Sequence[str] = CLIPS_720P, **sections: Any
) -> Workload:
    """Make posts, media and a bundle in a folder.

    Args:
        name: As above.
        folder: Where to.
        clips: Kinds of clip of the realistic posts, in turn.
        sections: Of `Settings`, to set otherwise.
    """
    features: dict[str, Any] = {}
    if name == "tiny":
        features = tiny_features().model_dump()
    if name == "realistic":
        features = {"preset": "small", "audio": {"weights": "random:0"}}
    if name == "demo":
        overrides = ["features.video.weights=random:0", "features.audio.weights=random:0"]
        settings = load_settings(ROOT / "config" / "demo.yaml", overrides)
        features = settings.features.model_dump()
    extractors = ["video", "image", "audio", "text", *(["ocr"] if name != "tiny" else [])]
    group = {"extractors": extractors, "processes": 1 if name == "tiny" else 2, "threads": 1}
    settings = Settings.model_validate(
        {
            "features": features,
            "fetch": {"allow_private_hosts": True, "spool": folder / "spool"},
            "decode": {"processes": 1},
            "workers": {"extractors": [group]},
            "fusion": {"bundle": folder / "bundle"},
            "log": {"format": "json"},
            **sections,
        }
    )
    # It goes by shapes and fingerprints: nothing is traced, and half precision not held to float32.
    plain = {"engine": "torch", "precision": "fp32"}
    exact = {
        name: section.model_copy(update={k: v for k, v in plain.items() if hasattr(section, k)})
        for name in ("video", "image", "audio", "text")
        for section in [getattr(settings.features, name)]
    }
    tiny_bundle(folder / "bundle", settings.features.model_copy(update=exact))
    web = folder / "web"
    if name == "realistic":
        entries = _realistic(web, _MADE[name], clips)
    else:
        list(make_posts(web, plan_posts(_MADE[name], 7, "online"), os.cpu_count() or 1))
        entries = json.loads((web / DATA_FILE).read_text(encoding="utf-8"))
    return Workload(settings, entries, web)


def _realistic(web: Path, number: int, clips: Sequence[str]) -> list[dict[str, Any]]:
    web.mkdir(parents=True, exist_ok=True)
    names = []
    for k, kind in enumerate(clips):
        names.append(f"clip{k}{CLIPS[kind].suffix}")
        if not (web / names[-1]).exists():  # an earlier run's, or packed beforehand
            write_clip(web / names[-1], CLIPS[kind])
    for i in range(number):
        picture = texture(i, 1280, 960)
        cv2.putText(picture, f"summer sale {i}%", (80, 500), 0, 4, (255, 255, 255), 8)
        cv2.imwrite(str(web / f"picture{i}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
    chance = np.random.default_rng(0)
    return [
        {
            "text": f"post {i} about " + " ".join(chance.choice(_WORDS, 20)),
            "images": [f"picture{(2 * i + j) % number}.jpg" for j in range(2)],
            "videos": [names[i % len(names)]],
            "audios": [],
        }
        for i in range(number)
    ]
