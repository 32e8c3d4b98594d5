"""The command line ``insighttag``.

Exit codes: 0 done, 2 the user's input or configuration is wrong (one line on standard error that
names the key or file), 1 anything else. A mistake of the user never shows a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple, TypeAlias

import typer
from rich.markup import escape

import flask_server
import infer_net
import online_process
import train_net
from common.cli import HELP, USAGE_ERROR, WORDS, Script, complain, exit_code, say, usage_message
from corpus.build import command as build
from corpus.build import label_map
from corpus.extract import out_of_fold
from corpus.extract.run import script as extraction
from corpus.extract.work import Kind
from scripts.commands import (
    bundle,
    cache,
    dead,
    doctor,
    export,
    init,
    inspect,
    labels,
    publish,
    retag,
    services,
    show,
    status,
    tag,
    top,
    train,
    tune,
    tune_host,
    weights,
    zeroshot,
)
from scripts.data_scripts import analyze_posts, download_mp, pull_posts

_NAME = "insighttag"
_LEVEL = "INSIGHTTAG_LOG__LEVEL"

Runs: TypeAlias = Callable[..., None] | Script[Any]
_KINDS: tuple[Kind, ...] = ("image", "video", "audio", "text")
_FILES, _CORPUS, _MODELS, _SERVING, _CARE = (
    "Your own files",
    "From the platform to a training set",
    "Models",
    "Serving",
    "Upkeep",
)


_EXTRACT = ("--input work/posts.jsonl --features work/features",)

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "init": ("mine", "mine --preset modern"),
    "train": (
        "pictures/ --labels labels.csv --out mine",
        "posts.jsonl --out mine --set trainer.epochs=5",
    ),
    "tag": (
        "pictures/ --out tags.jsonl --bundle mine/bundle",
        "picture.jpg --bundle mine/bundle --json",
    ),
    "inspect": ("picture.jpg", "clip.mp4 --out frames"),
    "doctor": ("--config mine/settings.yaml", "--json"),
    "pull": (
        "--since 30d --out work/posts.jsonl",
        """--query '{"lang": "en"}' --min-posts-per-tag 50 --out work/posts.jsonl""",
    ),
    "download": ("work/posts.jsonl --out work/media --per-host 16",),
    "analyze": ("work/posts.jsonl --media work/media --out work/analysis",),
    "extract image": _EXTRACT,
    "extract video": _EXTRACT,
    "extract audio": _EXTRACT,
    "extract text": _EXTRACT,
    "label-map": ("--input work/posts.jsonl --min-posts 20 --out work/tags.json",),
    "build": (
        "--input work/posts.jsonl --features work/features --labels work/tags.json --out data",
    ),
    "weights list": ("--preset small", "--config mine/settings.yaml"),
    "weights get": ("small", "modern --out FOLDER"),
    "weights verify": ("--preset small",),
    "train-net": ("--config config/train_config.yaml --epochs 20", "--resume runs"),
    "infer": ("--input data/test.json --bundle mine/bundle --out tags.jsonl",),
    "tune": ("--config config/train_config.yaml --trials 20",),
    "zeroshot": ("--tags tags.yaml --out workshop/weights/new",),
    "out-of-fold": ("--model-config image.yaml --features work/features",),
    "bundle list": ("", "workshop/weights --json"),
    "bundle show": ("", "workshop/weights/new"),
    "bundle diff": ("workshop/weights/new",),
    "bundle use": ("workshop/weights/new",),
    "bundle shadow": ("workshop/weights/new", "--off"),
    "bundle compare": (
        "",
        "workshop/weights/new --data workshop/data/test.json",
        "old.jsonl new.jsonl",
    ),
    "bundle rollback": ("", "workshop/weights/earlier"),
    "bundle thresholds": (
        "workshop/weights/insight",
        "workshop/weights/insight --set cat=0.4 --set dog=0.55",
    ),
    "bundle add-tags": ("workshop/weights/new --tags more.yaml --out workshop/weights/more",),
    "export": ("--bundle mine/bundle --out model.onnx",),
    "work": ("--config mine/settings.yaml", "--config mine/settings.yaml --drain"),
    "serve": ("--config mine/settings.yaml --port 8080",),
    "publish": ("POST_ID OTHER_ID", "--file ids.txt --priority 5", "--untagged"),
    "retag": ("--bundle-older-than current",),
    "tune-host": ("--config mine/settings.yaml", "--seconds 240 --videos 0 --images 3"),
    "status": ("--json",),
    "top": ("--config mine/settings.yaml", "--once --json"),
    "show": ("POST_ID",),
    "dead list": ("--json",),
    "dead show": ("POST_ID",),
    "dead replay": ("POST_ID", "--all"),
    "dead drop": ("POST_ID",),
    "labels check": ("work/tags.json --data data/train.json",),
    "labels rename": ("work/tags.json cats cat",),
    "labels merge": ("work/tags.json car cars --into car",),
    "labels split": ("work/tags.json pets --into cats --into dogs",),
    "labels retire": ("work/tags.json misc",),
    "labels history": ("work/tags.json",),
    "labels apply": ("work/tags.json --data data/train.json",),
    "cache stats": ("--json",),
    "cache prune": ("--max-mb 1000",),
    "cache clear": ("--yes",),
    "services start": ("",),
    "services stop": ("",),
    "services status": ("--json",),
}
"""Examples in the help of each command, without ``insighttag`` and the command before them."""


class Group(NamedTuple):
    """Commands under one name."""

    about: str
    commands: Mapping[str, Runs]


def commands() -> Mapping[str, Mapping[str, Runs | Group]]:
    """Return the commands of each panel of the help."""
    return {
        _FILES: {
            "init": init.init,
            "train": train.train,
            "tag": tag.tag,
            "inspect": inspect.inspect,
            "doctor": doctor.doctor,
        },
        _CORPUS: {
            "pull": pull_posts.SCRIPT,
            "download": download_mp.SCRIPT,
            "analyze": analyze_posts.SCRIPT,
            "extract": Group(
                "Features of posts: image, video, audio, text.",
                {kind: extraction(kind) for kind in _KINDS},
            ),
            "label-map": label_map.SCRIPT,
            "build": build.SCRIPT,
        },
        _MODELS: {
            "weights": Group("The weights of encoders: list, download, verify.", weights.COMMANDS),
            "train-net": train_net.SCRIPT,
            "infer": infer_net.SCRIPT,
            "tune": tune.tune,
            "zeroshot": zeroshot.zeroshot,
            "out-of-fold": out_of_fold.SCRIPT,
            "bundle": Group(
                "Bundles: list, serve, try, compare, roll back, set thresholds.",
                bundle.COMMANDS,
            ),
            "export": export.export,
        },
        _SERVING: {
            "work": online_process.SCRIPT,
            "serve": flask_server.SCRIPT,
            "publish": publish.publish,
            "retag": retag.retag,
            "tune-host": tune_host.tune_host,
            "status": status.status,
            "top": top.top,
            "show": show.show,
            "dead": Group("The dead letters: posts set aside with their reason.", dead.COMMANDS),
        },
        _CARE: {
            "labels": Group("The taxonomy: recorded changes and checks.", labels.COMMANDS),
            "cache": Group("The feature cache.", cache.COMMANDS),
            "services": Group("The embedded broker and database.", services.COMMANDS),
        },
    }


def build_app() -> typer.Typer:
    """Every command by its name."""
    app = _typer("Multimodal tagging: posts in by message queue, tags out to MongoDB.")
    app.callback()(_global_options)
    for panel, its_commands in commands().items():
        for name, runs in its_commands.items():
            if isinstance(runs, Group):
                sub = _typer(runs.about)
                for verb, verb_runs in runs.commands.items():
                    _add(sub, f"{name} {verb}", verb_runs)
                app.add_typer(sub, name=name, rich_help_panel=panel)
            else:
                _add(app, name, runs, rich_help_panel=panel)
    return app


def _typer(about: str) -> typer.Typer:
    return typer.Typer(
        name=_NAME,
        help=about,
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings=WORDS,
    )


def _add(app: typer.Typer, path: str, runs: Runs, **shown: Any) -> None:
    examples = EXAMPLES.get(path, ())
    if examples:
        lines = (f"  {_NAME} {path} {words}".rstrip() for words in examples)
        shown["epilog"] = "\n".join(("Examples:", *lines))
    if isinstance(runs, Script):
        runs.mount(app, path, **shown)
    else:
        app.command(path.rsplit(maxsplit=1)[-1], **shown)(runs)


def _fit_help(command: Any) -> None:
    """Have help shown as it is meant.

    Square brackets are markup to rich. typer would keep the line ends of docstrings, and say
    ``<bool>`` behind a flag, as if a value came after it.
    """
    paragraphs = (command.help or "").split("\n\n")
    command.help = escape("\n\n".join(" ".join(each.split("\n")) for each in paragraphs))
    command.epilog = escape(command.epilog or "")
    own_help = command.get_help_option(typer.Context(command, help_option_names=HELP))
    for parameter in (*command.params, own_help):
        parameter.help = escape(getattr(parameter, "help", None) or "")
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    for each in getattr(command, "commands", {}).values():
        _fit_help(each)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    command = typer.main.get_command(build_app())
    _fit_help(command)

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
        typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version."),
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
    message = usage_message(error)
    return complain(_NAME, f"{path}: {message}" if path else message, 2)


if __name__ == "__main__":
    main()
