"""A modality with two streams: they are one modality wherever modalities are hidden."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from common.fingerprint import mismatch
from common.post import Features, Stream, modality_of, streams_of
from config.train import DataSettings, LossSettings
from extractors.feature_file import Header
from fusion.bundle.bundle import load_bundle
from fusion.data.data_file import Record
from fusion.data.dataset import FeatureFiles, find_manifest
from fusion.models import MODELS, FusionModel, build_model
from fusion.models.base import Batch, FeatureManifest, InputSchema, ModalityDropout
from fusion.train.losses import Objective, TaggingLoss
from tests.support.fusion import support
from tests.support.fusion.numpy_models import FORWARDS

NAMES = sorted(MODELS)
DIMS: dict[Stream, int] = {s: support.DIMS[s] for s in support.MODALITIES} | {"video_lstm": 9}
PRINTS: dict[Stream, str] = {stream: f"{stream}-1" for stream in DIMS}


def features(post_id: str = "p", *, seed: int = 0, videos: int = 1, **lengths: int) -> Features:
    """A post of scheme 2; without ``videos`` it has no video at all."""
    counts = {**lengths, **({} if videos else {"video": 0})}
    one = support.features(post_id, seed=seed, lengths=counts)
    if not videos:
        return one
    vectors = np.random.default_rng(seed).normal(0, 1, (videos, DIMS["video_lstm"]))
    return Features(post_id, {**one.arrays, "video_lstm": vectors.astype(np.float16)}, one.statuses)


def schema(**changes: Any) -> InputSchema:
    manifest = FeatureManifest(**{"dims": DIMS, "fingerprints": PRINTS, **changes})
    return InputSchema.of(manifest, support.SMALL.tokens, support.CLASSES)


def model(name: str, **changes: Any) -> FusionModel:
    torch.manual_seed(2)
    settings = support.SMALL.model_copy(update={"name": name, "auxiliary": 0.5, **changes})
    return build_model(schema(), settings).eval()


def batch_of(*posts: Features) -> Batch:
    return support.batch(posts, support.truth(len(posts)), schema())


def test_streams_belong_to_modalities() -> None:
    """Each stream has one modality, and each modality a stream of its own name."""
    assert modality_of("video_lstm") == modality_of("video") == "video"
    assert streams_of(["text", "video"]) == ("video", "video_lstm", "text")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_two_streams_equals_a_numpy_forward(name: str) -> None:
    """Posts with one video, with three, and with none, against the same weights in float64."""
    posts = [features("a", seed=1), features("b", seed=2, videos=3), features("c", videos=0)]
    made = model(name)
    weights = {k: v.numpy().astype(np.float64) for k, v in made.state_dict().items()}
    with torch.inference_mode():
        said = made.outputs(batch_of(*posts))
    for i, post in enumerate(posts):
        logits, own = FORWARDS[name](weights, post)
        np.testing.assert_allclose(said.logits[i], logits, atol=2e-5)
        assert set(own) == set(post.arrays)
        for stream, expected in own.items():
            np.testing.assert_allclose(said.own[stream][i], expected, atol=2e-5)  # type: ignore[index]


def test_without_video_hides_both_streams() -> None:
    arrays = schema().arrays(features(), frozenset({"video"}))
    assert set(arrays) == {"image", "audio", "text", "ocr"}
    assert set(schema().arrays(features())) == set(DIMS)


def test_images_join_the_rows_and_not_the_vector() -> None:
    """With image_as_frames the video's vector stays what it is."""
    dims = {stream: dim for stream, dim in DIMS.items() if stream != "image"}
    joined = schema(image_as_frames=True)
    assert dict(joined.dims) == dims
    post = features(video=3, image=2)
    arrays = joined.arrays(post)
    assert len(arrays["video"]) == 5
    np.testing.assert_array_equal(arrays["video_lstm"], post.arrays["video_lstm"])


def test_modality_dropout_drops_both_streams_together() -> None:
    present, absent = torch.ones(400, 2, dtype=torch.bool), torch.zeros(400, 2, dtype=torch.bool)
    torch.manual_seed(0)
    for audio, chance in ((present, 0.5), (absent, 0.99)):
        drop = ModalityDropout(chance).train()
        masks: dict[Stream, torch.Tensor] = {
            "video": present,
            "video_lstm": present,
            "audio": audio,
        }
        stays = {s: mask.any(dim=1) for s, mask in drop(masks).items()}
        assert torch.equal(stays["video"], stays["video_lstm"])
        assert (stays["video"] | stays["audio"]).all()
        if audio is present:
            assert 0.2 < (~stays["video"]).float().mean() < 0.5
            assert not torch.equal(stays["video"], stays["audio"])


def test_hidden_streams_have_no_loss_of_their_own() -> None:
    made = model("concat_mlp", modality_dropout=0.5).train()
    for part in made.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    batch: Any = batch_of(*(features(str(i), seed=i) for i in range(8)))
    objective = Objective(
        made, TaggingLoss(LossSettings(), torch.ones(support.CLASSES)), auxiliary=1
    )
    torch.manual_seed(6)
    total = objective(batch)
    torch.manual_seed(6)
    said = made.outputs(batch)
    assert torch.equal(said.present["video"], said.present["video_lstm"])
    assert 0 < said.present["video"].sum() < 8
    expected = binary_cross_entropy_with_logits(said.logits, batch.targets)
    for stream, present in said.present.items():
        if present.any():
            own = binary_cross_entropy_with_logits(
                said.own[stream][present], batch.targets[present]
            )
            expected = expected + own * present.float().mean()
    torch.testing.assert_close(total, expected)


def test_a_bundle_carries_streams(tmp_path: Path) -> None:
    """Manifest, dims and fingerprints of both streams come back, and a wrong one is named."""
    made = model("token_transformer", auxiliary=0.0)
    support.write_bundle(tmp_path / "b", model=made, manifest=FeatureManifest(DIMS, PRINTS))
    bundle = load_bundle(tmp_path / "b")
    assert dict(bundle.manifest.dims) == DIMS
    assert dict(bundle.manifest.fingerprints) == PRINTS
    wrong = mismatch(bundle.manifest.fingerprints, {**PRINTS, "video_lstm": "x"})
    assert str(wrong).startswith("modality video_lstm: the bundle needs")


@dataclass(frozen=True)
class _Reader(FeatureFiles):
    """Feature files in memory."""

    posts: dict[str, Features] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)

    def header(self, post_id: str, path: Path | None) -> Header:
        return Header(post_id, PRINTS, {}, {}, None, {})

    def features(self, post_id: str, path: Path | None, fingerprints: Any) -> Features:
        self.reads.append(post_id)
        return self.posts[post_id]


def test_the_manifest_takes_every_stream_of_the_modalities_asked_for() -> None:
    """`data.modalities: [video]` is rows and vector; one stream alone does not delay it."""
    posts = [features(str(i)) for i in range(40)]
    reader = _Reader(posts={post.post_id: post for post in posts})
    records = [Record(post.post_id) for post in posts]
    manifest = find_manifest(records, reader, DataSettings(modalities=("video", "text")))
    assert dict(manifest.dims) == {"video": 12, "video_lstm": 9, "text": 10}
    assert len(reader.reads) < 10
    plain = _Reader(posts={str(i): support.features(str(i)) for i in range(40)})
    dims = find_manifest(records, plain, DataSettings(modalities=("video", "text"))).dims
    assert set(dims) == {"video", "text"}
    assert len(plain.reads) < 10
