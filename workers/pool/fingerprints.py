"""Fingerprints of the extractors, and whether the bundle was made for their features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from common.errors import ConfigError
from common.fingerprint import differing, known_parts, unpacked
from config.settings import FeatureSettings
from extractors.fingerprint import stream_fingerprints
from workers.protocol import CacheFingerprints, Expect, Stream


def expected_fingerprints(
    features: FeatureSettings, infos: Iterable[Mapping[str, str]]
) -> dict[Stream, str]:
    """Return stream -> fingerprint, from the extract workers' `Ready`.

    Raises:
        ConfigError: Two workers give the same extractor another fingerprint.
    """
    by_extractor = extractor_fingerprints(infos)
    return stream_fingerprints(features, by_extractor) if by_extractor else {}


def extractor_fingerprints(infos: Iterable[Mapping[str, str]]) -> dict[Stream, str]:
    """Return the fingerprint of each extractor, from the extract workers' `Ready`.

    Raises:
        ConfigError: Two workers give the same extractor another fingerprint.
    """
    by_extractor: dict[Stream, str] = {}
    for info in infos:
        for name, fingerprint in unpacked(info.get("fingerprints", "{}")).items():
            known = by_extractor.setdefault(name, fingerprint)
            if known != fingerprint:
                raise ConfigError(
                    f"extractor {name} differs between workers: {known} and {fingerprint}"
                    f"{differing(known, fingerprint)}"
                )
    return by_extractor


def known_extractors(infos: Iterable[Mapping[str, str]]) -> CacheFingerprints:
    """Return `extractor_fingerprints` as the message to the cache worker."""
    return CacheFingerprints(
        {stream: str(text) for stream, text in extractor_fingerprints(infos).items()}
    )


def expectation(expected: Mapping[Stream, str]) -> Expect:
    """Return fingerprints as the message to the fusion worker."""
    # A fingerprint is text that carries its parts; messages carry the two apart.
    return Expect({s: str(text) for s, text in expected.items()}, known_parts(expected))


def bundle_fingerprints(info: Mapping[str, str]) -> dict[Stream, str]:
    """Return stream -> fingerprint, from the fusion worker's `Ready`."""
    return unpacked(info.get("fingerprints", "{}"))


def mismatch(bundle: Mapping[Stream, str], expected: Mapping[Stream, str]) -> str | None:
    """Return the first stream that the bundle needs and the extractors do not give, in one line."""
    for stream, needed in bundle.items():
        actual = expected.get(stream)
        if actual != needed:
            named = actual or "nothing (its extractor is not enabled)"
            return (
                f"modality {stream}: the bundle needs {needed}, the extractors give "
                f"{named}{differing(needed, actual)}"
            )
    return None
