"""`infer_net.py` into a MongoDB collection: the daemon's sub-document, in a real server."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient

from config.settings import CollectionSettings
from extractors.feature_file import write_features
from scripts.inference.collection import store_of
from tests.support.fusion import support
from tests.support.scripts import infer_rig as rig


def target(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}.tags"


def test_the_collection_holds_what_the_daemon_writes(
    tmp_path: Path, mongo_url: str, unique_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """New documents are made, the platform's updated whatever their ID's type; newer tags stay."""
    folder = rig.make(tmp_path, posts=10)
    entries: list[Any] = json.loads((folder / "posts.json").read_text())
    oid = ObjectId()
    for post_id in (str(oid), "77"):
        path = write_features(folder / "features", support.features(post_id), support.FINGERPRINTS)
        entries.append({"post_id": post_id, "features": str(path.relative_to(folder))})
    (folder / "posts.json").write_text(json.dumps(entries))
    client: MongoClient[dict[str, Any]] = MongoClient(mongo_url)
    posts = client[unique_name]["tags"]
    posts.insert_many([{"_id": oid, "text": "x"}, {"_id": 77}])
    newer = {"status": "tagged", "version": "99990101T000000Z-00000000"}
    posts.insert_one({"_id": "posts4", "insight": newer})
    try:
        options = ["--output", target(mongo_url, unique_name)]
        assert rig.infer(folder, *options) == 0
        assert "posts 12  labelled 10  gap" in capsys.readouterr().out
        assert rig.infer(folder, "--output", str(folder / "t.jsonl")) == 0
        stored = {document["_id"]: document for document in posts.find()}
        assert len(stored) == 12
        assert stored[oid]["text"] == "x"
        assert stored["posts4"]["insight"] == newer
        keys: dict[str, Any] = {str(oid): oid, "77": 77}
        for line in rig.lines(folder / "t.jsonl"):
            if line["post_id"] == "posts4":
                continue
            insight = stored[keys.get(line["post_id"], line["post_id"])]["insight"]
            assert isinstance(insight.pop("tagged_at"), datetime)
            assert insight.pop("attempts") == 1
            assert insight.pop("timings_ms") == {}
            assert insight == {key: line[key] for key in insight}
        assert not list((folder / "notes").glob("*.part*"))
        client.drop_database(unique_name)
        only = ["--set", "collection.insert=false"]
        assert rig.infer(folder, *options, *only) == 2
        assert re.search(r"post posts0: \S+ holds no such post", capsys.readouterr().err)
        posts.insert_one({"_id": "posts1"})
        assert rig.infer(folder, *options, *only, "--skip_bad") == 0
        assert "posts 1  labelled 1  skipped 11" in capsys.readouterr().out
        assert [d["_id"] for d in posts.find()] == ["posts1"]
    finally:
        client.drop_database(unique_name)
        client.close()


def test_a_post_that_stands_twice_in_a_batch(
    tmp_path: Path, mongo_url: str, unique_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rig.make(tmp_path, posts=3)
    entries: list[Any] = json.loads((folder / "posts.json").read_text())
    (folder / "posts.json").write_text(json.dumps([*entries, *entries[:2]]))
    options = ["--output", target(mongo_url, unique_name), "--set", "collection.insert=false"]
    client: MongoClient[dict[str, Any]] = MongoClient(mongo_url)
    posts = client[unique_name]["tags"]
    try:
        posts.insert_many([{"_id": "posts0"}, {"_id": "posts2"}])
        assert rig.infer(folder, *options, "--skip_bad") == 0
        assert "posts 3  labelled 3  skipped 2" in capsys.readouterr().out
        assert {d["_id"]: d["insight"]["status"] for d in posts.find()} == {
            "posts0": "tagged",
            "posts2": "tagged",
        }
        listed = [
            line["post_id"] for path in folder.rglob("*.skipped.jsonl") for line in rig.lines(path)
        ]
        assert listed == ["posts1", "posts1"]
    finally:
        client.drop_database(unique_name)
        client.close()


def test_a_lost_database_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rig.make(tmp_path, posts=3)
    url = "mongodb://me:secret@127.0.0.1:1/db.tags"
    assert rig.infer(folder, "--output", url, "--set", "collection.timeout_s=0.5") == 1
    said = capsys.readouterr().err
    assert "127.0.0.1:1" in said
    assert "the same command continues" in said
    assert "secret" not in said
    assert len(said.splitlines()) == 1


def test_urls_name_database_and_collection() -> None:
    """With users, options, and dots in the collection's name."""
    settings = CollectionSettings(id="key", result_path="a.b")
    store = store_of("mongodb://u:p%2F@h:1,h2:2/db.posts.2026?authSource=admin", settings)
    assert store.url == "mongodb://u:p%2F@h:1,h2:2/db?authSource=admin"
    assert (store.database, store.collection) == ("db", "posts.2026")
    assert (store.fields.id, store.result_path) == ("key", "a.b")
