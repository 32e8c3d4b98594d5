"""download_mp against a real server: results, limits, resuming, kills, a full disk, memory."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.data_scripts.download_mp import main
from tests.support.processes import limited_to
from tests.support.scripts.media_site import MediaSite, media_site, png, wav, write_posts
from tests.support.services import wait_until

SCRIPT = Path(__file__).resolve().parents[3] / "scripts/data_scripts/download_mp.py"
RESULTS = ("manifest.jsonl", "posts.jsonl", "rejected.jsonl", "summary.json")
QUICK = ["--set", "fetch.allow_private_hosts=true", "--backoff", "0.05", "--processes", "1"]


@pytest.fixture
def site() -> Iterator[MediaSite]:
    with media_site() as server:
        yield server


def command(posts: Path, out: Path, *more: str) -> list[str]:
    return [str(posts), "--out", str(out), *QUICK, *more]


def manifest(out: Path) -> list[dict[str, Any]]:
    text = (out / "manifest.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def reasons(out: Path) -> dict[str, str]:
    """Path of the source ─► why it failed."""
    reasons_by_path = {}
    for line in manifest(out):
        if line["status"] == "failed":
            path = line["source"].removeprefix("http://").partition("/")[2]
            reasons_by_path[path] = f"{line['reason']['type']}: {line['reason']['message']}"
    return reasons_by_path


def results(out: Path) -> dict[str, bytes]:
    """Every file that a run leaves, without its state."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and ".state" not in path.parts
    }


def spawn(posts: Path, out: Path, *more: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *command(posts, out, *more)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
        **options,
    )


def test_every_media_gets_its_line(site: MediaSite, tmp_path: Path) -> None:
    """A manifest line per media in the order of the posts, its file under its hash, its reason."""
    good = [site.url("/png/1"), site.url("/same/1"), site.url("/same/2"), site.url("/png/1#x")]
    bad = ["status/404", "html", "empty", "short", "status/500", "cutwav"]
    posts = write_posts(
        tmp_path / "p.jsonl", [good, [site.url(f"/{name}") for name in bad], ["file:///etc/passwd"]]
    )
    with posts.open("a", encoding="utf-8") as file:
        file.write('{{"post_id": "s", "audios": ["{}"]}}\n'.format(site.url("/wav/1")))
        file.write('{{"post_id": "v", "videos": ["{}"]}}\nbroken\n'.format(site.url("/png/1")))
    out = tmp_path / "out"
    assert main(command(posts, out, "--retries", "1")) == 0
    lines = manifest(out)
    assert [line["source"] for line in lines[:4]] == good
    for line, content in zip(lines[:3], [png(1), png(0), png(0)], strict=True):
        sha256 = hashlib.sha256(content).hexdigest()
        path = f"media/{sha256[:2]}/{sha256}.png"
        assert line == {
            "post_id": "p0",
            "kind": "image",
            "source": line["source"],
            "status": "ok",
            "sha256": sha256,
            "path": path,
            "bytes": len(content),
            "reason": None,
        }
        assert (out / path).read_bytes() == content
    sound = next(line for line in lines if line["post_id"] == "s")
    assert sound["path"].endswith(".wav")
    assert (out / sound["path"]).read_bytes() == wav()
    assert reasons(out) == {
        "status/404": "FetchRefused: HTTP 404",
        "html": "MediaError: no media: HTML page",
        "empty": "FetchRefused: the answer is empty",
        "short": "FetchRetryable: the connection broke",
        "status/500": "FetchRetryable: HTTP 500",
        "cutwav": "MediaError: truncated WAV sound: 1600 of 3244 bytes",
        "etc/passwd": "FetchRefused: is a local path: pass --local to copy it",
        "png/1": "MediaError: is not a video: PNG picture",
    }
    assert len(list((out / "media").rglob("*.*"))) == 3
    assert site.requests["/png/1"] == 1, "a URL is asked for once, whatever follows its #"
    downloaded = [json.loads(line) for line in (out / "posts.jsonl").read_text().splitlines()]
    assert [post["post_id"] for post in downloaded] == ["p0", "p1", "p2", "s", "v"]
    assert downloaded[0]["images"] == [line["path"] for line in lines[:4]]
    assert downloaded[1]["images"] == []
    assert downloaded[0]["text"] == "text 0"
    rejected = json.loads((out / "rejected.jsonl").read_text())
    assert rejected["line"] == 6
    assert rejected["reason"].startswith("not JSON")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["done"], summary["files"], summary["posts"]) == (5, 3, 5)
    assert sum(summary["failed"].values()) == len(lines) - 5


