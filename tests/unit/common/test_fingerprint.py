"""Fingerprints say what they are of, and which setting two of them differ in."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from common.errors import FeatureError
from common.fingerprint import (
    Fingerprint,
    differing,
    digest,
    mismatch,
    packed,
    parts_of,
    unpacked,
    with_parts,
)
from common.post import Features
from config.features import FeatureSettings
from extractors.feature_file import (
    features_bytes,
    read_features,
    read_header,
    stream_fingerprints,
    write_features,
)
from fusion.bundle.bundle import load_bundle
from tests.support.fusion import support

WEIGHTS = "a" * 64, "b" * 64


def of(**changes: Any) -> Fingerprint:
    return digest({"arch": "vit", "weights": WEIGHTS[0], "sampling": {"frames": 64}, **changes})


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (of(sampling={"frames": 32}), " (another sampling.frames: 64, now 32)"),
        (of(weights=WEIGHTS[1]), " (another weights)"),
        (of(arch="cnn", weights=WEIGHTS[1]), ' (another arch: "vit", now "cnn", weights)'),
        (of(short_clips="loop"), ' (another short_clips: null, now "loop")'),
        (str(of(arch="cnn")), ""),
        (None, ""),
        (of(), ""),
    ],
)
def test_what_differs_is_named(other: str | None, says: str) -> None:
    """Values where they are short, names alone of weights, nothing where it is not known."""
    assert differing(of(), other) == says


def test_a_fingerprint_is_its_text() -> None:
    """It equals, hashes, and is written as its digest; another one makes all features new."""
    known = of()
    plain = str(known)
    assert type(plain) is str
    assert (known, hash(known), json.dumps([known])) == (plain, hash(plain), json.dumps([plain]))
    assert plain == "ef2c846f1f30311cf4cb41899d555ace"
    again = pickle.loads(pickle.dumps(known))
    assert (again, parts_of(again)) == (known, parts_of(known))
    assert parts_of(plain) == {}


def test_what_a_joined_fingerprint_is_of_is_named_too() -> None:
    """``ocr`` is of the text model and the engine; the setting inside is named."""
    features = FeatureSettings()
    one, other = (
        stream_fingerprints(features, {"text": of(), "ocr": digest({"max_side": side})})
        for side in (960, 480)
    )
    assert differing(one["ocr"], other["ocr"]) == " (another ocr.max_side: 960, now 480)"
    assert mismatch(one, other) == (
        f"modality ocr: the bundle needs {one['ocr']}, the extractors give {other['ocr']} "
        "(another ocr.max_side: 960, now 480)"
    )


@pytest.mark.parametrize("parts", [None, 7, {"video": 3}, {"video": {}}, {"audio": {"a": 1}}])
def test_what_another_release_left_is_a_plain_digest(parts: Any) -> None:
    """Nothing beside a digest, or something else: only the name of the setting is missing."""
    prints = with_parts({"video": "v"}, parts)
    assert prints == {"video": "v"}
    assert parts_of(prints["video"]) == {}
    assert unpacked('{"video": "v"}') == prints


def test_a_process_tells_what_its_fingerprints_are_of() -> None:
    """As one text, which is what a worker sends when it is ready."""
    prints = unpacked(packed({"video": of(), "text": "t"}))
    assert prints == {"video": of(), "text": "t"}
    assert parts_of(prints["video"]) == parts_of(of())


def test_a_feature_file_keeps_it(tmp_path: Path) -> None:
    """Reading with another fingerprint names the setting; files without it are read as before."""
    features = Features("p", {"video": np.zeros((1, 4), np.float16)}, {"video": "ok"}, {}, None)
    path = write_features(tmp_path, features, {"video": of()})
    assert read_features(tmp_path, "p", {"video": str(of())}).arrays["video"].shape == (1, 4)
    assert parts_of(read_header(path).fingerprints["video"]) == parts_of(of())
    with pytest.raises(FeatureError, match=r"is needed \(another sampling\.frames: 9, now 64\): "):
        read_features(tmp_path, "p", {"video": of(sampling={"frames": 9})})
    assert path.read_bytes() == features_bytes(features, read_header(path).fingerprints)

    assert b"made_of" not in write_features(tmp_path, features, {"video": str(of())}).read_bytes()
    with pytest.raises(FeatureError, match=r"is needed: extract it again"):
        read_features(tmp_path, "p", {"video": of(sampling={"frames": 9})})


def test_a_bundle_keeps_it(tmp_path: Path) -> None:
    """The daemon's refusal names the setting; a bundle without it is served as before."""
    prints = {**support.FINGERPRINTS, "video": of()}
    support.write_bundle(tmp_path / "b", "gmu", manifest=support.manifest(fingerprints=prints))
    about = yaml.safe_load((tmp_path / "b" / "bundle.yaml").read_text())
    assert [name for name, entry in about["features"].items() if "made_of" in entry] == ["video"]
    manifest = load_bundle(tmp_path / "b").manifest
    assert mismatch(manifest.fingerprints, {s: str(f) for s, f in prints.items()}) is None
    wrong = mismatch(manifest.fingerprints, {**prints, "video": of(weights=WEIGHTS[1])})
    assert str(wrong).endswith("(another weights)")
