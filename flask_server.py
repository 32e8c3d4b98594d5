"""The HTTP server: tags a post in one request, puts posts on the queue, and has a page to try."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from common.cli import ConfigFile, Overrides, Script, flag, option
from common.errors import ConfigError
from common.logs import configure_logs
from config.load import load_settings


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: ConfigFile = None
    overrides: Overrides
    host: Annotated[str | None, option("address to listen on (default: http.host, 127.0.0.1)")] = (
        None
    )
    port: Annotated[str | None, option("default: http.port, 8080")] = None
    debug: Annotated[bool, flag("--debug", "a development server")] = False


def run(line: CommandLine) -> int:
    """Serve until stopped; return the exit code."""
    named = {"host": line.host, "port": line.port}
    overrides = [f"http.{key}={value}" for key, value in named.items() if value is not None]
    settings = load_settings(line.config, [*line.overrides, *overrides])
    configure_logs(settings.log.format, "debug" if line.debug else settings.log.level)
    bundle = settings.fusion.bundle
    if not (bundle / "bundle.yaml").is_file():
        raise ConfigError(f"fusion.bundle: {bundle}: no bundle there; train_net.py makes one")
    from deploy import embedded
    from web.backend import Services
    from web.server import serve, serve_for_debugging
    from workers.pool.placement import place

    services = Services(lambda: embedded.resolve(settings), lambda: embedded.peek(settings))
    return (serve_for_debugging if line.debug else serve)(place(settings).settings, services)


SCRIPT = Script("flask_server.py", CommandLine, run, about=__doc__)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