def test_rerun_asks_only_for_what_may_have_passed(site: MediaSite, tmp_path: Path) -> None:
    """Only passing failures and files that have disappeared are downloaded again."""
    names = ["png/1", "png/2", "status/404", "status/503"]
    posts = write_posts(tmp_path / "p.jsonl", [[site.url(f"/{name}") for name in names]])
    out = tmp_path / "out"
    args = command(posts, out, "--retries", "0")
    assert main(args) == 0
    first, before = results(out), dict(site.requests)
    assert before == {f"/{name}": 1 for name in names}
    assert main(args) == 0
    assert results(out) == first
    assert dict(site.requests) == before | {"/status/503": 2}
    gone, spoilt = (out / line["path"] for line in manifest(out)[:2])
    gone.unlink()
    spoilt.write_bytes(b"x" * spoilt.stat().st_size)
    assert main(args) == 0
    assert site.requests["/png/1"] == 2, "a file that is gone is downloaded again"
    assert site.requests["/png/2"] == 1, "without --verify only the size is looked at"
    assert main([*args, "--verify"]) == 0
    assert site.requests["/png/2"] == 2
    assert results(out) == first
    assert site.requests["/status/404"] == 1
    assert main([*args, "--retry_failed"]) == 0
    assert site.requests["/status/404"] == 2
    assert results(out) == first


def test_tries_again_with_waits(site: MediaSite, tmp_path: Path) -> None:
    posts = write_posts(tmp_path / "p.jsonl", [[site.url("/flaky/2")], [site.url("/status/502")]])
    out = tmp_path / "out"
    assert main(command(posts, out, "--retries", "2")) == 0
    assert dict(site.requests) == {"/flaky/2": 3, "/status/502": 3}
    assert reasons(out) == {"status/502": "FetchRetryable: HTTP 502"}

    rest = [[site.url("/later/1")], *[[site.url(f"/png/{i}")] for i in range(20)]]
    site.times.clear()
    site.delay_s = 0.05
    posts = write_posts(tmp_path / "q.jsonl", rest)
    assert main(command(posts, tmp_path / "out2", "--per_host", "1")) == 0
    began = site.times[0][1]
    assert [path for path, at in site.times if at < began + 1] == ["/later/1"]
    assert site.requests["/later/1"] == 2
    assert site.requests["/png/19"] == 1


def test_one_host_gets_so_many_at_once_over_all_processes(site: MediaSite, tmp_path: Path) -> None:
    """--per_host holds over all processes, and hosts do not hold up each other."""
    site.delay_s = 0.03
    media = [[site.url(f"/png/{i}", "localhost" if i % 2 else "127.0.0.1")] for i in range(60)]
    posts = write_posts(tmp_path / "p.jsonl", media)
    args = command(posts, tmp_path / "out", "--per_host", "3", "--connections", "8")
    assert main([*args, "--processes", "2"]) == 0
    assert site.at_once == 6, "two hosts, three each"
    assert reasons(tmp_path / "out") == {}


def test_limits_of_the_settings_hold(site: MediaSite, tmp_path: Path) -> None:
    """Size and number of media are bounded as in the daemon, and private addresses refused."""
    posts = write_posts(
        tmp_path / "p.jsonl", [[site.url(f"/{n}") for n in ("large/1", "png/1", "png/2")]]
    )
    limits = ["--set", "fetch.max_bytes=5000", "--set", "fetch.max_media=2"]
    assert main(command(posts, tmp_path / "out", *limits)) == 0
    assert reasons(tmp_path / "out") == {
        "large/1": "FetchRefused: larger than fetch.max_bytes (5000)",
        "png/2": "FetchRefused: beyond fetch.max_media (2)",
    }
    assert "/png/2" not in site.requests
    site.requests.clear()
    assert main([str(posts), "--out", str(tmp_path / "out2"), "--processes", "1"]) == 1
    assert "is private" in reasons(tmp_path / "out2")["png/1"]
    assert not site.requests


