"""``insighttag retag`` and ``insighttag cache``, against real embedded services."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import ObjectId

from config.load import load_settings
from config.settings import CacheSettings
from deploy import embedded
from scripts.cli import run
from tests.support.scripts.command import Command
from workers.cache.store import open_store

OLD, NOW, NEXT = (f"2026010{day}T000000Z-00000000" for day in (1, 2, 3))


def insert(command: Command, documents: list[dict[str, Any]]) -> None:
    store = embedded.resolve(command.settings).store
    with pymongo.MongoClient[dict[str, Any]](store.url) as client:
        client[store.database][store.collection].insert_many(documents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("retag")
    yield made
    embedded.stop(load_settings(None, [f"embedded.folder={made / 'embedded'}"]))


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str], unique_name: str) -> Command:
    (folder / "bundle").mkdir(exist_ok=True)
    (folder / "bundle" / "bundle.yaml").write_text(f"version: {NOW}\nfeatures: {{}}\n")
    queue, store = {"queue": f"{unique_name}.posts"}, {"database": unique_name}
    made = Command(folder, capsys, broker=queue, store=store)
    versions = {"new": NEXT, "same": NOW, "old": OLD, "older": OLD}
    documents: list[dict[str, Any]] = [
        {"_id": name, "text": name[0], "insight": {"status": "tagged", "version": version}}
        for name, version in versions.items()
    ]
    for document in documents[::2]:  # new and old
        document["insight"]["partial"] = True
    documents[1]["insight"]["rules"] = "00000000"  # same
    insert(made, [*documents, {"_id": "untagged", "text": "u"}])
    return made


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--all"], {"new", "same", "old", "older", "untagged"}),
        (["--bundle-older-than", "current"], {"old", "older"}),
        (["--bundle-older-than", NEXT], {"same", "old", "older"}),
        (["--query", '{"text": "o"}'], {"old", "older"}),
        (["--query", '{"_id": "same"}', "--bundle-older-than", "current"], set()),
        (["--partial"], {"new", "old"}),
        (["--partial", "--bundle-older-than", "current"], {"old"}),
        (["--partial", "--query", '{"_id": "new"}'], {"new"}),
        (["--query", '{"_id": "old"}', "--bundle-older-than", "current"], {"old"}),
        (["--other-rules"], {"same"}),
        (["--other-rules", "--set", "fusion.min_tags=1"], {"new", "same", "old", "older"}),
    ],
)
def test_which_posts(command: Command, words: list[str], expected: set[str]) -> None:
    """Each way to choose publishes these posts, by force, and tells how many."""
    code, out, _ = command("retag", *words, "--priority", "3")
    assert (code, out) == (
        0,
        f"retagging {len(expected)} posts through {command.settings.broker.queue}\n",
    )
    messages = command.queued()
    assert {message.post_id for message in messages} == expected
    assert all(message.force and message.priority == 3 for message in messages)


def test_query_in_extended_json(command: Command) -> None:
    """The types that JSON lacks are written as for pull_posts."""
    object_id = ObjectId()
    insert(command, [{"_id": object_id, "text": "x"}])
    query = json.dumps({"_id": {"$oid": str(object_id)}})
    assert "retagging 1 posts" in command("retag", "--query", query)[1]
    assert [message.post_id for message in command.queued()] == [str(object_id)]


def test_from_a_file(command: Command, tmp_path: Path) -> None:
    """IDs of a file, in their order, those that are there and match; at most so many."""
    file = tmp_path / "ids"
    file.write_text("older\nabsent\nnew\nold\n")
    older = ["--bundle-older-than", "current"]
    code, out, err = command("retag", "--file", str(file), *older)
    assert (code, out.split()[:2]) == (0, ["retagging", "2"])
    where = f"{command.settings.store.database}.posts"
    assert err.startswith(f"insighttag: retag: not in {where}: 'absent'\n")
    assert [message.post_id for message in command.queued()] == ["older", "old"]
    assert command("retag", "--file", str(file), "--limit", "2")[0] == 0
    assert [message.post_id for message in command.queued()] == ["older", "new"]


def test_limit_of_many(command: Command) -> None:
    """A thousand posts stream through; with a limit only so many."""
    insert(command, [{"_id": f"m{i}", "text": "many"} for i in range(1000)])
    query = ["--query", '{"text": "many"}']
    assert "retagging 700 posts" in command("retag", *query, "--limit", "700")[1]
    assert len(command.queued()) == 700


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "name --query JSON"),
        (["--all", "--query", "{}"], "exclude one another"),
        (["--query", "{text: 1}"], "--query: not JSON"),
        (["--query", "[1]"], "must be an object"),
        (["--query", '{"_id": {"$oid": "x"}}'], "--query: not JSON"),
        (["--query", '{"n": 99999999999999999999999}'], "--query: not a query for MongoDB"),
        (["--file", "/nowhere/ids"], "no such file"),
        (["--all", "--set", "fusion.bundle=/nowhere", "--bundle-older-than", "current"], "bundle"),
    ],
)
def test_mistakes(command: Command, words: list[str], reason: str) -> None:
    """A mistake is one line, exit 2, and nothing is published."""
    code, out, err = command("retag", *words)
    assert code == 2
    assert reason in err
    assert err.count("\n") == 1
    assert out == ""


def test_cache_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`stats` counts, `prune` and `clear` delete; a cache that is not set is a mistake."""
    place = tmp_path / "cache"
    words = ["--set", f"cache.url={place}"]
    store = open_store(CacheSettings(url=str(place)))
    for i in range(4):
        store.put(hashlib.sha256(bytes([i])).hexdigest(), bytes(1 << 20))
    assert run(["cache", "stats", "--json", *words]) == 0
    assert '"entries": 4' in capsys.readouterr().out
    assert run(["cache", "prune", "--max-mb", "1", *words]) == 0
    assert capsys.readouterr().out == "deleted 3 entries, 3.0 MiB\n"
    assert run(["cache", "clear", "--yes", *words]) == 0
    assert capsys.readouterr().out == "deleted 1 entries, 1.0 MiB\n"
    assert run(["cache", "stats"]) == 2
    assert "cache.url" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(["cache", "stats", "--set", f"cache.url={tmp_path / 'file'}"]) == 2
    assert capsys.readouterr().err.endswith("file: is not a folder\n")
    assert run(["cache", "stats", "--set", "cache.url=nonsense://x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
