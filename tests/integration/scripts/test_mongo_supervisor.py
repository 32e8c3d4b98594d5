"""The monitor's command on real servers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from config.settings import MonitorSettings, Settings
from king.broker.connect import queue_depth
from king.jobs import Job
from king.store.client import StoreClient
from king.store.store import Store
from scripts.mongo_supervisor import check
from scripts.mongo_supervisor.snapshot import look
from tests.support.services import MongoServer, RedisServer


class Place:
    """A database and a queue of this test alone, and a settings file that names them."""

    def __init__(self, folder: Path, name: str, redis: RedisServer, mongo: MongoServer) -> None:
        self.file = folder / "settings.yaml"
        content = {
            "broker": {"url": redis.url, "queue": f"{name}.posts", "socket_timeout_s": 1},
            "store": {"url": mongo.url, "database": name, "timeout_s": 2},
            "embedded": {"folder": str(folder / "embedded")},
            "log": {"format": "json"},
        }
        self.file.write_text(json.dumps(content))
        self.settings = Settings.model_validate(content)
        self.store = Store(StoreClient(self.settings.store))

    def post(self, post_id: Any, **fields: Any) -> None:
        self.store.client.posts.insert_one({"_id": post_id, **fields})

    def result(self, post_id: Any, status: str, age_s: float) -> None:
        """Write a result as the King does."""
        tagged_at = datetime.now(timezone.utc) - timedelta(seconds=age_s)
        content = {"status": status, "tagged_at": tagged_at}
        self.store.client.posts.update_one({"_id": post_id}, {"$set": {"insight": content}})

    def run(self, *options: str) -> int:
        """The command; gives its exit code."""
        return check.main(["--config", str(self.file), *options])


@pytest.fixture
def place(
    tmp_path: Path, unique_name: str, redis_server: RedisServer, mongo_server: MongoServer
) -> Iterator[Place]:
    made = Place(tmp_path, unique_name, redis_server, mongo_server)
    yield made
    made.store.close()


def test_facts_of_a_real_database(place: Place) -> None:
    """Ages from ObjectIds, counts of results and jobs, latency, depth; no set on a plain server."""
    old = ObjectId.from_datetime(datetime.now(timezone.utc) - timedelta(hours=2))
    for post_id in (old, ObjectId(), "no-time", "t1", "t2", "f1"):
        place.post(post_id, text="words")
    place.result("t1", "tagged", 40)
    place.result("t2", "tagged", 7200)
    place.result("f1", "failed", 5)
    now = time.time()
    jobs = [
        Job("f1", "dead"),
        Job("w1", "waiting", due_at=now + 99),
        Job("w2", "waiting", due_at=now - 10),
        Job("w3", "running", due_at=now - 500),
    ]
    place.store.client.jobs.insert_many([job.as_document() for job in jobs])
    seen: Any = look(place.settings)
    assert seen.errors == {}
    assert seen.latency_s is not None
    assert seen.latency_s < 1
    assert seen.replicas is None
    assert (seen.backlog.untagged, seen.backlog.old, seen.backlog.ageless) == (3, 1, 1)
    assert seen.backlog.oldest_s == pytest.approx(7200, abs=30)
    assert (seen.results.tagged, seen.results.failed) == (1, 1)
    assert seen.results.last_tag_s == pytest.approx(40, abs=20)
    assert seen.jobs.states == {"running": 1, "waiting": 2, "queued": 0, "dead": 1}
    assert (seen.jobs.due, seen.jobs.overdue) == (2, 1)
    assert seen.queue_depth == 0


def test_ages_can_come_from_a_field_and_a_look_is_bounded(place: Place) -> None:
    """`store.fields.created` names the time; past `scan` posts it says "at least"."""
    for i in range(12):
        place.post(f"p{i}", meta={"at": datetime.now(timezone.utc) - timedelta(hours=1 + i)})
    fields = place.settings.store.fields.model_copy(update={"created": "meta.at"})
    store = place.settings.store.model_copy(update={"fields": fields})
    settings = place.settings.model_copy(update={"store": store})
    backlog = look(settings).backlog
    assert backlog is not None
    assert (backlog.old, backlog.ageless, backlog.complete) == (12, 0, True)
    backlog = look(settings.model_copy(update={"monitor": MonitorSettings(scan=10)})).backlog
    assert backlog is not None
    assert (backlog.untagged, backlog.old, backlog.complete) == (10, 10, False)


def test_options_move_the_thresholds(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code follows; the first line is the plugin's, and the table has every check."""
    for i in range(3):
        place.post(f"p{i}")
    assert place.run() == 0
    first, _, table = capsys.readouterr().out.partition("\n")
    assert first.startswith("OK: 7 checks | database=")
    assert "3 have no known age: set store.fields.created" in table
    assert place.run("--older-than", "0s", "--warning", "backlog=3") == 1
    assert capsys.readouterr().out.startswith("WARNING: backlog: 3 untagged")
    assert place.run("--older-than", "0s", "--critical", "backlog=3") == 2
    assert place.run("--set", "monitor.queue_depth.critical=0") == 2


