"""The HTTP server: tags a post in one request, puts posts on the queue, and has a page to try."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import OneLineParser
from common.errors import ConfigError
from common.logs import configure_logs
from config.load import DEFAULT_CONFIG, load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped; gives the exit code."""
    parser = OneLineParser(prog="flask_server.py", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help=f"settings (default: {DEFAULT_CONFIG})")
    parser.add_argument(
        "--set",
        metavar="A.B=C",
        action="append",
        default=[],
        dest="overrides",
        help="one setting, over file and environment; may be repeated",
    )
    parser.add_argument("--host", help="address to listen on (default: http.host, 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (default: http.port, 8080)")
    parser.add_argument("--debug", action="store_true", help="a development server")
    options = parser.parse_args(arguments)
    named = {"host": options.host, "port": options.port}
    overrides = [f"http.{key}={value}" for key, value in named.items() if value is not None]
    try:
        settings = load_settings(options.config, [*options.overrides, *overrides])
        configure_logs(settings.log.format, "debug" if options.debug else settings.log.level)
        bundle = Path(settings.fusion.bundle)
        if not (bundle / "bundle.yaml").is_file():
            raise ConfigError(f"fusion.bundle: {bundle}: no bundle there; train_net.py makes one")
        from deploy import embedded
        from web.backend import Services
        from web.server import serve, serve_for_debugging

        services = Services(lambda: embedded.resolve(settings), lambda: embedded.peek(settings))
        return (serve_for_debugging if options.debug else serve)(settings, services)
    except ConfigError as error:
        sys.stderr.write(f"flask_server.py: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
