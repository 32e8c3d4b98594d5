"""``insighttag weights``: what encoders need, put in place and checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from common.cli import argument, option, print_json, say
from common.errors import ConfigError
from common.files import new_file
from common.progress import notice
from common.tables import print_table
from config.features import FeatureSettings
from config.presets import PRESETS, TRAINED, Preset
from extractors.parts import PLACED
from scripts.commands.common import AsJson, Config, Overrides, settings_of

if TYPE_CHECKING:
    from extractors.models.catalog import Need

COLUMNS = ("preset", "for", "encoder", "from", "licence", "MB", "vector", "here")


def list_weights(
    preset: Annotated[Preset | None, option("Only this preset; default: all.")] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """List what each preset needs, and what of it is on this machine.

    With --config or --set: what these settings need.
    """
    from extractors.models.catalog import needs

    if config is not None or overrides:
        features_of = {"settings": settings_of(config, overrides).features}
    else:
        names = [preset] if preset else list(PRESETS)
        features_of = {name: FeatureSettings(preset=name) for name in names}
    rows = [about(name, need) for name, each in features_of.items() for need in needs(each)]
    if as_json:
        print_json(rows)
        return
    cells = [
        (
            row["preset"],
            ", ".join(row["for"]),
            row["encoder"],
            row["from"],
            row["licence"],
            f"{row['megabytes']:,}" if row["megabytes"] else "",
            row["dim"] or "",
            row["here"] or "missing",
        )
        for row in rows
    ]
    print_table("", COLUMNS, cells, right=(5, 6), width=200)
    say("To download them: insighttag weights get PRESET\n")


def get(
    name: Annotated[str, argument("A preset, or one encoder by its name.", "PRESET")],
    *,
    out: Annotated[Path, option("Where to put their folders.", "FOLDER")] = PLACED,
    source: Annotated[
        Literal["hub", "package"] | None,
        option("The source, if there is a choice; default: the preset's.", None, "--from"),
    ] = None,
) -> None:
    """Put weights into a folder that can be copied to machines without network.

    Encoders find them under workshop/pretrained, before any cache or hub.
    """
    from extractors.models.catalog import from_source, needs_of
    from extractors.models.placed import fetch
    from extractors.models.weights import HubUnreachable, in_place

    problems: list[str] = []
    unreachable: list[str] = []
    for need in needs_of(name):
        if need.origin in ("wheel", "file", "seed"):
            _not_fetched(need, out)
            continue
        chosen = from_source(need, source)
        target = out / in_place(chosen.name).name
        notice(f"{chosen.name}: {size_of(chosen)}from {origin_of(chosen)}")
        try:
            new = fetch(chosen, out)
        except HubUnreachable:
            unreachable += chosen.urls or [chosen.name]
            continue
        except ConfigError as error:
            problems.append(str(error))
            continue
        say(f"{target}: {'checked' if new else 'is there already, and complete'}\n")
        if chosen != need:
            keys = ", ".join(f"features.{each}.weights" for each in need.modalities)
            use = "package" if chosen.origin == "package" else "pretrained"
            say(f"for it set {keys} to {use}\n")
    if unreachable:
        problems.append(
            f"no network to {', '.join(unreachable)}: run insighttag weights get {name} --out "
            f"FOLDER where there is one, and copy the contents of FOLDER to {out}"
        )
    if problems:
        raise ConfigError(f"weights get {name}: {'; '.join(problems)}")


def verify(
    folder: Annotated[Path, argument("As weights get wrote it.", "FOLDER")] = (PLACED),
    preset: Annotated[Preset | None, option("Everything that it needs must be there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the sha256 of every file of weights; exit code 2 when one differs or is missing."""
    from extractors.models.catalog import needs
    from extractors.models.placed import check_all
    from extractors.models.weights import in_place

    checked = list(check_all(folder))
    again = "insighttag weights get PRESET brings it again"
    faults = [f"{fault}: {again}" for each in checked for fault in each.faults]
    for need in needs(FeatureSettings(preset=preset)) if preset else ():
        placed = folder / in_place(need.name).name
        absent = not need.here() if need.origin in ("wheel", "file") else not placed.is_dir()
        if absent:
            faults.append(f"{need.name} of the preset {preset} is missing: {_way_to(need, preset)}")
    if as_json:
        rows = [{"folder": str(e.folder), "weights": e.about, "faults": e.faults} for e in checked]
        print_json({"folders": rows, "faults": faults})
    else:
        cells = [(str(e.folder), *_state(e.about, len(e.faults))) for e in checked]
        print_table("", ("folder", "from", "files", "state"), cells, right=(2,), width=200)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(f"weights verify: {faults[0]}{more}")


def _way_to(need: Need, preset: str | None) -> str:
    """Return what brings weights that are missing."""
    match need.origin:
        case "wheel":
            return f"pip install {need.name}"
        case "file" if need.name in TRAINED:
            return f"train_net.py --model_config {TRAINED[need.name]} trains it on your posts"
        case "file":
            return "it is trained on your posts"
        case _:
            return f"insighttag weights get {preset}"


def _state(about: Mapping[str, Any] | None, faults: int) -> tuple[str, str, str]:
    """Return origin, number of files and state of a folder, for the table."""
    state = f"{faults} faults" if faults else "whole" if about else "no weights.json: not checked"
    return (about["source"], str(len(about["files"])), state) if about else ("", "", state)


def _not_fetched(need: Need, out: Path) -> None:
    """Say of weights that are not fetched where they come from; copy those that lie in place."""
    file = Path(need.name)
    match need.origin:
        case "wheel":
            state = need.here() or f"missing: {_way_to(need, None)}"
            notice(f"{need.arch}: its models come with the package {need.name} ({state})")
        case "file" if not file.is_file():
            notice(f"{need.name} is missing: {_way_to(need, None)}")
        case "file" if file.parent == PLACED and out.resolve() != PLACED.resolve():
            with new_file(out / file.name) as copy, file.open("rb") as original:
                shutil.copyfileobj(original, copy)
            say(f"{out / file.name}: copied\n")
        case "file":
            notice(f"{need.name} was trained here: copy it along")
        case _:
            pass


def about(preset: str, need: Need) -> dict[str, Any]:
    """Return one line of `weights list`."""
    return {
        "preset": preset,
        "for": need.modalities,
        "encoder": need.arch,
        "from": origin_of(need),
        "licence": need.licence,
        "megabytes": need.known.megabytes,
        "dim": need.known.dim,
        "here": need.here(),
    }


def origin_of(need: Need) -> str:
    """Return in words where weights come from."""
    match need.origin:
        case "hub":
            return f"hub: {need.name}"
        case "release":
            return f"release: {need.name}"
        case "package" | "wheel":
            return f"package: {need.name}"
        case "file":
            return f"trained here: {need.name}"
        case _:
            return need.name


def size_of(need: Need) -> str:
    """Return the size of a download in words, where it is known."""
    return f"{need.known.megabytes:,} MB " if need.known.megabytes else ""


COMMANDS: Mapping[str, Callable[..., None]] = {"list": list_weights, "get": get, "verify": verify}
