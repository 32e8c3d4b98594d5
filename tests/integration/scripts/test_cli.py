"""The command line against real embedded services, and its answers to mistakes."""

import io
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pymongo
import pytest

from common.processes import process_identity
from config.load import load_settings
from deploy import embedded
from king.messages import PostMessage
from scripts.cli import run
from tests.support.processes import python
from tests.support.scripts.command import Command, Database


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("cli")
    yield made
    config = made / "settings.yaml"
    if config.exists():
        embedded.stop(load_settings(config))


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(folder, capsys)


@pytest.fixture
def database(command: Command) -> Iterator[Database]:
    """An empty database, and an empty queue."""
    resolved = embedded.resolve(command.settings)
    command.queued()
    with pymongo.MongoClient[dict[str, Any]](resolved.store.url) as client:
        database = client[resolved.store.database]
        database["posts"].delete_many({})
        database["jobs"].delete_many({})
        yield database


def by_id(command: Command) -> list[PostMessage]:
    return sorted(command.queued(), key=lambda message: message.post_id)


def dead(post_id: str, stage: str, type_: str, age_s: float = 0.0) -> dict[str, Any]:
    return {
        "_id": post_id,
        "state": "dead",
        "attempts": 3,
        "last_error": {"stage": stage, "type": type_, "message": "because [of] it"},
        "payload": post_id,
        "first_at": time.time() - age_s,
        "updated_at": time.time() - age_s,
    }


def test_publish_by_id_and_file(command: Command, database: Database, tmp_path: Path) -> None:
    """IDs of the command line and of a file arrive once each, with priority and force."""
    database["posts"].insert_many([{"_id": i} for i in ("p1", "p2", "p3", "帖子")])
    file = tmp_path / "ids.txt"
    file.write_text("p2\n\n  p3 \n帖子\n", encoding="utf-8")
    code, out, err = command(
        "publish", "p1", "p2", "--file", str(file), "--priority", "3", "--force"
    )
    assert (code, out, err) == (0, "published 4 to insighttag.posts\n", "")
    queue = command.json("status")["queue"]
    assert (queue["depth"], queue["unacknowledged"]) == (4, 0)
    assert "4 waiting, 0 unacknowledged" in command("status")[1]
    ids = ("p1", "p2", "p3", "帖子")
    assert by_id(command) == [PostMessage(i, priority=3, force=True) for i in ids]
    assert command.json("publish", "p1") == {"published": 1, "queue": "insighttag.posts"}
    command.queued()


def test_publish_says_which_ids_name_no_post(command: Command, database: Database) -> None:
    """Unasked they are published all the same; --check refuses them, --no-check looks nowhere."""
    database["posts"].insert_many([{"_id": "p1"}, {"_id": 7.0}])
    ids = ("p1", "nobody", "7")
    code, out, err = command("publish", *ids)
    assert (code, out) == (0, "published 3 to insighttag.posts\n")
    where = f"{database.name}.posts"
    assert err.startswith(f"insighttag: publish: not in {where}: 'nobody' (1 of 3 IDs); they")
    code, out, err = command("publish", *ids, "--check")
    assert (code, out) == (2, "")
    assert err.startswith(f"insighttag: publish: not in {where}: 'nobody' (1 of 3 IDs); nothing ")
    assert command("publish", *ids, "--no-check") == (0, "published 3 to insighttag.posts\n", "")
    away = ("--set", "store.url=mongodb://127.0.0.1:9", "--set", "store.timeout_s=0.3")
    code, out, err = command("publish", *ids, *away)
    assert (code, out) == (0, "published 3 to insighttag.posts\n")
    assert err.startswith("insighttag: publish: the IDs were not checked: mongodb://127.0.0.1:9")
    assert command("publish", *ids, "--check", *away)[0] == 1


def test_publish_looks_up_many_ids_only_when_asked(
    command: Command, database: Database, tmp_path: Path
) -> None:
    """Up to a thousand unasked: more are a delay that nobody expects."""
    file = tmp_path / "ids.txt"
    for count, warned in ((1000, True), (1001, False)):
        file.write_text("".join(f"m{i}\n" for i in range(count)))
        code, out, err = command("publish", "--file", str(file))
        assert (code, out) == (0, f"published {count} to insighttag.posts\n")
        assert ("1000 of 1000 IDs" in err) is warned
    code, out, err = command("publish", "--file", str(file), "--check")
    assert (code, out) == (2, "")
    assert "1001 of 1001 IDs" in err
    command.queued()


def test_publish_from_standard_input(
    command: Command, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("p1\np2\n"))
    assert command("publish", "--file", "-")[:2] == (0, "published 2 to insighttag.posts\n")
    assert by_id(command) == [PostMessage("p1"), PostMessage("p2")]


