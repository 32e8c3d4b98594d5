"""The parsers of the commands and scripts themselves, without running what they start.

A script runs until it parses its command line. What it would parse with, a command of typer or a
parser of argparse, ends it there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer

from common.cli import USAGE_ERROR
from scripts.cli import build_command

ROOT = Path(__file__).resolve().parents[2]


class WrongCommandLineError(Exception):
    """A command line that the program would refuse; the message is the program's own."""


@dataclass
class _Stopped(BaseException):  # nothing of a script catches it
    parser: Any
    words: Sequence[str]


@cache
def insighttag() -> Any:
    """Return the command of typer behind ``insighttag``."""
    return build_command(whole=True)


def script_parser(path: str, words: Sequence[str] = ()) -> tuple[Any, Sequence[str]]:
    """Return the parser of a script of the repository, and the words as it would get them.

    Raises:
        LookupError: It reads its words itself.
    """
    if "sys.argv[1" in (ROOT / path).read_text(encoding="utf-8"):
        raise LookupError(f"{path} has no parser")
    get_command = typer.main.get_command

    class Stopper:
        def __init__(self, app: typer.Typer) -> None:
            self._command = get_command(app)

        def main(self, *, args: Sequence[str] | None = None, **_options: Any) -> None:
            raise _Stopped(self._command, sys.argv[1:] if args is None else args)

    def stop(parser: Any, args: Sequence[str] | None = None, *_: Any) -> None:
        raise _Stopped(parser, sys.argv[1:] if args is None else args)

    with (
        patch.object(sys, "argv", [path, *words]),
        patch.object(sys, "path", [str((ROOT / path).parent), *sys.path]),
        patch.object(typer.main, "get_command", Stopper),
        patch.object(argparse.ArgumentParser, "parse_args", stop),
        warnings.catch_warnings(),
    ):
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except _Stopped as stopped:
            return stopped.parser, stopped.words
    raise LookupError(f"{path} has no parser")


def parser_of(words: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """Return the parser of ``insighttag ...`` or ``python script.py ...``, and its words.

    Raises:
        WrongCommandLineError: There is no such script.
    """
    if words[0] != "python":
        return insighttag(), words[1:]
    if not (ROOT / words[1]).is_file():
        raise WrongCommandLineError(f"{words[1]}: no such script")
    return script_parser(words[1], words[2:])


def check(words: Sequence[str]) -> None:
    """Parse a command line as its program would.

    Raises:
        WrongCommandLineError: The program would refuse it, or there is none.
    """
    parser, rest = parser_of(words)
    if isinstance(parser, argparse.ArgumentParser):
        _check_argparse(parser, rest)
    else:
        _check_typer(parser, list(rest))


def check_names(words: Sequence[str]) -> None:
    """Look up the subcommand and the options that a line names, whatever else it lacks.

    Raises:
        WrongCommandLineError: One does not exist.
    """
    parser, rest = parser_of(words)
    if isinstance(parser, argparse.ArgumentParser):
        known = set(parser._option_string_actions)
    else:
        while hasattr(parser, "commands") and rest and not rest[0].startswith("-"):
            if rest[0] not in parser.commands:
                raise WrongCommandLineError(f"No such command {rest[0]!r}.")
            parser, rest = parser.commands[rest[0]], rest[1:]
        known = {name for each in parser.params for name in each.opts + each.secondary_opts}
    unknown = [word for word in rest if word.startswith("-") and word not in {*known, "--help"}]
    if unknown:
        raise WrongCommandLineError(f"No such option: {unknown[0]}")


def _check_argparse(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            parser.parse_args(words)
        except SystemExit as error:
            raise WrongCommandLineError(said.getvalue().strip()) from error


def _check_typer(command: Any, words: list[str]) -> None:
    name, parent = "", None
    try:
        while command is not None:
            context = command.make_context(name, words, parent=parent)
            if not hasattr(command, "resolve_command"):
                return
            name, command, words = command.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            parent = context
    except USAGE_ERROR as error:
        raise WrongCommandLineError(error.format_message()) from error  # type: ignore[attr-defined]


def subcommands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a command and all below it with their names, in the order of the help."""
    yield name, command
    for each, child in getattr(command, "commands", {}).items():
        yield from subcommands(child, f"{name} {each}".strip())
