"""Turns and waits of hosts, the state file, types of files, and rates; no network."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from common.files import file_digest
from corpus.download.hosts import DEAD_AFTER, Hosts
from corpus.download.state import State
from corpus.download.transfer import classify, incoming_folder, left_over
from corpus.download.values import Ask, UrlResult, host_of, key_of
from tests.support.scripts.media_site import png, wav

FAILED = UrlResult("retryable", reason=("FetchRetryable", "no"))


def items(host: str, count: int) -> list[Ask]:
    return [Ask(f"{host}{i}", f"http://{host}/{i}", host) for i in range(count)]


def take_all(hosts: Hosts, now: float = 0.0) -> list[str]:
    """Keys of all that may go now."""
    taken = []
    while (item := hosts.take(now)) is not None:
        taken.append(item.key)
    return taken


def test_hosts_take_turns_within_their_limit() -> None:
    """A host with many URLs does not hold up the others, and has so many under way at most."""
    hosts = Hosts(per_host=2)
    for item in [*items("a", 5), *items("b", 1), *items("c", 3)]:
        hosts.add(item, 0.0)
    assert take_all(hosts) == ["a0", "b0", "c0", "a1", "c1"]
    assert hosts.size == 4
    hosts.done("a")
    assert take_all(hosts) == ["a2"]
    hosts.done("c")
    hosts.done("b")
    assert take_all(hosts) == ["c2"]
    for name in ("a", "a", "c", "c"):
        hosts.done(name)
    assert take_all(hosts) == ["a3", "a4"]
    assert (take_all(hosts), hosts.size) == ([], 0)


def test_waits_end_in_time() -> None:
    """A URL comes back at its time, a host that asked for rest not before the end of it."""
    hosts = Hosts(per_host=4)
    first, second, third = items("a", 3)
    hosts.add(first, 0.0)
    hosts.add(second, 0.0)
    assert hosts.take(0.0) is first
    hosts.pause("a", 10.0)
    hosts.pause("a", 3.0)  # the later end counts
    hosts.done("a")
    hosts.add(first, 5.0)
    hosts.add(third, 1.0)
    assert (take_all(hosts, 1.0), take_all(hosts, 6.0)) == ([], [])
    assert take_all(hosts, 10.0) == ["a1", "a2", "a0"]
    assert hosts.size == 0
    for _ in range(3):
        hosts.done("a")
    hosts.add(first, 20.0)
    assert (take_all(hosts, 19.9), hosts.size) == ([], 1)
    assert take_all(hosts, 20.0) == ["a0"]


def test_host_that_is_never_reached_is_given_up() -> None:
    hosts = Hosts(per_host=1)
    for item in items("a", 5):
        hosts.add(item, 0.0)
    for _ in range(DEAD_AFTER - 1):
        hosts.unreached("a", FAILED)
    hosts.reached("a")
    for _ in range(DEAD_AFTER - 1):
        hosts.unreached("a", FAILED)
    assert hosts.verdict("a") is None
    hosts.unreached("a", FAILED)
    assert hosts.verdict("a") is FAILED
    hosts.add(items("a", 6)[5], 9.0)
    assert sorted(item.key for item in hosts.drop("a")) == [f"a{i}" for i in range(6)]
    assert (hosts.size, take_all(hosts, 9.0)) == (0, [])


def test_hosts_are_told_apart_by_port_and_not_by_login() -> None:
    assert host_of("http://u:p@H.example:8080/x?y") == "h.example:8080"
    assert host_of("https://h.example/x") == "h.example"
    assert host_of("http://[broken") == host_of("no url") == ""


def test_file_that_is_no_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match=r"s\.sqlite: not the state of a download"):
        State(tmp_path / "s.sqlite")


def test_state_that_is_damaged_later_is_named(tmp_path: Path) -> None:
    """Pages spoilt behind a sound beginning are result while reading, and the way out is said."""
    path = tmp_path / "s.sqlite"
    state = State(path)
    keys = [key_of(str(i)) for i in range(2000)]
    state.put((key, FAILED) for key in keys)
    state.close()
    content = path.read_bytes()
    page_bytes = int.from_bytes(content[16:18], "big")
    path.write_bytes(content[: 3 * page_bytes] + b"\xff" * (len(content) - 3 * page_bytes))
    state = State(path)
    with pytest.raises(ConfigError, match=r"s\.sqlite: .* damaged .*; delete it to verify"):
        _ = [state.get(key) for key in keys]
    state.close()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(1), ("ok", "png", {"image"}, "")),
        (wav(), ("ok", "wav", {"audio"}, "")),
        (b"\xff\xd8\xff\xe0" + b"x" * 50, ("ok", "jpg", {"image"}, "")),
        (b"GIF89a" + b"x" * 50, ("ok", "gif", {"image", "video"}, "")),
        (b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42", ("ok", "m4a", {"audio"}, "")),
        (b"ID3\x04" + b"\0" * 50, ("ok", "mp3", {"audio"}, "")),
        (wav()[:1000], ("refused", "", set(), "truncated WAV sound: 1000 of 3244 bytes")),
        (b"<html>", ("refused", "", set(), "no media: HTML page")),
        (b"#EXTM3U\n", ("refused", "", set(), "no media: playlist")),
        (b"\x01\x02\xfe" * 30, ("refused", "", set(), "no media: unknown type of file")),
        (b"", ("refused", "", set(), "the file is empty")),
    ],
)
def test_files_are_what_their_bytes_say(
    tmp_path: Path, content: bytes, expected: tuple[str, str, set[str], str]
) -> None:
    """Extension and use by the first bytes; what is not media is refused with its reason."""
    (tmp_path / "f").write_bytes(content)
    result = classify(tmp_path / "f", "00")
    assert (result.status, result.extension, set(result.kinds), result.reason[1]) == expected


def test_what_a_kill_left_is_taken_or_deleted(tmp_path: Path) -> None:
    folder = incoming_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "whole").write_bytes(png(1))
    sha256 = file_digest(folder / "whole")
    key, other = key_of("a"), key_of("b")
    (folder / "whole").rename(folder / f"{key}-{sha256}")
    (folder / f"{other}-{sha256}").write_bytes(png(1)[:-5])
    (folder / f"{other}.part").write_bytes(b"half")
    assert [(k, name, f.status) for k, name, f in left_over(tmp_path)] == [
        (key, f"{key}-{sha256}", "ok")
    ]
    assert [path.name for path in folder.iterdir()] == [f"{key}-{sha256}"]
