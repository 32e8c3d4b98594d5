"""Command lines: mistakes are one line with exit code 2, whichever program it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

import flask_server
import infer_net
import online_process
import train_net
from common.cli import exit_code, read_options, seconds, share
from common.errors import ConfigError, RetryableError
from demo.__main__ import main as demo_main
from deploy import watchdog
from scripts import cli
from scripts.data_scripts import analyze_posts, download_mp, make_demo_posts, pull_posts


@pytest.mark.parametrize(
    ("main", "words", "told"),
    [
        (download_mp.main, ["posts", "--out", "x", "--processes", "abc"], "'--processes'"),
        (download_mp.main, ["posts", "--out", "x", "--retries", "-1"], "'--retries'"),
        (download_mp.main, ["posts", "--out", "x", "--backoff", "abc"], "abc: must be a number"),
        (pull_posts.main, ["--out", "x.json"], "x.json: must end in .jsonl"),
        (pull_posts.main, ["--out", "x.jsonl", "--limit", "0"], "'--limit'"),
        (pull_posts.main, ["--out", "x.jsonl", "--seed", str(1 << 63)], "'--seed'"),
        (analyze_posts.main, ["posts", "--out", "x", "--text_threshold", "0"], "must be above 0"),
        (analyze_posts.main, ["posts", "--out", "x", "--hash_distance", "17"], "'--hash_distance'"),
        (make_demo_posts.main, ["--out", "x", "--posts", "1", "--noise", "2"], "be from 0 to 1"),
        (make_demo_posts.main, ["--posts", "0", "--out", "x"], "'--posts'"),
        (demo_main, ["--train", "abc"], "'--train'"),
        (demo_main, ["--set", "broker.urll=x"], "broker.urll"),
        (online_process.main, ["--wrong"], "--wrong"),
        (flask_server.main, ["--wrong"], "--wrong"),
        (watchdog.main, ["--config"], "--config"),
        (train_net.main, ["--wrong"], "--wrong"),
        (infer_net.main, ["--input", "x", "--resume", "--restart"], "--restart"),
        (infer_net.main, [], "'--input'"),
        (cli.run, ["show"], "'ID'"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    words: list[str],
    told: str,
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "good", "bad", "told"),
    [
        (share, ["0", "0.5", "1"], ["-0.1", "1.1", "nan"], "must be from 0 to 1"),
        (seconds, ["0.1", "60"], ["0", "-1", "inf", "nan"], "must be above 0"),
    ],
)
def test_numbers_have_their_bounds(
    kind: Callable[[str], float], good: list[str], bad: list[str], told: str
) -> None:
    """A number inside is taken as it is; the mistake names the bound."""
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(typer.BadParameter, match=f"^{text}: {told}$"):
            kind(text)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command line with every form of option."""

    files: Annotated[list[Path], typer.Option("--files", default_factory=list)]
    flag: Annotated[str | None, typer.Option("--flag")] = None
    number: Annotated[int, typer.Option("--number", min=1)] = 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Line(files=[])),
        (["--files", "a", "b", "--number", "3"], Line(files=[Path("a"), Path("b")], number=3)),
        (["--files", "a", "--files", "b"], Line(files=[Path("a"), Path("b")])),
        (["--flag"], Line(files=[], flag="true")),
        (["--flag", "--number", "2"], Line(files=[], flag="true", number=2)),
        (["--flag", "no"], Line(files=[], flag="no")),
        (["--flag=no", "--files=a"], Line(files=[Path("a")], flag="no")),
    ],
)
def test_values_in_a_row_and_flags_with_or_without_one(words: list[str], expected: Line) -> None:
    """The forms that the scripts have always had."""
    assert read_options(Line, "line", words, flags=("--flag",), many=("--files",)) == expected


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    """It names the program and what it does."""
    with pytest.raises(SystemExit) as ended:
        read_options(Line, "line", ["--help"], about="Try options.")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: line ")
    assert "Try options." in out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a\n b"), 2, "x: a b\n"),
        (RetryableError("later"), 1, "x: later; again\n"),
        (
            OSError(28, "No space left on device", "file"),
            1,
            "x: file: No space left on device; again\n",
        ),
        (OSError(36, "File name too long", "file"), 2, "x: file: File name too long\n"),
        (OSError(20, "Not a directory", "file/a"), 2, "x: file/a: Not a directory\n"),
        (OSError(21, "Is a directory", "folder"), 2, "x: folder: Is a directory\n"),
        (RuntimeError("Symlink loop from 'a'"), 2, "x: Symlink loop from 'a'\n"),
        (KeyboardInterrupt(), 1, "x: interrupted\n"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fail() -> None:
        raise error

    assert exit_code("x", fail, again="; again") == code
    assert capsys.readouterr().err == said
    assert exit_code("x", lambda: None) == 0
