"""The command line ``insighttag``.

Exit codes: 0 done, 2 the user's input or configuration is wrong (one line on standard error that
names the key or file), 1 anything else. A mistake of the user never shows a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from common.errors import ConfigError, TaggingError
from scripts.commands import (
    cache,
    dead,
    export,
    labels,
    publish,
    retag,
    services,
    show,
    status,
    tag,
)

# typer has carried click inside since 0.2x and imported it before: the class is found either way.
_USAGE_ERROR: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def build_app() -> typer.Typer:
    """Every command by its name."""
    app = typer.Typer(
        name="insighttag",
        help="Multimodal tagging: posts in by message queue, tags out to MongoDB.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
    )
    app.command("publish")(publish.publish)
    app.command("retag")(retag.retag)
    app.command("tag")(tag.tag)
    app.command("status")(status.status)
    app.command("show")(show.show)
    app.command("export")(export.export)
    groups = {
        "dead": ("The dead letters: posts set aside with their reason.", dead.COMMANDS),
        "labels": ("The taxonomy: recorded changes and checks.", labels.COMMANDS),
        "cache": ("The feature cache.", cache.COMMANDS),
        "services": ("The embedded broker and database.", services.COMMANDS),
    }
    for name, (text, commands) in groups.items():
        group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
        for verb, function in commands.items():
            group.command(verb)(function)
        app.add_typer(group, name=name)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    command = typer.main.get_command(build_app())
    try:
        code = command.main(
            args=list(arguments) if arguments is not None else None,
            prog_name="insighttag",
            standalone_mode=False,
        )
    except _USAGE_ERROR as error:
        return _usage(error)
    except ConfigError as error:
        return _complain(str(error), 2)
    except TaggingError as error:
        return _complain(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 1)
    except BrokenPipeError:
        # `insighttag dead list | head`: nobody reads on; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(code) if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the installed command."""
    sys.exit(run())


def _usage(error: Any) -> int:
    # No arguments at all: what is shown is the help, not a complaint.
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    context = getattr(error, "ctx", None)
    path = context.command_path.removeprefix("insighttag").strip() if context else ""
    message = " ".join(error.format_message().split())
    return _complain(f"{path}: {message}" if path else message, 2)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"insighttag: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    main()