def test_publish_untagged_leaves_out_results_and_jobs(command: Command, database: Database) -> None:
    database["posts"].insert_many(
        [
            {"_id": "new", "text": "x"},
            {"_id": "done", "insight": {"status": "tagged"}},
            {"_id": "stuck", "text": "x"},
        ]
    )
    database["jobs"].insert_one(dead("stuck", "extract", "NothingUsable"))
    assert command("publish", "--untagged")[1] == "published 1 to insighttag.posts\n"
    assert command.queued() == [PostMessage("new")]
    counts = command.json("status")["store"]["counts"]
    assert (counts["posts"], counts["tagged"], counts["jobs"]["dead"]) == (3, 1, 1)
    code, out, _ = command("status")
    assert code == 0
    assert "3 posts, 1 tagged" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["publish"], "--file"),
        (["publish", "a\nb"], "control character"),
        (["publish", "ok", "x" * 600], "600 bytes"),
        (["publish", "--file", "/nowhere/ids"], "/nowhere/ids: no such file"),
        (["publish", "--file", "/dev/null"], "--file /dev/null: holds no ID"),
        (["publish", "p", "--priority", "ten"], "--priority"),
        (["publish", "p", "--set", "broker.queu=x"], "broker.queu: unknown key"),
        (["publish", "p", "--set", "broker.url=http://h"], "broker.url"),
        (["status", "--nonsense"], "--nonsense"),
        (["frobnicate"], "No such"),
        (["show"], "ID"),
        (["dead", "drop"], "--all"),
        (["dead", "replay", "p1", "--all"], "not both"),
        (["dead", "list", "--since", "yesterday"], "--since yesterday"),
        (["tag", "/nowhere/post.json"], "/nowhere/post.json: no such data file"),
        # The default encoders have no weights here: they would be told first if they were loaded.
        (
            ["tag", "data/media/test-00000-0.jpg", "--bundle", "/nowhere"],
            "/nowhere: holds no bundle",
        ),
        (["tag", "file:///nowhere/a.jpg"], "give a plain path, without file://"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    folder: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], named: str
) -> None:
    code, out, err = Command(folder, capsys)(*words)
    assert (code, out) == (2, "")
    assert err.startswith("insighttag: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert named in err


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\x00"


def test_a_terminal_obeys_no_stored_text(command: Command, database: Database) -> None:
    """Every command that prints what strangers wrote shows its control characters as escapes."""
    failure = {"stage": "fetch", "type": "FetchRefused", "message": f"HTTP {HOSTILE}"}
    result = {
        **{"model": HOSTILE, "version": HOSTILE, "status": "tagged", "attempts": 1},
        "tags": [{"id": 3, "name": f"cat {HOSTILE}", "score": 0.9}],
        "modalities": {"video": "failed"},
        **{"failures": {"video": failure}, "error": failure},
        "tagged_at": datetime.now(timezone.utc),
    }
    post_id = f"p{HOSTILE}"
    database["posts"].insert_one({"_id": post_id, "labels": [HOSTILE], "insight": result})
    letter = {**dead(post_id, "fetch", HOSTILE), "last_error": failure, "payload": HOSTILE}
    database["jobs"].insert_one(letter)
    words = (["show", post_id], ["dead", "list"], ["dead", "show", post_id], ["status"])
    unknown = ([HOSTILE], ["show", HOSTILE], ["retag", "--file", HOSTILE.strip("\x00")])
    for line in (*words, *([*some, "--json"] for some in words), *unknown):
        code, out, err = command(*line)
        assert code == 0 or line in unknown, err
        said = out + err
        assert [c for c in said if not (c.isprintable() or c in "\n\t")] == [], line
        assert line[0] == "status" or re.search(r"\\(u00|x)1b\]0;owned", said), line
    assert command.json("show", post_id)["result"]["tags"][0]["name"] == f"cat {HOSTILE}"


ODD: list[Any] = [5, "x", [[{}]], {"a": 1}]


def test_results_and_jobs_of_any_shape_are_shown(command: Command, database: Database) -> None:
    """The platform may write there too, or an operator: no traceback, and the value is printed."""
    result = {
        **{"model": "m", "version": "1", "status": "tagged", "tags": [], "modalities": {}},
        **{"failures": {}, "error": None, "tagged_at": 1, "attempts": 1, "partial": False},
    }
    tag = {"id": 1, "name": "cat", "score": 0.5}
    results: list[Any] = [*ODD]
    for odd in ODD:
        results += [{**result, key: odd} for key in result]
        results += [{**result, "tags": [{**tag, key: odd}]} for key in tag]
        parts = ({"tags": [odd]}, {"modalities": {"video": odd}})
        results += [{**result, **part} for part in parts]
        results.append({**result, "modalities": {"video": "failed"}, "failures": {"video": odd}})
    letter = dead("j", "fetch", "FetchRefused")
    keys = [key for key in letter if key not in ("_id", "state")]
    letters = [{**letter, key: odd} for odd in [*ODD, 1e300, -1e12, True, None] for key in keys]
    database["posts"].insert_many([{"_id": f"r{n}", "insight": r} for n, r in enumerate(results)])
    database["jobs"].insert_many([{**each, "_id": f"j{n}"} for n, each in enumerate(letters)])
    for n in range(len(results)):
        assert command("show", f"r{n}", *(["--json"] if n % 5 == 0 else []))[0] == 0, results[n]
    for line in (["dead", "list"], ["dead", "list", "--json"], ["status"], ["show", "j9"]):
        code, out, err = command(*line)
        assert code == 0, err
        assert line[0] != "dead" or f"j{len(letters) - 1}" in out


def test_show_tells_tags_modalities_and_reasons(command: Command, database: Database) -> None:
    result = {
        "model": "demo",
        "version": "20260101T000000Z-abcdef12",
        "status": "tagged",
        "tags": [{"id": 3, "name": "猫 [cat]", "score": 0.91234}],
        "near_misses": [{"id": 1, "name": "dog", "score": 0.37, "threshold": 0.4}],
        "modalities": {"video": "failed", "text": "ok"},
        "failures": {"video": {"stage": "fetch", "type": "FetchRefused", "message": "HTTP 404"}},
        "error": None,
        "attempts": 2,
        "tagged_at": datetime.now(timezone.utc),
        "timings_ms": {"fetch": 10},
        "language": "zh",
    }
    media = ["http://u:secret@h/a.jpg"]
    database["posts"].insert_one(
        {"_id": "p1", "text": "a\ncat " * 99, "labels": ["猫"], "images": media, "insight": result}
    )
    bundle = command.settings.fusion.bundle
    bundle.mkdir()
    about = f"version: {result['version']}\nfeatures: {{}}\nthresholds:\n- 0.5\n- 0.3125\n"
    (bundle / "bundle.yaml").write_text(about)
    (bundle / "labels.json").write_text('{"0": "dog", "1": "猫 [cat]"}')
    code, out, _ = command("show", "p1")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["猫", "[cat]", "0.912", "0.312", "3"] in rows
    assert ["dog", "0.370", "0.400", "1"] in rows
    assert f"text      {('a cat ' * 99)[:300]} ...\n" in out
    for text in (
        "猫 [cat]",
        "0.912",
        "FetchRefused: HTTP 404",
        "demo 20260101T000000Z",
        "attempt 2",
        "language  zh",
    ):
        assert text in out
    content = command.json("show", "p1")
    assert content["result"]["tags"][0]["score"] == 0.91234
    assert content["media"] == ["image"]
    assert "secret" not in out + json.dumps(content)

    database["jobs"].insert_one(dead("gone", "load", "PostNotFound"))
    code, out, _ = command("show", "gone")
    assert code == 0
    assert "not in the database" in out
    assert "PostNotFound" in out
    code, _, err = command("show", "nobody")
    assert (code, err) == (2, "insighttag: show: post 'nobody' is not in the database\n")


def test_dead_letters_are_listed_shown_replayed_and_dropped(
    command: Command, database: Database
) -> None:
    database["jobs"].insert_many(
        [
            dead("a", "fetch", "FetchRefused"),
            dead("b", "fetch", "FetchRetryable", age_s=7200),
            dead("c", "extract", "NothingUsable"),
            {"_id": "d", "state": "waiting", "attempts": 1, "due_at": time.time() + 99},
        ]
    )

    def listed(*filters: str) -> list[str]:
        return sorted(letter["post_id"] for letter in command.json("dead", "list", *filters))

    assert listed() == ["a", "b", "c"]
    assert listed("--stage", "fetch") == ["a", "b"]
    assert listed("--type", "NothingUsable") == ["c"]
    assert listed("--since", "1h") == ["a", "c"]
    assert len(listed("--limit", "1")) == 1
    assert "because [of] it" in command("dead", "list")[1]
    assert command.json("dead", "show", "a")["error"]["type"] == "FetchRefused"
    assert "FetchRefused" in command("dead", "show", "a")[1]
    assert command("dead", "show", "d")[0] == 2

    code, out, _ = command("dead", "replay", "a", "d", "nobody")
    assert (code, out) == (2, "replayed 1\n")
    assert command.queued() == [PostMessage("a")]
    assert listed() == ["b", "c"]
    assert command("dead", "replay", "--stage", "fetch")[1] == "replayed 1\n"
    assert command("dead", "drop", "--all")[1] == "dropped 1\n"
    assert listed() == []
    jobs = {document["_id"]: document["state"] for document in database["jobs"].find()}
    assert jobs == {"a": "queued", "b": "queued", "d": "waiting"}


def test_status_says_what_cannot_be_reached(command: Command) -> None:
    """Broker and database down: exit 1, each said to be so, passwords hidden, within seconds."""
    down = ["--set", "broker.url=redis://:secret@127.0.0.1:1/0"]
    down += ["--set", "store.url=mongodb://user:secret@127.0.0.1:1/"]
    started = time.monotonic()
    code, out, err = command("status", *down)
    assert code == 1
    assert "refused" in out
    assert out.count("redis://") == 1
    assert out.count("mongodb://") == 1
    assert "mongodb://user:***@127.0.0.1:1/: no answer yet; waiting for it, at most 3 s" in err
    assert "secret" not in out + err
    content = json.loads(command("status", "--json", *down)[1])
    assert content["queue"]["depth"] is None
    assert content["queue"]["error"]
    assert content["store"]["error"]
    assert content["services"] is None
    assert time.monotonic() - started < 20
    code, _, err = command("publish", "p1", *down)
    assert code == 1
    assert "redis://:***@127.0.0.1:1/0" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "setting", ["broker.url=amqp://host:port/", "store.url=mongodb://user:secret@host:port/"]
)
def test_status_refuses_urls_that_no_service_can_have(command: Command, setting: str) -> None:
    """A malformed URL is a mistake in the settings, not a service that is down: exit 2."""
    code, _, err = command("status", "--set", setting)
    assert code == 2
    assert setting.partition("=")[0] in err
    assert "secret" not in err
    assert err.count("\n") == 1


