"""``insighttag init``: a folder for one project, with commented settings."""

from __future__ import annotations

import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from common.cli import say
from common.errors import ConfigError, path_error
from common.files import write_whole
from config.load import DEFAULT_CONFIG
from config.presets import PRESETS, Preset
from fusion.infer.options import INFER_CONFIG
from fusion.train.options import TRAIN_CONFIG

_FILES = (DEFAULT_CONFIG, TRAIN_CONFIG, INFER_CONFIG)

# What stands in the files that are copied -> what a new project has instead.
_CHANGES = {
    "preset: classic  ": "preset: {preset}  ",
    "data/train_cls24_samples.json": "data/train_clsN.json  # N: number of tags; insighttag build",
    "data/valid_cls24_samples.json": "data/valid_clsN.json",
    "config/idx2name_cls24.json": "data/idx2name_clsN.json",
    "python online_process.py ": "insighttag work ",
    "python infer_net.py --infer_config": "insighttag infer --config",
    "python train_net.py --model_config config/train_config.yaml": "insighttag train-net",
}


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The project's folder.")],
    preset: Annotated[
        Preset | None,
        typer.Option("--preset", help="The encoders; asks at a terminal, otherwise small."),
    ] = None,
) -> None:
    """Make a project folder with commented settings for a preset.

    Every command that runs in the folder uses them. Existing files are never overwritten.
    """
    for path in _FILES:
        if (folder / path).exists():
            raise ConfigError(f"init: {folder / path}: already exists; name another folder")
    chosen = preset or _asked()
    try:
        for path in _FILES:
            write_whole(folder / path, project_text(path, chosen))
    except OSError as error:
        raise path_error(f"init: {folder}", error) from error
    say("".join(f"{folder / path}\n" for path in _FILES))
    say(
        f"next     cd {shlex.quote(str(folder))}\n"
        f"         insighttag weights get {chosen}\n"
        "         insighttag doctor\n"
        "         insighttag train POSTS --out mine    (files, without a database)\n"
        "         insighttag pull --out posts.jsonl    (the platform's database: store.url)\n"
    )


def project_text(path: Path, preset: str) -> str:
    """Return the settings file of a new project."""
    text = (files("config") / path.name).read_text(encoding="utf-8")
    for old, new in _CHANGES.items():
        text = text.replace(old, new.format(preset=preset))
    return text


def _asked() -> str:
    """Ask for the preset at a terminal; without one, take the smallest."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "small"
    names = ", ".join(PRESETS)
    while (name := typer.prompt(f"preset ({names})", default="small")) not in PRESETS:
        say(f"{name}: must be one of {names}\n")
    return str(name)