def test_local_files_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the posts file, as whole paths or file URLs; without --local it is named as the way.

    Where nothing at all could be had, the exit code is 1.
    """
    (tmp_path / "a b.png").write_bytes(png(3))
    sources = ["a b.png", str(tmp_path / "a b.png"), f"file://{tmp_path}/a%20b.png"]
    posts = write_posts(tmp_path / "p.jsonl", [[*sources, "none.png"]])
    assert main([*command(posts, tmp_path / "out"), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("download_mp: all 4 media failed, see the reasons above\n")
    report = json.loads(printed.out)
    assert (report["total"], report["done"], sum(report["failed"].values())) == (4, 0, 4)
    assert report["manifest"] == str(tmp_path / "out" / "manifest.jsonl")
    assert {line["reason"]["message"] for line in manifest(tmp_path / "out")} == {
        "is a local path: pass --local to copy it"
    }
    assert main(command(posts, tmp_path / "out2", "--local")) == 0
    *taken, absent = manifest(tmp_path / "out2")
    assert [(tmp_path / "out2" / line["path"]).read_bytes() for line in taken] == [png(3)] * 3
    assert absent["reason"]["message"] == "local file: No such file or directory"


def test_host_that_is_never_reached_is_given_up(tmp_path: Path) -> None:
    """A dead host costs a few tries, not a time-out for each of its URLs."""
    with media_site() as gone:
        url = gone.url("/png")
    posts = write_posts(tmp_path / "p.jsonl", [[f"{url}/{i}"] for i in range(300)])
    began = time.monotonic()
    assert main(command(posts, tmp_path / "out", "--retries", "3", "--backoff", "0.5")) == 1
    assert time.monotonic() - began < 8
    assert set(reasons(tmp_path / "out").values()) == {"FetchRetryable: Connection refused"}
    assert len(manifest(tmp_path / "out")) == 300


def until_asked(site: MediaSite, times: int, run: subprocess.Popen[str]) -> None:
    wait_until(lambda: site.requests.total() >= times or run.poll() is not None, 30, "requests")


def finished(out: Path) -> set[str]:
    """Contents that a killed run has downloaded, wherever they lie."""
    names = [path.stem for path in (out / "media").rglob("*.png")]
    names += [path.name[33:] for path in (out / ".state/incoming").glob("*-*")]
    return set(names)


def test_random_kills_change_nothing(tmp_path: Path) -> None:
    chance, count, connections = random.Random(), 80, 4
    hashes = {f"/png/{i}": hashlib.sha256(png(i)).hexdigest() for i in range(count)}
    with media_site(delay_s=0.02) as site:
        names = [*hashes, "/status/404", "/html"]
        posts = write_posts(tmp_path / "p.jsonl", [[site.url(n), site.url(n)] for n in names])
        assert main(command(posts, tmp_path / "calm")) == 0
        site.requests.clear()
        out = tmp_path / "out"
        kills = sorted(chance.sample(range(1, count), 2))
        for kill_at in kills:
            run = spawn(posts, out, "--connections", str(connections))
            until_asked(site, kill_at, run)
            time.sleep(chance.uniform(0, 0.03))
            run.kill()
            run.communicate()
            time.sleep(0.1)  # its processes end with it
            had = finished(out)
            before = site.requests.copy()
        assert main(command(posts, out, "--connections", str(connections))) == 0
        again = {
            path
            for path, sha in hashes.items()
            if sha in had and site.requests[path] > before[path]
        }
        assert again == set(), f"kills at {kills}"
        assert site.requests.total() <= len(names) + 2 * connections, f"kills at {kills}"
    assert results(out) == results(tmp_path / "calm"), f"kills at {kills}"
    assert not list((out / ".state/incoming").iterdir())


def test_signal_ends_it_in_good_order(tmp_path: Path) -> None:
    with media_site(delay_s=0.05) as site:
        posts = write_posts(tmp_path / "p.jsonl", [[site.url(f"/png/{i}")] for i in range(100)])
        run = spawn(posts, tmp_path / "out", "--connections", "4", start_new_session=True)
        wait_until(lambda: site.requests.total() >= 10, 30, "downloads")
        os.killpg(run.pid, signal.SIGTERM)
        _, said = run.communicate(timeout=10)
        assert run.returncode == 1
        last = said.strip().splitlines()[-1]
        assert last.startswith("download_mp: SIGTERM: ")
        assert last.endswith("run the same command again to continue where it stopped")
        assert "Traceback" not in said
        with pytest.raises(ProcessLookupError):
            os.killpg(run.pid, 0)
        asked = site.requests.copy()
        assert main(command(posts, tmp_path / "out")) == 0
        assert site.requests == dict.fromkeys(site.requests, 1), "nothing was cut or had twice"
        assert len(site.requests) == 100 > len(asked)


def test_full_disk_stops_it_with_one_line(
    site: MediaSite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A write that fails ends the run; with room again the rerun ends with the same files.

    The limit on file sizes stands for the full disk: a write fails half-way through a file.
    """
    names = ["/png/1", "/png/2", "/large/3", "/png/4"]
    posts = write_posts(tmp_path / "p.jsonl", [[site.url(name)] for name in names])
    assert main(command(posts, tmp_path / "calm")) == 0
    out = tmp_path / "out"
    with limited_to(100_000):
        assert main(command(posts, out)) == 1
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("download_mp: stopped: ")
    assert "make room, then run the same" in last
    assert "Traceback" not in said
    assert not (out / "manifest.jsonl").exists()
    assert main(command(posts, out)) == 0
    assert results(out) == results(tmp_path / "calm")
