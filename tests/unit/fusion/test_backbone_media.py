"""Training of backbones and of the attention LSTM: the media of posts, and the scores of posts."""

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config.features import ImageSettings, LstmSizes, VideoLstmSettings, VideoSettings
from config.labels import LabelMap
from config.settings import DecodeSettings
from extractors.media.decode import decode_media
from extractors.models.visual import AttentionLstm, VideoLstm
from fusion.backbones.media import (
    STREAM,
    MediaDataset,
    MediaItems,
    MediaPost,
    augment,
    best_of_post,
    collate_media,
    pixels,
    read_posts,
)
from fusion.backbones.model import LstmTagger, MediaTagger, create_backbone, save_weights
from fusion.models.base import Batch, Sample
from tests.support.fusion.media_posts import write_labels, write_pictures, write_videos
from tests.support.tiny_models import TINY_CNN, tiny_features

SIZE = 32


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_labels(folder)
    write_pictures(folder, "pictures", 4)
    write_videos(folder, "videos", 6)
    return folder


def test_pixels_are_those_that_the_extractors_see(posts: Path) -> None:
    """A picture and a clip's centre frames are just what `decode_media` gives."""
    reader, limits = MediaItems(), DecodeSettings()
    features = tiny_features(
        image=ImageSettings(image_size=SIZE),
        video=VideoSettings(image_size=SIZE, frames=5, decode="accurate"),
    )
    picture = posts / "pictures" / "1-1.jpg"
    decoded = decode_media("image", picture, features, limits)
    np.testing.assert_array_equal(reader.picture(picture, SIZE)[None], decoded.image)
    clip = posts / "videos" / "1.mp4"
    decoded = decode_media("video", clip, features, limits)
    np.testing.assert_array_equal(reader.frames(clip, SIZE, 5, None), decoded.frames)
    assert reader.frames(clip, SIZE, 40, None).shape == (40, SIZE, SIZE, 3)


def test_consensus_is_the_mean_over_segments_and_the_best_over_media() -> None:
    """A post's logits, written out: each frame alone, mean of a clip, highest of the clips."""
    torch.manual_seed(0)
    tagger = MediaTagger(
        create_backbone(TINY_CNN, "picture", (SIZE, SIZE), "scratch"), (SIZE, SIZE), 3, 0.5
    )
    tagger.eval()
    chance = np.random.default_rng(0)
    clips = [chance.integers(0, 256, (n, 2, SIZE, SIZE, 3)).astype(np.uint8) for n in (2, 1)]
    samples = [
        Sample(str(i), {STREAM: clip}, np.zeros(3, np.float32)) for i, clip in enumerate(clips)
    ]
    batch = collate_media(samples)
    assert batch.masks[STREAM].tolist() == [[True, True], [True, False]]
    with torch.inference_mode():
        logits = tagger(batch).numpy()
        for post, clip in zip(logits, clips, strict=True):
            of_clips = []
            for frames in clip:
                pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
                each = tagger.classify(tagger.backbone(tagger.normalize(pixels))).numpy()
                of_clips.append((each[0] + each[1]) / 2)
            np.testing.assert_allclose(post, np.max(of_clips, axis=0), atol=1e-4)


def test_the_best_of_nothing_is_the_bias() -> None:
    """A post without media takes the given scores, the others the maximum of theirs."""
    scores = torch.tensor([[1.0, -2.0], [0.0, 5.0], [3.0, 3.0]])
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    best = best_of_post(scores, mask, torch.tensor([-7.0, -8.0]))
    assert best.tolist() == [[1.0, 5.0], [-7.0, -8.0], [3.0, 3.0]]


def test_what_is_drawn_depends_on_the_batch_alone(posts: Path) -> None:
    listed = read_posts(posts / "videos.json", LabelMap.load(posts / "labels.json"), "videos")
    item = partial(pixels, reader=MediaItems(), size=SIZE, segments=3)
    build = partial(MediaDataset.of_files, listed, 3, max_items=2)
    train = build(partial(item, augmented=True), seed=1)
    first = [s.arrays[STREAM] for s in train.__getitems__([4, 2])]
    train.__getitems__([1, 3])
    for one, again in zip(first, train.__getitems__([4, 2]), strict=True):
        np.testing.assert_array_equal(one, again.arrays[STREAM])
    assert not np.array_equal(first[0], train.__getitems__([4, 3])[0].arrays[STREAM])
    valid = build(item)
    np.testing.assert_array_equal(
        valid[4].arrays[STREAM][0], MediaItems().frames(listed[4].paths[0], SIZE, 3, None)
    )


