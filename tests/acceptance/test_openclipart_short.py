"""The short forms of ``bench/openclipart.py`` and ``bench/heads.py``, on posts that are made up."""

import json
from pathlib import Path
from typing import Any

import heads
import numpy as np
import openclipart
import pytest

from common.post import Features
from config.labels import LabelMap
from extractors.feature_file import write_features

TAGS = ("animal", "plant", "tool")
AUTHORS = 12


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with posts of three tags and their features, as the first steps leave it."""
    rng = np.random.default_rng(0)
    entries: list[dict[str, Any]] = []
    for i in range(96):
        tag = int(rng.integers(len(TAGS)))
        image, text = (rng.normal(0, 0.3, (1, n)).astype(np.float16) for n in (12, 8))
        image[0, tag] += 1
        text[0, tag] += 1
        post_id, words = f"p{i}", f"drawing number {i} of some {TAGS[tag]}"
        author = f"author {i % AUTHORS}" if i % 7 else None
        entries.append(
            {"post_id": post_id, "labels": [TAGS[tag]], "text": words, "author": author}
            | {"ocr": None, "images": [], "videos": [], "audios": [], "features": ""}
        )
        post = Features(post_id, {"image": image, "text": text}, {"image": "ok", "text": "ok"})
        write_features(tmp_path / "features", post, {"image": "i", "text": "t"})
    (tmp_path / "posts").mkdir()
    (tmp_path / "posts" / "posts.json").write_text(json.dumps(entries))
    (tmp_path / "posts" / "idx2name.json").write_text(json.dumps(dict(enumerate(TAGS))))
    for sentence in openclipart.tag_sentences(openclipart.tag_texts(LabelMap(TAGS))):
        text = np.array([[name in sentence["text"] for name in TAGS] + [True] * 5], np.float16)
        post = Features(sentence["post_id"], {"text": text}, {"text": "ok"})
        write_features(tmp_path / "tag_features", post, {"text": "t"})
    for done in ("features/summary_image", "features/summary_text", "tag_features/summary_text"):
        (tmp_path / f"{done}.json").write_text("{}")
    return tmp_path


def test_no_author_is_on_two_sides_and_every_post_is_tested_once(work: Path) -> None:
    """Folds of authors; ``choose`` never shows a post of the fold that is left out."""
    entries = json.loads((work / "posts" / "posts.json").read_text())
    by_author = openclipart.split_posts(entries, "author")
    chosen = openclipart.split_posts(entries, "choose")
    tested = [post["post_id"] for sides in by_author for post in sides["test"]]
    assert sorted(tested) == sorted(entry["post_id"] for entry in entries)
    for sides, inner in zip(by_author, chosen, strict=True):
        authors = {side: set(map(openclipart.author_of, sides[side])) for side in sides}
        assert not authors["train"] & authors["test"]
        seen = {post["post_id"] for side in inner.values() for post in side}
        assert not seen & {post["post_id"] for post in sides["test"]}
        assert not {openclipart.author_of(p) for p in inner["train"]} & {
            openclipart.author_of(p) for p in inner["test"]
        }


@pytest.mark.slow
def test_the_short_run_finds_what_is_planted(work: Path) -> None:
    """From posts to figures of both splits; linear models see the same posts."""
    assert openclipart.main(["--work", str(work), "--seeds", "1", "--out", str(work)]) == 0
    _, *rows = json.loads((work / "openclipart.json").read_text())["results"]
    fusion = {row["split"]: row for row in rows if row["model"] == "fusion"}
    assert fusion.keys() == {"author", "random"}
    assert min(row["gap"] for row in rows) > 0.5
    assert fusion["author"]["gap"] > 0.8
    assert len(fusion["author"]["gap_folds"][0]) == openclipart.FOLDS


@pytest.mark.slow
def test_the_short_comparison_of_heads_has_every_cell(work: Path) -> None:
    """Each model with each loss, and with the first loss also averaged; nothing is run twice."""
    options = ["--work", str(work), "--seeds", "2", "--epochs", "1", "--width", "32"]
    options += ["--models", "concat_mlp", "token_transformer", "--losses", "bce", "two_way"]
    options += ["--out", str(work)]
    assert heads.main(options) == 0
    rows = json.loads((work / "heads.json").read_text())["results"]
    ended = {file: file.stat().st_mtime_ns for file in work.glob("heads-*/*bce*.json")}
    assert ended
    assert heads.main(options) == 0
    assert ended == {file: file.stat().st_mtime_ns for file in ended}
    assert json.loads((work / "heads.json").read_text())["results"] == rows
    cells = {(row["model"], row["loss"], row["ema"] > 0) for row in rows}
    assert cells == {
        (model, loss, averaged)
        for model in ("concat_mlp", "token_transformer")
        for loss, averaged in (("bce", False), ("two_way", False), ("bce", True))
    }
    assert all(row["seeds"] == 2 and row["gap_se"] is not None for row in rows)
