"""Health of the database and of the backlog, for people and for monitoring.

The first line is the state with performance data; the exit code is that of monitoring plugins:
0 ok, 1 warning, 2 critical, 3 unknown (also for a wrong option or setting). Thresholds come from
the section `monitor` of the settings, and options override them.

    python scripts/mongo_supervisor/check.py --warning backlog=50 --older-than 30m
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import (
    ConfigFile,
    Overrides,
    complain,
    exit_code,
    flag,
    option,
    print_json,
    read_options,
    say,
)
from common.errors import ConfigError, TaggingError
from common.logs import configure_logs
from common.times import since_time
from config.load import load_settings
from config.settings import MonitorSettings, Settings, Threshold
from corpus.runs import Stopper
from scripts.commands.common import DOWN
from scripts.mongo_supervisor.checks import EXIT_CODES, as_dict, judge, log_look, show, worst
from scripts.mongo_supervisor.snapshot import look

NAMES = tuple(n for n, f in MonitorSettings.model_fields.items() if f.annotation is Threshold)
_NAMES = ", ".join(NAMES)


def _limit_option(name: str, state: str) -> Any:
    about = f"from which value on a check is {state}; NAME: {_NAMES}"
    return typer.Option(
        name, metavar="NAME=VALUE", default_factory=list, show_default=False, help=about
    )


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: ConfigFile = None
    overrides: Overrides
    warning: Annotated[list[str], _limit_option("--warning", "a warning")]
    critical: Annotated[list[str], _limit_option("--critical", "critical")]
    older_than: Annotated[str | None, option("untagged posts of this age: 15m, 2h, 0s", "T")] = None
    window: Annotated[str | None, option("recent time of the failed ratio: 1h, 1d", "T")] = None
    json: Annotated[bool, flag("--json", "JSON instead of a table")] = False
    watch: Annotated[
        float | None,
        option(
            "look again and again: redrawn on a terminal, otherwise a log line for each look",
            "SECONDS",
        ),
    ] = None
    requeue: Annotated[
        bool, flag("--requeue", "publish every untagged post without a job again, and say how many")
    ] = False
    # The daemon's option, which KING_ARGS may hold.
    drain: Annotated[bool, typer.Option("--drain", hidden=True)] = False


def parse(arguments: Sequence[str] | None = None) -> CommandLine:
    options = read_options(CommandLine, "check.py", arguments, about=__doc__)
    if options.watch is not None and (options.requeue or not options.watch > 0):
        raise ConfigError(
            f"--watch {options.watch:g}: takes seconds above 0, and goes without --requeue"
        )
    return options


def settings_of(options: CommandLine) -> Settings:
    """Load the settings, with the options over them."""
    overrides = list(options.overrides)
    for level in ("warning", "critical"):
        for text in getattr(options, level):
            name, separator, value = text.partition("=")
            if not separator or name not in NAMES:
                raise ConfigError(
                    f"--{level} {text}: write it as NAME=VALUE; NAME is one of {_NAMES}"
                )
            overrides.append(f"monitor.{name}.{level}={value}")
    for key, text in (("backlog_age_s", options.older_than), ("window_s", options.window)):
        if text is not None:
            overrides.append(f"monitor.{key}={_seconds(text)}")
    return load_settings(options.config, overrides)


def _seconds(text: str) -> float:
    try:
        since_s = since_time(text, 0.0)
    except ConfigError:
        since_s = None
    if since_s is None or since_s > 0:  # a date lies after the time 0, too
        raise ConfigError(f"{text}: write a time as 90s, 15m, 2h or 7d")
    return abs(since_s)


def requeue(settings: Settings) -> int:
    """Publish every untagged post without a job, and return their number; repeat it freely."""
    from deploy import embedded
    from king.broker.connect import publish_posts
    from king.messages import PostMessage
    from king.store.queries import open_queries

    running = embedded.peek(settings)
    for url in (running.broker.url, running.store.url):
        if url.startswith(embedded.SCHEME):
            raise ConfigError(DOWN)
    with open_queries(running.store) as queries:
        return publish_posts(running.broker, map(PostMessage, queries.untagged_ids()))


def once(settings: Settings, *, as_json: bool, again: bool) -> int:
    """Look once, print it, and return the exit code."""
    checks = judge(look(settings), settings.monitor)
    code = EXIT_CODES[worst(checks)]
    requeued: int | None = None
    if again:
        try:
            requeued = requeue(settings)
        except TaggingError as error:
            complain("check.py", f"not requeued: {error}", 0)
            code = EXIT_CODES["critical"]
    if as_json:
        print_json(as_dict(checks, requeued))
        return code
    show(checks)
    if requeued is not None:
        say(f"requeued {requeued} posts to {settings.broker.queue}\n")
    return code


def watch(settings: Settings, every_s: float, *, as_json: bool) -> int:
    """Look every few seconds until SIGTERM or Ctrl-C, and return the exit code."""
    with Stopper() as stopper:
        while not stopper.asked:
            due = time.monotonic() + every_s
            checks = judge(look(settings), settings.monitor)
            if as_json:
                say(json.dumps(as_dict(checks), ensure_ascii=False) + "\n")
                sys.stdout.flush()
            elif sys.stdout.isatty():
                show(checks, redraw=True)
            else:
                log_look(checks)
            stopper.wait(due - time.monotonic())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, once or again and again; return the exit code."""
    return exit_code("check.py", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = parse(arguments)
        settings = settings_of(options)
        configure_logs(settings.log.format, settings.log.level)
        if options.watch is not None:
            return watch(settings, options.watch, as_json=options.json)
        return once(settings, as_json=options.json, again=options.requeue)
    except ConfigError as error:
        say(f"UNKNOWN: {error}\n")
        return EXIT_CODES["unknown"]


if __name__ == "__main__":
    sys.exit(main())
