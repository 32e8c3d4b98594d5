"""``python -m demo``: from nothing to tagged posts, in one command."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from common.cli import Overrides, exit_code, flag, option, read_options
from common.files import write_whole
from common.logs import configure_logs
from config.labels import LabelMap
from config.load import load_settings
from config.settings import Settings
from demo.layout import Layout, Sizes

CONFIG = Path("config/demo.yaml")
ROOT = Path("workshop/demo")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: Annotated[Path, typer.Option(metavar="FILE")] = CONFIG
    overrides: Overrides
    train: Annotated[int | None, option("training posts", "N", min=1)] = None
    online: Annotated[int | None, option("posts that the daemon tags", "N", min=1)] = None
    seed: Annotated[int, option("of the posts")] = 7
    fresh: Annotated[bool, flag("--fresh", "make everything again")] = False
    keep: Annotated[bool, flag("--keep", "leave the embedded services running")] = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 done, 2 the configuration is wrong, 1 anything else."""

    def run() -> int:
        line = read_options(CommandLine, "python -m demo", arguments, about=__doc__)
        signal.signal(signal.SIGTERM, _interrupt)
        return _demo(line)

    return exit_code(
        "demo", run, interrupted="interrupted; the next run continues from the last complete stage"
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End on SIGTERM as on Ctrl-C, so that what we started is stopped."""
    raise KeyboardInterrupt


def _demo(options: CommandLine) -> int:
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
    """Yield settings with running services; stop those that the demo itself started."""
    from deploy import embedded

    before = any(view.state == "running" for view in embedded.status(settings))
    try:
        yield embedded.resolve(settings)
    finally:
        if not keep and not before and embedded.configured(settings):
            embedded.stop(settings)


def _tag(
    options: CommandLine, layout: Layout, settings: Settings
) -> tuple[dict[str, Mapping[str, Any]], float]:
    """Let the daemon tag the online posts; gives results and the seconds it took."""
    from demo.online import PostBox, daemon, media_server, publish_and_wait

    sys.stderr.write("daemon\n")
    command = ["--config", str(options.config)]
    for override in options.overrides:
        command += ["--set", override]
    posts, log = layout.posts("online"), layout.daemon_log
    box = PostBox(settings.store)
    try:
        with media_server(posts.parent) as url:
            ids = box.put(posts, url)
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
    from demo.evaluate import evaluate, show_posts, show_summary
    from demo.training import LABELS
    from fusion.data.data_file import read_whole_posts

    posts = read_whole_posts(layout.posts("online"))
    evaluation = evaluate(layout, settings, LabelMap.load(LABELS), posts, results)
    tagged = sum(result.get("status") == "tagged" for result in results.values())
    content = {
        "posts": len(posts),
        "tagged": tagged,
        "gap": round(evaluation.gap, 6),
        "gap_without": {m: round(gap, 6) for m, gap in evaluation.gap_without.items()},
        "posts_per_s": round(len(posts) / max(seconds, 1e-3), 3),
        "seconds": round(time.monotonic() - started, 3),
    }
    show_posts(posts, results)
    write_whole(layout.report, json.dumps(content, indent=2))
    places = {
        "report": layout.report,
        "posts and media": layout.root / "posts",
        "backbones": Path(settings.features.video.weights).parent,
        "features": layout.features,
        "bundle": settings.fusion.bundle,
        "daemon's log": layout.daemon_log,
        "database, queue": settings.embedded.folder,
    }
    show_summary(evaluation, content, places)
    return 0 if tagged == len(posts) else 1


if __name__ == "__main__":
    sys.exit(main())
