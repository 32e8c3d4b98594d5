"""Tags by their texts, with the commands as they are started: a bundle, the daemon, more tags."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.post import Features, Post
from config.features import FeatureSettings
from config.settings import BrokerSettings, Settings
from extractors.feature_file import write_features
from extractors.suite import ExtractorSuite
from fusion.bundle.bundle import load_bundle
from fusion.infer.inferer import Inferer
from king.broker.connect import publish_posts
from king.messages import PostMessage
from king.store.client import StoreClient
from scripts import cli
from tests.support.king.store_rig import mongo_settings
from tests.support.processes import python
from tests.support.services import MongoServer, RedisServer
from tests.support.tiny_models import tiny_features
from workers.local import local_runner


def tag_file(folder: Path, *tags: Any) -> str:
    path = folder / "tags.yaml"
    path.write_text(yaml.safe_dump({"templates": ["{}"], "tags": list(tags)}), encoding="utf-8")
    return str(path)


def settings_file(folder: Path, **sections: Any) -> Path:
    """Small random encoders; the text's gives one vector a text, and the picture's embeds none."""
    features = tiny_features().model_dump(mode="json")
    features["text"] |= {"pooling": "mean"}
    features["ocr"]["enabled"] = False
    path = folder / "settings.yaml"
    content = {"features": features, "log": {"format": "json"}, **sections}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def labelled_posts(folder: Path, features: FeatureSettings) -> str:
    """Posts on two subjects and others, with their features; random encoders are poor judges."""
    subjects = {"winter sports": "winter sports", "cats": "a kitten", "": "nothing of it"}
    suite = ExtractorSuite(features, names=("text",))
    suite.load()
    entries = []
    for i in range(30):
        label, text = list(subjects.items())[i % 3]
        [row] = suite.run("text", [f"{text} {i}"])
        path = write_features(
            folder / "f", Features(f"p{i}", {"text": row}, {}), suite.fingerprints
        )
        labels = [label] if label else []
        entries.append({"post_id": f"p{i}", "labels": labels, "features": str(path)})
    suite.close()
    file = folder / "posts.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return str(file)


@pytest.fixture
def config(
    tmp_path: Path,
    redis_server: RedisServer,
    mongo_server: MongoServer,
    unique_name: str,
    queue_name: str,
) -> Path:
    return settings_file(
        tmp_path,
        broker=BrokerSettings(url=redis_server.url, queue=queue_name).model_dump(mode="json"),
        store=mongo_settings(mongo_server.url, unique_name).model_dump(mode="json"),
        fetch={"spool": str(tmp_path / "spool")},
        decode={"processes": 1},
        fusion={"bundle": str(tmp_path / "bundle")},
        workers={"slots": 2, "extractors": [{"threads": 1}]},
        king={"health_file": str(tmp_path / "king.json")},
    )


@pytest.mark.redis
@pytest.mark.slow
def test_the_daemon_tags_by_texts_alone(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tags that no post was ever given, and after `bundle add-tags` one more."""
    settings = Settings.model_validate(yaml.safe_load(config.read_text()))
    tags = tag_file(tmp_path, "winter sports", {"name": "cats", "synonyms": ["a kitten"]})
    made = ["zeroshot", "--tags", tags, "--out", str(tmp_path / "bundle"), "--config", str(config)]
    assert cli.run([*made, "--labels", labelled_posts(tmp_path, settings.features)]) == 0
    said = capsys.readouterr()
    assert "2 tags by text, ocr" in said.out
    assert "image takes no part: features.image.arch" in said.err

    client = StoreClient(settings.store)
    client.posts.insert_many(
        [{"_id": "w", "text": "winter sports"}, {"_id": "k", "text": "a kitten"}]
    )

    publish_posts(settings.broker, [PostMessage("w"), PostMessage("k")])
    done = python("online_process.py", "--config", str(config), "--drain", timeout_s=180)
    assert done.returncode == 0, done.stderr[-3000:]
    insights = {p["_id"]: p["insight"] for p in client.posts.find()}
    tags_of = {key: [tag["name"] for tag in of["tags"]] for key, of in insights.items()}
    assert tags_of == {"w": ["winter sports"], "k": ["cats"]}
    client.close()

    more = tag_file(tmp_path, {"name": "volcano", "descriptions": ["volcano in Iceland"]})
    grow = ["bundle", "add-tags", str(tmp_path / "bundle"), "--tags", more]
    assert cli.run([*grow, "--out", str(tmp_path / "bundle"), "--config", str(config)]) == 0
    assert load_bundle(tmp_path / "bundle").labels.names == ("winter sports", "cats", "volcano")
    with local_runner(settings) as runner:
        tags_of_more = runner.run(Post("v", "volcano in Iceland")).tags
    # Random vectors may bring others along.
    assert "volcano" in [tag.name for tag in tags_of_more.tags]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings_file(tmp_path)
    out = str(tmp_path / "b")

    def complaint(*arguments: str) -> str:
        assert cli.run([*arguments, "--out", out, "--config", str(config)]) == 2
        # The log of the encoders is JSON, a line each.
        lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("{")]
        assert len(lines) == 1, lines
        return lines[0]

    def refused(content: Any, text: str) -> None:
        path = tmp_path / "t.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        assert text in complaint("zeroshot", "--tags", str(path))

    refused({"tags": []}, "t.yaml: tags: ")
    refused({"tags": ["a", "a"]}, "tags: 'a' appears twice")
    refused({"tags": [{"name": "a", "synonym": ["b"]}]}, "tags.0.synonym: unknown key")
    refused({"tags": [{"name": " "}]}, "tags.0.name: must not be empty")
    refused({"tags": ["a"], "templates": ["about"]}, "templates.0: must hold {} once")
    assert "no such file" in complaint("zeroshot", "--tags", "gone.yaml")
    tags = tag_file(tmp_path, "a", "b")
    whole = ["--set", "features.text.pooling=tokens"]
    assert "features.text.pooling: tokens gives no vector" in complaint(
        "zeroshot", "--tags", tags, *whole
    )
    assert not Path(out).exists()
    notes = Path(out) / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for command in (("zeroshot",), ("bundle", "add-tags", str(tmp_path / "none"))):
        mine = complaint(*command, "--tags", tags)
        assert f"--out: {out} holds something that is not a bundle" in mine
    assert notes.read_text() == "mine"
    notes.unlink()

    assert cli.run(["zeroshot", "--tags", tags, "--out", out, "--config", str(config)]) == 0
    capsys.readouterr()
    assert "'a' is in the bundle already" in complaint("bundle", "add-tags", out, "--tags", tags)
    more = tag_file(tmp_path, "c")
    other = ["--set", "features.text.weights=random:9"]
    wrong = complaint("bundle", "add-tags", out, "--tags", more, *other)
    assert "modality text: the bundle needs" in wrong
    assert Inferer.load(Path(out)).labels.names == ("a", "b")
    assert json.loads((Path(out) / "labels.json").read_text()) == {"0": "a", "1": "b"}