def test_status_shows_the_king(command: Command) -> None:
    """A fresh health file is shown with its rates; a stale one is no running King."""
    health = command.settings.king.health_file
    content = {
        "pid": os.getpid(),
        "process": process_identity(os.getpid()),
        "updated_at": time.time(),
        "phase": "serving",
        "in_flight": 7,
        "oldest_in_flight_s": 1.5,
        "posts_per_s": 12.5,
        "counters": {"tagged": 99},
        "bundle": {"name": "demo", "version": "v1"},
        "workers": [{"name": "extract-0", "state": "ready", "held": 1}],
    }
    health.write_text(json.dumps(content))
    try:
        out = command("status")[1]
        for text in ("serving", "7 in flight", "12.5 posts/s", "99 tagged", "demo v1", "extract-0"):
            assert text in out
        assert command.json("status")["king"]["alive"] is True
        health.write_text(json.dumps({**content, "updated_at": time.time() - 60}))
        assert "not running" in command("status")[1]
        assert command.json("status")["king"]["alive"] is False
    finally:
        health.unlink()
    assert "no health file" in command("status")[1]


def test_services_start_status_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = Command(tmp_path, capsys)
    try:
        assert [s["state"] for s in command.json("services", "status")] == ["stopped"] * 2
        assert "insighttag services start" in command("status")[1]
        code, out, _ = command("services", "start")
        assert code == 0
        assert "redis\tunix://" in out
        assert "mongo\tmongodb://" in out
        assert [s["state"] for s in command.json("services", "status")] == ["running"] * 2
        assert "running" in command("services", "status")[1]
    finally:
        assert command("services", "stop")[1] == "stopped mongo, redis\n"
    assert command("services", "stop")[1] == "none was running\n"


def test_help_of_every_command_loads_no_model_library() -> None:
    """``--help`` is quick: no torch, cv2, transformers, kombu or pymongo."""
    heavy = {"torch", "cv2", "transformers", "timm", "av", "onnxruntime", "kombu", "pymongo"}
    commands = [[], ["publish"], ["tag"], ["status"], ["show"], ["dead"], ["dead", "list"]]
    program = (
        "import sys\nfrom scripts.cli import run\n"
        f"for words in {[[*c, '--help'] for c in commands]!r}:\n"
        "    assert run(words) == 0, words\n"
        f"loaded = {heavy!r} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    result = python("-c", program, timeout_s=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: insighttag") == len(commands)


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """A bare ``insighttag`` and a bare group are answered with what there is."""
    for words, told in (([], "Serving"), (["dead"], "Commands")):
        assert run(words) == 2
        out, err = capsys.readouterr()
        assert told in out + err
