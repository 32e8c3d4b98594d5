"""The daemon: takes post IDs off the queue and writes their tags to MongoDB."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.cli import OneLineParser
from common.errors import ConfigError
from common.logs import configure_logs
from config.load import DEFAULT_CONFIG, load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; gives the exit code."""
    parser = OneLineParser(prog="online_process.py", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help=f"settings (default: {DEFAULT_CONFIG})")
    parser.add_argument(
        "--set",
        metavar="A.B=C",
        action="append",
        default=[],
        dest="overrides",
        help="one setting, over file and environment; may be repeated",
    )
    parser.add_argument(
        "--drain",
        action="store_true",
        help="exit 0 when the queue is empty, nothing is in flight and no retry is due",
    )
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config, options.overrides)
        configure_logs(settings.log.format, settings.log.level)
        from deploy import embedded
        from king.king import King

        return King(embedded.resolve(settings)).run(drain=options.drain)
    except ConfigError as error:
        sys.stderr.write(f"online_process.py: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
