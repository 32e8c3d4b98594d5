"""The commands of ``insighttag``: examples that parse, one spelling of options, and its aliases."""

import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.cli import COMMANDS, EXAMPLES, build_command, run


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


def test_help_shows_hyphens_and_keeps_square_brackets(capsys: pytest.CaptureFixture[str]) -> None:
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
