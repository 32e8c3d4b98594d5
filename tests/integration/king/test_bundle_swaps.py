"""The life of a bundle in a daemon that tags posts: swaps, a trial, what is refused, the way back.

One daemon serves all tests, as it is started, with the small text extractor; its bundles give other
scores for the same post, so that a mix of two would be seen.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.files import new_folder
from common.post import Features
from config.settings import BrokerSettings, Settings
from extractors.suite import ExtractorSuite
from fusion.bundle.folder import newest_version
from fusion.infer.inferer import Inferer
from king.broker.connect import open_broker, publish_posts
from king.messages import PostMessage
from king.status import read_health
from king.store.client import StoreClient
from king.store.store import Store
from scripts.cli import run
from tests.support.king.store_rig import mongo_settings
from tests.support.processes import ROOT
from tests.support.services import MongoServer, RedisServer, wait_until
from tests.support.tiny_models import tiny_features
from tests.support.workers.driving import PATIENCE_S, toy_settings
from tests.support.workers.small_bundle import write_bundle

pytestmark = [pytest.mark.redis, pytest.mark.slow]

SWAPS = 20
POSTS = 1_000
TEXTS = ("a cat", "a dog in the sea", "三只猫", "the old town", "bells")
NAMES = [f"b{i}" for i in range(SWAPS + 1)]


class Daemon:
    """A daemon in a process of its own, its bundles, and what it has said.

    Attributes:
        scores: Bundle -> text -> the scores of its tags by name.
        suite: The extractors of the daemon, in this process.
    """

    def __init__(self, folder: Path, settings: Settings, suite: ExtractorSuite) -> None:
        self.folder, self.settings, self.suite = folder, settings, suite
        self.store = Store(StoreClient(settings.store))
        self.served = settings.fusion.bundle
        self.scores: dict[str, dict[str, dict[str, float]]] = {}
        self._log = folder / "log"
        self._number = 0

    def bundle(self, name: str, seed: int, **changes: Any) -> Path:
        """Write a bundle, and note what it says of each text."""
        folder = self.folder / "bundles" / name
        write_bundle(
            folder, self.suite, seed=seed, name=name, threshold=0.0, model="concat_se", **changes
        )
        if not changes:
            with closing(Inferer.load(folder)) as inferer:
                arrays = self.suite.run("text", list(TEXTS))
                made = [Features("p", {"text": array}, {"text": "ok"}) for array in arrays]
                self.scores[name] = {
                    text: {tag.name: tag.score for tag in tags.tags}
                    for text, tags in zip(TEXTS, inferer.predict(made), strict=True)
                }
        return folder

    def start(self) -> subprocess.Popen[bytes]:
        config = self.folder / "config.yaml"
        config.write_text(json.dumps(self.settings.model_dump(mode="json")), encoding="utf-8")
        with self._log.open("wb") as log:
            words = ["online_process.py", "--config", str(config)]
            return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log)

    def command(self, *words: str) -> int:
        """Run ``insighttag bundle`` with the daemon's settings."""
        return run(["bundle", *words, "--config", str(self.folder / "config.yaml")])

    def put(self, bundle: Path) -> None:
        """Put a folder in the place of the bundle that is served, whatever it holds."""
        with new_folder(self.served) as part:
            shutil.copytree(bundle, part, dirs_exist_ok=True)

    def said(self, event: str) -> list[dict[str, Any]]:
        lines = self._log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if f'"{event}"' in line]

    def until(self, done: Callable[[], Any], what: str) -> None:
        wait_until(done, PATIENCE_S, what)

    def until_served(self, name: str, version: str | None = None) -> None:
        version = version or newest_version(self.served)
        self.until(
            lambda: any(
                (line["name"], line["version"]) == (name, version)
                for line in self.said("king.bundle_changed")
            ),
            f"{name} {version}",
        )

    @property
    def health(self) -> dict[str, Any]:
        return read_health(self.settings.king.health_file) or {}

    def publish(self, count: int) -> list[str]:
        ids = [f"p{self._number + i:05}" for i in range(count)]
        texts = [TEXTS[(self._number + i) % len(TEXTS)] for i in range(count)]
        self._number += count
        posts = [{"_id": i, "text": text} for i, text in zip(ids, texts, strict=True)]
        self.store.client.posts.insert_many(posts)
        publish_posts(self.settings.broker, [PostMessage(i) for i in ids])
        return ids

    def tagged(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        named = {"_id": {"$in": list(ids)}}
        done = {**named, "insight.status": "tagged"}
        posts = self.store.client.posts
        self.until(lambda: posts.count_documents(done) == len(ids), f"{len(ids)} posts")
        return list(posts.find(named))

    def says(self, result: dict[str, Any], text: str) -> list[str]:
        """Return the bundles that give these scores to a text."""
        tags = {tag["name"]: tag["score"] for tag in result["tags"]}
        return [
            name
            for name, scores in self.scores.items()
            if tags.keys() == scores[text].keys()
            and all(math.isclose(tags[tag], scores[text][tag], abs_tol=1e-4) for tag in tags)
        ]


@pytest.fixture(scope="module")
def daemon(
    _redis_session: RedisServer,
    _mongo_session: MongoServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("swaps")
    for server in (_redis_session, _mongo_session):
        server.resume()
        server.start()
    features = tiny_features()
    settings = toy_settings(
        folder / "spool",
        features=features.model_dump(),
        fusion={"bundle": str(folder / "served"), "reload_s": 0.05},
        workers={"slots": 4, "extractors": [{"threads": 1}]},
        broker=BrokerSettings(url=_redis_session.url, queue=folder.name, prefetch=64).model_dump(),
        store=mongo_settings(_mongo_session.url, "swaps").model_dump(),
        king={"health_file": str(folder / "king.json")},
        log={"format": "json", "level": "info"},
    )
    with closing(ExtractorSuite(features, threads=1)) as suite:
        suite.load()
        daemon = Daemon(folder, settings, suite)
        for seed, name in enumerate(NAMES):
            daemon.bundle(name, seed)
        daemon.put(folder / "bundles" / NAMES[0])
        child = daemon.start()
        try:
            daemon.until(lambda: daemon.said("king.workers_ready") or child.poll(), "the workers")
            assert child.poll() is None, daemon.folder.joinpath("log").read_text()[-3000:]
            yield daemon
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
            daemon.store.close()


def test_each_post_has_the_tags_of_one_bundle_while_bundles_are_swapped(daemon: Daemon) -> None:
    """A bundle on trial has a document of its own, and changes nothing."""
    assert daemon.command("shadow", str(daemon.bundle("trial", 99))) == 0
    daemon.until(lambda: daemon.said("workers.bundle_swapped"), "the trial")
    ids = daemon.publish(POSTS - 40 * SWAPS)
    for name in NAMES[1:]:
        ids += daemon.publish(40)
        assert daemon.command("use", str(daemon.folder / "bundles" / name)) == 0
        daemon.until_served(name)
    posts = daemon.tagged(ids)
    assert len(posts) == POSTS
    mixed = [p for p in posts if daemon.says(p["insight"], p["text"]) != [p["insight"]["model"]]]
    assert mixed == []
    versions: dict[str, set[str]] = {}
    for post in posts:
        versions.setdefault(post["insight"]["model"], set()).add(post["insight"]["version"])
    assert all(len(each) == 1 for each in versions.values()), versions
    assert len(versions) > SWAPS / 2
    assert {post["insight"]["attempts"] for post in posts} == {1}
    assert set(Counter(line["post_id"] for line in daemon.said("king.post_tagged")).values()) == {1}
    tried = [post for post in posts if "insight_shadow" in post]
    assert len(tried) > POSTS / 2  # a batch that was slow is followed by a rest
    assert all(daemon.says(p["insight_shadow"], p["text"]) == ["trial"] for p in tried)
    broker = open_broker(daemon.settings.broker)
    broker.connect()
    with closing(broker):
        daemon.until(lambda: not broker.depth(), "the acknowledgements")
    assert daemon.store.queries.counts()["jobs"]["dead"] == 0
    assert daemon.command("compare") == 0
    assert daemon.command("shadow", "--off") == 0


def cut(bundle: Path) -> None:
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_yaml(bundle: Path) -> None:
    (bundle / "bundle.yaml").write_text("format: [1\n", encoding="utf-8")


def other_features(bundle: Path) -> None:
    about = bundle / "bundle.yaml"
    lines = about.read_text("utf-8").splitlines()
    lines = ["    fingerprint: of-others" if "  fingerprint: " in line else line for line in lines]
    about.write_text("\n".join(lines), encoding="utf-8")


def no_labels(bundle: Path) -> None:
    (bundle / "labels.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "model.safetensors: is truncated, or not this bundle's"),
        (no_yaml, "bundle.yaml: cannot be read"),
        (other_features, "the bundle needs of-others, the extractors give"),
        (no_labels, "labels.json: is missing"),
    ],
)
def test_a_broken_bundle_is_refused_in_one_line_and_the_old_one_serves_on(
    daemon: Daemon, damage: Callable[[Path], None], reason: str
) -> None:
    before = newest_version(daemon.served)
    good = daemon.folder / f"good-{damage.__name__}"
    shutil.copytree(daemon.served, good)
    broken = daemon.folder / f"broken-{damage.__name__}"
    shutil.copytree(daemon.folder / "bundles" / NAMES[0], broken)
    damage(broken)
    refusals = len(daemon.said("workers.bundle_refused"))
    daemon.put(broken)
    daemon.until(lambda: daemon.health.get("bundle_refused"), "the refusal")
    assert reason in daemon.health["bundle_refused"]
    assert daemon.health["bundle"]["version"] == before
    [post] = daemon.tagged(daemon.publish(1))
    assert post["insight"]["version"] == before
    [line] = daemon.said("workers.bundle_refused")[refusals:]
    assert reason in line["reason"]
    assert line["serving"] == [post["insight"]["model"], before]
    daemon.put(good)
    daemon.until(lambda: daemon.health.get("bundle_refused") is None, "the good one")
    if damage is not no_labels:  # the commands refuse it themselves
        assert daemon.command("shadow", str(broken)) == 2


def test_a_trial_for_other_features_is_one_line_and_posts_are_tagged(daemon: Daemon) -> None:
    trial = daemon.bundle(
        "foreign", 7, fingerprints={**daemon.suite.fingerprints, "text": "theirs"}
    )
    assert daemon.command("shadow", str(trial)) == 2
    assert daemon.command("shadow", str(trial), "--other-features") == 0
    daemon.until(lambda: daemon.health.get("shadow_refused"), "the refusal")
    assert "modality text: the bundle needs theirs" in daemon.health["shadow_refused"]
    assert not any("insight_shadow" in post for post in daemon.tagged(daemon.publish(20)))
    assert len([x for x in daemon.said("workers.bundle_refused") if x["bundle"] == "shadow"]) == 1
    assert daemon.command("shadow", "--off") == 0
    daemon.until(lambda: daemon.health.get("shadow_refused") is None, "the end of the trial")


def test_a_trial_that_fails_costs_only_its_own_tags(daemon: Daemon) -> None:
    """Here it takes features of another length under the same fingerprint."""
    trial = daemon.bundle("failing", 8, dims={**daemon.suite.dims, "text": 7})
    assert daemon.command("shadow", str(trial)) == 0
    daemon.until(lambda: (daemon.health.get("shadow") or {}).get("name") == "failing", "the trial")
    posts = daemon.tagged(daemon.publish(20))
    assert not any("insight_shadow" in post for post in posts)
    assert all(daemon.says(p["insight"], p["text"]) == [p["insight"]["model"]] for p in posts)
    assert "the model takes (n, 7)" in daemon.said("workers.shadow_failed")[0]["reason"]
    assert daemon.command("shadow", "--off") == 0
    daemon.until(lambda: daemon.health.get("shadow") is None, "the end of the trial")


def test_the_bundle_before_is_back_within_a_second(daemon: Daemon) -> None:
    took = []
    for name in ("b3", "b4", "b3"):
        # A version of its own for each, since what was served last is what comes back.
        assert daemon.command("use", str(daemon.folder / "bundles" / name)) == 0
        daemon.until_served(name)
        assert daemon.command("use", str(daemon.folder / "bundles" / "b5")) == 0
        daemon.until_served("b5")
        began = time.monotonic()
        assert daemon.command("rollback") == 0
        took.append(time.monotonic() - began)
        daemon.until_served(name)
        [post] = daemon.tagged(daemon.publish(1))
        assert daemon.says(post["insight"], post["text"]) == [name]
        assert post["insight"]["version"] == newest_version(daemon.served)
    assert min(took) < 1


def test_a_trial_ends_when_the_fusion_worker_dies(daemon: Daemon) -> None:
    """Posts must not die of a bundle that nobody is served by, again and again."""
    assert daemon.command("shadow", str(daemon.folder / "bundles" / "trial")) == 0
    daemon.until(lambda: daemon.health.get("shadow"), "the trial")
    [worker] = [each for each in daemon.health["workers"] if each["role"] == "fuse"]
    os.kill(worker["pid"], signal.SIGKILL)
    daemon.until(lambda: daemon.health.get("shadow_refused"), "the end of the trial")
    assert "restart the daemon" in daemon.health["shadow_refused"]
    [post] = daemon.tagged(daemon.publish(1))
    assert daemon.says(post["insight"], post["text"]) == [post["insight"]["model"]]
    assert "insight_shadow" not in post
