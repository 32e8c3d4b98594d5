"""``insighttag tag``: reading posts from files, and what is printed of their results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, MediaError, NothingUsable
from common.post import Failure, Features, Media, Post, Tag, Tags
from common.times import since_time
from config.settings import Settings
from fusion.data.data_file import read_whole_posts
from scripts.cli import run
from scripts.commands.common import ago
from tests.support.mistakes import one_line
from workers import local
from workers.post_run import PostTags


def written(folder: Path, content: Any) -> Path:
    file = folder / "posts.json"
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


def test_a_post_is_read_with_its_media(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.jpg").write_bytes(b"x")
    entry: dict[str, Any] = {
        "post_id": "p1",
        "text": "你好",
        "labels": ["cat"],
        "images": ["media/a.jpg"],
        "videos": ["https://host/v.mp4"],
        "features": "features/p1",
    }
    (post,) = read_whole_posts(written(tmp_path, entry))
    assert post == Post(
        "p1",
        text="你好",
        media=(
            Media("image", str(tmp_path / "media" / "a.jpg")),
            Media("video", "https://host/v.mp4"),
        ),
        labels=("cat",),
    )
    entry["images"] = [f"file://{tmp_path}/media/a.jpg", f"file://localhost{tmp_path}/media/a.jpg"]
    assert read_whole_posts(written(tmp_path, entry))[0].media[:2] == post.media[:1] * 2
    two = read_whole_posts(written(tmp_path, [entry, {"post_id": "p2", "ocr": "SALE"}]))
    assert [p.post_id for p in two] == ["p1", "p2"]
    assert two[1].ocr == "SALE"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([], "holds no post"),
        (3, "must be a list of posts"),
        ({}, "must have a post_id"),
        ({"post_id": 7}, "post_id"),
        ({"post_id": ""}, "post_id"),
        ({"post_id": "p", "image": []}, "image: unknown key; did you mean 'images'?"),
        ([{"post_id": "p"}, {"post_id": "q", "images": "a.jpg"}], "entry 2: images must be"),
        ({"post_id": "p", "videos": ["none.mp4"]}, "videos.0: no such file: none.mp4"),
        ({"post_id": "p", "videos": ["file:///none.mp4"]}, "videos.0: no such file: /none.mp4"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, content: Any, named: str) -> None:
    file = written(tmp_path, content)
    with one_line(ConfigError, named, str(file)):
        read_whole_posts(file)


def test_text_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "posts.json"
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="not a JSON data file"):
        read_whole_posts(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not a JSON data file"):
        read_whole_posts(file)


class FakeRunner:
    """Tags posts that have text; stands in for the models."""

    bundle = ("demo", "v1")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __enter__(self) -> "FakeRunner":
        if self.settings.fusion.bundle == Path("absent"):
            raise ConfigError("fusion.bundle: absent: no such bundle")
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def run(self, post: Post) -> PostTags:
        if not post.text:
            error = NothingUsable("the post has no text and no media")
            error.stage = "load"
            raise error
        failure = Failure.of("decode", MediaError("truncated"))
        features = Features(
            post.post_id,
            arrays={"text": np.zeros((1, 4), np.float16)},
            statuses={"video": "failed", "text": "ok"},
            failures={"video": failure},
        )
        tags = (Tag(3, "猫", 0.9),) if post.text == "cat" else ()
        return PostTags(features, Tags(post.post_id, "demo", "v1", tags, np.zeros(4)), {})


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "local_runner", FakeRunner)


@pytest.mark.usefixtures("models")
def test_results_as_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("{}")
    posts = [{"post_id": "a", "text": "cat"}, {"post_id": "b", "text": "?"}, {"post_id": "empty"}]
    file = written(tmp_path, posts)
    assert run(["tag", str(file), "--config", str(config)]) == 1
    out = capsys.readouterr().out
    for text in ("猫", "0.900", "video failed", "MediaError: truncated", "none over its threshold"):
        assert text in out
    assert run(["tag", str(file), "--json", "--config", str(config)]) == 1
    first, second, third = json.loads(capsys.readouterr().out)
    assert first["tags"] == [{"id": 3, "name": "猫", "score": 0.9}]
    assert first["failures"]["video"]["type"] == "MediaError"
    assert (first["status"], third["status"], second["tags"]) == ("tagged", "failed", [])
    assert third["error"]["stage"] == "load"
    assert (third["model"], third["version"]) == ("demo", "v1")
    assert first.keys() == third.keys()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("settings", "posts", "status", "error", "shown"),
    [
        pytest.param("{}", [{"text": "cat"}], 0, "", "猫", id="tagged"),
        pytest.param(
            "{}", [{}, {"text": "cat"}], 1, "", "NothingUsable: the post has no", id="a post fails"
        ),
        pytest.param(
            "{}",
            [{"text": "cat", "videos": ["a.mp4"] * 2}] * 2,
            1,
            "tag: all 4 media failed\n",
            "猫",
            id="no medium is usable",
        ),
        pytest.param(
            "fusion: {bundle: absent}",
            [{"text": "cat"}],
            2,
            "fusion.bundle: absent: no such bundle",
            "",
            id="no bundle",
        ),
    ],
)
def test_exit_codes(
    *,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    posts: list[dict[str, Any]],
    status: int,
    error: str,
    shown: str,
) -> None:
    """1 when a post or every medium failed, 2 for a wrong configuration; the rest is shown."""
    config = tmp_path / "settings.yaml"
    config.write_text(settings)
    (tmp_path / "a.mp4").write_bytes(b"x")
    file = written(tmp_path, [{"post_id": str(i), **post} for i, post in enumerate(posts)])
    assert run(["tag", str(file), "--config", str(config)]) == status
    output = capsys.readouterr()
    assert error in output.err
    assert bool(error) == bool(output.err)
    assert shown in output.out


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("folder", "is a folder: name a file in it"),
        ("posts.json/tags.jsonl", "posts.json/tags.jsonl: a file is in the place of its folder"),
        ("posts.json/new/tags.jsonl", "Not a directory"),
    ],
)
def test_a_wrong_out_is_told_before_models_are_loaded(
    out: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(local, "local_runner")
    (tmp_path / "folder").mkdir()
    file = written(tmp_path, [{"post_id": "a", "text": "cat"}])
    assert run(["tag", str(file), "--out", str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err


def test_times_are_read_and_told() -> None:
    """``--since`` takes durations and dates; durations are shown in their unit."""
    now = 1_767_225_600.0 + 86400  # 2026-01-02 UTC
    assert since_time(None, now) is None
    assert since_time("90s", now) == now - 90
    assert since_time("1.5h", now) == now - 5400
    assert since_time("7d", now) == now - 7 * 86400
    assert since_time("2026-01-01", now) == 1_767_225_600.0
    assert since_time("2026-01-01T01:00:00+01:00", now) == 1_767_225_600.0
    with pytest.raises(ConfigError):
        since_time("h", now)
    assert [ago(None, now), ago(now - 5, now), ago(now - 7200, now)] == [
        "never",
        "5 s ago",
        "2 h ago",
    ]
