"""The suite: all extractors of one process."""

from collections.abc import Iterator

import numpy as np
import pytest

from common.errors import ConfigError, FeatureError
from config.features import ImageSettings
from extractors.suite import ExtractorSuite
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
        found = suite.run(name, items)  # type: ignore[arg-type]
        assert len(found) == len(items)
        assert {array.shape[1] for array in found} == {suite.dims[name]}  # type: ignore[index]
        assert {array.dtype for array in found} == {np.dtype(np.float16)}
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
    """Equal settings load one model, others two."""
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
    """Without OCR the suite hosts four extractors, and running OCR is an error."""
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
