"""Let 1, 2 and 4 Kings share one queue, and measure what broker and database give at most.

Posts of one text and tiny models, on RabbitMQ: what grows with the Kings is the machinery, until
the cores are busy. As many bare loops (`bench/peers/bare.py`) read, write and acknowledge the same
posts in batches and do nothing else: what they reach is the limit of the broker and the database.
The servers' CPU a post tells what a machine of their own would reach. docs/scaling.md counts on it.

Run: ``python bench/scale.py [--kings 1 2 4] [--posts 2000] [--rounds 5] [--broker rabbitmq]
[--small]``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from floors import finish
from overhead import BATCH, WARM, documents, settings_of
from results_file import FOLDER
from rig import BROKERS, SERVER_NAMES, Load, median_load, site

from common.logs import configure_logs
from common.tables import print_table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kings", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--posts", type=int, default=2000, help="of one load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--broker", choices=BROKERS, default="rabbitmq")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of scale.json")
    parser.add_argument("--small", action="store_true", help="two Kings, few posts")
    options = parser.parse_args(arguments)
    if options.small:
        options.kings, options.posts, options.rounds = [2], 20, 1
        options.broker = "embedded"
    return options


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of Kings, and of bare loops."""
    loads: dict[tuple[str, int], list[Load]] = {}
    number = options.posts
    with tempfile.TemporaryDirectory(prefix="scale-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = settings_of(folder)
        with site(options.broker, settings, folder) as place:
            for i in range(options.rounds):
                for count in options.kings:
                    with place.kings(count):
                        warm = min(WARM, number) * count
                        place.load(documents("text", f"kings-warm-{i}-{count}", warm, ""))
                        load = place.load(documents("text", f"kings-{i}-{count}", number, ""))
                    loads.setdefault(("Kings", count), []).append(load)
                    posts = documents("text", f"loops-{i}-{count}", number, "")
                    bare = place.bare(posts, BATCH, count)
                    loads.setdefault((f"bare loops, {BATCH} at once", count), []).append(bare)
    rows = []
    for (system, count), rounds in loads.items():
        row = {"broker": options.broker, "system": system, "count": count, "posts": number}
        row |= median_load(rounds) | {"load": [round(x, 1) for x in os.getloadavg()]}
        servers = {each: row["cpu_ms"][each] for each in SERVER_NAMES}
        row["own_cpu_ms"] = round(sum(row["cpu_ms"].values()) - sum(servers.values()), 3)
        row["posts_per_core_s"] = {
            each: round(1000 / max(ms, 0.01)) for each, ms in servers.items()
        }
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    rows = measure(options)
    cells = [
        (
            *(row["system"], row["count"], row["posts_per_s"], row["own_cpu_ms"]),
            *(row["cpu_ms"][each] for each in SERVER_NAMES),
            *row["posts_per_core_s"].values(),
        )
        for row in rows
    ]
    of_servers = (
        f"{name}'s {what}" for what in ("CPU ms", "posts/core-s") for name in SERVER_NAMES
    )
    columns = ("system", "count", "posts/s", "own CPU ms", *of_servers)
    print_table(options.broker, columns, cells, right=range(1, len(columns)))
    return finish("scale", options.rounds, rows, options.out, check=not options.small)


if __name__ == "__main__":
    sys.exit(main())
