"""The daemon: takes post IDs off the queue and writes their tags to MongoDB."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from common.cli import ConfigFile, Overrides, Script, flag
from common.logs import configure_logs
from config.load import load_settings


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: ConfigFile = None
    overrides: Overrides
    drain: Annotated[
        bool,
        flag("--drain", "exit 0 when the queue is empty, nothing is in flight and no retry is due"),
    ] = False


def run(line: CommandLine) -> int:
    """Run the daemon; return the exit code."""
    settings = load_settings(line.config, line.overrides)
    configure_logs(settings.log.format, settings.log.level)
    from deploy import embedded
    from king.king import King
    from workers.pool.placement import place

    return King(embedded.resolve(place(settings).settings)).run(drain=line.drain)


SCRIPT = Script("online_process.py", CommandLine, run, about=__doc__)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
