"""pull_posts against a real MongoDB-protocol server: mapping, choice, time, kills, mistakes."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import Binary, Int64, ObjectId

from corpus.pull.progress import Files
from scripts.data_scripts.pull_posts import main
from tests.support.services import wait_until

SCRIPT = Path(__file__).resolve().parents[3] / "scripts/data_scripts/pull_posts.py"
EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)

Insert = Callable[[Sequence[dict[str, Any]]], None]


@pytest.fixture
def arguments(mongo_url: str, unique_name: str, tmp_path: Path) -> list[str]:
    """The options that name this test's collection and file."""
    sets = [f"store.url={mongo_url}", f"store.collection={unique_name}", "log.level=error"]
    return [*(part for s in sets for part in ("--set", s)), "--out", str(tmp_path / "p.jsonl")]


@pytest.fixture
def insert(mongo_url: str, unique_name: str) -> Iterator[Insert]:
    """Puts documents into the posts collection."""
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(mongo_url)

    def put(documents: Sequence[dict[str, Any]]) -> None:
        client["insighttag"][unique_name].insert_many(list(documents))

    yield put
    client["insighttag"].drop_collection(unique_name)
    client.close()


def posts_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "p.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def ids_of(folder: Path) -> list[str]:
    return [post["post_id"] for post in posts_of(folder)]


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "p.summary.json").read_text(encoding="utf-8"))
    return summary


def results(folder: Path) -> dict[str, bytes]:
    names = ("p.jsonl", "p.rejected.jsonl", "p.summary.json")
    return {name: (folder / name).read_bytes() for name in names}


def documents(count: int) -> list[dict[str, Any]]:
    """Plain posts: tag a on all, b on every 2nd, c on every 50th; an hour between two of them."""
    return [
        {
            "_id": f"p{i:05}",
            "text": f"text {i}",
            "labels": ["a"] + ["b"] * (i % 2 == 0) + ["c"] * (i % 50 == 0),
            "images": [f"http://h/{i}.png"],
            "at": EPOCH + timedelta(hours=i),
        }
        for i in range(count)
    ]


def test_odd_documents(arguments: list[str], insert: Insert, tmp_path: Path) -> None:
    """Other names and types are read as the daemon reads them; what is no post is named."""
    oid = ObjectId("65a000000000000000000001")
    insert(
        [
            {
                "_id": oid,
                "pid": 7,
                "body": {"t": "猫"},
                "media": [{"url": "http://h/a.png"}, {"url": 3}, "http://h/b.png"],
                "video": "http://h/v.mp4",
                "tags": [{"name": "cat"}, {"name": "cat"}, "dog", 3, ["x"]],
                "by": {"id": Int64(12)},
                "when": EPOCH,
            },
            {
                "_id": "s1",
                "pid": ObjectId("65a000000000000000000002"),
                "tags": "one",
                "body": {"t": "x"},
                "when": 1767225600,
            },
            {
                "_id": "s2",
                "pid": "no labels",
                "body": {"t": "y"},
                "when": "2026-01-01T00:00:00Z",
                "by": {"id": "me"},
            },
            {
                "_id": "s3",
                "pid": "text of another type",
                "body": {"t": 5},
                "media": {"url": "u"},
                "when": "?",
            },
            {"_id": "b1", "body": {"t": "x"}},
            {"_id": "b2", "pid": 1.5, "body": {"t": "x"}},
            {"_id": "b3", "pid": True, "body": {"t": "x"}},
            {"_id": "b4", "pid": "", "body": {"t": "x"}},
            {"_id": "b5", "pid": "nothing"},
            {"_id": "b6", "pid": "x" * 600, "body": {"t": "x"}},
            {"_id": "b7", "pid": Binary(b"1"), "body": {"t": "x"}},
        ]
    )
    names = {
        "id": "pid",
        "text": "body.t",
        "images": "media",
        "videos": "video",
        "labels": "tags",
        "author": "by.id",
        "created": "when",
    }
    fields = [part for k, v in names.items() for part in ("--set", f"store.fields.{k}={v}")]
    assert main([*arguments, *fields]) == 0
    posts = {post["post_id"]: post for post in posts_of(tmp_path)}
    assert posts["7"] == {
        "post_id": "7",
        "labels": ["cat", "dog", "x"],
        "text": "猫",
        "ocr": None,
        "images": ["http://h/a.png", "http://h/b.png"],
        "videos": ["http://h/v.mp4"],
        "audios": [],
        "author": "12",
        "created": "2026-01-01T00:00:00+00:00",
    }
    other = posts["65a000000000000000000002"]
    assert (other["labels"], other["created"]) == (["one"], "2026-01-01T00:00:00+00:00")
    plain = posts["no labels"]
    assert (plain["labels"], plain["author"], plain["created"]) == ([], "me", other["created"])
    odd = posts["text of another type"]
    assert (odd["text"], odd["images"], odd["created"]) == ("", ["u"], None)
    of_other_types = {"1.5", "true", '""', '{"$binary":{"base64":"MQ==","subType":"00"}}'}
    assert len(posts) == 4 + len(of_other_types & set(posts)) == 8
    lines = (tmp_path / "p.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert {line["_id"]: line["reason"] for line in map(json.loads, lines)} == {
        "b1": "pid: it is null",
        "b5": "neither text nor media",
        "b6": "pid: its text is longer than 512 bytes",
    }
    summary = summary_of(tmp_path)
    assert (summary["done"], sum(summary["failed"].values())) == (8, 3)