def test_pictures_are_mirrored_and_cut_only_where_asked() -> None:
    """A ramp from left to right falls where it is mirrored, and is less steep where it is cut."""
    ramp = np.broadcast_to(np.arange(64, 192, 4, dtype=np.uint8)[None, :, None], (32, 32, 3))

    def steps(**options: Any) -> np.ndarray:
        chance = np.random.default_rng(3)
        pictures = [augment(ramp, "picture", chance, **options) for _ in range(40)]
        middle = np.stack([f[16, 4:28, 0].astype(float) for f in pictures])
        return np.asarray(middle[:, -1] - middle[:, 0])

    plain = steps()
    assert (plain > 60).all()
    assert 8 < (steps(flip=True) < 0).sum() < 32
    cut = steps(crop=0.5)
    assert (cut > 20).all()
    assert cut.mean() < 0.85 * plain.mean()


def test_media_of_one_post_are_limited() -> None:
    """Evenly spread ones in validation, random ones in training, never one twice."""

    class Named(MediaItems):
        def picture(self, path: Path, size: int) -> Any:
            return np.full((size, size, 3), int(path.name), np.uint8)

    post = MediaPost("p", tuple(Path(str(i)) for i in range(10)), (0,))
    item = partial(pixels, reader=Named(), size=4, segments=None)
    build = partial(MediaDataset.of_files, [post], 1, item, max_items=3)
    assert build()[0].arrays[STREAM][:, 0, 0, 0, 0].tolist() == [1, 5, 8]
    seen: set[int] = set()
    for seed in range(30):
        chosen = build(seed=seed)[0].arrays[STREAM][:, 0, 0, 0, 0].tolist()
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 3
        seen.update(chosen)
    assert seen == set(range(10))


SIZES = LstmSizes(projection=6, hidden=5, join=9, width=7)
DIM = 11


def test_saved_weights_load_in_the_extractor(tmp_path: Path) -> None:
    """The same weights give the same bytes, and the extractor takes all of them."""
    torch.manual_seed(1)
    model = AttentionLstm(DIM, SIZES)
    out = tmp_path / "weights" / "video_lstm.safetensors"
    save_weights(model, out, "lstm", {"frames_dim": "11"})
    first = out.read_bytes()
    save_weights(model, out, "lstm", {"frames_dim": "11"})
    assert out.read_bytes() == first
    served = VideoLstm(
        VideoLstmSettings(**SIZES.model_dump(), weights=str(out), precision="fp32"), "cpu"
    )
    served.load_for(DIM, "frames")
    state = served.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_half_written_weights_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are on the disk before they get their name; those from before stay."""
    out = tmp_path / "weights" / "x.safetensors"
    model = torch.nn.Linear(3, 2)
    save_weights(model, out, "backbone", {"arch": "linear"})
    before = out.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(model, out, "backbone", {"arch": "linear"})
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_training_has_dropout_and_serving_has_none() -> None:
    model = AttentionLstm(DIM, SIZES)
    frames = torch.randn(2, 5, DIM)
    assert not torch.equal(model(frames), model(frames))
    model.eval()
    assert torch.equal(model(frames), model(frames))


def test_a_post_has_the_scores_of_its_best_video() -> None:
    torch.manual_seed(0)
    tagger = LstmTagger(DIM, SIZES, 4).eval()
    videos = torch.randn(3, 6, DIM)
    tokens = torch.stack([torch.stack([videos[0], videos[1]]), torch.stack([videos[2], videos[0]])])
    mask = torch.tensor([[True, True], [True, False]])
    logits = tagger(Batch(("a", "b"), {STREAM: tokens}, {STREAM: mask}))
    scores = tagger.classify(tagger.lstm(videos))  # (videos, classes)
    torch.testing.assert_close(logits[0], scores[:2].amax(dim=0))
    torch.testing.assert_close(logits[1], scores[2])


def test_a_post_without_video_has_the_scores_of_the_frequencies() -> None:
    """Nothing to see is no error: the classifier's bias speaks."""
    tagger = LstmTagger(DIM, SIZES, 2).eval()
    tagger.start_at(torch.tensor([0.5, 0.1]))
    tokens = torch.randn(2, 1, 6, DIM)
    logits = tagger(Batch(("a", "b"), {STREAM: tokens}, {STREAM: torch.tensor([[True], [False]])}))
    torch.testing.assert_close(logits[1].sigmoid(), torch.tensor([0.5, 0.1]))
