"""The folder of a bundle: its version, and what becomes of the bundle that another one replaces.

Imports no torch.
"""

from __future__ import annotations

import re
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import yaml

from common.errors import BundleError, ConfigError
from common.files import link_or_copy, part_of, publish

ABOUT = "bundle.yaml"
_TIME = "%Y%m%dT%H%M%SZ"

# Files that hold weights alone, which need a bundle for the rest.
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")


def newest_version(folder: Path) -> str | None:
    """Return the version in the folder now, None while there is none; reads one small file."""
    try:
        text = (folder / ABOUT).read_text(encoding="utf-8")
        # The thresholds of many tags take long to parse, and the version stands before them.
        about = yaml.safe_load(text.partition("\nfeatures:")[0])
    except (OSError, ValueError, yaml.YAMLError):
        return None
    version = about.get("version") if isinstance(about, dict) else None
    return version if isinstance(version, str) else None


def thresholds_of(folder: Path, version: str) -> tuple[float, ...]:
    """Return the thresholds of a bundle; none where the folder holds no bundle of this version."""
    if newest_version(folder) != version:
        return ()
    try:
        rest = (folder / ABOUT).read_text(encoding="utf-8").partition("\nthresholds:")[2]
        # Only these lines, and by the C parser: the whole file takes seconds with many tags.
        own = re.split(r"\n(?=[a-z])", rest, maxsplit=1)[0]
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return tuple(float(value) for value in yaml.load(own, Loader=loader))  # noqa: S506 - safe
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return ()


def later_version(served: str | None, digest: str) -> str:
    """Return the version of now for weights with a digest: later than the one that is served.

    The clock that made the served one may have been ahead.
    """
    now = datetime.now(timezone.utc).strftime(_TIME)
    if served is not None and now <= served[: len(now)]:
        made = datetime.strptime(served[: len(now)], _TIME).replace(tzinfo=timezone.utc)
        now = (made + timedelta(seconds=1)).strftime(_TIME)
    return f"{now}-{digest}"


def refuse_foreign(bundle: Path, setting: str) -> None:
    """Check that a folder may be replaced by a bundle."""
    try:
        other = bundle.exists() and not (bundle / ABOUT).exists() and any(bundle.iterdir())
    except OSError as error:
        raise ConfigError(f"{setting}: {bundle}: cannot be a bundle's folder: {error}") from error
    if other:
        raise ConfigError(
            f"{setting}: {bundle} holds something that is no bundle and would be replaced: "
            "name another folder"
        )


def keep_bundle(bundle: Path) -> Path | None:
    """Keep the bundle that will be replaced, next to it as ``NAME.VERSION``; return the copy.

    The bundle that is served stays where it is; files are hard links where the file system has
    them. Of a link, the bundle that it leads to is kept under that one's name.
    """
    source = bundle.resolve()
    version = newest_version(source)
    if version is None:
        return None
    copy = source.with_name(f"{source.name}.{version}")
    if copy.exists():
        return copy
    part = part_of(copy)
    try:
        if part.exists():  # of a run that was killed here
            shutil.rmtree(part)
        shutil.copytree(source, part, copy_function=link_or_copy)
        publish(part, copy)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise BundleError(f"{bundle}: the bundle there cannot be kept: {error}") from error
    return copy
