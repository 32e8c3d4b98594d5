"""The folder of a bundle: read its version, replace it, and keep the earlier ones.

Imports no torch.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import yaml

from common.errors import BundleError, ConfigError, reason, replaced, told
from common.files import link_or_copy, locked, new_folder, part_of, publish, write_whole
from config.settings import FusionSettings

ABOUT = "bundle.yaml"
# Thresholds of 10,000 tags take Python's own reader 2 s; wheels bring the quick one.
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TIME = "%Y%m%dT%H%M%SZ"

# A command that replaces a bundle takes a second. At half, two of them on a loaded machine collide;
# at double, somebody waits a minute behind a process that hangs.
_LOCK_S = 30.0

# Changed thresholds make a copy, too. At half, an afternoon of them ends the way back to the model
# before; at double, twenty models of 400 MB take 8 GB.
MOST_KEPT = 10

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
        own = re.split(r"\n(?=[a-z])", rest, maxsplit=1)[0]  # the whole file takes far longer
        return tuple(map(float, yaml.load(own, Loader=YamlLoader)))  # noqa: S506 - safe
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return ()


def later_version(served: str | None, digest: str) -> str:
    """Return the version of now for weights with a digest: later than the one that is served.

    The clock that made the served one may have been ahead.
    """
    now = datetime.now(timezone.utc).strftime(_TIME)
    if served is not None and now <= served[: len(now)]:
        with replaced(
            BundleError(
                f"version {served}: no version is later than that of the bundle there: write the "
                f"time at which it was made in its {ABOUT}"
            ),
            ValueError,
            OverflowError,
        ):
            now = (made_at(served) + timedelta(seconds=1)).strftime(_TIME)
    return f"{now}-{digest}"


def shadow_folder(settings: FusionSettings) -> Path:
    """Return the folder of the bundle on trial, which may be absent."""
    return settings.shadow or settings.bundle.with_name(f"{settings.bundle.name}.shadow")


def refuse_foreign(bundle: Path, setting: str) -> None:
    """Check that a folder may be replaced by a bundle."""
    with told(f"{setting}: {bundle}: cannot be a bundle's folder"):
        other = bundle.exists() and not (bundle / ABOUT).exists() and any(bundle.iterdir())
    if other:
        raise ConfigError(
            f"{setting}: {bundle} holds something that is not a bundle and would be replaced: "
            "name another folder"
        )


@contextmanager
def replacing(bundle: Path) -> Iterator[None]:
    """Hold off other commands that read a bundle's version, keep the bundle and replace it.

    Of the copies that they keep the latest `MOST_KEPT` stay.

    Raises:
        BundleError: Another one does not end, or the folder around it cannot be written.
    """
    target = bundle.resolve()
    lock = target.with_name(f".{target.name}.lock")
    try:
        with locked(lock, _LOCK_S):
            parts = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{8}")
            for part in target.parent.iterdir():
                if parts.fullmatch(part.name):  # of a command that was killed
                    shutil.rmtree(part, ignore_errors=True)
            try:
                yield
                for old in list(kept_bundles(target))[MOST_KEPT:]:
                    shutil.rmtree(old, ignore_errors=True)
            finally:  # while it is held: a process that waits sees it go, and tries anew
                lock.unlink(missing_ok=True)
    except TimeoutError as error:
        raise BundleError(f"{bundle}: another command has been replacing it: try later") from error
    except OSError as error:
        raise BundleError(f"{bundle}: cannot be replaced: {error}") from error


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
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        what = f"{bundle}: the bundle there cannot be kept"
        raise BundleError(f"{what}: {reason(error)}") from error
    return copy


@dataclass(frozen=True)
class Replaced:
    """A folder that holds another bundle now.

    Attributes:
        version: Of the bundle in it.
        before: Of the one that it replaced; None where there was none.
        copy: The copy of that one.
    """

    version: str
    before: str | None = None
    copy: Path | None = None


def put_bundle(source: Path, target: Path, *, anew: bool, keep: bool = True) -> Replaced:
    """Copy a bundle into the folder of another, in one step; readers see the old or the new.

    Its version becomes one of now where it is not later than that of the bundle it replaces, whose
    tags it could not overwrite, and always with ``anew``. Files are copied: of links, what somebody
    copies over the source later would be served at once.

    Args:
        source: A bundle that has been checked.
        target: A folder, a link to one, or a name for a new one; `refuse_foreign` has accepted it.
        anew: Give it a version of now.
        keep: Keep the bundle that is replaced.

    Raises:
        BundleError: It cannot be copied.
    """
    target = target.resolve()
    failed = f"{target}: the bundle {source} cannot be put there"
    with replacing(target), told(failed, as_=BundleError):
        before, version = newest_version(target), str(newest_version(source))
        about = (source / ABOUT).read_text(encoding="utf-8")
        if anew or (before is not None and version <= before):
            about, version = _restamped(source / ABOUT, about, version, before)
        if source.resolve() == target:
            write_whole(target / ABOUT, about)
            return Replaced(version, before)
        copy = keep_bundle(target) if keep else None
        with new_folder(target) as part:
            # This file may differ, and its own time says that the bundle is another.
            but = shutil.ignore_patterns(ABOUT)
            shutil.copytree(source, part, ignore=but, dirs_exist_ok=True)
            (part / ABOUT).write_text(about, encoding="utf-8")
    return Replaced(version, before, copy)


def kept_bundles(bundle: Path) -> Iterator[Path]:
    """Yield the copies of replaced bundles next to a bundle's folder, the latest first."""
    target = bundle.resolve()
    # Each was later than the one that it had replaced, so the versions are in the order of serving.
    names = re.compile(re.escape(target.name) + r"\.\d{8}T\d{6}Z-[0-9a-f]{8}")
    if target.parent.is_dir():
        copies = [each for each in target.parent.iterdir() if names.fullmatch(each.name)]
        yield from sorted(copies, key=lambda copy: copy.name, reverse=True)


def made_at(version: str) -> datetime:
    """Return the time in a version."""
    return datetime.strptime(version.partition("-")[0], _TIME).replace(tzinfo=timezone.utc)


def _restamped(path: Path, about: str, version: str, before: str | None) -> tuple[str, str]:
    """Return the content of ``bundle.yaml`` with a version of now, and that version."""
    stamp = later_version(before, version.rpartition("-")[2])
    line = rf"^version: .*{re.escape(version)}.*$"  # perhaps with the note of an earlier time
    note = f"version: {stamp}  # {version}, put here by insighttag bundle"
    about, count = re.subn(line, note, about, count=1, flags=re.MULTILINE)
    if not count:
        raise BundleError(f"{path}: has no line `version: ...`")
    return about, stamp
