"""Whether the bundle was made for the features that the extractors give."""

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
    """Stream ─► fingerprint, from what the extract workers said in `Ready`.

    Raises:
        ConfigError: Two workers give the same extractor another fingerprint.
    """
    by_extractor = extractor_fingerprints(infos)
    return stream_fingerprints(features, by_extractor) if by_extractor else {}


def extractor_fingerprints(infos: Iterable[Mapping[str, str]]) -> dict[Stream, str]:
    """Fingerprint of each extractor, from what the extract workers said in `Ready`.

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
    """`extractor_fingerprints` as the message that the cache worker takes."""
    return CacheFingerprints(
        {stream: str(text) for stream, text in extractor_fingerprints(infos).items()}
    )


def expectation(expected: Mapping[Stream, str]) -> Expect:
    """Fingerprints as the message that the fusion worker takes."""
    # Plain text and what it is of apart: a pipe carries nothing but messages.
    return Expect({s: str(text) for s, text in expected.items()}, known_parts(expected))


def bundle_fingerprints(info: Mapping[str, str]) -> dict[Stream, str]:
    """Stream ─► fingerprint, from what the fusion worker said in `Ready`."""
    return unpacked(info.get("fingerprints", "{}"))


def mismatch(bundle: Mapping[Stream, str], expected: Mapping[Stream, str]) -> str | None:
    """What the bundle wants and the extractors do not give, in one line; None when it fits."""
    for stream, wanted in bundle.items():
        given = expected.get(stream)
        if given != wanted:
            named = given or "nothing (its extractor is not enabled)"
            return (
                f"modality {stream}: the bundle needs {wanted}, the extractors give "
                f"{named}{differing(wanted, given)}"
            )
    return None
