"""Every backend passes the same contract; the S3 one on a real S3-protocol server."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import redis

from common.errors import CacheUnavailable, ConfigError
from config.settings import CacheSettings
from tests.support.ports import free_port
from tests.support.processes import limited_to
from tests.support.services import RedisServer, unavailable
from workers.cache.store import CacheStore, FolderStore, RemoteStore, open_store

KINDS = ("folder", "file", "redis", "memory", "s3")
Open = Callable[..., CacheStore]


def wait_until_later(folder: Path) -> None:
    """Wait until the file system's clock, and the server's, show another millisecond."""
    probe = folder / "probe"
    probe.touch()
    first, end = probe.stat().st_mtime, time.monotonic() + 0.005
    # That of files goes in steps: the next may come at once, in the server's same millisecond.
    while probe.stat().st_mtime < first + 0.002 or time.monotonic() < end:
        probe.touch()


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """A server that speaks S3 on loopback, with one bucket."""
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    client.create_bucket(Bucket="features")
    client.close()
    try:
        yield url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if RedisServer.binary() is None:
        unavailable("no redis-server")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.close()


@pytest.fixture(params=KINDS)
def open_one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a store of one kind; each call opens the same place again."""
    kind = request.param
    values: dict[str, Any] = {"url": str(tmp_path / "a cache")}
    if kind == "file":
        values["url"] = f"file://{tmp_path}/a%20cache"
    elif kind == "redis":
        values["url"] = request.getfixturevalue("redis_url")
    elif kind == "memory":
        values["url"] = f"memory://{tmp_path.name}/cache"
    elif kind == "s3":
        endpoint = request.getfixturevalue("s3_server")
        values["url"] = f"s3://features/{tmp_path.name}"
        login = {"key": "key", "secret": "secret", "endpoint_url": endpoint}
        values["options"] = {**login, "client_kwargs": {"region_name": "us-east-1"}}
        values["timeout_s"] = 20
    with contextlib.ExitStack() as stack:

        def opened(**more: Any) -> CacheStore:
            store = open_store(CacheSettings(**{**values, **more}))
            stack.callback(store.close)
            return store

        opened().prune(0)
        yield opened


def test_what_is_put_is_there_for_everybody(open_one: Open) -> None:
    store, other = open_one(), open_one()
    values = {key(f"k{i}"): os.urandom(size) for i, size in enumerate((0, 1, 1000, 300_000))}
    assert store.get_many(list(values)) == {}
    for name, value in values.items():
        store.put(name, value)
    assert dict(other.get_many([*values, key("absent")])) == values
    store.put(key("k1"), b"new")
    assert other.get_many([key("k1")]) == {key("k1"): b"new"}


def test_deleted_is_gone(open_one: Open) -> None:
    store = open_one()
    store.put(key("a"), b"1")
    store.put(key("b"), b"2")
    store.delete([key("a"), key("never")])
    store.delete([])
    assert dict(store.get_many([key("a"), key("b")])) == {key("b"): b"2"}
    assert dict(store.get_many([])) == {}


def test_counts_and_prunes(open_one: Open) -> None:
    """`stats` counts, also after a value was replaced; `prune` goes down to the size, then to 0."""
    store = open_one()
    for i in range(20):
        store.put(key(str(i)), bytes(1000))
    store.put(key("0"), bytes(1000))
    assert (store.stats().entries, store.stats().bytes) == (20, 20_000)
    gone = store.prune(5_000)
    assert (gone.entries, gone.bytes) == (15, 15_000)
    assert (store.stats().entries, store.stats().bytes) == (5, 5_000)
    store.prune(0)
    assert (store.stats().entries, store.stats().bytes) == (0, 0)


@pytest.mark.parametrize("open_one", ["folder"], indirect=True)
def test_puts_keep_to_the_limit(open_one: Open) -> None:
    store = open_one(max_mb=1)
    for i in range(400):
        store.put(key(str(i)), bytes(10_000))
        if i % 50 == 49:
            assert store.stats().bytes <= 1 << 20
    assert store.stats().bytes > 1 << 19  # and it does not throw everything away either
    assert set(store.get_many([key("399")])) == {key("399")}
    assert not store.get_many([key("0")])


