"""The cost of the machinery: posts of a text, or a text and a tiny picture, on every broker.

All posts are alike and the models are tiny, the fusion model too, so that what is left is the King,
its workers' ways with messages, the broker and the database. In turn with the daemon a bare loop of
kombu and pymongo does nothing but read, write and acknowledge the same posts, one by one and in
batches.

Run: ``python bench/overhead.py [--posts 2000] [--rounds 5] [--broker rabbitmq redis embedded]
[--tree CHECKOUT] [--fusion mbt] [--small]``; with ``--tree`` the daemon is that of another
checkout, with ``--fusion`` the fusion model is another.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from chaos_rig.posts import media_server
from floors import finish
from results_file import FOLDER
from rig import BROKERS, ROOT, SERVER_NAMES, Load, median_load, site

from common.logs import configure_logs
from common.tables import print_table
from config.settings import Settings
from tests.support import media
from tests.support.tiny_models import tiny_bundle, tiny_features

BATCH = 200  # of the bare loop that takes many at once, as `store.batch_size`
WARM = 200
ENCODERS = ("extract", "ocr")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posts", type=int, default=2000, help="of one load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--broker", choices=BROKERS, nargs="+", default=list(BROKERS))
    parser.add_argument("--idle-s", type=float, default=20, help="how long it is watched idling")
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument(
        "--fusion", default="concat_mlp", help="fusion model; ml_decoder is the default"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of overhead.json")
    parser.add_argument("--small", action="store_true", help="one round of few posts, embedded")
    options = parser.parse_args(arguments)
    if options.small:
        options.posts, options.rounds, options.broker, options.idle_s = 20, 1, ["embedded"], 1.0
    options.tree = options.tree.resolve()
    return options


def settings_of(folder: Path, fusion: str = "concat_mlp") -> Settings:
    """Return settings with tiny models, and make a bundle for them."""
    features = tiny_features()
    tiny_bundle(folder / "bundle", features, model=fusion)
    return Settings.model_validate(
        {
            "features": features.model_dump(),
            "fetch": {"allow_private_hosts": True, "spool": folder / "spool"},
            "decode": {"processes": 1},
            "workers": {"slots": 8, "extractors": [{"threads": 1}]},
            "fusion": {"bundle": folder / "bundle"},
            "log": {"format": "json"},
        }
    )


def documents(case: str, name: str, number: int, url: str) -> list[dict[str, Any]]:
    """Return posts that are alike but for their IDs."""
    post: dict[str, Any] = {"text": "a red cat on a boat"}
    if case == "picture":
        post["images"] = [f"{url}/a.jpg"]
    return [{"_id": f"{name}-{i:06d}", **post} for i in range(number)]


def measure(options: argparse.Namespace, broker: Any, settings: Settings, url: str) -> list[Any]:
    """Return the rows of a broker."""
    loads: dict[tuple[str, str], list[Load]] = {}
    number = options.posts
    with (
        tempfile.TemporaryDirectory(prefix="over-", ignore_cleanup_errors=True) as name,
        site(broker, settings, Path(name)) as place,
        place.kings(tree=options.tree),
    ):
        for case in ("text", "picture"):
            place.load(documents(case, f"warm-{case}", min(WARM, number), url))
        idle = place.idle_percent(options.idle_s)
        for i in range(options.rounds):
            for case in ("text", "picture"):
                load = place.load(documents(case, f"{case}-{i}", number, url))
                loads.setdefault(("daemon", case), []).append(load)
            for batch in (1, BATCH):
                load = place.bare(documents("text", f"bare-{batch}-{i}", number, url), batch)
                loads.setdefault((f"bare loop, {batch} at once", "text"), []).append(load)
    rows = []
    for (system, case), rounds in loads.items():
        row = {"system": system, "broker": broker, "case": case, "posts": number}
        row["fusion"] = options.fusion
        row |= median_load(rounds) | {"load": [round(x, 1) for x in os.getloadavg()]}
        if system == "daemon":
            apart = (*ENCODERS, *SERVER_NAMES)
            own = [sum(ms for n, ms in r.cpu_ms.items() if n not in apart) for r in rounds]
            row["machinery_cpu_ms"] = round(statistics.median(own), 3)
            row["idle_percent"] = idle
            row["idle_percent_daemon"] = round(
                sum(share for n, share in idle.items() if n not in SERVER_NAMES), 2
            )
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    names = sorted({name for row in rows for name in row["cpu_ms"]})
    columns = ("broker", "system", "posts", "posts/s", *names, "all but encoders", "idle %")
    cells = [
        (
            *(row["broker"], row["system"], row["case"], row["posts_per_s"]),
            *(row["cpu_ms"].get(name) for name in names),
            *(row.get("machinery_cpu_ms"), row.get("idle_percent_daemon")),
        )
        for row in rows
    ]
    print_table("CPU ms of a post", columns, cells, right=range(3, len(columns)))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    rows = []
    with tempfile.TemporaryDirectory(prefix="over-") as name:
        folder = Path(name)
        settings = settings_of(folder, options.fusion)
        (folder / "web").mkdir()
        media.write_jpeg(folder / "web" / "a.jpg", media.quadrants(96, 80))
        with media_server(folder / "web") as url:
            for broker in options.broker:
                rows += measure(options, broker, settings, url)
    show(rows)
    return finish("overhead", options.rounds, rows, options.out, check=not options.small)


if __name__ == "__main__":
    sys.exit(main())
