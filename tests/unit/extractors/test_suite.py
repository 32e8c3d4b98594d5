"""The suite of extractors: its parts, fingerprints, precisions, and posts it has learned from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.errors import ConfigError, FeatureError
from common.files import file_digest
from common.fingerprint import digest
from common.post_set import PostSet
from common.precision import autocast, copy_in_half, cpu_has_bf16, require_device, resolve_precision
from config.features import ExtractorName, FeatureSettings, ImageSettings, OcrSettings
from extractors.feature_file import read_features, read_header, stream_fingerprints, write_features
from extractors.learned import FILE, learned_from, posts_of_weights, streams_of_post
from extractors.models.base import to_float16
from extractors.suite import ExtractorSuite
from fusion.backbones.model import save_weights
from tests.support.fusion import support
from tests.support.tiny_models import TINY_CNN, TINY_SIZE, tiny_features


@pytest.fixture(scope="module")
def suite() -> Iterator[ExtractorSuite]:
    suite = ExtractorSuite(tiny_features(ocr=True), threads=1)
    suite.load()
    yield suite
    suite.close()


def pixels(count: int) -> np.ndarray:
    return np.full((count, TINY_SIZE, TINY_SIZE, 3), 7, np.uint8)


def test_every_extractor_answers_a_batch_in_order(suite: ExtractorSuite) -> None:
    patches = np.zeros((3, 96, 64), np.float32)
    for name, items in (
        ("video", [pixels(4), pixels(0), pixels(2)]),
        ("image", [pixels(1), pixels(0)]),
        ("audio", [patches, patches[:1]]),
        ("text", ["a cat", "", "two words more"]),
    ):
        arrays = suite.run(name, items)  # type: ignore[arg-type]
        assert len(arrays) == len(items)
        assert {array.shape[1] for array in arrays} == {suite.dims[name]}  # type: ignore[index]
        assert {array.dtype for array in arrays} == {np.dtype(np.float16)}
    assert suite.run("ocr", [(pixels(1)[0],), ()]) == ["", ""]


def test_manifest_names_every_modality(suite: ExtractorSuite) -> None:
    """Fingerprints and dims stand for all modalities that are on; ocr has the text's columns."""
    assert set(suite.fingerprints) == set(suite.dims) == set(suite.by_extractor)
    assert suite.dims == {"video": 64, "image": 64, "audio": 96, "text": 64, "ocr": 64}
    assert all(len(text) == 32 for text in suite.fingerprints.values())


def test_a_suite_gives_what_its_extractors_give(suite: ExtractorSuite) -> None:
    """The same item gives the same features and fingerprint through one extractor alone."""
    alone = ExtractorSuite(tiny_features(ocr=True), names=("image",))
    alone.load()
    (expected,) = alone.run("image", [pixels(2)])
    np.testing.assert_array_equal(suite.run("image", [pixels(2)])[0], expected)
    assert alone.by_extractor == {"image": suite.by_extractor["image"]}


def test_video_and_image_share_one_model_when_they_can() -> None:
    suite = ExtractorSuite(tiny_features(), names=("video", "image"))
    suite.load()
    video, image = suite._extractors["video"], suite._extractors["image"]
    assert video._backbone is image._backbone  # type: ignore[attr-defined]
    assert suite.run("image", [pixels(1)])[0].shape == (1, 64)
    suite.close()
    image_settings = ImageSettings(arch=TINY_CNN, weights="random:1", image_size=TINY_SIZE)
    apart = ExtractorSuite(tiny_features(image=image_settings), names=("video", "image"))
    apart.load()
    assert apart.dims == {"video": 64, "image": 96}


def test_disabled_ocr_is_not_loaded() -> None:
    suite = ExtractorSuite(tiny_features(), names=("text", "ocr"))
    assert suite.names == ("text",)
    suite.load()
    with pytest.raises(FeatureError, match="ocr: this process does not host"):
        suite.run("ocr", [()])
    suite.close()
    with pytest.raises(FeatureError, match="text: this process does not host"):
        suite.run("text", ["closed"])


def test_one_extractor_that_cannot_load_leaves_none_loaded() -> None:
    """A suite loads whole or not at all, and says why in one line."""
    image = ImageSettings(arch=TINY_CNN, weights="/no/such/file", image_size=TINY_SIZE)
    suite = ExtractorSuite(tiny_features(image=image), names=("video", "image"))
    with pytest.raises(ConfigError, match=r"features.image.weights: /no/such/file"):
        suite.load()
    assert not suite.by_extractor


ALL: dict[ExtractorName, str] = {"video": "v", "image": "i", "audio": "a", "text": "t", "ocr": "o"}


def of(mode: Any = "separate", enabled: bool = True, **changes: str) -> dict[str, str]:
    settings = FeatureSettings(ocr_mode=mode, ocr=OcrSettings(enabled=enabled))
    names: Any = {**ALL, **changes}
    fingerprints = stream_fingerprints(settings, names)
    return {str(key): value for key, value in fingerprints.items()}


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
    assert stream_fingerprints(FeatureSettings(ocr_mode="append"), {"text": "t"}) == {}


