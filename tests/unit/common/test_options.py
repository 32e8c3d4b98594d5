"""Mistakes on the command line of the plain scripts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import pytest

import online_process
from common.cli import OneLineParser, count, natural, seconds, share
from demo.__main__ import main as demo_main
from deploy import watchdog
from scripts.data_scripts import analyze_posts, download_mp, make_demo_posts, pull_posts


def test_a_wrong_option_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """The script, the option, and where to read on; no usage before it."""
    parser = OneLineParser(prog="some.py")
    parser.add_argument("--number", type=int)
    for arguments, told in ((["--number", "x"], "--number"), (["--wrong"], "--wrong")):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(arguments)
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("some.py: ")
        assert said.count("\n") == 1
        assert told in said


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (download_mp.parse, ["posts", "--out", "x", "--processes", "abc"]),
        (download_mp.parse, ["posts", "--out", "x", "--retries", "abc"]),
        (download_mp.parse, ["posts", "--out", "x", "--backoff", "abc"]),
        (pull_posts.parse, ["--out", "x.jsonl", "--limit", "abc"]),
        (pull_posts.parse, ["--out", "x.jsonl", "--seed", "abc"]),
        (analyze_posts.parse, ["posts", "--out", "x", "--rare", "abc"]),
        (analyze_posts.parse, ["posts", "--out", "x", "--text_threshold", "abc"]),
        (analyze_posts.parse, ["posts", "--out", "x", "--hash_distance", "abc"]),
        (make_demo_posts.parse, ["--out", "x", "--posts", "abc"]),
        (make_demo_posts.parse, ["--out", "x", "--posts", "1", "--noise", "abc"]),
        (demo_main, ["--train", "abc"]),
    ],
)
def test_what_is_no_number_is_told_without_private_names(
    capsys: pytest.CaptureFixture[str], parse: Callable[[list[str]], Any], words: list[str]
) -> None:
    """The option, what was given, and what it must be."""
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert re.search(rf"argument {words[-2]}: abc: must be a (whole )?number \(", said)


@pytest.mark.parametrize(
    ("kind", "good", "bad", "told"),
    [
        (count, ["1", "20"], ["0", "-1"], "must be 1 or more"),
        (natural, ["0", "7"], ["-1"], "must be 0 or more"),
        (share, ["0", "0.5", "1"], ["-0.1", "1.1", "nan"], "must lie in 0 to 1"),
        (seconds, ["0.1", "60"], ["0", "-1", "inf", "nan"], "must be above 0"),
    ],
)
def test_numbers_have_their_bounds(
    kind: Callable[[str], float], good: list[str], bad: list[str], told: str
) -> None:
    """What lies inside is taken as it is; what does not is told with its bound."""
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: {told}$"):
            kind(text)


def test_the_scripts_say_it_so(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, whichever script it is."""
    calls = (
        (online_process.main, ["--wrong"]),
        (make_demo_posts.main, ["--posts", "0", "--out", "x"]),
        (watchdog.main, ["--config"]),
    )
    for main, arguments in calls:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
