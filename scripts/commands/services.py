"""``insighttag services``: the embedded broker and database."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.cli import print_json, say
from common.tables import print_table
from deploy import embedded
from scripts.commands.common import AsJson, Config, Overrides, duration, settings_of


def start(config: Config = None, overrides: Overrides = None) -> None:
    """Start those that are down; print their URLs."""
    settings = settings_of(config, overrides)
    for service in embedded.ensure(settings).values():
        say(f"{service.name}\t{service.url}\n")


def stop(config: Config = None, overrides: Overrides = None) -> None:
    """Stop them; their data stays."""
    stopped = embedded.stop(settings_of(config, overrides))
    say(f"stopped {', '.join(stopped)}\n" if stopped else "none was running\n")


def status(as_json: AsJson = False, config: Config = None, overrides: Overrides = None) -> None:
    """Say which run, and where."""
    settings = settings_of(config, overrides)
    views = embedded.status(settings)
    if as_json:
        print_json([view_json(view) for view in views])
        return
    rows = [
        (v.name, v.state, v.url, v.pid, None if v.running_s is None else duration(v.running_s))
        for v in views
    ]
    title = f"embedded services in {settings.embedded.folder}"
    print_table(title, ("service", "state", "url", "pid", "for"), rows)


def view_json(view: embedded.ServiceView) -> dict[str, object]:
    """Return one service as ``--json`` prints it."""
    return {"name": view.name, "state": view.state, "url": view.url, "pid": view.pid}


COMMANDS: Mapping[str, Callable[..., None]] = {"start": start, "stop": stop, "status": status}
