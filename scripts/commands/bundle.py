"""``insighttag bundle``: list, show, serve, try and roll back bundles.

None of these commands needs torch: they read the files of bundles, check the digests, and copy the
files as they are. `compare`, `thresholds` and `zeroshot` have the other commands.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from common.cli import argument, flag, print_json, say
from common.errors import BundleError, ConfigError, told
from common.tables import print_table
from config.settings import FusionSettings
from fusion.bundle.about import read_about
from fusion.bundle.differences import BundleFiles, differences, other_features, summary_of
from fusion.bundle.folder import (
    ABOUT,
    Replaced,
    kept_bundles,
    put_bundle,
    refuse_foreign,
    replacing,
    shadow_folder,
)
from scripts.commands.common import AsJson, Config, Overrides, say_row, settings_of
from scripts.commands.compare import compare
from scripts.commands.thresholds import thresholds
from scripts.commands.zeroshot import add_tags

_SHOWN = 12  # tags and thresholds of a table; --json has all

Bundle = Annotated[Path, argument("The bundle.", "DIR")]
OtherFeatures = Annotated[
    bool,
    flag(
        "--other-features",
        "Allow other features than those of the served bundle: the settings must be changed "
        "too, and the daemon restarted.",
    ),
]


def list_bundles(
    folders: Annotated[
        list[Path] | None,
        argument("Folders with bundles; by default the one that holds fusion.bundle.", "DIR…"),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """List the bundles in folders: served, on trial, kept, and others."""
    fusion = settings_of(config, overrides).fusion
    if folders is None:
        named = (fusion.bundle.resolve(), shadow_folder(fusion).resolve())
        folders = list(dict.fromkeys(folder.parent for folder in named))
    states = _states(fusion)
    bundles = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"bundle list: {folder}: is not a folder")
        for each in sorted(folder.iterdir()):
            if not each.name.startswith(".") and (each / ABOUT).is_file():
                bundles.append({"state": states.get(each.resolve(), ""), **summary_of(each)})
    if as_json:
        print_json(bundles)
        return
    if not bundles:
        say(f"no bundle in {', '.join(map(str, folders))}\n")
        return
    above = None
    for bundle in bundles:  # no table: names and versions are wider than a terminal's columns
        folder = Path(bundle["folder"])
        if folder.parent != above:
            above = folder.parent
            say(f"{above}/\n")
        say(f"{bundle['state'] or '-':<8}{folder.name:<34} {bundle['version'] or 'broken'}\n")
        if bundle["error"] is not None:
            say(f"        {bundle['error']}\n")
            continue
        models = f" ({bundle['models']})" if bundle["models"] > 1 else ""
        gap = f", GAP {bundle['gap']:.4f}" if bundle["gap"] is not None else ""
        say(f"        {bundle['made_at']:%Y-%m-%d %H:%M} UTC, {bundle['model']}{models}, ")
        say(f"{bundle['tags']} tags{gap}\n")


def show(
    folder: Annotated[
        Path | None, argument("The bundle; the one in fusion.bundle by default.", "DIR")
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Show a bundle: model, features, tags with thresholds, metrics. Its files are checked."""
    fusion = settings_of(config, overrides).fusion
    folder = folder or fusion.bundle
    bundle = _read("show", folder)
    state = _states(fusion).get(folder.resolve(), "")
    content = {"state": state, **bundle.content()}
    if as_json:
        print_json(content)
        return
    models = f", mean of {content['models']}" if content["models"] > 1 else ""
    frames = str(content["image_as_frames"]).lower()
    say_row("bundle", f"{content['name']} {content['version']}{f', {state}' if state else ''}")
    say_row("folder", f"{folder}, {content['bytes'] / 1e6:.1f} MB, all files whole")
    say_row("made", f"{content['made_at']:%Y-%m-%d %H:%M} UTC")
    say_row("model", f"{content['model']}{models}, calibration {content['calibration'] or 'none'}")
    say_row("features", f"ocr_mode {content['ocr_mode']}, image_as_frames {frames}")
    rows = [
        (stream, entry["dim"], _encoder(entry["of"]), entry["fingerprint"][:12])
        for stream, entry in content["features"].items()
    ]
    print_table("", ("stream", "dim", "encoder", "fingerprint"), rows, right=(1,))
    if content["metrics"]:
        seen = f" of the {content['seen_posts']} posts it learned from" * bool(
            content["seen_posts"]
        )
        metrics = [(name, _number(value)) for name, value in content["metrics"].items()]
        print_table("", (f"metric{seen}", "value"), metrics, right=(1,))
    tags = list(content["thresholds"].items())
    print_table("", ("tag", "threshold"), _some(tags, len(tags)), right=(1,))