def test_digests_do_not_depend_on_order(tmp_path: Path) -> None:
    """The same parts in another order are the same; the same bytes in two files are not one."""
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"x")
    two.write_bytes(b"y")
    assert file_digest(one, two) != file_digest(two, one)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags : fpu avx2 avx512f avx512_vnni\n", False),
        ("Features : fp asimd\n", False),
        ("", False),
    ],
)
def test_bf16_is_read_off_the_processor(tmp_path: Path, text: str, expected: bool) -> None:
    """Only processors that multiply bfloat16 in hardware count."""
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu_has_bf16(file) is expected
    assert cpu_has_bf16(tmp_path / "none") is False


def test_auto_follows_the_processor() -> None:
    """Auto is bf16 exactly where the CPU has it; what is asked for by name is honoured."""
    expected = "bf16" if cpu_has_bf16() else "fp32"
    assert resolve_precision("auto", "cpu", setting="s") == expected
    assert resolve_precision("fp32", "cpu", setting="s") == "fp32"
    assert resolve_precision("bf16", "cpu", setting="s") == "bf16"
    with pytest.raises(ConfigError, match=r"features.image.precision: fp16"):
        resolve_precision("fp16", "cpu", setting="features.image.precision")


def test_casting_weights_once_changes_no_number() -> None:
    """Weights stored in bf16 give bit for bit what autocast gives on float32 weights."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(288),
        torch.nn.Linear(288, 4),
    )
    inputs = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), autocast("cpu", "bf16"):
        before = model(inputs)
        half = copy_in_half(model, "bf16", whole=False)
        after = half(inputs)
    assert half[0].weight.dtype == torch.bfloat16
    assert half[2].weight.dtype == torch.float32
    assert torch.equal(before, after)


def test_a_copy_in_half_leaves_the_original_and_what_is_not_saved() -> None:
    """Tied weights stay tied; frequencies of positions keep their digits."""
    model: Any = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.BatchNorm1d(8))
    model.tied = torch.nn.Linear(8, 4, bias=False)
    model.tied.weight = model[0].weight
    model.register_buffer("frequencies", torch.tensor([0.1]), persistent=False)
    half = copy_in_half(model, "bf16", whole=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.tied.weight is half[0].weight
    assert half[1].running_mean.dtype == torch.bfloat16
    assert half[1].num_batches_tracked.dtype == torch.int64
    assert half.frequencies.dtype == torch.float32


def test_float16_is_clamped_not_overflown() -> None:
    """Large values stay finite; NaN stays visible."""
    clamped = to_float16(torch.tensor([1e9, -1e9, 1.5, float("nan")]))
    assert clamped.tolist()[:3] == [65504.0, -65504.0, 1.5]
    assert torch.isnan(clamped[3])


def test_a_device_that_is_not_there_is_named() -> None:
    assert require_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="device cuda:99: this machine has"):
        require_device("cuda:99")


@given(st.sets(st.text()), st.sets(st.text()))
def test_a_set_of_posts_is_a_set(one: set[str], other: set[str]) -> None:
    joined = PostSet.from_text(PostSet.of(one).as_text()) | PostSet.of(other)
    assert len(joined) == len(one | other)
    assert all(post in joined for post in one | other)
    assert ("another" in joined) == ("another" in one | other)


def test_weights_tell_what_they_have_learned_from(tmp_path: Path) -> None:
    """Files and folders of ours; of third parties nothing is known. The tensors stay alone."""
    linear, posts = torch.nn.Linear(3, 2), PostSet.of(["a", "b"])
    ours, theirs, folder = tmp_path / "o.safetensors", tmp_path / "t.safetensors", tmp_path / "bert"
    save_weights(linear, ours, "backbone", {"arch": "x"}, posts)
    save_file(dict(linear.state_dict()), theirs, metadata={"format": "pt"})
    folder.mkdir()
    (folder / FILE).write_text(json.dumps({"learned_from": posts.as_text()}))
    settings = FeatureSettings.model_validate(
        {
            "image": {"weights": str(ours)},
            "video": {"weights": str(theirs), "lstm": {"weights": str(ours)}},
            "audio": {"weights": "random:1"},
            "text": {"weights": str(folder)},
        }
    )
    assert load_file(ours).keys() == linear.state_dict().keys()
    learned = learned_from(settings)
    assert learned.keys() == {"image", "video_lstm", "text", "ocr"}
    assert streams_of_post("a", learned) == ("video_lstm", "image", "text", "ocr")
    assert streams_of_post("c", learned) == ()
    assert len(posts_of_weights(tmp_path / "weights.pth")) == 0
    ours.write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"o\.safetensors: cannot be read as weights"):
        learned_from(settings)


def test_a_feature_file_tells_it_of_its_post(tmp_path: Path) -> None:
    """Of no other post; and a file without the note is byte for byte what it was."""
    features = support.features("a")
    plain = write_features(tmp_path, features, support.FINGERPRINTS).read_bytes()
    assert b"learned_from" not in plain
    path = write_features(tmp_path, features, support.FINGERPRINTS, ("text", "image"))
    assert read_header(path).learned_from == ("image", "text")
    assert read_features(tmp_path, "a").arrays.keys() == features.arrays.keys()
