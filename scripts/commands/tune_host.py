"""``insighttag tune-host``: measure this host, and choose the numbers of its workers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import flag, option, print_json, say
from common.errors import ConfigError, replaced
from common.files import locked
from common.logs import configure_logs
from common.progress import notice, progress_bar
from common.tables import print_table
from config.settings import Settings
from scripts.commands.common import AsJson, Config, Overrides, settings_of
from scripts.commands.status import king_health

if TYPE_CHECKING:
    from workers.pool.placement import Host
    from workers.sample_posts import Mix
    from workers.tuning import Tuning

_LEAST_S, _MOST_S = 5.0, 3600.0


def tune_host(
    *,
    seconds: Annotated[
        float, option("Time to measure, without loading the models.", min=_LEAST_S, max=_MOST_S)
    ] = 60.0,
    videos: Annotated[int, option("Videos of an average post.", min=0, max=20)] = 1,
    images: Annotated[int, option("Images of an average post.", min=0, max=20)] = 2,
    audios: Annotated[int, option("Sounds of an average post.", min=0, max=20)] = 0,
    dry_run: Annotated[
        bool, flag("--dry-run", "Show what would be written, and write nothing.")
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Measure each stage with generated posts, and choose processes, threads, slots and batches.

    The result is written to workers.host_file; the daemon uses it for keys that its settings leave
    open. A placement is only chosen if it tags more posts per second than the quick rule.
    """
    from workers.pool.placement import place, this_host, write_measured
    from workers.sample_posts import Mix
    from workers.tuning import has_bundle

    settings = settings_of(config, overrides)
    file = settings.workers.host_file
    if file is None:
        raise ConfigError("workers.host_file: null: name a file to write")
    _check_open(settings)
    king = king_health(settings)
    if king is not None and king["alive"]:
        raise ConfigError(
            f"a King runs here (pid {king['pid']}), and would share the cores: stop it first"
        )
    host = this_host()
    settings = _quiet(settings)
    if not has_bundle(settings):
        notice(f"fusion.bundle: {settings.fusion.bundle}: no bundle, so fusion is not measured")
    notice(f"{host.signature}: measuring for {seconds:g} s, plus loading the models a few times")
    tuning = _tune(settings, host, Mix(videos, images, audios), seconds)
    about = {
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
        "post": {"videos": videos, "images": images, "audios": audios},
        "cpu_ms": {stage.name: stage.cpu_ms for stage in tuning.stages},
        "posts_per_s": {trial.name: list(trial.posts_per_s) for trial in tuning.trials},
        "best": tuning.best,
    }
    if not dry_run:
        write_measured(file, host, settings.features, tuning.values, about)
    if as_json:
        written = None if dry_run else str(file)
        print_json({"host": host.signature, **about, **tuning.as_dict(), "written": written})
        return
    _print(tuning.as_dict())
    fixed = _fixed_keys(settings)
    if fixed:
        say(f"fixed by the settings: {', '.join(fixed)}\n")
    say("nothing is written\n" if dry_run else f"written: {file}\n")
    if not dry_run:
        say(f"the daemon uses: {_numbers(place(settings).settings.model_dump())}\n")


def _tune(settings: Settings, host: Host, mix: Mix, seconds: float) -> Tuning:
    """Measure in a temporary folder, alone on this host, and show the progress."""
    from workers.tuning import steps, tune

    file = Path(settings.workers.host_file or "")
    with ExitStack() as stack:
        with replaced(
            ConfigError("another tune-host runs here, and shares the cores"), TimeoutError
        ):
            stack.enter_context(locked(file.with_name(f".{file.name}.tuning")))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-host-")))
        bar = stack.enter_context(progress_bar("tune-host", steps(host)))

        def tell(what: str) -> None:
            bar.note(what)
            bar.advance()

        return tune(settings, host, mix, seconds, folder=folder, tell=tell)


def _fixed_keys(settings: Settings) -> list[str]:
    """Return the keys that are tuned and that the settings name themselves."""
    keys = [f"workers.{key}" for key in ("extractors", "slots")]
    keys = [key for key in keys if key.partition(".")[2] in settings.workers.model_fields_set]
    return keys + ["decode.processes"] * ("processes" in settings.decode.model_fields_set)


def _check_open(settings: Settings) -> None:
    """Refuse settings that name everything: what is measured would change nothing."""
    if len(fixed := _fixed_keys(settings)) == 3:
        raise ConfigError(
            f"nothing is left to choose: the settings name {', '.join(fixed)}; delete these keys "
            "first (--set workers=auto for the two of workers)"
        )


def _quiet(settings: Settings) -> Settings:
    """Return the settings with errors alone in the logs: lines would tear the progress bar."""
    level = "debug" if settings.log.level == "debug" else "error"
    log = settings.log.model_copy(update={"level": level})
    configure_logs(log.format, log.level)
    return settings.model_copy(update={"log": log})


def _print(tuning: Mapping[str, Any]) -> None:
    total = sum(stage["cpu_ms"] for stage in tuning["stages"]) or 1.0
    print_table(
        "CPU of each stage, for an average post",
        ("stage", "ms", "share", "memory, MB"),
        [
            (
                each["name"],
                f"{each['cpu_ms']:.1f}",
                f"{each['cpu_ms'] / total:.0%}",
                each["memory_mb"],
            )
            for each in tuning["stages"]
        ],
        right=(1, 2, 3),
    )
    if tuning["batches"]:
        print_table(
            "batches on the GPU",
            ("encoder", "rows", "rows/s", "memory, MB"),
            [
                (b["extractor"], b["rows"], b["rows_per_s"], b["memory_mb"])
                for b in tuning["batches"]
            ],
            right=(1, 2, 3),
        )
    print_table(
        "placements, in turns",
        ("placement", "posts/s of each turn", "numbers"),
        [
            (
                f"{trial['name']}{' (taken)' if trial['name'] == tuning['best'] else ''}",
                " ".join(f"{speed:.2f}" for speed in trial["posts_per_s"]),
                _numbers(trial["values"]),
            )
            for trial in tuning["trials"]
        ],
    )


def _numbers(values: Mapping[str, Any]) -> str:
    """Return a placement in words."""
    groups = [
        f"{'+'.join(each['extractors'])} {each['processes']} x {each['threads']} threads"
        f"{'' if each['device'] == 'cpu' else ' on ' + each['device']}"
        for each in values["workers"]["extractors"]
    ]
    decoders, slots = values["decode"]["processes"], values["workers"]["slots"]
    return f"{decoders} decoders; {'; '.join(groups)}; {slots} slots"
