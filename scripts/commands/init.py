"""``insighttag init``: a folder for one project, with commented settings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.cli import argument, option, say
from common.errors import ConfigError, path_told
from common.files import write_whole
from config.load import CONFIGS, DEFAULT_CONFIG
from config.presets import PRESETS, Preset
from fusion.infer.options import INFER_CONFIG
from fusion.train.options import TRAIN_CONFIG
from scripts.write_schemas import schemas, text_of

_FILES = {DEFAULT_CONFIG: "settings", TRAIN_CONFIG: "train", INFER_CONFIG: "infer"}
"""The files, and the schema of each: an editor completes and checks them by it."""

# What stands in the files that are copied -> what a new project has instead.
_CHANGES = {
    "preset: classic  ": "preset: {preset:<9}",
    "data/train_cls24_samples.json": "data/train_clsN.json  # N: number of tags; insighttag build",
    "data/valid_cls24_samples.json": "data/valid_clsN.json",
    "config/idx2name_cls24.json": "data/idx2name_clsN.json",
    "python online_process.py ": "insighttag work ",
    "python infer_net.py --infer_config": "insighttag infer --config",
    "python train_net.py --model_config config/train_config.yaml": "insighttag train-net",
    "infer_net.py": "insighttag infer",
    "what train_net.py wrote": "what insighttag train-net wrote",
    # A project has no source code of ours and no files of encoders.
    "$schema=../docs/schemas/": "$schema=../schemas/",
    "config/settings.py and config/features.py": "schemas/settings.schema.json",
    "config/settings.py": "schemas/settings.schema.json",
    "config/train.py": "schemas/train.schema.json",
    "config/fusion_models.py": "schemas/train.schema.json",
    "config/train_image_eff103.yaml, train_video_tsn_lstm.yaml": "docs/training.md",
}


def init(
    folder: Annotated[Path, argument("The project's folder.", "FOLDER")],
    preset: Annotated[
        Preset | None, option("The encoders; asks at a terminal, otherwise small.")
    ] = None,
) -> None:
    """Make a project folder with commented settings for a preset.

    Every command that runs in the folder uses them. Existing files are never overwritten.
    """
    written = {folder / path: path for path in _FILES}
    for path in (*written, *(_schema(folder, name) for name in _FILES.values())):
        if path.exists():
            raise ConfigError(f"init: {path}: already exists; name another folder")
    chosen = preset or _asked()
    every = schemas()
    with path_told(f"init: {folder}"):
        for path, source in written.items():
            write_whole(path, project_text(source, chosen))
        for name in _FILES.values():
            write_whole(_schema(folder, name), text_of(every[name]))
    say("".join(f"{path}\n" for path in written))
    say(
        f"next     cd {shlex.quote(str(folder))}\n"
        f"         insighttag weights get {chosen}\n"
        "         insighttag doctor\n"
        "         insighttag train POSTS --out mine    (files, without a database)\n"
        "         insighttag pull --out posts.jsonl    (the platform's database: store.url)\n"
    )


def project_text(path: Path, preset: str) -> str:
    """Return the settings file of a new project."""
    text = (CONFIGS / path.name).read_text(encoding="utf-8")
    for old, new in _CHANGES.items():
        text = text.replace(old, new.format(preset=preset))
    return text


def _schema(folder: Path, name: str) -> Path:
    return folder / "schemas" / f"{name}.schema.json"


def _asked() -> str:
    """Ask for the preset at a terminal; without one, take the smallest."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "small"
    names = ", ".join(PRESETS)
    while (name := typer.prompt(f"preset ({names})", default="small")) not in PRESETS:
        say(f"{name}: must be one of {names}\n")
    return str(name)
