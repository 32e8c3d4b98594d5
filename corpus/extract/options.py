"""The command line of the extraction scripts, and the settings that follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from common.cli import ConfigFile, JsonReport, Overrides, flag, option, read_options
from common.errors import ConfigError
from common.processes import cores
from config.load import load_settings, validate
from config.settings import Settings
from corpus.extract.work import POSTS_OF_MANIFEST, Kind

EngineName = Literal["local", "ray"]
Share = Literal["auto", "yes", "no"]

_DEVICE = re.compile(r"cpu|cuda:\d+")
_WHAT: Mapping[Kind, str] = {
    "text": "the text of posts, and of the words in their pictures",
    "audio": "the sounds of posts, and of the sound of their videos",
    "image": "the images of posts",
    "video": "the videos of posts",
}
_EPILOG = """
A post is passed over when its file has these features already, made by the same extractors from
the same media. Other modalities in a file stay as they are: the four scripts may run in any
order, or side by side. What was interrupted goes on when the same command is run again.
"""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: ConfigFile = None
    overrides: Overrides
    input: Annotated[Path | None, option("posts.jsonl, or a data file", "FILE")] = None
    manifest: Annotated[
        Path | None, option("manifest of download_mp.py, with its posts.jsonl next to it", "FILE")
    ] = None
    features: Annotated[Path, option("root of feature files", "DIR")]
    workers: Annotated[int, option("extractor processes; 0: by the cores", min=0)] = 0
    devices: Annotated[str | None, option("cpu, or cuda:0,cuda:1; default: settings'", "LIST")] = (
        None
    )
    engine: Annotated[EngineName, typer.Option()] = "local"
    address: Annotated[
        str | None, option("cluster of Ray: auto, ray://host:10001; default: one on this machine")
    ] = None
    batch: Annotated[int | None, option("frames, images, patches or texts per batch", min=1)] = None
    share: Annotated[
        Share,
        option(
            "whether posts share a pass: faster on GPUs, but the last bit of a feature may then "
            "differ from run to run; auto: on GPUs only"
        ),
    ] = "auto"
    as_json: JsonReport = False
    failures: Annotated[Path | None, option("default: DIR/failures_KIND.jsonl", "FILE")] = None
    limit: Annotated[int | None, option("only the first lines of the input", min=1)] = None
    force: Annotated[bool, flag("--force", "extract again what exists already")] = False
    retry_failed: Annotated[
        bool, flag("--retry_failed", "try again what has failed permanently")
    ] = False


@dataclass(frozen=True)
class Options:
    """Options of one run, with what follows from the command line.

    Attributes:
        settings: With the workers that the command asks for.
        posts: The posts file; relative paths are whole here and below.
        workers: Extractor processes, or actors of Ray; 0: as many actors as suit the cluster.
        devices: What they run on, in turn.
    """

    kind: Kind
    line: CommandLine
    settings: Settings
    posts: Path
    features: Path
    failures: Path
    workers: int
    devices: tuple[str, ...]


def about(kind: Kind) -> str:
    """Return the help of a script."""
    return f"Extract the features of {_WHAT[kind]} into one feature file a post.\n{_EPILOG}"


def parse(kind: Kind, arguments: Sequence[str]) -> Options:
    return options_of(kind, read_options(CommandLine, f"extract_{kind}_features", arguments))


def options_of(kind: Kind, line: CommandLine) -> Options:
    """Return the options that follow from a command line."""
    source = line.manifest or line.input
    if source is None or (line.manifest and line.input):
        raise ConfigError("name the posts with either --input or --manifest")
    settings = load_settings(line.config, line.overrides)
    if ":/" in str(line.features):  # what is left of a URL as a path
        raise ConfigError(
            f"--features {line.features}: must be a folder; for several machines one that all "
            "of them mount at the same path"
        )
    if line.address is not None and line.engine != "ray":
        raise ConfigError("--address: names a cluster of Ray; add --engine ray")
    devices = _devices(line.devices, settings)
    features = line.features.absolute()
    workers, processes = line.workers, 1
    if line.engine == "local":
        gpus = sum(device != "cpu" for device in devices)
        workers = workers or gpus or max(1, cores() // 2)
        processes = max(workers, len(devices))
    return Options(
        kind,
        line,
        _placed(settings, devices, processes, line.batch, line.share),
        posts=(source.parent / POSTS_OF_MANIFEST if line.manifest else source).absolute(),
        features=features,
        failures=(line.failures or features / f"failures_{kind}.jsonl").absolute(),
        workers=workers,
        devices=devices,
    )


def _placed(
    settings: Settings, devices: Sequence[str], processes: int, batch: int | None, share: Share
) -> Settings:
    """Return the settings with the workers that the command asks for, and quiet logs."""
    values: dict[str, Any] = settings.model_dump()
    first = settings.workers.extractors[0]
    on = [devices[i % len(devices)] for i in range(processes)]
    # Threads are the cores' share, so that processes do not take them from each other.
    threads = max(1, min(first.threads, cores() // processes))
    values["workers"]["extractors"] = [
        {"device": device, "processes": on.count(device), "threads": threads}
        for device in dict.fromkeys(on)
    ]
    decoders = max(1, cores() - processes, cores() // 2)
    values["decode"]["processes"] = decoders
    values["workers"]["slots"] = max(settings.workers.slots, 2 * (processes + decoders))
    gpus = any(device != "cpu" for device in devices)
    values["workers"]["share_batches"] = share == "yes" or (share == "auto" and gpus)
    if batch is not None:
        for name in ("video", "image", "audio", "text"):
            values["features"][name]["batch_size"] = batch
    if settings.log.level == "info":  # the default: lines of it would tear the progress bar
        values["log"]["level"] = "warning"
    return validate(Settings, values, "options")


def _devices(text: str | None, settings: Settings) -> tuple[str, ...]:
    if text is None:
        return tuple(dict.fromkeys(group.device for group in settings.workers.extractors))
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or not all(_DEVICE.fullmatch(name) for name in names):
        raise ConfigError(f"--devices {text}: write it as cpu, or as cuda:0,cuda:1")
    return names
