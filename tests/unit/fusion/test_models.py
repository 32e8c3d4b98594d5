"""The fusion models: padding, missing modalities, order, and an independent forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.post import MODALITIES, Features, Modality, Stream
from fusion.data.collate import Batch, Collate, Sample
from fusion.models import MODELS, build_model
from fusion.models.base import ModalityDropout
from fusion.models.transformers import positions
from tests.support.fusion import support

NAMES = sorted(MODELS)


def batch_of(posts: list[Features], **changes: bool) -> Batch:
    """Posts as the model takes them."""
    schema = support.schema(**changes)
    return Collate(schema)([Sample(p.post_id, schema.arrays(p)) for p in posts])


def logits(name: str, posts: list[Features], seed: int = 0) -> np.ndarray:
    """Return the logits of a small model with the seed's weights."""
    torch.manual_seed(seed)
    with torch.inference_mode():
        found: np.ndarray = support.model(name)(batch_of(posts)).numpy()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_post_is_scored_alike_alone_and_in_any_batch(name: str) -> None:
    post = support.features("a", seed=1, lengths={"video": 3, "text": 2})
    others = [
        support.features("b", seed=2, lengths={"video": 9, "text": 20, "audio": 11}),
        support.features("c", seed=3, lengths={"image": 0, "ocr": 0}),
    ]
    alone = logits(name, [post])[0]
    np.testing.assert_allclose(logits(name, [*others, post])[2], alone, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_the_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = support.model(name)
    batch = batch_of([support.features("a", lengths={"audio": 2}), support.features("b")])
    with torch.inference_mode():
        before = model(batch)
        batch.tokens["audio"][0, 2:] = float("nan")
        torch.testing.assert_close(model(batch), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("modality", MODALITIES)
def test_a_masked_modality_equals_a_missing_one(name: str, modality: Modality) -> None:
    torch.manual_seed(0)
    model = support.model(name)
    whole = batch_of([support.features()])
    whole.masks[modality].zero_()
    with torch.inference_mode():
        cleared = model(whole)
        missing = model(batch_of([support.features(lengths={modality: 0})]))
    torch.testing.assert_close(cleared, missing, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_modality_counts(name: str) -> None:
    whole = logits(name, [support.features()])
    for modality in MODALITIES:
        without = logits(name, [support.features(lengths={modality: 0})])
        assert np.abs(whole - without).max() > 1e-4, modality


@pytest.mark.parametrize("name", NAMES)
def test_missing_vectors_learn(name: str) -> None:
    torch.manual_seed(0)
    model = support.model(name)
    model(batch_of([support.features(lengths={"ocr": 0})])).sum().backward()
    gradients = {k.rpartition("missing.")[2]: p.grad for k, p in model.named_parameters()}
    assert gradients["ocr"] is not None
    assert gradients["ocr"].abs().sum() > 0
    assert gradients["video"] is None or not gradients["video"].any()


def test_the_order_of_frames_matters_and_that_of_images_does_not() -> None:
    """Motion is visible only in the order of frames; a post's pictures have none."""
    post = support.features(lengths={"video": 8, "image": 6})
    whole = logits("token_transformer", [post])
    cases: tuple[tuple[Stream, bool], ...] = (("video", True), ("audio", True), ("image", False))
    for modality, moved in cases:
        reverse = {**post.arrays, modality: post.arrays[modality][::-1].copy()}
        found = logits("token_transformer", [Features("p", reverse, {})])
        assert (np.abs(found - whole).max() > 1e-4) == moved, modality


def test_modality_dropout_always_leaves_one() -> None:
    drop = ModalityDropout(0.9).train()
    torch.manual_seed(0)
    has = torch.rand(500, 5) < 0.5
    has[:, 2] |= ~has.any(dim=1)
    masks = {m: has[:, i : i + 1].expand(-1, 3) for i, m in enumerate(MODALITIES)}
    left = torch.stack([mask.any(dim=1) for mask in drop(masks).values()], dim=1)
    assert left.any(dim=1).all()
    assert not (left & ~has).any(), "nothing appears that was not there"
    several = has.sum(dim=1) == 5
    assert left[several].float().mean() < 0.4
    assert all(torch.equal(a, masks[m]) for m, a in drop.eval()(masks).items())


def test_modality_dropout_hides_independently_and_about_as_often_as_asked() -> None:
    """At 0.15 a modality of a full post is hidden 15% of the time, less for the one kept."""
    drop = ModalityDropout(0.15).train()
    torch.manual_seed(1)
    masks = {m: torch.ones(20_000, 1, dtype=torch.bool) for m in MODALITIES}
    hidden = [1 - mask.float().mean().item() for mask in drop(masks).values()]
    assert all(abs(share - 0.15) < 0.01 for share in hidden)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_model_predicts_the_frequencies(name: str) -> None:
    torch.manual_seed(0)
    model = support.model(name)
    frequencies = torch.linspace(0.02, 0.6, support.CLASSES)
    model.start_at(frequencies)
    with torch.inference_mode():
        found = torch.sigmoid(model(batch_of([support.features()])))[0]
    torch.testing.assert_close(found, frequencies, atol=0.1, rtol=0)


def test_positions_are_distinct_for_any_width() -> None:
    for width in (7, 32):
        places = positions(64, width)
        assert places.shape == (64, width)
        distances = torch.cdist(places, places) + torch.eye(64)
        assert distances.min() > 0.05


def test_heads_must_divide_the_width() -> None:
    options = support.SMALL.token_transformer.model_copy(update={"heads": 5})
    settings = support.SMALL.model_copy(update={"token_transformer": options})
    with pytest.raises(ConfigError, match=r"model.token_transformer.width: 32"):
        build_model(support.schema(), settings)
