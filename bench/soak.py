"""Does the daemon grow? Tags many equal posts and compares the memory of every process.

The real daemon (``online_process.py`` and its watchdog under supervisord, Redis, small models
with random weights) tags posts that all have the same text, the same picture and the same sound,
so that every process works and every post has the same features: what grows is a leak. Resident
memory (RSS) is sampled after ``--warm`` posts and at the end, each time as the median of several
samples while posts are being tagged, and must not have grown by more than the limit. The
anonymous part of it (heap and stacks, without files and shared slots) is shown next to it: in a
small process one step of the allocator, of a mebibyte or two, is a large share of that part.

Run: ``python bench/soak.py [--posts 20000] [--warm 2000] [--limit 0.03]``.
Exits 1 when a process has grown by more than the limit, was replaced, or a post is not tagged.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from chaos_rig.posts import media_server
from chaos_rig.site import Site
from results_file import FOLDER, write_results

from common.logs import configure_logs
from common.progress import progress_bar
from common.tables import print_table
from tests.support import media
from tests.support.tiny_models import tiny_bundle, tiny_features

_SAMPLES = 9
_SAMPLE_EVERY_S = 0.5


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posts", type=int, default=20_000)
    parser.add_argument("--warm", type=int, default=2000, help="posts before the first look")
    parser.add_argument("--limit", type=float, default=0.03, help="growth that passes")
    parser.add_argument("--timeout-s", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of soak.json")
    return parser.parse_args(arguments)


def memory(site: Site) -> dict[str, tuple[int, float, float]]:
    """Return the ID, anonymous and resident MiB of each process now, by name."""
    king = site.king_pid
    pids = {"king": king} if king else {}
    for view in site.health.get("workers", []):
        pids[str(view["name"])] = view["pid"]
    usage = {}
    for name, pid in pids.items():
        if pid is not None:
            anonymous, resident = (_status_mib(pid, key) for key in ("RssAnon", "VmRSS"))
            usage[name] = (pid, anonymous, resident)
    return usage


def _status_mib(pid: int, key: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    [line] = [line for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def look(site: Site) -> dict[str, tuple[int, float, float]]:
    """Return the median of several samples."""
    samples = []
    for _ in range(_SAMPLES):
        samples.append(memory(site))
        time.sleep(_SAMPLE_EVERY_S)
    last = samples[-1]
    return {
        name: (
            last[name][0],
            statistics.median(s[name][1] for s in samples if name in s),
            statistics.median(s[name][2] for s in samples if name in s),
        )
        for name in last
    }


def soak(options: argparse.Namespace, folder: Path, tell: Callable[[int], None]) -> dict[str, Any]:
    """Run the soak; return its figures."""
    features = tiny_features()
    tiny_bundle(folder / "bundle", features)
    files = folder / "web"
    files.mkdir()
    media.write_jpeg(files / "a.jpg", media.quadrants(96, 80))
    media.write_wav(files / "a.wav", media.tone(duration_s=1.0))
    settings = {
        "features": features.model_dump(mode="json"),
        "fusion": {"bundle": str(folder / "bundle")},
        "fetch": {"allow_private_hosts": True},
        "decode": {"processes": 1},
        "workers": {"slots": 8, "extractors": [{"threads": 1}]},
        "store": {
            "database": "soak",
            "collection": "soak_posts",
            "jobs_collection": "soak_jobs",
            "timeout_s": 30,
        },
    }
    site = Site(folder, "redis", settings)
    try:
        with media_server(files) as url:
            images, audios = [f"{url}/a.jpg"], [f"{url}/a.wav"]
            ids = [f"post-{i:06d}" for i in range(options.posts)]
            post = {"text": "a red cat 一只猫", "images": images, "audios": audios}
            site.open([{"_id": post_id, **post} for post_id in ids])
            site.start_daemon()
            site.wait_for_phase("serving", 120)
            began = time.monotonic()
            site.publish(ids)

            def reach(number: int) -> None:
                while (tagged := int(site.health.get("posts_tagged", 0))) < number:
                    tell(tagged)
                    if time.monotonic() - began > options.timeout_s:
                        raise TimeoutError(f"{tagged} posts tagged in {options.timeout_s:g} s")
                    time.sleep(0.2)

            reach(options.warm)
            before = look(site)
            # The second look ends before the posts do: an idle daemon is not what is compared.
            rate = options.warm / (time.monotonic() - began)
            reach(options.posts - int(rate * _SAMPLES * _SAMPLE_EVERY_S * 1.5))
            after = look(site)
            reach(options.posts)
            seconds = time.monotonic() - began
            counts = site.store.queries.counts()
            site.stop_king()
    finally:
        site.close()
    return figures(options, before, after, counts, seconds)


def figures(
    options: argparse.Namespace,
    before: dict[str, tuple[int, float, float]],
    after: dict[str, tuple[int, float, float]],
    counts: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the results as they are written."""
    processes = {}
    for name, (pid, anonymous, resident) in before.items():
        pid_after, anonymous_after, resident_after = after.get(name, (0, 0.0, 0.0))
        processes[name] = {
            "anonymous_mib": [round(anonymous, 2), round(anonymous_after, 2)],
            "resident_mib": [round(resident, 2), round(resident_after, 2)],
            "growth": round(anonymous_after / anonymous - 1, 4),
            "resident_growth": round(resident_after / resident - 1, 4),
            "replaced": pid != pid_after,
        }
    return {
        "posts": options.posts,
        "warm": options.warm,
        "tagged": counts["tagged"],
        "jobs_left": sum(counts["jobs"].values()),
        "seconds": round(seconds, 1),
        "posts_per_s": round(options.posts / seconds, 1),
        "limit": options.limit,
        "processes": processes,
    }


def broken(results: dict[str, Any]) -> list[str]:
    """Return everything that is not as it must be."""
    wrong = []
    if results["tagged"] != results["posts"]:
        wrong.append(f"{results['tagged']} of {results['posts']} posts are tagged")
    if results["jobs_left"]:
        wrong.append(f"{results['jobs_left']} jobs are left")
    for name, process in results["processes"].items():
        if process["replaced"]:
            wrong.append(f"{name} was replaced")
        elif process["resident_growth"] > results["limit"]:
            wrong.append(f"{name} has grown by {process['resident_growth']:.1%}")
    return wrong


def show(results: dict[str, Any]) -> None:
    """Print the figures."""
    seconds, rate = results["seconds"], results["posts_per_s"]
    columns = ("process", "heap MiB", "at the end", "growth", "RSS MiB", "at the end", "growth")
    rows = []
    for name, process in results["processes"].items():
        heap, rss = process["anonymous_mib"], process["resident_mib"]
        grown, rss_grown = f"{process['growth']:+.2%}", f"{process['resident_growth']:+.2%}"
        rows.append((name, *heap, grown, *rss, rss_grown))
    title = f"{results['posts']} posts, {seconds} s, {rate} posts/s"
    print_table(title, columns, rows, right=range(1, len(columns)))
    for line in broken(results):
        print(f"BROKEN: {line}")


def _end(_number: int, _frame: object) -> None:
    sys.exit("soak: ended by a signal")


def main(arguments: list[str] | None = None) -> int:
    """Run it; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    signal.signal(signal.SIGTERM, _end)  # so that nothing outlives this process
    with (
        tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder,
        progress_bar("soak", options.posts) as bar,
    ):
        results = soak(options, Path(folder), bar.update)
    show(results)
    print(f"written: {write_results('soak', 1, [results], options.out)}")
    return 1 if broken(results) else 0


if __name__ == "__main__":
    sys.exit(main())
