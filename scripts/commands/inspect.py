"""``insighttag inspect``: one media file as the model sees it."""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import option, print_json, say
from common.errors import (
    ConfigError,
    FetchRetryable,
    MediaError,
    PermanentError,
    one_line,
    path_told,
)
from common.post import MEDIA_KINDS, Media, MediaKind
from common.progress import told_if_long
from common.urls import is_url, local_source, redact
from config.settings import Settings
from scripts.commands.common import AsJson, Config, Overrides, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

    from extractors.media.decode import DecodedMedia


def inspect(
    source: Annotated[str, typer.Argument(metavar="FILE|URL")],
    *,
    kind: Annotated[
        MediaKind | None, option("Read it as this; by default as what it mainly is.", None, "--as")
    ] = None,
    out: Annotated[Path | None, option("Write the pictures and the sound there.", "DIR")] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Show a media file as the model sees it.

    Its type and streams, the chosen frames and their times, how they were turned upright, the
    sound, the text in the pictures, the words in the sound where ASR is on, and what is missing or
    wrong. No models but those of OCR and ASR are loaded.
    """
    settings = settings_of(config, overrides)
    if out is not None:
        with path_told(f"--out {out}"):
            out.mkdir(parents=True, exist_ok=True)
    with _local(source, settings) as path:
        facts = facts_of(path, settings, kind=kind, out=out)
    facts = {"source": redact(source), **facts}
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    if facts["error"]:
        raise typer.Exit(1)


@contextmanager
def _local(source: str, settings: Settings) -> Iterator[Path]:
    """Yield the path of a source; a URL is downloaded as the daemon does, and deleted."""
    from workers.fetch import Fetcher

    source = local_source(source)
    if not is_url(source):
        if not Path(source).is_file():
            what = "is a folder: name a file in it" if Path(source).is_dir() else "no such file"
            raise ConfigError(f"inspect: {source}: {what}")
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="inspect-") as folder:
        target = Path(folder) / "media"
        try:
            with closing(Fetcher(settings.fetch)) as fetcher:
                fetcher.fetch(Media("image", source), target)
        except (PermanentError, FetchRetryable) as error:
            raise ConfigError(f"inspect: {redact(source)}: {one_line(error, 300)}") from error
        yield target


def facts_of(
    path: Path, settings: Settings, *, kind: MediaKind | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Return what a media file gives, as JSON values; `out` gets its pictures and its sound."""
    from extractors.media.decode import decode_media
    from extractors.media.sniff import type_of

    with path.open("rb") as stream:
        file_type = type_of(stream)
    facts: dict[str, Any] = {
        "type": file_type.name if file_type else "unknown type of file",
        "bytes": path.stat().st_size,
        "start": file_type.start if file_type else 0,
        "streams": [],
    }
    kinds = file_type.kinds if file_type else ()
    first: MediaKind = next((k for k in MEDIA_KINDS if k in kinds), "image")
    read_as = kind or first
    facts |= {"read_as": read_as, "error": None, "notes": {}}
    if read_as != "image":
        facts |= _streams(path, read_as)
    try:
        media = decode_media(read_as, path, settings.features, settings.decode)
    except MediaError as error:
        facts["error"] = str(error)
        return facts
    facts["notes"] = {name: failure.message for name, failure in media.failures.items()}
    facts |= _decoded(path, media, settings, out)
    max_chars, count = (
        settings.features.ocr.max_chars,
        sum(len(each["text"]) for each in facts["ocr"]),
    )
    if count > max_chars:
        facts["notes"]["ocr"] = (
            f"of {count:,} characters the extractor keeps the first {max_chars:,} "
            "(features.ocr.max_chars)"
        )
    return facts


def _streams(path: Path, kind: MediaKind) -> dict[str, Any]:
    """Return the streams of a container as its headers describe them; nothing for a broken one."""
    from extractors.media.containers import open_container
    from extractors.media.sniff import check_type

    try:
        with open_container(path, check_type(path, kind)) as container:
            duration_s = round(container.duration / 1e6, 3) if container.duration else None
            return {"duration_s": duration_s, "streams": [_stream(s) for s in container.streams]}
    except MediaError:
        return {}  # decoding says why


def _stream(stream: Any) -> dict[str, Any]:
    codec = stream.codec_context
    facts: dict[str, Any] = {"type": stream.type, "codec": codec.name if codec else None}
    if stream.duration and stream.time_base:
        facts["duration_s"] = round(float(stream.duration * stream.time_base), 3)
    if codec and stream.type == "video":
        facts |= {"width": codec.width, "height": codec.height, "rate_hz": stream.average_rate}
    elif codec and stream.type == "audio":
        facts |= {"rate_hz": codec.sample_rate, "channels": codec.channels}
    return {name: float(v) if name == "rate_hz" and v else v for name, v in facts.items()}


def _decoded(
    path: Path, media: DecodedMedia, settings: Settings, out: Path | None
) -> dict[str, Any]:
    from extractors.media.decode import read_waveform
    from extractors.parts import SPEECH, audio_encoder

    by = {None: "", True: "GPU", False: "CPU, in place of the GPU"}[media.on_gpu]
    facts: dict[str, Any] = {"turned": media.turned, "decoder": by}
    if media.frames is not None:
        facts["frames"] = {"times_s": media.times_s, "shape": media.frames.shape}
    if media.image is not None:
        facts["image"] = {"shape": media.image.shape}
    facts["ocr"] = [
        {"width": p.shape[1], "height": p.shape[0], "text": text}
        for p, text in zip(media.pictures, _texts(media, settings), strict=True)
    ]
    waveform, sound = None, audio_encoder(settings.features.audio).sound
    if media.sound is not None:
        waveform, _ = read_waveform(path, settings.decode, sound.rate_hz)
        facts["sound"] = {
            "seconds": round(len(waveform) / sound.rate_hz, 3),
            "rate_hz": sound.rate_hz,
            "windows": len(media.sound),
            "window_s": sound.row_s,
            "peak": round(float(abs(waveform).max(initial=0)), 4),
        }
    if media.speech is not None:
        facts["speech"] = [
            {"start_s": i * SPEECH.row_s, "text": text}
            for i, text in enumerate(_spoken(media.speech, settings))
        ]
    if out is not None:
        facts["files"] = _write(out, media, waveform, sound.rate_hz)
    return facts


def _texts(media: DecodedMedia, settings: Settings) -> list[str]:
    """Return the text in each picture that OCR reads, also what the extractor would cut off."""
    from extractors.suite import ExtractorSuite

    if not media.pictures:
        return []
    whole = settings.features.ocr.model_copy(update={"max_chars": sys.maxsize})
    suite = ExtractorSuite(settings.features.model_copy(update={"ocr": whole}), names=("ocr",))
    with told_if_long("loading the models that read text in pictures"):
        suite.load()
    try:
        return [str(text) for text in suite.run("ocr", [(p,) for p in media.pictures])]
    finally:
        suite.close()


def _spoken(windows: npt.NDArray[np.float32], settings: Settings) -> list[str]:
    """Return the words in each window of the sound that ASR hears."""
    from extractors.models.asr import Whisper

    whisper = Whisper(settings.features.asr, "cpu")
    whisper.load()
    return whisper.transcribe(windows)


def _write(
    out: Path, media: DecodedMedia, waveform: npt.NDArray[np.float32] | None, rate_hz: int
) -> list[str]:
    """Write what the extractors get: squares, pictures for OCR, and the sound before its rows."""
    import soundfile
    from PIL import Image

    files: list[Path] = []
    for name, pictures in (
        ("frame", media.frames),
        ("image", media.image),
        ("ocr", media.pictures),
    ):
        for i, pixels in enumerate(() if pictures is None else pictures):
            files.append(out / f"{name}_{i:02}.png")
            Image.fromarray(pixels).save(files[-1])
    if waveform is not None:
        files.append(out / "sound.wav")
        soundfile.write(str(files[-1]), waveform, rate_hz, subtype="FLOAT")
    return [str(file) for file in files]


def _print(facts: dict[str, Any]) -> None:
    def line(name: str, text: object) -> None:
        # What a file says of itself may hold terminal escapes.
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
        say(f"{name:<9} {shown}\n")

    line("type", f"{facts['type']}, {facts['bytes']} bytes, read as {facts['read_as']}")
    if facts["start"]:
        line("", f"begins at byte {facts['start']}")
    for stream in facts["streams"]:
        line("stream", ", ".join(f"{k} {v}" for k, v in stream.items() if v is not None))
    if facts["error"]:
        line("failed", facts["error"])
        return
    if "frames" in facts:
        times = " ".join(f"{time:g}" for time in facts["frames"]["times_s"])
        line("frames", f"{len(facts['frames']['times_s'])} at {times} s")
    if "image" in facts:
        line("image", "x".join(map(str, facts["image"]["shape"])))
    for name in filter(facts.get, ("decoder", "turned")):
        line(name, facts[name])
    if "sound" in facts:
        line("sound", ", ".join(f"{k} {v}" for k, v in facts["sound"].items()))
    for picture in facts["ocr"]:
        line("picture", f"{picture['width']}x{picture['height']}")
        for text in picture["text"].splitlines():
            line("", text)
    for window in facts.get("speech", ()):
        line("speech", f"from {window['start_s']:g} s: {window['text'] or 'no words'}")
    for name, note in facts["notes"].items():
        line("note", f"{name}: {note}")
    for file in facts.get("files", ()):
        line("written", file)
