"""Real demo posts with planted duplicates, as the tests of ``analyze_posts`` need them."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from demo.posts.make import MEDIA_FOLDER, make_post
from demo.posts.plan import plan_posts

LONG = (
    "We walked from the old harbour to the lighthouse this morning, found a small bakery that "
    "nobody had told us about, and stayed there until the rain was over; the photographs follow."
)
ZH = "今天早上我们从老码头一直走到灯塔，路上发现了一家没有人提起过的小面包店，一直待到雨停才离开。"


@dataclass
class Corpus:
    """Posts on disk.

    Attributes:
        file: The posts file; media lie relative to it.
        near: Pairs of posts with pictures that look alike.
        exact: Pairs of posts with a medium in common.
        texts: Pairs of posts with nearly the same text.
        apart: Pairs with texts that are not near.
    """

    file: Path
    posts: list[dict[str, Any]] = field(default_factory=list)
    near: list[tuple[str, str]] = field(default_factory=list)
    exact: list[tuple[str, str]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    apart: list[tuple[str, str]] = field(default_factory=list)

    def write(self) -> None:
        lines = [json.dumps(post, ensure_ascii=False) + "\n" for post in self.posts]
        self.file.write_text("".join(lines), encoding="utf-8")


def make_corpus(folder: Path, count: int = 20) -> Corpus:
    """Demo posts, a copy of every picture that has structure, and texts with small edits."""
    (folder / MEDIA_FOLDER).mkdir()
    posts: list[Any] = [make_post(folder, plan) for plan in plan_posts(count, 3, "train")]
    corpus = Corpus(folder / "posts.jsonl", posts)
    pictures = [(post["post_id"], post["images"][0]) for post in posts if post["images"]]
    for i, (post_id, source) in enumerate(pictures):
        name = _copy(folder, source, i)
        if name:
            corpus.near.append((post_id, f"near-{i}"))
            corpus.posts.append(_post(f"near-{i}", images=[name]))
    shutil.copy(folder / pictures[0][1], folder / "media/same.jpg")
    corpus.exact.append((pictures[0][0], "exact"))
    corpus.posts.append(_post("exact", images=["media/same.jpg"], labels=["other"]))
    edits = {
        "en": LONG,
        "en-case": LONG.upper().replace(",", " ,", 1).replace(" ,", ","),
        "en-typo": LONG.replace("bakery", "bakry"),
        "en-other": LONG.replace("lighthouse", "castle").replace("rain", "concert")
        .replace("bakery", "museum of trams").replace("photographs", "drawings"),
        "zh": ZH,
        "zh-typo": ZH.replace("离开。", "离开！"),
        "zh-other": ZH.replace("灯塔", "火车站").replace("面包店", "书店").replace("雨停", "天黑"),
        "short-1": "Good night!",
        "short-2": "Good night!",
    }  # fmt: skip
    corpus.posts += [_post(name, text=text, labels=["walk"]) for name, text in edits.items()]
    corpus.texts += [("en", "en-case"), ("en", "en-typo"), ("zh", "zh-typo")]
    corpus.apart += [("en", "en-other"), ("zh", "zh-other"), ("short-1", "short-2"), ("en", "zh")]
    corpus.write()
    return corpus


def _copy(folder: Path, source: str, number: int) -> str:
    """Encode a picture anew, scaled up or down, or as another type; empty for a flat one."""
    with Image.open(folder / source) as opened:
        picture = opened.convert("RGB")
    low, high = picture.convert("L").getextrema()
    if high - low < 60:
        return ""
    width, height = picture.size
    sizes = [(width, height), (width // 2, height // 2), (width * 3 // 2, height * 3 // 2)]
    name = f"media/near-{number}.{'webp' if number % 4 == 3 else 'jpg'}"
    picture.resize(sizes[number % 3]).save(folder / name, quality=(60, 85, 40)[number % 3])
    return name


def _post(post_id: str, **more: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {"labels": [], "text": "", "ocr": None}
    return {"post_id": post_id, **blank, "images": [], "videos": [], "audios": [], **more}
