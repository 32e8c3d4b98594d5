"""``python -m demo``: from nothing to tagged posts, in one command."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from common.cli import OneLineParser, count
from common.errors import ConfigError, TaggingError
from common.logs import configure_logs
from config.labels import LabelMap
from config.load import load_settings
from config.settings import Settings
from demo.layout import Layout, Sizes

CONFIG = Path("config/demo.yaml")
ROOT = Path("workshop/demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; gives the exit code."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _demo(options)
    except ConfigError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    except (TaggingError, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ndemo: interrupted; the next run goes on from the last whole stage\n")
        return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends us as Ctrl-C does: what we started is stopped."""
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE")
    parser.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], dest="overrides", help="one setting"
    )
    parser.add_argument("--train", type=count, metavar="N", help="training posts")
    parser.add_argument("--online", type=count, metavar="N", help="posts that the daemon tags")
    parser.add_argument("--seed", type=int, default=7, help="of the posts")
    parser.add_argument("--fresh", action="store_true", help="make everything anew")
    parser.add_argument("--keep", action="store_true", help="leave the embedded services running")
    return parser.parse_args(arguments)


def _demo(options: argparse.Namespace) -> int:
    started = time.monotonic()
    settings = load_settings(options.config, options.overrides)
    configure_logs("pretty", "warning")
    layout, sizes = Layout(ROOT), Sizes()
    posts = dict(sizes.posts)
    posts["train"] = options.train or posts["train"]
    posts["online"] = options.online or posts["online"]
    sizes = replace(sizes, posts=posts)
    if options.fresh:
        shutil.rmtree(layout.root, ignore_errors=True)

    from demo.stages import prepare

    prepare(layout, settings, sizes, options.seed)
    with _services(settings, keep=options.keep) as online:
        results, seconds = _tag(options, layout, online)
    return _conclude(layout, settings, results, seconds, started)


@contextmanager
def _services(settings: Settings, *, keep: bool) -> Iterator[Settings]:
    """Settings with running services; those that the demo itself started are stopped again."""
    from deploy import embedded

    before = any(view.state == "running" for view in embedded.status(settings))
    try:
        yield embedded.resolve(settings)
    finally:
        if not keep and not before and embedded.wanted(settings):
            embedded.stop(settings)


def _tag(
    options: argparse.Namespace, layout: Layout, settings: Settings
) -> tuple[dict[str, Mapping[str, Any]], float]:
    """Let the daemon tag the online posts; gives results and the seconds it took."""
    from demo.media_server import MediaServer
    from demo.online import PostBox, daemon, publish_and_wait

    sys.stderr.write("daemon\n")
    command = ["--config", str(options.config)]
    for override in options.overrides:
        command += ["--set", override]
    posts, log = layout.posts("online"), layout.daemon_log
    box = PostBox(settings.store)
    try:
        with MediaServer(posts.parent) as media:
            ids = box.put(posts, media.url)
            with daemon(command, settings, log) as child:
                return publish_and_wait(settings, box, ids, child, log)
    finally:
        box.close()


def _conclude(
    layout: Layout,
    settings: Settings,
    results: Mapping[str, Mapping[str, Any]],
    seconds: float,
    started: float,
) -> int:
    from demo.evaluate import evaluate
    from demo.report import show_posts, show_summary, write_report
    from demo.training import LABELS
    from scripts.commands.post_file import read_posts

    posts = read_posts(layout.posts("online"))
    found = evaluate(layout, settings, LabelMap.load(LABELS), posts, results)
    tagged = sum(result.get("status") == "tagged" for result in results.values())
    content = {
        "posts": len(posts),
        "tagged": tagged,
        "gap": round(found.gap, 6),
        "gap_without": {m: round(gap, 6) for m, gap in found.gap_without.items()},
        "posts_per_s": round(len(posts) / max(seconds, 1e-3), 3),
        "seconds": round(time.monotonic() - started, 3),
    }
    show_posts(posts, results)
    write_report(layout.report, content)
    places = {
        "report": layout.report,
        "posts and media": layout.root / "posts",
        "backbones": Path(settings.features.video.weights).parent,
        "features": layout.features,
        "bundle": settings.fusion.bundle,
        "daemon's log": layout.daemon_log,
        "database, queue": settings.embedded.folder,
    }
    show_summary(found, content, places)
    return 0 if tagged == len(posts) else 1


if __name__ == "__main__":
    sys.exit(main())