def diff(
    one: Annotated[Path, argument("The first bundle.", "DIR1")],
    other: Annotated[
        Path | None, argument("The second; the one in fusion.bundle by default.", "DIR2")
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Say what differs between two bundles: tags, thresholds, features, model, metrics."""
    other = other or settings_of(config, overrides).fusion.bundle
    first, second = _read("diff", one), _read("diff", other)
    content = differences(first, second)
    if as_json:
        print_json(content)
        return
    for sign, each in (("-", first), ("+", second)):
        say(f"{sign} {each.folder}: {each.about.name} {each.about.version}\n")
    labels, counted = content["labels"], content["thresholds"]
    for sign, key in (("-", "removed"), ("+", "added"), ("~", "renumbered")):
        if names := labels[key]:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            say(f"{sign} tags {key}: {', '.join(names[:_SHOWN])}{more}\n")
    pairs = sorted(counted.items(), key=lambda pair: -abs(pair[1][1] - pair[1][0]))
    rows = [
        *[(f"threshold of {name}", *map(_number, pair)) for name, pair in pairs[:_SHOWN]],
        *([(f"{len(pairs) - _SHOWN} more thresholds", "", "")] if len(pairs) > _SHOWN else []),
        *[
            (f"features of {name}", *map(_stream, pair))
            for name, pair in content["features"].items()
        ],
        *[(name, *pair) for name, pair in content["settings"].items()],
        *[(name, *map(_number, pair)) for name, pair in content["metrics"].items()],
        ("weights", "", content["weights"]),
    ]
    print_table("", ("", "first", "second"), [row[:3] for row in rows])
    for name, pair in content["features"].items():
        if pair[2:] and pair[2]:
            say(f"features of {name}: {pair[2]}\n")


def use(
    folder: Bundle,
    other_features: OtherFeatures = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Serve a bundle: copy it into fusion.bundle, and keep the old one next to it.

    A running daemon serves it from the next batch on, within fusion.reload_s. A broken bundle is
    refused here; insighttag status shows what the daemon refuses. No post is lost, and no result
    mixes two bundles.
    """
    fusion = settings_of(config, overrides).fusion
    bundle = _read("use", folder)
    if folder.resolve() == fusion.bundle.resolve():
        raise ConfigError(f"bundle use: {folder} is fusion.bundle, and is served already")
    done = _put("use", bundle, fusion.bundle, fusion, other_features, anew=False)
    say(f"{fusion.bundle} is {bundle.about.name} {done.version} now\n")
    _say_version("insighttag retag --bundle-older-than current", bundle, done)


def rollback(
    folder: Annotated[
        Path | None,
        argument("The earlier bundle; the one that was served before by default.", "DIR"),
    ] = None,
    other_features: OtherFeatures = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Serve an earlier bundle again, as the latest: its tags replace those of the one in between.

    It is copied into fusion.bundle with the current time as its version; the bundle there is kept
    next to it. Then use insighttag retag --bundle-older-than current to tag the posts again.
    """
    fusion = settings_of(config, overrides).fusion
    earlier = _read("rollback", folder or _served_before(fusion.bundle))
    done = _put("rollback", earlier, fusion.bundle, fusion, other_features, anew=True)
    about = earlier.about
    say(f"{fusion.bundle} is {about.name} {about.version} again, as version {done.version}\n")


def shadow(
    folder: Annotated[Path | None, argument("The bundle.", "DIR")] = None,
    off: Annotated[bool, flag("--off", "End the trial.")] = False,
    other_features: OtherFeatures = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Try a bundle on the posts that the daemon tags; its tags go to a sub-document of their own.

    It is copied into fusion.shadow, by default the folder of fusion.bundle with .shadow added to
    its name. The served tags do not change. insighttag bundle compare shows how they differ.
    """
    from king.store.documents import shadow_path

    settings = settings_of(config, overrides)
    fusion, target = settings.fusion, shadow_folder(settings.fusion)
    if off == (folder is not None):
        raise ConfigError("bundle shadow: name a bundle, or --off")
    if folder is None:
        _end_trial(target)
        return
    bundle = _read("shadow", folder)
    if target.resolve() in (fusion.bundle.resolve(), folder.resolve()):
        raise ConfigError(
            f"fusion.shadow: {target}: is the folder of the bundle that is named or served"
        )
    done = _put("shadow", bundle, target, fusion, other_features, anew=False, keep=False)
    say(f"{target} is {bundle.about.name} {done.version} now\n")
    say(f"its tags go to {shadow_path(settings.store)} of the posts: insighttag bundle compare\n")


def _end_trial(target: Path) -> None:
    if not (target / ABOUT).is_file():
        say(f"there is no bundle on trial in {target}\n")
        return
    hidden = target.resolve().with_name(f".{target.name}.off")
    with told("bundle shadow", BundleError), replacing(target):
        shutil.rmtree(hidden, ignore_errors=True)
        target.resolve().rename(hidden)  # in one step: the daemon sees no half of it
        shutil.rmtree(hidden)
        if target.is_symlink():
            target.unlink()
    say(f"{target}: the trial has ended\n")


def _put(
    command: str,
    bundle: BundleFiles,
    target: Path,
    fusion: FusionSettings,
    other: bool,
    *,
    anew: bool,
    keep: bool = True,
) -> Replaced:
    """Put a bundle into the folder of the served one, or of the one on trial."""
    refuse_foreign(target.resolve(), "fusion.bundle" if keep else "fusion.shadow")
    if not other:
        _check_features(command, bundle, fusion)
    with told(f"bundle {command}", BundleError):
        done = put_bundle(bundle.folder, target, anew=anew, keep=keep)
    if done.copy is not None:
        say(f"kept {done.before} in {done.copy}\n")
    return done


def _check_features(command: str, bundle: BundleFiles, fusion: FusionSettings) -> None:
    """Refuse a bundle for other features than those of the daemon, as it would itself."""
    wrong = None
    try:
        wrong = other_features(bundle.about, read_about(fusion.bundle))
    except BundleError:  # none is served, or a broken one: the daemon will tell
        return
    if wrong is not None:
        raise ConfigError(
            f"bundle {command}: {bundle.folder}: {wrong} as {fusion.bundle} does; if you change "
            "features.* in the settings too, add --other-features"
        )


def _served_before(bundle: Path) -> Path:
    before = next(kept_bundles(bundle), None)
    if before is None:
        raise ConfigError(
            f"bundle rollback: no bundle is kept next to {bundle}: name a folder "
            "(insighttag bundle list DIR)"
        )
    return before


def _states(fusion: FusionSettings) -> dict[Path, str]:
    """Return the state of each folder that has one."""
    states = dict.fromkeys(kept_bundles(fusion.bundle), "kept")
    named = {shadow_folder(fusion).resolve(): "shadow", fusion.bundle.resolve(): "served"}
    return {**states, **named}


def _read(command: str, folder: Path) -> BundleFiles:
    with told(f"bundle {command}", BundleError):
        return BundleFiles.read(folder)


def _say_version(retag: str, bundle: BundleFiles, done: Replaced) -> None:
    if done.version != bundle.about.version:
        say(f"its version was {bundle.about.version}, not later than {done.before}\n")
    if done.before is not None:
        say(f"tagged posts keep their tags; to tag them again: {retag}\n")


def _some(rows: list[tuple[Any, Any]], total: int) -> Iterable[tuple[Any, Any]]:
    yield from ((name, _number(value)) for name, value in rows[:_SHOWN])
    if total > _SHOWN:
        yield f"and {total - _SHOWN} more", ""


def _encoder(made_of: Mapping[str, Any]) -> str:
    name = str(made_of.get("arch") or made_of.get("encoder") or "")
    return " ".join(name.split())[:40]


def _stream(entry: Mapping[str, Any] | None) -> str:
    return f"{entry['dim']}, {entry['fingerprint']}" if entry is not None else "not taken"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


COMMANDS: Mapping[str, Callable[..., None]] = {
    "list": list_bundles,
    "show": show,
    "diff": diff,
    "use": use,
    "shadow": shadow,
    "compare": compare,
    "rollback": rollback,
    "thresholds": thresholds,
    "add-tags": add_tags,
}
