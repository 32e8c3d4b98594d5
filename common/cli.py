"""Command lines on typer: options as a dataclass, mistakes as one line, exit codes in one place.

Example:
    @dataclass(frozen=True, kw_only=True)
    class Options:
        posts: Annotated[Path, argument("posts file", "POSTS")]
        limit: Annotated[int | None, option("at most this many", "N", min=1)] = None

    SCRIPT = Script("count.py", Options, count, about="Count posts.")
    main = SCRIPT.main
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import typer
from typer.core import TyperCommand

from common.errors import ConfigError, TaggingError, one_line
from common.logs import open_standard_streams, visible
from common.times import plain

Options = TypeVar("Options")

# Only a name that somebody has given fails with these: `Path.exists` and `is_file` raise them too.
_WRONG_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)

Overrides: TypeAlias = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="A.B=C",
        default_factory=list,
        show_default=False,
        help="one setting, over file and environment; A.B=@FILE reads it from a file; repeatable",
    ),
]

# typer has carried click inside since 0.2x and imported it before: the class is found either way.
USAGE_ERROR: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def option(text: str, metavar: str | None = None, *names: str, **limits: Any) -> Any:
    """Return typer's option with a value; without names its name is that of the parameter."""
    return typer.Option(*names, metavar=metavar, help=text, **limits)


def flag(name: str, text: str) -> Any:
    """Return typer's option without a value, and without one that takes it back."""
    return typer.Option(name, help=text)


def argument(text: str, metavar: str | None = None) -> Any:
    """Return typer's argument."""
    return typer.Argument(metavar=metavar, help=text)


ConfigFile: TypeAlias = Annotated[Path | None, option("settings, YAML", "FILE", "--config")]
JsonReport: TypeAlias = Annotated[
    bool, flag("--json", "print one JSON object at the end; all else goes to standard error")
]


def hyphens(name: str) -> str:
    """Return an option's name with hyphens: each may be written with underscores too."""
    return name.replace("_", "-")


HELP = ["--help", "-h"]
WORDS = {"help_option_names": HELP, "token_normalize_func": hyphens}
"""typer's ``context_settings`` of every command."""


@dataclass(frozen=True)
class Script(Generic[Options]):
    """A command line, for a script of its own and for a command of ``insighttag``.

    Attributes:
        name: The script, as its help and its complaints call it.
        options: A dataclass annotated with typer's options.
        run: Takes the options, and returns the exit code, None for 0.
        flags: Options that take a value or none, which is ``true``.
        many: Options that take several values in a row: ``--input a b``.
        mistakes: The errors that are the user's.
        interrupted: Said after Ctrl-C.
        again: Said after errors that are not the user's: the way to go on.
    """

    name: str
    options: Callable[..., Options]
    run: Callable[[Options], int | None]
    about: str = ""
    flags: tuple[str, ...] = ()
    many: tuple[str, ...] = ()
    mistakes: tuple[type[TaggingError], ...] = (ConfigError,)
    interrupted: str = "interrupted"
    again: str = ""

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run as a script; 0 done, 2 the input is wrong, 1 anything else."""
        return self._exit_code(self.name, lambda: self.run(self.read(arguments)))

    def read(self, arguments: Sequence[str] | None = None) -> Options:
        """Parse the words of this process, or others."""
        return read_options(
            self.options,
            self.name,
            arguments,
            about=self.about,
            flags=self.flags,
            many=self.many,
        )

    def mount(self, app: typer.Typer, path: str, **shown: Any) -> None:
        """Add the script as the last word of a path, options with hyphens; ``shown`` as typer's."""

        def command(**values: Any) -> None:
            run = self._exit_code(f"insighttag: {path}", lambda: self.run(self.options(**values)))
            if run:
                raise typer.Exit(run)

        signature = inspect.signature(self.options, eval_str=True)
        parameters = signature.parameters.values()
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        cls = _command_class(self.flags, self.many, name_of=hyphens)
        app.command(path.rsplit(maxsplit=1)[-1], cls=cls, help=self.about, **shown)(command)

    def _exit_code(self, name: str, run: Callable[[], int | None]) -> int:
        return exit_code(
            name, run, mistakes=self.mistakes, interrupted=self.interrupted, again=self.again
        )


