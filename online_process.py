"""The daemon: takes post IDs off the queue and writes their tags to MongoDB."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from common.cli import ConfigFile, Overrides, exit_code, read_options
from common.logs import configure_logs
from config.load import load_settings

_NAME = "online_process.py"


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: ConfigFile = None
    overrides: Overrides
    drain: Annotated[
        bool,
        typer.Option(
            "--drain",
            help="exit 0 when the queue is empty, nothing is in flight and no retry is due",
        ),
    ] = False


def run(arguments: Sequence[str] | None) -> int:
    """Run the daemon; return the exit code."""
    line = read_options(CommandLine, _NAME, arguments, about=__doc__)
    settings = load_settings(line.config, line.overrides)
    configure_logs(settings.log.format, settings.log.level)
    from deploy import embedded
    from king.king import King

    return King(embedded.resolve(settings)).run(drain=line.drain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; 0 done, 2 the configuration is wrong, 1 anything else."""
    return exit_code(_NAME, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
