"""Mistakes on the command line of the plain scripts."""

from __future__ import annotations

import pytest

import online_process
from config.options import OneLineParser
from deploy import watchdog
from scripts.data_scripts import make_demo_posts


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
