"""The daemon next to what a user would write instead: a plain loop, Celery, Ray Data.

All have the same posts, models, database, broker and media server, and one thread in each process;
the systems take turns, each starts anew, tags some posts to warm up, and then the measured ones.
Their tags are compared with the daemon's. `bench/peers/` has the code of the others. Celery and Ray
Data are left out where they are not installed; so that they are::

    pip install --target FOLDER -c constraints/py3.11.txt -r bench/peers/requirements.txt

and named by ``--packages`` or the variable ``PEERS_PACKAGES``.

Run: ``python bench/peers.py [--packages FOLDER] [--case demo realistic] [--rounds 5] [--posts N]
[--only NAME ...] [--small]``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import psutil
import yaml
from chaos_rig.posts import media_server
from floors import finish
from results_file import FOLDER
from rig import ROOT, STALL_S, Load, Site, cpu_s, median_load, site, tree_of
from workloads import workload

from common.logs import configure_logs
from common.tables import print_table

APPS = Path(__file__).with_name("peers")
POSTS = {"demo": 200, "realistic": 30, "tiny": 12}
WARM = {"demo": 24, "realistic": 2, "tiny": 4}
SAME = 2e-3
"""Scores may differ by this: kernels round differently for other batch sizes."""
_POLL_S = 0.25


@dataclass(frozen=True)
class System:
    """A way to tag posts: the daemon, or a script of `bench/peers`."""

    name: str
    script: str = ""
    processes: int = 2
    batch: int = 1
    needs: str = ""


SYSTEMS = (
    System("daemon"),
    System("loop 1 x 1", "loop.py", 1, 1),
    System("loop 1 x 8", "loop.py", 1, 8),
    System("loop 2 x 1", "loop.py", 2, 1),
    System("loop 2 x 8", "loop.py", 2, 8),
    System("Celery", "celery_app", 2, 1, "celery"),
    System("Ray Data", "ray_app.py", 2, 8, "pyarrow"),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [system.name for system in SYSTEMS]
    packages = os.environ.get("PEERS_PACKAGES")
    parser.add_argument("--packages", type=Path, default=packages, help="folder of Celery and Ray")
    cases = ("demo", "realistic", "tiny")
    parser.add_argument("--case", choices=cases, nargs="+", default=["demo", "realistic"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--posts", type=int, help="of each load, instead of 200 and 30")
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of peers.json")
    parser.add_argument("--small", action="store_true", help="one round of few tiny posts")
    options = parser.parse_args(arguments)
    if options.small:
        options.case, options.rounds, options.only = ["tiny"], 1, ["daemon", "loop 1 x 8"]
    return options


def environment(packages: Path | None, folder: Path, broker_url: str) -> dict[str, str]:
    """Return the variables of the others' processes."""
    paths = [str(ROOT), str(ROOT / "bench"), str(APPS), *([str(packages)] if packages else [])]
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PEERS_FOLDER": str(folder),
        "PEERS_BROKER": broker_url.replace("unix://", "redis+socket://").partition("?")[0],
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        **dict.fromkeys(threads, "1"),
    }


def installed(system: System, variables: Mapping[str, str]) -> bool:
    """Tell if the packages that a system needs are there."""
    command = [sys.executable, "-c", f"import {system.needs or 'sys'}"]
    done = subprocess.run(command, env=dict(variables), capture_output=True, check=False)
    return done.returncode == 0


@contextmanager
def peer(
    system: System, variables: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of the others until the block ends."""
    script, numbers = system.script, [str(system.processes), str(system.batch)]
    command = [sys.executable, str(APPS / script), *numbers]
    if system.name == "Celery":
        worker = ["worker", "--pool", "prefork", "-c", numbers[0], "-l", "WARNING"]
        command = [sys.executable, "-m", "celery", "-A", script, *worker]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            command, cwd=folder, env=dict(variables), stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        yield child
    finally:
        assert child.stdin is not None
        processes = tree_of(child.pid)
        child.stdin.close()
        for process in processes:
            process.terminate()
        for process in psutil.wait_procs(processes, 15)[1]:
            process.kill()
        child.wait()


def send(ids: list[str], variables: Mapping[str, str]) -> None:
    """Give posts to Celery's workers."""
    code = "import sys, json\nfrom celery import Celery\nimport os\n"
    code += "app = Celery(broker=os.environ['PEERS_BROKER'])\n"
    code += "with app.producer_pool.acquire(block=True) as producer:\n"
    code += "    for each in json.load(sys.stdin):\n"
    code += "        app.send_task('tag_post', (each,), queue='celery.posts', producer=producer)\n"
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=json.dumps(ids).encode(), env=dict(variables), check=True)


def watched(place: Site, ids: list[str], pids: list[int], go: Callable[[], object]) -> Load:
    """Let posts begin, and wait for their tags; a process that ends counts until it was seen."""
    used: dict[int, float] = {}

    def look() -> None:
        for pid in pids:
            used.update({each.pid: cpu_s(each) or used.get(each.pid, 0) for each in tree_of(pid)})

    look()
    before, servers, began = dict(used), place.cpu_s(), time.time()
    go()
    seen, latest = 0, began
    while (tagged := place.tagged(ids)) < len(ids):
        look()
        if tagged > seen:
            seen, latest = tagged, time.time()
        if time.time() - latest > STALL_S or not psutil.pid_exists(pids[0]):
            raise RuntimeError(f"{len(ids) - tagged} of {len(ids)} posts have no tags")
        time.sleep(_POLL_S)
    look()
    own = sum(s - before.get(pid, 0.0) for pid, s in used.items())
    spent = {name: s - servers[name] for name, s in place.cpu_s().items() if name in servers}
    spent = {"system": own, "broker": spent["broker"], "database": spent["database"]}
    seconds = max(r["tagged_at"].timestamp() for r in place.results(ids).values()) - began
    return Load(len(ids) / seconds, {name: 1000 * s / len(ids) for name, s in spent.items()})


