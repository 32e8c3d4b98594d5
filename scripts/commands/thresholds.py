"""``insighttag bundle thresholds``: show and change the score that each tag needs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

from common.cli import argument, option, print_json, say
from common.errors import ConfigError, path_told, told
from common.files import write_whole
from common.progress import notice
from common.tables import print_table
from config.load import did_you_mean
from fusion.bundle.folder import keep_bundle, replacing
from scripts.commands.common import AsJson

_FORMS = (".csv", ".json")
_SHOWN = 20  # changed tags that are printed; --json and --out have all

_Sets = Annotated[
    list[str] | None, option("One tag's threshold, 0 to 1; repeatable.", "TAG=X", "--set")
]
_File = Annotated[
    Path | None, option("Thresholds of some tags: .csv (tag,threshold) or .json.", "F", "--file")
]
_FromData = Annotated[
    Path | None, option("Fit all to labelled posts with features.", "F", "--from-data")
]
_Precision = Annotated[
    float | None,
    option(
        "With --from-data: share of given tags that should be right; default: best F1.",
        "X",
        "--precision",
        min=0,
        max=1,
    ),
]
_MinPositives = Annotated[
    int,
    option(
        "With --from-data: tags with fewer posts share a threshold.", None, "--min-positives", min=1
    ),
]
_Root = Annotated[
    Path | None, option("Root of feature files, for --from-data.", "DIR", "--features")
]
_Out = Annotated[Path | None, option("Write all thresholds to a .csv or .json file.", "F", "--out")]


def thresholds(
    folder: Annotated[Path, argument("The bundle.", "DIR")],
    *,
    sets: _Sets = None,
    file: _File = None,
    from_data: _FromData = None,
    precision: _Precision = None,
    min_positives: _MinPositives = 5,
    features: _Root = None,
    out: _Out = None,
    as_json: AsJson = False,
) -> None:
    """Show or change the score that each tag needs.

    A change makes a new version of the bundle with the same model. The daemon loads it by itself;
    insighttag retag --bundle-older-than current tags earlier posts again.
    """
    from fusion.infer.thresholds import fit_to_posts, read_thresholds, write_thresholds

    if from_data is None and (precision is not None or features is not None):
        option = "--precision" if precision is not None else "--features"
        raise ConfigError(f"bundle thresholds: {option} goes with --from-data F")
    if out is not None and out.suffix.lower() not in _FORMS:
        raise ConfigError(f"--out {out}: must be a .csv or .json file")
    about, before = read_thresholds(folder)
    asked: dict[str, float] = {}
    if from_data is not None:
        fitted, posts, metrics = fit_to_posts(
            folder, from_data, features, min_positives=min_positives, precision=precision
        )
        asked |= fitted
        _say_fit(fitted, posts, metrics["f1_micro"])
    if file is not None:
        asked |= _known(_read(file), before, str(file))
    for text in sets or ():
        asked |= _known(_one(text), before, "--set")
    backup, new = None, before
    version, changed = about.version, _changed(before, asked)
    if changed:
        with replacing(folder):
            about, before = read_thresholds(folder)  # another command may have changed others
            new, changed = {**before, **asked}, _changed(before, asked)
            backup = keep_bundle(folder)
            version = write_thresholds(folder, new)
    if out is not None:
        _write(out, new)
    if as_json:
        print_json({"name": about.name, "version": version, "thresholds": new})
        return
    if changed:
        _say_change(before, changed)
        say(f"{folder}: version {version}, thresholds changed: {len(changed)}\n")
        say(f"version {about.version} is kept in {backup}\n")
    elif sets or file is not None or from_data is not None:
        say(f"{folder}: version {version} has these thresholds already\n")
    elif out is None:
        say(f"{about.name} {version}\n")
        table = [(str(i), tag, f"{value:g}") for i, (tag, value) in enumerate(new.items())]
        print_table("", ("id", "tag", "threshold"), table, right=(0, 2))
    if out is not None:
        say(f"{out}: {len(new)} thresholds\n")


def _changed(before: Mapping[str, float], asked: Mapping[str, float]) -> dict[str, float]:
    return {tag: value for tag, value in asked.items() if round(value, 6) != before.get(tag)}


def _say_change(before: Mapping[str, float], changed: Mapping[str, float]) -> None:
    shown = list(changed)[:_SHOWN]
    rows = [(tag, f"{before[tag]:g}", f"{changed[tag]:g}") for tag in shown]
    if len(shown) < len(changed):
        rows.append((f"and {len(changed) - len(shown)} more", "", ""))
    print_table("", ("tag", "before", "now"), rows, right=(1, 2))


def _say_fit(fitted: Mapping[str, float], posts: int, f1: float) -> None:
    notice(f"fitted to {posts:,} posts: f1 {f1:.3f} with these thresholds")
    never = [tag for tag, value in fitted.items() if value == 1]
    if never:
        more = f" and {len(never) - 3} more" if len(never) > 3 else ""
        notice(
            f"no threshold gives {', '.join(never[:3])}{more} this precision: it is set to 1, so "
            "that they are almost never given; change it with --set"
        )


def _one(text: str) -> dict[str, Any]:
    tag, separator, value = text.rpartition("=")
    if not separator or not tag:
        raise ConfigError(f"--set {text!r}: write it as TAG=0.4")
    return {tag: value}


def _read(path: Path) -> Mapping[str, Any]:
    """Return thresholds by tag from a CSV or JSON file."""
    if path.suffix.lower() not in _FORMS:
        raise ConfigError(f"--file {path}: must be a .csv or .json file")
    with (
        path_told(f"--file {path}: cannot be read"),
        told(f"--file {path}: is not UTF-8", UnicodeDecodeError),
    ):
        text = path.read_text(encoding="utf-8-sig")  # Excel writes the mark
    if path.suffix.lower() == ".csv":
        return _from_csv(text, path)
    with told(f"--file {path}: not JSON", ValueError):
        content = json.loads(text)
    if isinstance(content, dict) and isinstance(content.get("thresholds"), dict):
        content = content["thresholds"]  # as --json prints them
    if not isinstance(content, dict):
        raise ConfigError(f'--file {path}: must map tags to thresholds, such as {{"cat": 0.4}}')
    return content


def _from_csv(text: str, path: Path) -> dict[str, Any]:
    rows: Sequence[list[str]] = [row for row in csv.reader(StringIO(text)) if row]
    if not rows or [cell.strip().lower() for cell in rows[0]] != ["tag", "threshold"]:
        raise ConfigError(f"--file {path}: the first line must be tag,threshold")
    values: dict[str, Any] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 2:
            raise ConfigError(f"--file {path}: row {number} has {len(row)} columns, not 2")
        if row[0] in values:
            raise ConfigError(f"--file {path}: row {number}: tag {row[0]!r} appears twice")
        values[row[0]] = row[1]
    return values


def _known(values: Mapping[str, Any], tags: Mapping[str, float], where: str) -> dict[str, float]:
    """Check tags and values."""
    checked = {}
    for tag, value in values.items():
        if tag not in tags:
            raise ConfigError(f"{where}: the bundle has no tag {tag!r}{did_you_mean(tag, tags)}")
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise ConfigError(f"{where}: {tag}: must be a number from 0 to 1, got {value!r}")
        checked[tag] = number
    return checked


def _write(path: Path, values: Mapping[str, float]) -> None:
    text = StringIO()
    if path.suffix.lower() == ".csv":
        csv.writer(text, lineterminator="\n").writerows([("tag", "threshold"), *values.items()])
    else:
        json.dump(values, text, ensure_ascii=False, indent=1)
    with path_told(f"--out {path}: cannot be written"):
        write_whole(path, text.getvalue())