def test_query_limit_untagged_and_time(
    arguments: list[str], insert: Insert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Posts that the options leave out are counted; a line says so when none remain."""
    stored = documents(40)
    for document in stored[:10]:
        document["insight"] = {"status": "tagged"}
    stored[20]["at"] = None
    insert(stored)
    assert main([*arguments, "--query", '{"labels": "b"}', "--limit", "5"]) == 0
    assert ids_of(tmp_path) == [f"p{i:05}" for i in range(0, 10, 2)]
    assert main([*arguments, "--untagged", "--query", '{"labels":  "c"}']) == 0
    assert ids_of(tmp_path) == []
    [told] = [line for line in capsys.readouterr().err.splitlines() if "pull_posts:" in line]
    assert told.startswith("pull_posts: no document of collection ")
    assert told.endswith(' matches --query {"labels": "c"} --untagged')
    created = ["--set", "store.fields.created=at"]
    times = ["--since", "2026-01-01T05:00", "--until", "2026-01-01T22:00:00Z"]
    assert main([*arguments, *created, *times, "--untagged"]) == 0
    assert ids_of(tmp_path) == [f"p{i:05}" for i in range(10, 22) if i != 20]
    assert summary_of(tmp_path)["skipped"] == {"no time is known": 1, "not before --until": 18}
    assert "pull_posts:" not in capsys.readouterr().err


def test_age_is_that_of_the_object_id(arguments: list[str], insert: Insert, tmp_path: Path) -> None:
    ids = [ObjectId.from_datetime(EPOCH + timedelta(days=i)) for i in range(5)]
    insert([{"_id": i, "text": "x"} for i in ids])
    assert main([*arguments, "--since", "2026-01-03"]) == 0
    assert ids_of(tmp_path) == [str(i) for i in ids[2:]]
    assert posts_of(tmp_path)[0]["created"] == "2026-01-03T00:00:00+00:00"


def test_sample_is_fixed_by_its_seed(arguments: list[str], insert: Insert, tmp_path: Path) -> None:
    """Exactly so many, the same ones for the same seed, in the order of _id, whatever the pages."""
    insert(documents(300))
    assert main([*arguments, "--sample", "50"]) == 0
    first = ids_of(tmp_path)
    assert (len(first), first) == (50, sorted(first))
    assert main([*arguments, "--sample", "50", "--page", "7"]) == 0
    assert ids_of(tmp_path) == first
    assert main([*arguments, "--sample", "80"]) == 0
    assert set(first) < set(ids_of(tmp_path)), "a larger sample holds the smaller one"
    assert main([*arguments, "--sample", "50", "--seed", "1"]) == 0
    assert len(ids_of(tmp_path)) == 50
    assert ids_of(tmp_path) != first
    assert main([*arguments, "--sample", "1000"]) == 0
    assert len(ids_of(tmp_path)) == 300


def test_rare_tags_are_left_out(arguments: list[str], insert: Insert, tmp_path: Path) -> None:
    """Rare tags go, posts with no other tag too; a sample keeps so many posts of each tag."""
    stored = documents(300)
    stored[3]["labels"], stored[5]["labels"] = ["rare"], []
    stored[7]["labels"] = ["rare", "a"]
    insert(stored)
    assert main([*arguments, "--min_posts_per_tag", "6"]) == 0
    posts = {post["post_id"]: post for post in posts_of(tmp_path)}
    assert set(map(str, [d["_id"] for d in stored])) - set(posts) == {"p00003", "p00005"}
    assert posts["p00007"]["labels"] == ["a"]
    summary = summary_of(tmp_path)
    assert summary["skipped"] == {"no tags": 1, "only tags of too few posts": 1}
    assert summary["tags of too few posts"] == 1
    assert main([*arguments, "--min_posts_per_tag", "6", "--sample", "30"]) == 0
    counts = Counter(name for post in posts_of(tmp_path) for name in post["labels"])
    assert len(posts_of(tmp_path)) == 30
    assert counts["c"] == 6, "every 50th post of 300"
    assert counts["b"] >= 6


def test_random_kills_change_nothing(arguments: list[str], insert: Insert, tmp_path: Path) -> None:
    more = ["--sample", "500", "--min_posts_per_tag", "10"]
    stored = documents(600)
    for document in stored[::100]:
        document["text"], document["images"] = 3, None
    insert(stored)
    assert main([*arguments, *more]) == 0
    calm = results(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    chance = random.Random()
    part, kills = tmp_path / ".p.jsonl.part", []
    for _ in range(2):
        run = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments, *more, "--page", "5"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = part.stat().st_size if part.exists() else 0
        wait_until(partial(grown, part, before, run), 30, "posts")
        time.sleep(chance.uniform(0, 0.15))
        kills.append(run.poll() is None)
        run.kill()
        run.wait()
    assert main([*arguments, *more]) == 0
    assert results(tmp_path) == calm
    assert any(kills), "every run had ended before it was killed"
    leftovers = {path.name for path in tmp_path.iterdir()} - set(calm)
    assert leftovers == {".p.jsonl.lock"}


def test_signal_ends_it_in_good_order(arguments: list[str], insert: Insert, tmp_path: Path) -> None:
    insert(documents(500))
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--page", "5"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(partial(grown, tmp_path / ".p.jsonl.part", 0, run), 30, "posts")
    run.terminate()
    _, said = run.communicate(timeout=20)
    assert run.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("pull_posts: SIGTERM: ")
    assert last.endswith("run the same command again to continue where it stopped")
    assert not (tmp_path / "p.jsonl").exists()
    assert main(arguments) == 0
    assert ids_of(tmp_path) == [f"p{i:05}" for i in range(500)]


def grown(part: Path, size: int, run: subprocess.Popen[Any]) -> bool:
    """Tell if a run has written something or has ended."""
    return run.poll() is not None or (part.exists() and part.stat().st_size > size)


def test_unfinished_pull_is_not_mixed_with_another(
    arguments: list[str],
    insert: Insert,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other options over an unfinished pull are refused by name; --restart starts over."""
    insert(documents(50))

    def full_disk(self: Files) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Files, "finish", full_disk)
    assert main([*arguments, "--limit", "20"]) == 1
    said = capsys.readouterr().err
    assert "No space left on device; make room, then run the same command again" in said
    monkeypatch.undo()
    assert main([*arguments, "--limit", "30"]) == 2
    assert "an unfinished pull with another limit is there" in capsys.readouterr().err
    assert main([*arguments, "--limit", "30", "--restart"]) == 0
    assert len(ids_of(tmp_path)) == 30


