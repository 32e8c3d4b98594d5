"""``insighttag bundle``: go back to an earlier bundle; `zeroshot` has the adding of tags."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from common.cli import say
from common.errors import BundleError, ConfigError
from common.files import new_folder, write_whole
from scripts.commands.common import Config, Overrides, settings_of
from scripts.commands.thresholds import thresholds
from scripts.commands.zeroshot import add_tags


def rollback(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The earlier bundle.")],
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Serve an earlier bundle again, as the latest: its tags replace those of the one in between.

    It is copied into fusion.bundle under a version of now; the bundle there is kept next to it.
    Then insighttag retag --bundle-older-than current has the posts tagged again.
    """
    from fusion.bundle.bundle import load_bundle
    from fusion.bundle.folder import (
        ABOUT,
        keep_bundle,
        later_version,
        newest_version,
        refuse_foreign,
    )

    target = settings_of(config, overrides).fusion.bundle.resolve()
    refuse_foreign(target, "fusion.bundle")
    try:
        earlier = load_bundle(folder)
    except BundleError as error:
        raise ConfigError(f"bundle rollback: {error}") from error
    served = newest_version(target)
    version = later_version(served, earlier.version.rpartition("-")[2])
    about = (folder / ABOUT).read_text(encoding="utf-8")
    about, count = re.subn(
        rf"^version: .*{re.escape(earlier.version)}.*$",  # perhaps with the note of a rollback
        f"version: {version}  # {earlier.version}, put back by insighttag bundle rollback",
        about,
        count=1,
        flags=re.MULTILINE,
    )
    if not count:
        raise ConfigError(f"bundle rollback: {folder / ABOUT}: has no line `version: ...`")
    if folder.resolve() == target:
        write_whole(target / ABOUT, about)  # somebody has put the folder back already
    else:
        if (kept := keep_bundle(target)) is not None:
            say(f"kept {served} in {kept}\n")
        with new_folder(target) as part:
            shutil.copytree(folder, part, dirs_exist_ok=True)
            (part / ABOUT).write_text(about, encoding="utf-8")
    say(f"{target} is {earlier.name} {earlier.version} again, as version {version}\n")


COMMANDS: Mapping[str, Callable[..., None]] = {
    "rollback": rollback,
    "thresholds": thresholds,
    "add-tags": add_tags,
}
