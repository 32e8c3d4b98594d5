"""Feature files: what is written is read, and what must not be read is refused by name."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from common.errors import FeatureError
from common.post import STREAMS, Failure, Features, Stream
from extractors.feature_file import (
    feature_path,
    features_bytes,
    read_features,
    read_header,
    write_features,
)
from tests.support.mistakes import one_line

PRINTS: dict[Stream, str] = {stream: f"print-{stream}" for stream in STREAMS}


def example(post_id: str = "p1", rows: int = 3) -> Features:
    random = np.random.default_rng(0)
    return Features(
        post_id=post_id,
        arrays={
            "video": random.normal(size=(rows, 8)).astype(np.float16),
            "text": np.empty((0, 4), np.float16),
        },
        statuses={
            "video": "ok",
            "image": "failed",
            "audio": "missing",
            "text": "ok",
            "ocr": "missing",
        },
        failures={"image": Failure("decode", "MediaError", "truncated", retryable=False)},
        ocr_text="大促销\n50%",
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    features = example()
    path = write_features(tmp_path, features, PRINTS)
    assert path == tmp_path / hashlib.sha256(b"p1").hexdigest()[:2] / "p1.safetensors"
    read = read_features(tmp_path, "p1", PRINTS)
    assert read.statuses == features.statuses
    assert read.failures == features.failures
    assert read.ocr_text == features.ocr_text
    assert set(read.arrays) == {"video", "text"}
    for modality, array in features.arrays.items():
        assert read.arrays[modality].dtype == np.float16
        np.testing.assert_array_equal(read.arrays[modality], array)
    assert read_header(path).fingerprints == PRINTS
    assert load_file(path)["video"].shape == (3, 8)  # plain safetensors for anyone else


def test_another_extractor_is_refused_by_name(tmp_path: Path) -> None:
    """The line names the modality and both fingerprints; a reader of other modalities reads on."""
    write_features(tmp_path, example(), PRINTS)
    with pytest.raises(FeatureError, match="image was made with print-image, but other is needed"):
        read_features(tmp_path, "p1", {**PRINTS, "image": "other"})
    only = read_features(tmp_path, "p1", {"video": PRINTS["video"]})
    assert set(only.arrays) == set(only.statuses) == {"video"}
    assert set(read_features(tmp_path, "p1").statuses) == set(STREAMS) - {"video_lstm", "asr"}
    prints: dict[Stream, str] = {"video": "v", "text": "t"}
    write_features(tmp_path, example("p2"), prints)
    with pytest.raises(FeatureError, match="audio was made with no extractor"):
        read_features(tmp_path, "p2", {**prints, "audio": "a"})


def test_both_streams_of_the_video(tmp_path: Path) -> None:
    one = example()
    vector = np.full((1, 16), 0.5, np.float16)
    write_features(tmp_path, replace(one, arrays={"video_lstm": vector, **one.arrays}), PRINTS)
    read = read_features(tmp_path, "p1", PRINTS)
    np.testing.assert_array_equal(read.arrays["video_lstm"], vector)
    assert set(read.statuses) == {"video", "image", "audio", "text", "ocr"}
    only = read_features(tmp_path, "p1", {"video_lstm": "print-video_lstm"})
    assert set(only.arrays) == {"video_lstm"}
    assert only.statuses == {"video": "ok"}
    with pytest.raises(FeatureError, match="video_lstm was made with print-video_lstm, but other"):
        read_features(tmp_path, "p1", {**PRINTS, "video_lstm": "other"})


def test_equal_features_are_equal_files(tmp_path: Path) -> None:
    """The order of arrays and keys leaves no trace."""
    one = example()
    turned = replace(
        one,
        arrays=dict(reversed(list(one.arrays.items()))),
        statuses=dict(reversed(list(one.statuses.items()))),
    )
    prints = dict(reversed(list(PRINTS.items())))
    assert features_bytes(one, PRINTS) == features_bytes(turned, prints)


def test_files_of_the_format_before_are_read(tmp_path: Path) -> None:
    """A file whose header has a key for each part reads as it did; a broken part is reported."""
    features = example()
    path = feature_path(tmp_path, "p1")
    path.parent.mkdir()
    header = {
        "format": "insighttag.features/1",
        "post_id": "p1",
        "fingerprints": json.dumps(PRINTS),
        "statuses": json.dumps(dict(features.statuses)),
        "failures": json.dumps({m: asdict(f) for m, f in features.failures.items()}),
        "ocr_text": json.dumps(features.ocr_text),
    }
    arrays = {str(stream): array for stream, array in features.arrays.items()}
    save_file(arrays, path, metadata=header)
    read = read_features(tmp_path, "p1", PRINTS)
    assert read.statuses == features.statuses
    assert read.failures == features.failures
    assert read.ocr_text == features.ocr_text
    np.testing.assert_array_equal(read.arrays["video"], features.arrays["video"])
    assert read_header(path).fingerprints == PRINTS
    other = feature_path(tmp_path, "p2")
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(FeatureError, match="belongs to post 'p1'"):
        read_features(tmp_path, "p2")
    save_file(arrays, path, metadata={**header, "statuses": "{"})
    with pytest.raises(FeatureError, match="its header is broken"):
        read_features(tmp_path, "p1")


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    path = write_features(tmp_path, example(), PRINTS)
    content = path.read_bytes()
    other = write_features(tmp_path, example("p2"), PRINTS)

    def refused(match: str) -> None:
        with one_line(FeatureError, str(path), match=match):
            read_features(tmp_path, "p1", PRINTS)

    path.write_bytes(content[: len(content) - 10])
    refused("cannot be read")
    path.write_bytes(b"")
    refused("cannot be read")
    save_file({"video": np.zeros((1, 2), np.float16)}, path)
    refused("is not a feature file")
    path.write_bytes(other.read_bytes())
    refused("belongs to post 'p2'")
    path.unlink()
    refused("no such feature file")


def test_only_features_are_written(tmp_path: Path) -> None:
    """Arrays that are not float16 (n, dim), or that nobody vouches for, are not written."""
    wrong: Any
    for wrong in (np.zeros((2, 3), np.float32), np.zeros(3, np.float16)):
        features = Features("p", {"video": wrong}, {"video": "ok"})
        with pytest.raises(FeatureError, match=r"video must be float16 \(n, dim\)"):
            write_features(tmp_path, features, PRINTS)
    with pytest.raises(FeatureError, match="text has no fingerprint"):
        write_features(tmp_path, example(), {"video": "v"})


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=512))
def test_any_id_has_a_file_inside_the_root(post_id: str) -> None:
    """Slashes, dots, long and odd IDs stay inside the folder, as one legal file name."""
    root = Path("/srv/features")
    path = feature_path(root, post_id)
    assert path.parent.parent == root
    assert len(path.name) <= 255
    assert path.name.isascii()
    assert not set(path.name) & set("/\\\0 ")


def test_ids_do_not_share_files(tmp_path: Path) -> None:
    """IDs that differ late, in case or in escapes have files of their own, and read back."""
    ids = ["a/b", "a%2Fb", "..", ".", "A", "a", "x" * 500 + "1", "x" * 500 + "2", "帖子/1", "a b"]
    for index, post_id in enumerate(ids):
        write_features(tmp_path, example(post_id, rows=index + 1), PRINTS)
    for index, post_id in enumerate(ids):
        assert len(read_features(tmp_path, post_id, PRINTS).arrays["video"]) == index + 1
