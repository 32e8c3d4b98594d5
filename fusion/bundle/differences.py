"""Descriptions of bundles from their files, and the differences of two; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BundleError, one_line
from common.fingerprint import differing
from common.post import Stream
from config.labels import LabelMap
from config.presets import flat
from fusion.bundle.about import About, check_files, read_about
from fusion.bundle.folder import made_at


@dataclass(frozen=True)
class BundleFiles:
    """A bundle's folder, ``bundle.yaml`` and labels."""

    folder: Path
    about: About
    labels: LabelMap

    @classmethod
    def read(cls, folder: Path, *, whole: bool = True) -> BundleFiles:
        """Read and check a bundle, with `whole` all bytes; BundleError where it is broken."""
        about = read_about(folder)
        return cls(folder, about, check_files(folder, about, whole=whole))

    def summary(self) -> dict[str, Any]:
        """Return the entry for a list of bundles."""
        about = self.about
        return {
            "folder": str(self.folder),
            "name": about.name,
            "version": about.version,
            "made_at": made_at(about.version),
            "model": about.model.name,
            "models": len(about.weights),
            "tags": len(self.labels),
            "gap": about.metrics.get("gap"),
            "error": None,
        }

    def content(self) -> dict[str, Any]:
        """Return everything but the weights."""
        about = self.about
        return {
            **self.summary(),
            "averaging": about.averaging if about.members_sha256 else None,
            "features": {
                stream: {"dim": entry.dim, "fingerprint": entry.fingerprint, "of": entry.made_of}
                for stream, entry in about.features.items()
            },
            "image_as_frames": about.image_as_frames,
            "ocr_mode": about.ocr_mode,
            "calibration": about.calibration.kind if about.calibration is not None else None,
            "metrics": dict(about.metrics),
            "seen_posts": about.seen_posts,
            "subsets": dict(about.subsets),
            "thresholds": dict(zip(self.labels.names, about.thresholds, strict=True)),
            "settings": flat(about.model.model_dump(mode="json")),
            "bytes": sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file()),
        }


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the entry of a folder for a list of bundles, with ``error`` if it is broken.

    Weights are not read: for many bundles that would take minutes.
    """
    try:
        return BundleFiles.read(folder, whole=False).summary()
    except BundleError as error:
        unknown = dict.fromkeys(("name", "version", "made_at", "model", "models", "tags", "gap"))
        return {"folder": str(folder), **unknown, "error": one_line(error)}


def other_features(one: About, other: About) -> str | None:
    """Return the first stream whose features differ between two bundles, in one line.

    Streams that only one of them takes are not compared: the extractors may produce them.
    """
    theirs = other.fingerprints
    for stream, fingerprint in one.fingerprints.items():
        if theirs.get(stream, fingerprint) != fingerprint:
            ways = f"{fingerprint}, not {theirs[stream]}{differing(fingerprint, theirs[stream])}"
            return f"modality {stream}: takes features of {ways}"
    if one.image_as_frames != other.image_as_frames:
        return f"image_as_frames is {one.image_as_frames}, not {other.image_as_frames}"
    return None


def differences(one: BundleFiles, other: BundleFiles) -> dict[str, Any]:
    """Return what differs between two bundles, values as ``[first, second]``."""
    ours, theirs = set(one.labels.names), set(other.labels.names)
    places = ((one.labels.index, other.labels.index), (one.about, other.about))
    both = [name for name in one.labels.names if name in theirs]
    thresholds = {
        name: [first.thresholds[at[name]] for at, first in zip(*places, strict=True)]
        for name in both
    }
    features: dict[Stream, list[Any]] = {
        stream: [
            entry.model_dump(include={"dim", "fingerprint"}) if entry is not None else None
            for entry in (one.about.features.get(stream), other.about.features.get(stream))
        ]
        for stream in dict.fromkeys([*one.about.features, *other.about.features])
    }
    streams = {stream: pair for stream, pair in features.items() if pair[0] != pair[1]}
    for stream, pair in streams.items():
        if all(pair):
            reason = differing(one.about.fingerprints[stream], other.about.fingerprints[stream])
            pair.append(reason.strip())
    contents = [
        {
            "name": each.about.name,
            "version": each.about.version,
            "models": len(each.about.weights),
            "averaging": each.about.averaging,
            "image_as_frames": each.about.image_as_frames,
            "ocr_mode": each.about.ocr_mode,
            "calibration": each.about.calibration and each.about.calibration.kind,
            **flat(each.about.model.model_dump(mode="json"), "model."),
        }
        for each in (one, other)
    ]
    return {
        "folders": [str(one.folder), str(other.folder)],
        "labels": {
            "added": [name for name in other.labels.names if name not in ours],
            "removed": [name for name in one.labels.names if name not in theirs],
            "renumbered": [n for n in both if one.labels.index[n] != other.labels.index[n]],
        },
        "thresholds": {name: pair for name, pair in thresholds.items() if pair[0] != pair[1]},
        "features": streams,
        "settings": _changed(*contents),
        "metrics": _changed(one.about.metrics, other.about.metrics),
        "weights": "same" if _weights(one.about) == _weights(other.about) else "other",
    }


def _weights(about: About) -> tuple[str, ...]:
    return (about.weights_sha256, *about.members_sha256)


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = dict.fromkeys([*one, *other])
    return {k: [one.get(k), other.get(k)] for k in keys if one.get(k) != other.get(k)}
