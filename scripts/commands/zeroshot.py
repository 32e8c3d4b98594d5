"""``insighttag zeroshot`` and ``insighttag bundle add-tags``: tags by their texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.cli import argument, complain, option, say
from common.errors import BundleError, ConfigError, told
from common.fingerprint import mismatch
from common.post import TEXT_STREAMS, Stream
from config.features import ExtractorName
from config.settings import Settings
from config.tags import TagTexts, load_tag_texts
from fusion.bundle.folder import keep_bundle, refuse_foreign, replacing
from scripts.commands.common import Config, Overrides, settings_of

if TYPE_CHECKING:
    from fusion.bundle.bundle import Bundle
    from fusion.bundle.tag_vectors import TagRows
    from fusion.models.base import FeatureManifest

_SPACES: tuple[Stream, ...] = ("video", "image", "audio", "text", "ocr", "asr")

Tags = Annotated[
    Path, option("tags.yaml: names, descriptions, synonyms, negatives.", "F", "--tags")
]
Out = Annotated[Path, option("Folder of the new bundle.", "DIR", "--out")]
Device = Annotated[str, option("cpu or cuda:N.", "X", "--device")]


def zeroshot(
    *,
    tags: Tags,
    out: Out,
    labels: Annotated[
        Path | None,
        option("A data file with features: its posts centre the vectors, labels calibrate.", "F"),
    ] = None,
    features: Annotated[
        Path | None, option("Root of feature files, for posts that name none.", "DIR")
    ] = None,
    device: Device = "cpu",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Make a bundle of texts about tags, without training.

    Each modality whose encoder embeds texts takes part: CLIP, SigLIP, CLAP, EmbeddingGemma, and
    sentence encoders for text and OCR. The daemon serves the bundle like any other.
    """
    texts, settings = load_tag_texts(tags), settings_of(config, overrides)
    refuse_foreign(out, "--out")
    from fusion.bundle.tag_vectors import zero_shot
    from fusion.data.dataset import FeatureFiles
    from fusion.data.posts import PostList

    posts = None if labels is None else PostList.read(labels, texts.labels(), progress=True)
    rows, manifest = _embedded(texts, settings, device)
    bundle = zero_shot(texts, rows, manifest, posts, FeatureFiles(features), name=out.name)
    version = _replace(out, bundle)
    measured = ""
    if bundle.metrics:
        gap, mean = bundle.metrics["gap"], bundle.metrics["map"]
        by = f"of the {bundle.seen_posts} posts that calibrate it"
        measured = f"; gap {gap:.4f}, map {mean:.4f} {by}"
    elif labels is not None:
        measured = "; not calibrated: there is no labelled post that no encoder was trained on"
    say(f"{out}: version {version}, {len(texts.tags)} tags by {', '.join(rows)}{measured}\n")


def add_tags(
    folder: Annotated[Path, argument("The bundle.", "DIR")],
    *,
    tags: Tags,
    out: Out,
    device: Device = "cpu",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Add tags to a bundle by texts about them, without training.

    For bundles of insighttag zeroshot, and those that were trained from one (model.name: tag_text).
    The settings must name the encoders that the bundle was made with.
    """
    texts, settings = load_tag_texts(tags), settings_of(config, overrides)
    refuse_foreign(out, "--out")
    from fusion.bundle.bundle import load_bundle
    from fusion.bundle.tag_vectors import text_streams, with_tags

    with told("bundle add-tags", BundleError):
        bundle = load_bundle(folder)
    streams = text_streams(bundle, str(folder))
    rows, manifest = _embedded(texts, settings, device, streams)
    needed = {stream: bundle.manifest.fingerprints[stream] for stream in streams}
    wrong = mismatch(needed, manifest.fingerprints)
    if wrong is not None:
        raise ConfigError(f"bundle add-tags: {folder}: {wrong}")
    grown = with_tags(bundle, texts, rows)
    version = _replace(out, grown)
    say(f"{out}: version {version}, {len(grown.labels)} tags\n")


def _replace(out: Path, bundle: Bundle) -> str:
    """Write a bundle, and keep the one that it replaces; return its version."""
    from fusion.bundle.bundle import save_bundle

    with replacing(out):
        backup = keep_bundle(out)
        version = save_bundle(out, bundle)
    if backup is not None:
        say(f"{out}: the bundle that was there is kept in {backup}\n")
    return version


def _embedded(
    texts: TagTexts, settings: Settings, device: str, streams: Sequence[Stream] = _SPACES
) -> tuple[dict[Stream, TagRows], FeatureManifest]:
    """Return the tags in the space of each stream that embeds texts, and how it is made.

    One encoder after another is loaded; one that embeds no texts, or has no weights, is named and
    takes no part.

    Raises:
        ConfigError: None takes part.
    """
    from extractors.feature_file import stream_fingerprints
    from extractors.suite import ExtractorSuite
    from fusion.bundle.tag_vectors import TagRows
    from fusion.models.base import FeatureManifest

    extractors: list[ExtractorName] = [
        name for name in ("video", "image", "audio") if name in streams
    ]
    if TEXT_STREAMS & set(streams):
        extractors += ["text", "ocr", *(("asr",) if settings.features.asr.enabled else ())]
    made: dict[Stream, str] = {}
    rows: dict[Stream, TagRows] = {}
    reasons = []
    for name in extractors:
        suite = ExtractorSuite(settings.features, device, (name,))
        try:
            suite.load()
            if name not in ("ocr", "asr"):
                rows[name] = TagRows.of(texts, partial(suite.embed_texts, name))
            made |= suite.by_extractor
        except ConfigError as error:
            reasons.append(f"{name} takes no part: {error}")
        finally:
            suite.close()
    if "text" in rows:
        rows |= {"ocr": rows["text"], "asr": rows["text"]}
    prints = stream_fingerprints(settings.features, made)
    rows = {stream: each for stream, each in rows.items() if stream in prints and stream in streams}
    if not rows:
        raise ConfigError("; ".join(reasons) or "no encoder embeds texts")
    for reason in reasons:
        complain("tags", reason, 0)
    manifest = FeatureManifest(
        {stream: each.vectors.shape[1] for stream, each in rows.items()},
        {stream: prints[stream] for stream in rows},
        settings.fusion.image_as_frames,
        settings.features.ocr_mode,
    )
    return rows, manifest
