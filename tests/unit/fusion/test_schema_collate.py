"""Features of posts -> padded batches."""

import numpy as np
import pytest
import torch

from common.errors import ConfigError, FeatureError
from common.post import Features
from config.fusion_models import TokenLimits
from fusion.models.base import FeatureManifest, InputSchema
from tests.support.fusion import support


def test_images_join_the_frames() -> None:
    """The model sees one modality: frames first, then images, in order; or images alone."""
    for frames in (3, 0):
        found = support.features(lengths={"video": frames, "image": 2})
        joined = support.schema(image_as_frames=True).arrays(found)
        assert "image" not in joined
        parts = [found.arrays[m] for m in ("video", "image") if m in found.arrays]
        np.testing.assert_array_equal(joined["video"], np.concatenate(parts))


def test_images_of_another_length_cannot_be_frames() -> None:
    """Features of two extractors with other dims cannot stand in one sequence."""
    manifest = support.manifest(dims={"video": 12, "image": 16}, image_as_frames=True)
    with pytest.raises(ConfigError, match="length 16, of frames 12"):
        InputSchema.of(manifest, TokenLimits(), 3)


def test_long_texts_are_cut_and_long_videos_thinned() -> None:
    """A text keeps its beginning; a video keeps frames from its whole length, in order."""
    limits = TokenLimits(video=4, text=4)
    manifest = FeatureManifest({"video": 1, "text": 1}, {"video": "v", "text": "t"})
    schema = InputSchema.of(manifest, limits, 2)
    count = np.arange(16, dtype=np.float16)[:, None]
    found = schema.arrays(Features("p", {"video": count, "text": count}, {}))
    assert found["text"].ravel().tolist() == [0, 1, 2, 3]
    assert found["video"].ravel().tolist() == [2, 6, 10, 14]


def test_features_of_another_shape_are_refused_by_name() -> None:
    wrong = Features("p7", {"audio": np.zeros((2, 5), np.float16)}, {})
    with pytest.raises(FeatureError, match=r"p7: audio features are \(2, 5\).*\(n, 6\)"):
        support.schema().arrays(wrong)


def test_modalities_can_be_left_out_or_unknown() -> None:
    found = support.schema().arrays(support.features(), frozenset({"audio"}))
    assert set(found) == {"video", "image", "text", "ocr"}
    only_text = InputSchema.of(FeatureManifest({"text": 10}, {"text": "t"}), TokenLimits(), 2)
    assert set(only_text.arrays(support.features())) == {"text"}


def test_a_batch_is_padded_and_masked() -> None:
    """Each post's tokens stand at its row's start, zeros behind; masks say which are real."""
    posts = [support.features("a", seed=1), support.features("b", seed=2, lengths={"video": 2})]
    targets = np.eye(2, support.CLASSES, dtype=np.float32)
    batch = support.batch(posts, targets)
    assert batch.post_ids == ("a", "b")
    assert batch.tokens["video"].shape == (2, 5, 12)
    assert batch.tokens["video"].dtype == torch.float32
    assert batch.masks["video"].sum(dim=1).tolist() == [5, 2]
    assert not batch.tokens["video"][1, 2:].any()
    np.testing.assert_array_equal(batch.tokens["video"][1, :2].numpy(), posts[1].arrays["video"])
    assert batch.targets is not None
    np.testing.assert_array_equal(batch.targets.numpy(), targets)


def test_a_modality_that_no_post_of_a_batch_has() -> None:
    """Its tokens have length 0, and nothing fails."""
    batch = support.batch([support.features(lengths={"ocr": 0})])
    assert batch.tokens["ocr"].shape == (1, 0, 10)
    assert batch.masks["ocr"].shape == (1, 0)
    assert batch.targets is None