def read_options(
    options: Callable[..., Options],
    name: str,
    arguments: Sequence[str] | None = None,
    *,
    about: str | None = None,
    flags: Sequence[str] = (),
    many: Sequence[str] = (),
) -> Options:
    """Parse the words of this process, or others, into a dataclass annotated with typer's options.

    `name` and `about` stand in the help, after which SystemExit is raised. `flags` and `many` are
    those of `Script`.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=about or "", cls=_command_class(flags, many), context_settings=WORDS)(options)
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        parsed: Any = command.main(args=words, prog_name=name, standalone_mode=False)
    except USAGE_ERROR as error:
        raise ConfigError(usage_text(error)) from error
    if isinstance(parsed, int):
        raise SystemExit(parsed)
    return parsed  # type: ignore[no-any-return]


def _command_class(
    flags: Sequence[str], many: Sequence[str], *, name_of: Callable[[str], str] = str
) -> type[TyperCommand]:
    """Return typer's command for options with values that typer cannot read by itself."""

    class Spelled(TyperCommand):
        def __init__(self, *args: Any, **values: Any) -> None:
            super().__init__(*args, **values)
            for each in self.params:
                each.opts = list(dict.fromkeys(map(name_of, each.opts)))

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, _spelled_out(args, flags, many))

    return Spelled


def usage_text(error: Any) -> str:
    """Return a mistake on the command line as one line."""
    return f"{usage_message(error).removesuffix('.')} (see --help)"


def usage_message(error: Any) -> str:
    """Return what typer says of a mistake, on one line."""
    # typer takes choices and ranges from pydantic, whose own words come before the reason.
    return " ".join(error.format_message().split()).replace(": Value error, ", ": ")


def exit_code(
    name: str,
    run: Callable[[], int | None],
    *,
    mistakes: tuple[type[TaggingError], ...] = (ConfigError,),
    interrupted: str = "interrupted",
    again: str = "",
) -> int:
    """Run a command and return its exit code: 0 done, 2 the user's mistake, 1 anything else.

    ``mistakes`` are the errors that are the user's; ``interrupted`` is said after Ctrl-C, and
    ``again`` after errors that are not the user's: the way to go on.
    """
    open_standard_streams()
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except mistakes as error:
        return complain(name, one_line(error), 2)
    except TaggingError as error:
        return complain(name, one_line(error) + again, 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 1
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in _WRONG_NAME:
            return complain(name, f"{where}{error.strerror}", 2)
        return complain(name, f"{where}{error.strerror or one_line(error)}{again}", 1)
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # of `Path.resolve` before Python 3.13
            raise
        return complain(name, one_line(error), 2)
    except KeyboardInterrupt:
        return complain(name, interrupted, 1)
    finally:
        _drop_unwritten()


def _nobody_reads() -> bool:
    """Return True if standard output is a pipe whose reader is gone: ``insighttag ... | head``."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poller.poll(0))


def _drop_unwritten() -> None:
    """Drop output that cannot be written: Python would try once more at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(name: str, text: str, code: int) -> int:
    """Write one line on standard error, and return the exit code."""
    # A full disk, or a pipe that nobody reads, changes nothing about the exit code.
    with contextlib.suppress(OSError):
        sys.stderr.write(visible(f"{name}: {text}\n"))
    return code


def say(text: str) -> None:
    """Write on standard output, as `visible` gives it."""
    sys.stdout.write(visible(text))


def print_json(value: Any) -> None:
    """Print one JSON document."""
    say(json.dumps(value, ensure_ascii=False, indent=2, default=plain) + "\n")


@contextlib.contextmanager
def json_report(enabled: bool) -> Iterator[dict[str, Any]]:
    """Yield an object to fill; with ``--json`` it alone goes to standard output, after the block.

    What the block says goes to standard error then. An object that was filled is printed after an
    error, too.
    """
    report: dict[str, Any] = {}
    try:
        with contextlib.redirect_stdout(sys.stderr) if enabled else contextlib.nullcontext():
            yield report
    finally:
        if enabled and report:
            print_json(report)


def share(text: str) -> float:
    """Parse a part of a whole, 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text}: must be from 0 to 1")
    return value


def seconds(text: str) -> float:
    """Parse a time in seconds, above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{text}: must be above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text}: must be a number") from error


def _spelled_out(words: Sequence[str], flags: Sequence[str], many: Sequence[str]) -> list[str]:
    """Give every option exactly one value, which is all that typer can read."""
    with_or_without, in_a_row = ({hyphens(name) for name in names} for names in (flags, many))
    spelled: list[str] = []
    option = ""
    for index, word in enumerate(words):
        is_option = word.startswith("-")
        if not is_option and hyphens(option) in in_a_row and spelled[-1] != option:
            spelled.append(option)
        spelled.append(word)
        if is_option:
            option = word
            alone = index + 1 == len(words) or words[index + 1].startswith("-")
            if hyphens(word) in with_or_without and alone:
                spelled.append("true")
    return spelled
