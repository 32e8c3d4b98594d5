"""The short form of ``make chaos``: faults under load on both brokers, and nothing goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_rig.run import Stock

from tests.support.services import MongoServer, RabbitMQServer, RedisServer, unavailable

ROOT = Path(__file__).resolve().parents[2]
POSTS = 40


@pytest.mark.slow
@pytest.mark.rabbitmq
@pytest.mark.redis
def test_nothing_is_lost_doubled_or_left_behind(tmp_path: Path) -> None:
    """A worker, a King and Redis are killed, links go silent, brokers and disk are full.

    Writes are refused, messages cannot be read, the clock steps. Each post, published up to three
    times, is tagged once or is a dead letter with a reason; no King ends with exit code 2; no job,
    message, process, shared memory or spool file is left.
    """
    if RabbitMQServer.binary() is None or RedisServer.binary() is None:
        unavailable("needs rabbitmq-server and redis-server")
    if not MongoServer.available():
        unavailable("needs nx-27017")
    Stock.at(tmp_path / "stock", posts=8)  # here, where torch is loaded already
    command = [sys.executable, str(ROOT / "bench" / "chaos.py"), "--short", f"--posts={POSTS}"]
    command += ["--limit-s=200", f"--out={tmp_path}", f"--keep={tmp_path / 'logs'}"]
    command += [f"--stock={tmp_path / 'stock'}"]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = child.communicate(timeout=560)
    finally:
        child.terminate()  # it ends what it has started; SIGKILL would leave that behind
        child.wait(60)
    assert child.returncode == 0, output[-6000:]
    results = json.loads((tmp_path / "chaos.json").read_text())["results"]
    assert [entry["broker"] for entry in results] == ["rabbitmq", "redis"]
    for entry in results:
        of_posts = ("lost", "tagged_twice", "king_exit_2", "poison_lost", "jobs_left")
        left_behind = ("messages_left", "orphan_processes", "shared_segments", "spool_files")
        for key in (*of_posts, *left_behind):
            assert entry[key] == 0, (key, entry)
        assert entry["posts"] == POSTS
        assert entry["published"] > POSTS
        assert entry["poison_messages"] > 10
        assert entry["faults"] >= 5
        assert 0 < entry["recovery_s"]["median"] <= entry["recovery_s"]["worst"]
