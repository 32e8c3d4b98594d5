"""The command line ``insighttag``.

Exit codes: 0 done, 2 the user's input or configuration is wrong (one line on standard error that
names the key or file), 1 anything else. A mistake of the user never shows a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import Annotated, Any, TypeAlias

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperOption

from common.cli import HELP, USAGE_ERROR, WORDS, Script, complain, exit_code, say, usage_message

_NAME = "insighttag"
_LEVEL = "INSIGHTTAG_LOG__LEVEL"
# typer's exit code for a KeyboardInterrupt, about which it says nothing; no command of ours has it.
_INTERRUPTED = 130

Runs: TypeAlias = Callable[..., None] | Script[Any]

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


COMMANDS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "Your own files": {
        "init": (
            "scripts.commands.init:init",
            "Make a project folder with commented settings for a preset.",
        ),
        "train": (
            "scripts.commands.train:SCRIPT",
            "Train on your own posts: read, split, extract, train, report, in one folder.",
        ),
        "tag": ("scripts.commands.tag:tag", "Tag posts in files, without a queue."),
        "inspect": ("scripts.commands.inspect:inspect", "Show a media file as the model sees it."),
        "doctor": (
            "scripts.commands.doctor:doctor",
            "Check what the daemon needs, and say how to fix each fault.",
        ),
    },
    "From the platform to a training set": {
        "pull": (
            "scripts.data_scripts.pull_posts:SCRIPT",
            "Pull posts from the database into a posts file (JSON lines), in the order of _id.",
        ),
        "download": (
            "scripts.data_scripts.download_mp:SCRIPT",
            "Download the media of posts: many connections at once, the daemon's own safety "
            "limits.",
        ),
        "analyze": (
            "scripts.data_scripts.analyze_posts:SCRIPT",
            "Look at posts before training on them: tags, texts, media, duplicates, "
            "suspicious labels.",
        ),
        "label-map": (
            "corpus.build.label_map:SCRIPT",
            "Make a label map, index to name, from the labels of posts.",
        ),
        "build": (
            "corpus.build.command:SCRIPT",
            "Split posts into training, validation and test files, without leakage.",
        ),
        "extract": ("corpus.extract.run:COMMANDS", "Features of posts: image, video, audio, text."),
    },
    "Models": {
        "train-net": (
            "train_net:SCRIPT",
            "Train a fusion model on feature files and write its bundle; or a backbone.",
        ),
        "infer": ("infer_net:SCRIPT", "Tag posts from their feature files, or from raw media."),
        "tune": (
            "scripts.commands.tune:tune",
            "Train many times with other values, and write the best ones as DIR/best.yaml.",
        ),
        "zeroshot": (
            "scripts.commands.zeroshot:zeroshot",
            "Make a bundle of texts about tags, without training.",
        ),
        "out-of-fold": (
            "corpus.extract.out_of_fold:SCRIPT",
            "Extract features of a backbone's own training posts, by backbones that did not see "
            "them.",
        ),
        "export": (
            "scripts.commands.export:export",
            "Write a model for other runtimes, and check the file against the model.",
        ),
        "weights": (
            "scripts.commands.weights:COMMANDS",
            "The weights of encoders: list, download, verify.",
        ),
        "bundle": (
            "scripts.commands.bundle:COMMANDS",
            "Bundles: list, serve, try, compare, roll back, set thresholds.",
        ),
    },
    "Serving": {
        "work": (
            "online_process:SCRIPT",
            "The daemon: takes post IDs off the queue and writes their tags to MongoDB.",
        ),
        "serve": (
            "flask_server:SCRIPT",
            "The HTTP server: tags a post in one request, puts posts on the queue, and has a "
            "page to try.",
        ),
        "publish": ("scripts.commands.publish:publish", "Put posts on the queue."),
        "retag": ("scripts.commands.retag:retag", "Put posts on the queue to be tagged again."),
        "tune-host": (
            "scripts.commands.tune_host:tune_host",
            "Measure each stage with generated posts, and choose processes, threads, slots and "
            "batches.",
        ),
        "status": ("scripts.commands.status:status", "Say how the queue and the daemon stand."),
        "top": (
            "scripts.commands.top:top",
            "Watch the queue, the King, its workers, and the last failures.",
        ),
        "show": ("scripts.commands.show:show", "Show one post's tags, and why."),
        "dead": (
            "scripts.commands.dead:COMMANDS",
            "The dead letters: posts set aside with their reason.",
        ),
    },
    "Upkeep": {
        "labels": (
            "scripts.commands.labels:COMMANDS",
            "The taxonomy: recorded changes and checks.",
        ),
        "cache": ("scripts.commands.cache:COMMANDS", "The feature cache."),
        "services": ("scripts.commands.services:COMMANDS", "The embedded broker and database."),
    },
}
"""The commands of each panel of the help: what runs each one, and its line in the help.

The line stands here too since importing all commands for it takes most of a second.
"""


class _Deferred(TyperCommand):
    """A line of the help, which imports its command when that is called."""

    def __init__(self, name: str, source: str, about: str, panel: str) -> None:
        super().__init__(name, help=about, rich_help_panel=panel)
        self._source = source

    def load(self) -> Any:
        """Return the command, or the group of commands."""
        runs = resolve_name(self._source)
        app = _typer(self.help or "")
        if isinstance(runs, Mapping):
            for verb, verb_runs in runs.items():
                _add(app, f"{self.name} {verb}", verb_runs)
        else:
            _add(app, str(self.name), runs)
        return typer.main.get_command(app)

    def make_context(self, *args: Any, **values: Any) -> Any:
        command = self.load()
        _fit_help(command)
        return command.make_context(*args, **values)


def build_command(*, whole: bool = False) -> Any:
    """Return ``insighttag`` as a command of typer, with ``whole`` all commands of it loaded."""
    app = _typer("Multimodal tagging: posts in by message queue, tags out to MongoDB.", True)
    app.callback()(_global_options)
    command: Any = typer.main.get_command(app)
    for panel, its_commands in COMMANDS.items():
        for name, (source, about) in its_commands.items():
            line = _Deferred(name, source, about, panel)
            command.add_command(line.load() if whole else line, name)
    return command


def _typer(about: str, completion: bool = False) -> typer.Typer:
    return typer.Typer(
        name=_NAME,
        add_completion=completion,
        help=about,
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings=WORDS,
    )


def _add(app: typer.Typer, path: str, runs: Runs) -> None:
    shown: dict[str, Any] = {}
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
        elif isinstance(parameter, TyperOption) and parameter.metavar is None:
            _shorten_type(parameter, typer.Context(command))
    for each in getattr(command, "commands", {}).values():
        _fit_help(each)


def _shorten_type(option: TyperOption, context: Any) -> None:
    """Leave the room of a line for what an option does: its choices go there, too."""
    shown = option.display_type_rich(context) or ""
    if "|" in shown:
        choices = shown.strip("<>").replace("|", ", ")
        option.metavar, option.help = "X", f"{option.help} One of: {choices}."
    elif shown.startswith(("<int", "<float")):
        option.metavar = "N"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    command = build_command()
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
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        return int(code) if isinstance(code, int) else 0

    return exit_code(_NAME, call)


def main() -> None:
    sys.exit(run())


def _say_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version  # 30 ms, for this alone

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
