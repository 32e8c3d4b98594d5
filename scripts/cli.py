"""The command line ``insighttag``.

Exit codes: 0 done, 2 the user's input or configuration is wrong (one line on standard error that
names the key or file), 1 anything else. A mistake of the user never shows a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import typer

from common.cli import USAGE_ERROR, complain, exit_code, say
from scripts.commands import (
    bundle,
    cache,
    dead,
    doctor,
    export,
    inspect,
    labels,
    publish,
    retag,
    services,
    show,
    status,
    tag,
    train,
    tune,
    weights,
    zeroshot,
)

_NAME = "insighttag"
_LEVEL = "INSIGHTTAG_LOG__LEVEL"


def build_app() -> typer.Typer:
    """Every command by its name."""
    app = typer.Typer(
        name=_NAME,
        help="Multimodal tagging: posts in by message queue, tags out to MongoDB.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    app.callback()(_global_options)
    app.command("publish")(publish.publish)
    app.command("retag")(retag.retag)
    app.command("train")(train.train)
    app.command("tag")(tag.tag)
    app.command("inspect")(inspect.inspect)
    app.command("status")(status.status)
    app.command("show")(show.show)
    app.command("doctor")(doctor.doctor)
    app.command("export")(export.export)
    app.command("tune")(tune.tune)
    app.command("zeroshot")(zeroshot.zeroshot)
    groups = {
        "dead": ("The dead letters: posts set aside with their reason.", dead.COMMANDS),
        "bundle": ("Bundles: back to an earlier one, thresholds, more tags.", bundle.COMMANDS),
        "labels": ("The taxonomy: recorded changes and checks.", labels.COMMANDS),
        "cache": ("The feature cache.", cache.COMMANDS),
        "weights": ("The weights of encoders: what is needed, put in place.", weights.COMMANDS),
        "services": ("The embedded broker and database.", services.COMMANDS),
    }
    for name, (text, commands) in groups.items():
        group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
        for verb, function in commands.items():
            group.command(verb)(function)
        app.add_typer(group, name=name)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    command = typer.main.get_command(build_app())

    def call() -> int:
        try:
            code = command.main(
                args=list(arguments) if arguments is not None else None,
                prog_name=_NAME,
                standalone_mode=False,
            )
        except USAGE_ERROR as error:
            return _usage(error)
        except typer.Abort as error:
            raise KeyboardInterrupt from error
        return int(code) if isinstance(code, int) else 0

    return exit_code(_NAME, call)


def main() -> None:
    sys.exit(run())


def _say_version(wanted: bool) -> None:
    if wanted:
        say(f"{_NAME} {version(_NAME)}\n")
        raise typer.Exit


def _global_options(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Say the version."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="log.level: debug, for any command.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="log.level: error, for any command.")
    ] = False,
) -> None:
    if verbose and quiet:
        raise typer.BadParameter("-v asks for more and -q for less: give one of them")
    if verbose or quiet:
        # In the environment it goes over the settings file and under --set, and reaches the
        # processes that are started.
        context.call_on_close(partial(_set_level, os.environ.get(_LEVEL)))
        _set_level("debug" if verbose else "error")


def _set_level(level: str | None) -> None:
    if level is None:
        os.environ.pop(_LEVEL, None)
    else:
        os.environ[_LEVEL] = level


def _usage(error: Any) -> int:
    # No arguments at all: what is shown is the help, not a complaint.
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    context = getattr(error, "ctx", None)
    path = context.command_path.removeprefix("insighttag").strip() if context else ""
    message = " ".join(error.format_message().split())
    return complain(_NAME, f"{path}: {message}" if path else message, 2)


if __name__ == "__main__":
    main()