def test_database_that_is_away_is_waited_for(
    mongo_server: Any, insert: Insert, arguments: list[str], tmp_path: Path
) -> None:
    """The server is killed and started again in the middle: nothing is missing or twice."""
    insert(documents(500))
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--page", "10", "--set", "store.timeout_s=1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: grown(tmp_path / ".p.jsonl.part", 0, run), 30, "posts")
    mongo_server.kill()
    assert run.poll() is None, "it ended before the server was killed"
    time.sleep(0.5)
    mongo_server.start()
    assert run.wait(60) == 0
    assert ids_of(tmp_path) == [f"p{i:05}" for i in range(500)]


def test_embedded_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``store.url embedded://`` starts what it needs; an empty collection gives an empty file."""
    sets = ["store.url=embedded://", f"embedded.folder={tmp_path / 'e'}"]
    more = [part for s in sets for part in ("--set", s)]
    try:
        assert main([*more, "--out", str(tmp_path / "p.jsonl")]) == 0
        assert posts_of(tmp_path) == []
        said = capsys.readouterr()
        assert "0 posts" in said.out
        assert " holds no document" in said.err
        assert not (tmp_path / "e" / "redis").exists(), "the queue is not needed"
    finally:
        stop_embedded(tmp_path / "e")


def stop_embedded(folder: Path) -> None:
    from config.load import load_settings
    from deploy.embedded import stop

    stop(load_settings(overrides=[f"embedded.folder={folder}"]))
