"""Options before the command, help for typing mistakes, and completion."""

import os
from importlib.metadata import version

import pytest

from config.load import load_settings
from scripts.cli import run
from scripts.commands import status as status_module

_LEVEL = "INSIGHTTAG_LOG__LEVEL"


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Log levels of the settings that ``insighttag status`` loads."""
    monkeypatch.delenv(_LEVEL, raising=False)
    found: list[str] = []

    def status() -> None:
        found.append(load_settings().log.level)

    monkeypatch.setattr(status_module, "status", status)
    return found


@pytest.mark.parametrize(
    ("words", "level"),
    [
        ((), "info"),
        (("-v",), "debug"),
        (("--verbose",), "debug"),
        (("-q",), "error"),
        (("--quiet",), "error"),
    ],
)
def test_verbosity_holds_for_one_command(
    words: tuple[str, ...], level: str, levels: list[str]
) -> None:
    assert run([*words, "status"]) == 0
    assert levels == [level]
    assert _LEVEL not in os.environ


def test_the_environment_is_as_before(levels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_LEVEL, "warning")
    assert run(["-v", "status"]) == 0
    assert levels == ["debug"]
    assert os.environ[_LEVEL] == "warning"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"insighttag {version('insighttag')}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tga"], "'tag'"),
        (["bundel", "list"], "'bundle'"),
        (["tag", "--sett", "a=b", "x.json"], "--set"),
        (["--verson"], "--version"),
        (["-v", "-q", "status"], "give one of them"),
    ],
)
def test_a_typing_mistake_is_one_line_that_names_what_is_near(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert err.count("\n") == 1


def test_the_shell_can_ask_for_completions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_INSIGHTTAG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "insighttag ta")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        run([])
    assert capsys.readouterr().out.split() == ["tag"]
