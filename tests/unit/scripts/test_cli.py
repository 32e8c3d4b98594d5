"""The tree of commands, options that every command takes, and `insighttag init`."""

import os
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import train_net
from config.load import load_settings
from config.presets import PRESETS
from config.train import TrainSettings
from fusion.train.options import train_settings
from scripts.cli import COMMANDS, EXAMPLES, build_command, run
from scripts.commands import status as status_module

_LEVEL = "INSIGHTTAG_LOG__LEVEL"


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Log levels of the settings that ``insighttag status`` loads."""
    monkeypatch.delenv(_LEVEL, raising=False)
    loaded: list[str] = []

    def status() -> None:
        loaded.append(load_settings().log.level)

    monkeypatch.setattr(status_module, "status", status)
    return loaded


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
def test_verbosity_of_one_command(words: tuple[str, ...], level: str, levels: list[str]) -> None:
    assert run([*words, "status"]) == 0
    assert levels == [level]
    assert _LEVEL not in os.environ


def test_the_environment_is_as_before(levels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_LEVEL, "warning")
    assert run(["-v", "status"]) == 0
    assert levels == ["debug"]
    assert os.environ[_LEVEL] == "warning"


def test_ctrl_c_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def status() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status_module, "status", status)
    assert run(["status"]) == 1
    assert capsys.readouterr().err == "insighttag: interrupted\n"


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


@pytest.fixture(scope="module")
def app() -> Any:
    return build_command(whole=True)


def leaves(command: Any, path: str = "") -> Iterator[str]:
    for name, each in command.commands.items():
        whole = f"{path} {name}".strip()
        yield from leaves(each, whole) if hasattr(each, "commands") else (whole,)


def context_of(app: Any, words: list[str]) -> Any:
    """Parse a command line as `run` does, without running it."""
    context = app.make_context("insighttag", list(words))
    while hasattr(context.command, "commands"):
        name, command, words = context.command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)
    return context


def test_the_help_says_of_a_command_what_the_command_says_of_itself(app: Any) -> None:
    said = {name: about for panel in COMMANDS.values() for name, (_, about) in panel.items()}
    own = {name: each.help.split("\n\n")[0] for name, each in app.commands.items()}
    assert said == {name: " ".join(about.split()) for name, about in own.items()}


def test_every_command_has_examples(app: Any) -> None:
    assert sorted(leaves(app)) == sorted(EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_stand_in_the_help_and_parse(path: str, app: Any) -> None:
    for words in EXAMPLES[path]:
        context = context_of(app, [*path.split(), *shlex.split(words)])
        assert f"insighttag {path} {words}".rstrip() in context.command.epilog


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("train-net --model_config a.yaml", "train-net --config a.yaml"),
        ("train-net --n_gpu 2 --epoch 3", "train-net --gpus 2 --epochs 3"),
        ("train-net --n-gpus 2 --save_dir runs", "train-net --gpus 2 --out runs"),
        ("train-net --fix_random_seed", "train-net --fix-random-seed true"),
        (
            "infer --infer_config a --input b --output c --n_gpus 1 --best_model m",
            "infer --config a --input b --out c --gpus 1 --bundle m",
        ),
        ("pull --out a.jsonl --min_posts_per_tag 3", "pull --out a.jsonl --min-posts-per-tag 3"),
        ("train p --out o --min_posts 3 --skip_bad", "train p --out o --min-posts 3 --skip-bad"),
        ("label_map --input a b --min_posts 2", "label-map --input a --input b --min-posts 2"),
        ("tune --model_config a.yaml", "tune --config a.yaml"),
        ("bundle add_tags d --tags t --out o", "bundle add-tags d --tags t --out o"),
    ],
)
def test_the_spelling_of_the_scripts_is_understood(words: str, same: str, app: Any) -> None:
    assert context_of(app, words.split()).params == context_of(app, same.split()).params


def test_help_shows_hyphens_and_keeps_square_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no line breaks in the brackets
    assert run(["build", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--test-since" in out
    assert "--test_since" not in out
    assert "[post_id, ...]" in out


def test_help_shows_no_value_behind_a_flag_and_fills_its_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["doctor", "-h"]) == 0
    out = capsys.readouterr().out
    assert "<bool>" not in out
    assert "weights, bundle, disk space, ports," in out


def test_help_is_whole_at_eighty_columns(
    app: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich ends a word that is longer than its column in an ellipsis."""
    monkeypatch.setenv("COLUMNS", "80")
    for path in leaves(app):
        assert run([*path.split(), "--help"]) == 0
    cut = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\S… +│|… ", line)]
    assert [line for line in cut if "ID…" not in line and "DIR…" not in line] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train-net", "--epoc", "3"], "insighttag: train-net: No such option: --epoc"),
        (["pul"], "Did you mean 'pull'"),
        (["top", "--every", "0"], "'--every'"),
        (["extract", "vidoe"], "Did you mean 'video'"),
        (["pull", "--out", "a.json"], "a.json: must end in .jsonl"),
        (["pull", "--out", "a.jsonl", "--query", "{"], "insighttag: pull: --query: not JSON"),
        (["infer", "--input", "x", "--resume", "--restart"], "insighttag: infer: --restart"),
        (["extract", "text", "--features", "f"], "insighttag: extract text: name the posts"),
        (["train", "--out", "o"], "name the posts once"),
        (["train", "p", "--posts", "q", "--out", "o"], "name the posts once"),
        (["serve", "--set", "fusion.bundle=/none"], "insighttag: serve: fusion.bundle: /none"),
        (["work", "--config", "none.yaml"], "insighttag: work: "),
    ],
)
def test_a_mistake_is_one_line_of_its_command(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


@pytest.mark.parametrize("preset", [*PRESETS, None])
def test_settings_of_a_new_project_are_those_of_its_preset(
    preset: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal nothing is asked: the preset is small."""
    options = [] if preset is None else ["--preset", preset]
    assert run(["init", str(tmp_path / "mine"), *options]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    expected = load_settings()
    text = Path("config/infer_config_e2e.yaml").read_text()
    assert f"preset: {preset or 'small'} " in text
    assert text.count("#") > 20  # what each key means
    other = load_settings(overrides=[f"features.preset={preset or 'small'}"])
    assert expected.features == other.features
    training = train_settings(train_net.SCRIPT.read([]))
    assert isinstance(training, TrainSettings)
    assert str(training.data.train) == "data/train_clsN.json"
    for file in Path("config").iterdir():
        first, *rest = file.read_text().splitlines()
        assert (file.parent / first.rpartition("=")[2]).is_file(), "an editor finds the schema"
        assert not any(".py" in line or "python " in line for line in rest), "nothing of a checkout"


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config" / "train_config.yaml"
    file.parent.mkdir()
    file.write_text("mine")
    assert run(["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"insighttag: init: {file}: already exists; name another folder\n"
    )
    assert file.read_text() == "mine"
    assert [each.name for each in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init"], "Missing argument 'FOLDER'"),
        (["init", "x", "--preset", "large"], "'--preset': 'large' is not one of"),
        (["init", "/proc/none/x"], "init: /proc/none/x: "),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
