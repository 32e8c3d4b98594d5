"""Fingerprints of modalities out of those of extractors."""

from pathlib import Path
from typing import Any

import pytest

from common.files import file_digest
from common.fingerprint import digest
from config.features import ExtractorName, FeatureSettings, OcrSettings
from extractors.feature_file import stream_fingerprints

ALL: dict[ExtractorName, str] = {"video": "v", "image": "i", "audio": "a", "text": "t", "ocr": "o"}


def of(mode: Any = "separate", enabled: bool = True, **changes: str) -> dict[str, str]:
    settings = FeatureSettings(ocr_mode=mode, ocr=OcrSettings(enabled=enabled))
    names: Any = {**ALL, **changes}
    found = stream_fingerprints(settings, names)
    return {str(key): value for key, value in found.items()}


def test_separate_gives_ocr_a_fingerprint_of_its_own() -> None:
    """OCR changes with the text model and with the engine; text only with the text model."""
    base = of()
    assert list(base) == ["video", "image", "audio", "text", "ocr"]
    assert base == {**ALL, "ocr": base["ocr"]}
    assert of(ocr="o2")["text"] == "t"
    assert len({base["ocr"], of(ocr="o2")["ocr"], of(text="t2")["ocr"]}) == 3


def test_append_makes_ocr_part_of_text() -> None:
    """With append there is no ocr modality, and text depends on the engine."""
    base = of("append")
    assert "ocr" not in base
    assert len({base["text"], of("append", ocr="o2")["text"], of()["text"]}) == 3


@pytest.mark.parametrize("mode", ["append", "separate"])
def test_disabled_ocr_is_another_fingerprint(mode: str) -> None:
    """Text read elsewhere and text read by the engine are not the same features."""
    key = "text" if mode == "append" else "ocr"
    assert of(mode, enabled=False)[key] != of(mode)[key]
    assert of(mode, enabled=False, ocr="o2") == of(mode, enabled=False)


def test_a_part_of_the_extractors_gives_a_part_of_the_modalities() -> None:
    """A process that hosts some extractors knows the modalities that these settle, no others."""
    settings = FeatureSettings()
    assert stream_fingerprints(settings, {"audio": "a"}) == {"audio": "a"}
    assert set(stream_fingerprints(settings, {"text": "t"})) == {"text"}
    append = FeatureSettings(ocr_mode="append")
    assert stream_fingerprints(append, {"text": "t"}) == {}


def test_digests_do_not_depend_on_order(tmp_path: Path) -> None:
    """The same parts in another order are the same; the same bytes in two files are not one."""
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"x")
    two.write_bytes(b"y")
    assert file_digest(one, two) != file_digest(two, one)