def test_json_is_one_document(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """State, summary, and each check with value and thresholds."""
    assert place.run("--json", "--window", "2h", "--critical", "queue_depth=0") == 2
    content = json.loads(capsys.readouterr().out)
    assert content["state"] == "critical"
    assert content["checks"]["queue_depth"] == {
        "state": "critical",
        "value": 0,
        "text": "0 messages wait",
        "warning": 10_000,
        "critical": 0,
    }
    assert "last 2 h" in content["checks"]["failed_ratio"]["text"]
    assert content["requeued"] is None


def test_servers_that_are_down_are_critical(
    place: Place,
    mongo_server: MongoServer,
    redis_server: RedisServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mongo_server.kill()
    redis_server.pause()
    began = time.monotonic()
    try:
        assert place.run("--json") == 2
    finally:
        redis_server.resume()
        mongo_server.start()
    assert time.monotonic() - began < 12
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {name: each["state"] for name, each in checks.items()} == {
        "database": "critical",
        "queue_depth": "critical",
    }
    assert "127.0.0.1" in checks["database"]["text"]


def test_embedded_services_stay_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A monitor changes nothing."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"embedded: {{folder: {tmp_path / 'embedded'}}}")
    assert check.main(["--config", str(file), "--requeue"]) == 2
    assert "not requeued: the embedded service is not running" in capsys.readouterr().err
    assert check.main(["--config", str(file)]) == 2
    assert capsys.readouterr().out.count("insighttag services start") >= 2
    assert not (tmp_path / "embedded").exists()


def test_requeue_publishes_what_is_lost(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how many, and leaves what is tagged, failed, waiting or dead."""
    for post_id in ("a", "b", "tagged", "waiting", "dead"):
        place.post(post_id)
    place.result("tagged", "tagged", 1)
    jobs = [Job("waiting", "waiting", due_at=time.time() + 99), Job("dead", "dead")]
    place.store.client.jobs.insert_many([job.as_document() for job in jobs])
    assert place.run("--requeue") == 0
    assert f"requeued 2 posts to {place.settings.broker.queue}" in capsys.readouterr().out
    assert queue_depth(place.settings.broker) == 2
    assert place.run("--requeue", "--json") == 0
    assert json.loads(capsys.readouterr().out)["requeued"] == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--warning", "backlog"], "--warning backlog: write it as NAME=VALUE"),
        (["--critical", "bogus=1"], "--critical bogus=1"),
        (["--warning", "backlog=many"], "monitor.backlog.warning"),
        (["--older-than", "soon"], "soon: write a time as 90s"),
        (["--set", "monitor.bogus=1"], "monitor.bogus: unknown key"),
        (["--config", "absent.yaml"], "absent.yaml: no such file"),
        (["--bogus"], "--bogus"),
        (["--watch", "0"], "--watch 0: takes seconds above 0"),
        (["--watch", "1", "--requeue"], "goes without --requeue"),
    ],
)
def test_wrong_options_are_unknown_not_critical(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 3 and one line: an alarm about the database would be wrong."""
    (tmp_path / "empty.yaml").write_text("{}")
    assert check.main(["--config", str(tmp_path / "empty.yaml"), *options]) == 3
    out = capsys.readouterr().out
    assert out.startswith("UNKNOWN: ")
    assert told in out
    assert out.count("\n") == 1


def test_watch_looks_again_until_sigterm(place: Place, project_root: Path) -> None:
    """As a plain script, from another folder: a line for each look, and exit code 0 at the end."""
    script = project_root / "scripts" / "mongo_supervisor" / "check.py"
    process: Any = subprocess.Popen(
        [sys.executable, str(script), "--watch", "0.2", "--config", str(place.file)],
        cwd=place.file.parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    for line in lines:
        assert line["state"] == "ok"
        assert line["event"] == "mongo_supervisor.looked"
        assert line["queue_depth"] == 0