@pytest.mark.parametrize("open_one", ["folder", "redis", "memory"], indirect=True)
def test_many_at_once(open_one: Open) -> None:
    stores = [open_one(max_mb=1) for _ in range(4)]
    wrong: list[str] = []

    def work(store: CacheStore, seed: int) -> None:
        for i in range(120):
            name = key(str((seed * 7 + i) % 60))
            store.put(name, name.encode() * 300)
            for stored, value in store.get_many([key(str(j)) for j in range(0, 60, 9)]).items():
                if value != stored.encode() * 300:
                    wrong.append(stored)

    threads = [threading.Thread(target=work, args=(s, i)) for i, s in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert stores[0].stats().bytes > 0


@pytest.mark.parametrize("open_one", ["folder", "redis"], indirect=True)
def test_least_used_are_pruned_first(open_one: Open, tmp_path: Path) -> None:
    store = open_one()
    store.put(key("used"), bytes(1000))
    for path in (tmp_path / "a cache").rglob(key("used")[2:]):
        os.utime(path, (1, 1))  # it has not been used for long: a use is written down
    store.put(key("unused"), bytes(1000))
    wait_until_later(tmp_path)
    assert store.get_many([key("used")])
    store.prune(1000)
    assert list(store.get_many([key("used"), key("unused")])) == [key("used")]


@pytest.mark.parametrize("open_one", ["folder"], indirect=True)
def test_what_is_used_stays(open_one: Open, tmp_path: Path) -> None:
    store = open_one(max_mb=1)
    store.put(key("kept"), bytes(10_000))
    for i in range(300):
        store.put(key(str(i)), bytes(10_000))
        for path in (tmp_path / "a cache").rglob(key("kept")[2:]):
            os.utime(path, (1, 1))  # it has not been used for long: a use is written down
        assert store.get_many([key("kept")]), i


def test_killed_writer_leaves_nothing_for_long(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, 1 << 20)
    store.put(key("a"), b"whole")
    folder = tmp_path / key("a")[:2]
    fresh, old = folder / f"{0:016x}.partial", folder / f"{1:016x}.partial"
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert store.stats().entries == 1
    assert sorted(p.name for p in folder.iterdir()) == sorted([fresh.name, key("a")[2:]])


@pytest.mark.parametrize("open_one", ["folder", "memory", "s3"], indirect=True)
def test_what_is_no_entry_is_left_alone(open_one: Open, tmp_path: Path) -> None:
    """Files of others where a cache was pointed to are not counted, evicted or pruned."""
    store = open_one(max_mb=1)
    names = ["important/report.csv", "ab/post-1.safetensors", "ab/old.partial", "ab/" + "F" * 62]
    names += ["abc/" + "0" * 62, f"ab/other/ab/{'0' * 62}"]
    if isinstance(store, RemoteStore):
        root, files = store._root, store._fs
    else:
        root, files = str(tmp_path / "a cache"), fsspec.filesystem("file")
    foreign = [f"{root}/{name}" for name in names]
    for path in foreign:
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
        files.pipe_file(path, bytes(300_000))
        if isinstance(store, FolderStore):
            os.utime(path, (1, 1))
    store.put(key("a"), bytes(1000))
    assert (store.stats().entries, store.stats().bytes) == (1, 1000)
    gone = store.prune(0)
    assert (gone.entries, gone.bytes) == (1, 1000)
    assert all(files.size(path) == 300_000 for path in foreign)


def test_half_a_write_is_no_entry(tmp_path: Path) -> None:
    """When the system takes only a part of a value, the put fails and nothing is left."""
    store = FolderStore(tmp_path, 1 << 20)
    with limited_to(1000), pytest.raises(CacheUnavailable, match="too large"):
        store.put(key("a"), bytes(5000))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("x")
    store = FolderStore(place, 1 << 20)
    with pytest.raises(CacheUnavailable, match="Not a directory"):
        store.put(key("a"), b"1")


def test_redis_that_is_not_there_or_refuses(redis_url: str) -> None:
    """No server, or a password that is wrong: unavailable; the password is not shown."""
    nobody = open_store(CacheSettings(url=f"redis://:hush@127.0.0.1:{free_port()}/0"))
    with pytest.raises(CacheUnavailable) as caught:
        nobody.get_many([key("a")])
    assert "hush" not in str(caught.value)


def test_redis_entries_run_out(redis_url: str) -> None:
    """With a TTL an entry goes when nobody asks for it, and the count follows."""
    store = open_store(CacheSettings(url=redis_url, ttl_s=600))
    store.prune(0)
    store.put(key("a"), bytes(100))
    with redis.Redis.from_url(redis_url) as server:
        [name] = server.keys(f"*{key('a')}")
        server.pexpire(name, 300_000)
        assert store.get_many([key("a")])
        assert server.pttl(name) > 500_000  # a use renews it
        server.pexpire(name, 1)
        time.sleep(0.01)
    assert not store.get_many([key("a")])
    store.prune(0)
    assert (store.stats().entries, store.stats().bytes) == (0, 0)
    store.close()


@pytest.mark.parametrize("url", ["nonsense://x", "http://host/x", " ", "embedded://"])
def test_no_such_cache(url: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"not a cache|cannot be used|empty"):
        open_store(CacheSettings(url=url))