def run(
    system: System, place: Site, warm: list[str], ids: list[str], packages: Path | None
) -> Load:
    """Start a system, have it tag some posts, and measure it on the others."""
    if system.name == "daemon":
        with place.kings():
            before = place.ended
            place.publish(warm)
            place.wait_for(before + len(warm))
            return watched(place, ids, place.pids, lambda: place.publish(ids))
    folder = Path(tempfile.mkdtemp(prefix="peer-", dir=place.folder))
    content = place.settings.model_dump(mode="json")
    (folder / "settings.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "warm.json").write_text(json.dumps(warm), encoding="utf-8")
    (folder / "posts.json").write_text(json.dumps(ids), encoding="utf-8")
    variables = environment(packages, folder, place.settings.broker.url)
    is_celery = system.name == "Celery"
    if is_celery:
        send(warm, variables)

    def go() -> None:
        (folder / "go").touch()
        if is_celery:
            send(ids, variables)

    def is_warm() -> bool:
        loaded = len([*folder.glob("ready-*")])
        return loaded == system.processes and place.tagged(warm) == len(warm)

    with peer(system, variables, folder) as child:
        end = time.monotonic() + STALL_S
        while not is_warm():
            if child.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{system.name} does not start: {tail(folder / 'log')}")
            time.sleep(_POLL_S)
        return watched(place, ids, [child.pid], go)


def tail(log: Path) -> str:
    """Return the end of a log that is about to be deleted."""
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


def difference(own: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[int, float]:
    """Return the posts with other tags, and the largest difference of a score."""
    wrong, worst = 0, 0.0
    for number, result in own.items():
        scores = [{tag["id"]: tag["score"] for tag in r["tags"]} for r in (result, others[number])]
        same = scores[0].keys() == scores[1].keys()
        apart = max((abs(scores[0][i] - scores[1][i]) for i in scores[0] if same), default=0.0)
        wrong, worst = wrong + (not same or apart > SAME), max(worst, apart)
    return wrong, worst


def measure(options: argparse.Namespace, case: Any) -> list[dict[str, Any]]:
    """Return the rows of one kind of posts."""
    loads: dict[str, list[Load]] = {}
    apart: dict[str, tuple[int, float]] = {}
    number = options.posts or POSTS[case]
    with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        made = workload(case, folder)
        with media_server(made.folder) as url, site("embedded", made.settings, folder) as place:
            variables = environment(options.packages, folder, "")
            systems = [s for s in SYSTEMS if s.name in options.only and installed(s, variables)]
            for i in range(options.rounds):
                own: dict[str, Any] = {}
                for k, system in enumerate(systems):
                    warm = place.insert(made.documents(f"peers-warm-{i}-{k}", WARM[case], url))
                    ids = place.insert(made.documents(f"peers-{i}-{k}", number, url))
                    load = run(system, place, warm, ids, options.packages)
                    results = {post_id[-6:]: r for post_id, r in place.results(ids).items()}
                    own = own or results
                    loads.setdefault(system.name, []).append(load)
                    worst = apart.get(system.name, (0, 0.0))
                    apart[system.name] = max(worst, difference(own, results))
                    print(f"{case}: {system.name}: {load.posts_per_s:.2f} posts/s", flush=True)
    rows = []
    for name, rounds in loads.items():
        row = {"case": case, "system": name, "posts": number}
        row |= median_load(rounds) | {"other_tags": apart[name][0]}
        row |= {"score_difference": round(apart[name][1], 5)}
        if "daemon" in loads:
            pairs = list(zip(loads["daemon"], rounds, strict=True))
            row["daemon_rate_over_it"] = round(
                statistics.median(d.posts_per_s / r.posts_per_s for d, r in pairs), 3
            )
            row["daemon_cpu_over_it"] = round(
                statistics.median(d.cpu_ms["system"] / r.cpu_ms["system"] for d, r in pairs), 3
            )
        rows.append(row | {"load": [round(x, 1) for x in os.getloadavg()]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    columns = (
        *("posts", "system", "posts/s", "CPU ms a post", "database"),
        *("daemon's rate over it", "daemon's CPU over it", "other tags"),
    )
    cells = [
        (
            *(row["case"], row["system"], row["posts_per_s"]),
            *(row["cpu_ms"]["system"], row["cpu_ms"]["database"]),
            *(row.get("daemon_rate_over_it"), row.get("daemon_cpu_over_it"), row["other_tags"]),
        )
        for row in rows
    ]
    print_table("", columns, cells, right=range(2, len(columns)))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    rows = [row for case in options.case for row in measure(options, case)]
    show(rows)
    code = finish("peers", options.rounds, rows, options.out, check=not options.small)
    wrong = [f"{r['system']} ({r['case']}): {r['other_tags']}" for r in rows if r["other_tags"]]
    if wrong:
        print(
            f"peers: posts with other tags than the daemon's: {', '.join(wrong)}", file=sys.stderr
        )
    return 1 if wrong else code


if __name__ == "__main__":
    sys.exit(main())
