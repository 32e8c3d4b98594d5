"""Hold each stage of the daemon against its ceiling, and name the stage that limits.

A stage's ceiling is what its processes would reach if they had nothing to wait for: the CPU of the
same work on the same posts, alone in one process on one thread, in batches. ``cores`` is all stages
together on all cores of the machine. The stage with the lowest ceiling limits the daemon, and
posts/s over that ceiling is how near it comes. Next to it stands what the stage's processes took in
the daemon: more than alone is the way of messages, and cores that share caches.

Run: ``python bench/speed_of_light.py [--case demo realistic] [--broker embedded rabbitmq]
[--rounds 5] [--posts N] [--tree CHECKOUT] [--small]``; ``--tree`` runs another checkout's daemon.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too
# As the daemon's decoders have it: a second thread of OpenBLAS spins, and would count as work.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from chaos_rig.posts import media_server
from floors import finish
from results_file import FOLDER
from rig import BROKERS, ROOT, Load, median_load, site
from tagger import Tagger
from workloads import MIXED_CLIPS, Workload, workload

from common.logs import configure_logs
from common.tables import print_table
from config.settings import Settings
from king.store.documents import read_post

POSTS = {"demo": 200, "realistic": 32, "tiny": 12}
BATCH = 8
PASSES = {"demo": 3, "realistic": 1, "tiny": 1}
"""Of the work alone, before and after the daemon's. One more comes first: models allocate then."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="speed_of_light",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", choices=list(POSTS), nargs="+", default=["demo", "realistic"])
    parser.add_argument("--broker", choices=BROKERS, nargs="+", default=["embedded", "rabbitmq"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--posts", type=int, help="of each load, instead of 200 and 32")
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of speed_of_light.json")
    parser.add_argument("--small", action="store_true", help="one round of few tiny posts")
    options = parser.parse_args(arguments)
    if options.small:
        options.case, options.broker, options.rounds = ["tiny"], ["embedded"], 1
    options.tree = options.tree.resolve()
    return options


def alone_ms(made: Workload, url: str, number: int) -> dict[str, float]:
    """Return the CPU ms of a post by kind of work: ``decode``, each extractor, ``fuse``."""
    spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        spent[name] += 1000 * (time.process_time() - began)

    class Clocked(Tagger):
        """Notes the CPU of each call."""

        def decode(self, kind: Any, path: Any) -> Any:
            with clock("decode"):
                return super().decode(kind, path)

        def extract(self, name: Any, items: Any) -> Any:
            with clock(name):
                return super().extract(name, items)

        def fuse(self, features: Any) -> Any:
            with clock("fuse"):
                return super().fuse(features)

    work, fields = Clocked(made.settings), made.settings.store.fields
    documents = made.documents("alone", len(made.entries), url)
    posts = [read_post(str(each["_id"]), each, fields) for each in documents]
    passes = []
    with closing(work):
        for _ in range(1 + number):
            spent.clear()
            for i in range(0, len(posts), BATCH):
                work.fuse(work.features(posts[i : i + BATCH]))
            passes.append(dict(spent))
    names = sorted(passes[0])
    return {n: statistics.median(p[n] for p in passes[1:]) / len(posts) for n in names}


def stages_of(settings: Settings) -> tuple[dict[str, str], dict[str, int]]:
    """Return the daemon's stage of each kind of work, and the processes of each stage."""
    stage, number = {}, {"decode": settings.decode.processes, "fuse": 1}
    for group in settings.workers.extractors:
        name = "ocr" if group.extractors == ("ocr",) else "extract"
        stage.update(dict.fromkeys(group.extractors, name))
        number[name] = group.processes
    return {str(each): name for each, name in stage.items()}, number


def rows_of(
    alone: Mapping[str, float], settings: Settings, loads: Sequence[Load]
) -> list[dict[str, Any]]:
    """Return a row for each stage, and one for the cores."""
    stage_of, number = stages_of(settings)
    stages: defaultdict[str, float] = defaultdict(float)
    for name, ms in alone.items():
        stages[stage_of.get(name, name)] += ms
    cores = os.cpu_count() or 1
    by_stage = {name: (ms, number[name]) for name, ms in stages.items() if ms > 0}
    by_stage["cores"] = (sum(stages.values()), cores)
    ceilings = {name: 1000 * count / ms for name, (ms, count) in by_stage.items()}
    limit = min(ceilings, key=lambda name: ceilings[name])
    figures = median_load(loads)
    figures["cpu_ms"]["cores"] = round(sum(figures["cpu_ms"].values()), 3)
    return [
        {
            "stage": name,
            "alone_ms": round(ms, 3),
            "in_daemon_ms": figures["cpu_ms"].get(name),
            "processes": count,
            "ceiling_posts_per_s": round(ceilings[name], 2),
            "posts_per_s": figures["posts_per_s"],
            "ratio": round(figures["posts_per_s"] / ceilings[name], 3),
            "limits": name == limit,
        }
        for name, (ms, count) in by_stage.items()
    ]


def measure(options: argparse.Namespace, case: Any) -> list[dict[str, Any]]:
    """Return the rows of one kind of posts."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="light-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        made = workload(case, folder, clips=MIXED_CLIPS)
        number = options.posts or POSTS[case]
        with media_server(made.folder) as url:
            for broker in options.broker:
                alone = alone_ms(made, url, PASSES[case])  # in turn with the daemon
                with (
                    site(broker, made.settings, folder / broker[0]) as place,
                    place.kings(tree=options.tree),
                ):
                    place.load(made.documents("light-warm", len(made.entries), url))
                    loads = [
                        place.load(made.documents(f"light-{i}", number, url))
                        for i in range(options.rounds)
                    ]
                again = alone_ms(made, url, PASSES[case])
                alone = {each: (ms + again[each]) / 2 for each, ms in alone.items()}
                head = {"case": case, "broker": broker, "posts": number}
                load = [round(x, 1) for x in os.getloadavg()]
                extractors = {each: round(ms, 3) for each, ms in alone.items()}
                for row in rows_of(alone, made.settings, loads):
                    rows.append(head | row | {"load": load})
                rows[-1] |= {"alone_ms_by_work": extractors, "cpu_ms": median_load(loads)["cpu_ms"]}
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows."""
    columns = (
        *("case", "broker", "stage", "alone_ms", "in_daemon_ms", "processes"),
        *("ceiling_posts_per_s", "posts_per_s", "ratio"),
    )
    cells = [[row[name] for name in columns] + ["<-" if row["limits"] else ""] for row in rows]
    titles = [name.replace("_", " ") for name in columns]
    print_table("", [*titles, "limits"], cells, right=range(3, len(columns)))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    rows = [row for case in options.case for row in measure(options, case)]
    show(rows)
    return finish("speed_of_light", options.rounds, rows, options.out, check=not options.small)


if __name__ == "__main__":
    sys.exit(main())
